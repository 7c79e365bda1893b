"""`measure_sharpness`: λ_max, trace, φ and SAM rise of given, initial or trained weights."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from rightbatch.errors import DivergedError, ProbeError, UsageError
from rightbatch.isolate import preserved_state
from rightbatch.probes.sharpness.fixed_loss import FixedLoss
from rightbatch.probes.sharpness.hutchinson import NUM_PROBES, estimate_hessian_trace
from rightbatch.probes.sharpness.keskar import EPSILONS, NUM_STARTS, measure_keskar
from rightbatch.probes.sharpness.lanczos import estimate_largest_eigenvalue
from rightbatch.probes.sharpness.records import Directions, SharpnessPoint, SharpnessRecord
from rightbatch.probes.sharpness.sam import RADIUS, measure_sam_rise
from rightbatch.recipe import Recipe
from rightbatch.training import Training
from rightbatch.training.activations import keep_activations
from rightbatch.training.evaluate import evaluating, to_device
from rightbatch.workload import Workload

Progress = Callable[[str, float], None]
"""Called with what is being measured now, and the share of the work that is done."""

MAX_EXAMPLES, MAX_TERMS = 1024, 4096
"""Examples, and terms of the loss (tokens), that are used where no number is given."""
_STREAM = 0x5A4B
"""Keeps the draws apart from other draws with the same seed."""


@dataclass(frozen=True, kw_only=True)
class _Effort:
    """What is measured at each point, and of which examples."""

    seed: int
    max_examples: int | None
    micro_batch: int | None
    num_starts: int
    num_probes: int
    epsilons: tuple[float, ...]


def measure_sharpness(
    workload: Workload,
    *,
    model: nn.Module | None = None,
    state: Mapping[str, Any] | None = None,
    recipe: Recipe | None = None,
    trajectory_steps: Sequence[int] = (0,),
    device: str = "cpu",
    seed: int = 0,
    max_examples: int | None = None,
    micro_batch: int | None = None,
    num_starts: int = NUM_STARTS,
    num_probes: int = NUM_PROBES,
    epsilons: Sequence[float] = EPSILONS,
    progress: Progress | None = None,
) -> SharpnessRecord:
    """Measures how sharp the training loss is around a model's weights.

    λ_max and trace of the Hessian, Keskar's φ over all directions and in random subspaces, and the
    SAM rise, of the mean loss of fixed training examples, in evaluation mode (dropout off,
    BatchNorm with its running statistics). None of them is invariant to rescaling weights where the
    function stays the same: compare trainings of one model, at like training losses.

    A given model is copied and never touched; random states, modes and threads are as before.

    Args:
        workload: Says what the loss is.
        model: Whose weights, such as a trained `run.model`.
        state: Or its `state_dict`, loaded into a fresh model.
        recipe: Or those of a training with this recipe, after `trajectory_steps`. Without any of
            them: the initial weights.
        trajectory_steps: Updates after which to measure; other than 0 they need a recipe.
        device: Where.
        seed: Of weights, data order, which examples are used, and everything drawn.
        max_examples: Most training examples to use. Default: 1,024, or where examples hold many
            tokens, as many as hold 4,096.
        micro_batch: Examples in one pass; halved where they do not fit. Default: as many as keep
            about 1 GiB for the backward passes.
        num_starts: Searches behind each φ.
        num_probes: Hutchinson's probes behind the trace, at least 2.
        epsilons: ε of φ.
        progress: Told what is being done, and how much is done.

    Returns:
        The record, with one point per step.

    Raises:
        UsageError: If arguments contradict each other, or a number is out of range.
        ProbeError: If the loss or a derivative is not finite.
        DivergedError: If the training diverged before the last step.

    Example:
        >>> import torch, rightbatch as rb
        >>> x = torch.eye(3).repeat(4, 1) * torch.tensor([1.0, 2.0, 3.0])
        >>> workload = rb.Workload(
        ...     name="squares", make_model=lambda: torch.nn.Linear(3, 1, bias=False),
        ...     train_data=(x, x.sum(dim=1, keepdim=True)), loss=torch.nn.functional.mse_loss,
        ... )
        >>> point = measure_sharpness(workload).points[0]  # H = 2 xᵀx / 12 = diag(2, 8, 18) / 3
        >>> round(point.largest_eigenvalue.value, 4), round(point.trace.value, 4)
        (6.0, 9.3333)

    References:
        Keskar et al. 2017; Dinh et al. 2017; Foret et al. 2021; see the modules of each estimator.
    """
    steps = sorted(set(trajectory_steps))
    _check(model, state, recipe, steps, epsilons)
    _check_counts(max_examples, micro_batch, num_starts, num_probes)
    effort = _Effort(
        seed=seed,
        max_examples=max_examples,
        micro_batch=micro_batch,
        num_starts=num_starts,
        num_probes=num_probes,
        epsilons=tuple(epsilons),
    )
    tell: Progress = progress or (lambda _what, _share: None)
    begun, trained = time.perf_counter(), 0
    with preserved_state(), torch.inference_mode(False), torch.enable_grad():
        if model is not None or state is not None:
            copied = _copy(model, device) if model is not None else _load(workload, state, device)
            points = [_measure(workload, copied, device, None, effort, _portion(tell, 0, 1))]
        else:
            points, trained = _along(workload, recipe, steps, device, effort, tell)
    given = model is not None or state is not None
    weights: Literal["given", "initial", "trained"] = "trained" if recipe else "initial"
    return SharpnessRecord(
        workload=workload.name,
        device=device,
        seed=seed,
        weights="given" if given else weights,
        recipe=recipe,
        points=tuple(points),
        population=workload.num_examples,
        notes=tuple(_notes(points, workload.num_examples)),
        cost_examples=trained + sum(point.cost_examples for point in points),
        seconds=time.perf_counter() - begun,
    )


def measure_sharpness_at(
    training: Training,
    *,
    seed: int = 0,
    max_examples: int | None = None,
    micro_batch: int | None = None,
    num_starts: int = NUM_STARTS,
    num_probes: int = NUM_PROBES,
    epsilons: Sequence[float] = EPSILONS,
) -> SharpnessPoint:
    """Measures the sharpness at the present weights of a running training, which does not notice.

    Args:
        training: The training; advanced no further.
        seed: Of which examples are used, and everything drawn.
        max_examples: Most training examples to use.
        micro_batch: Examples in one pass.
        num_starts: Searches behind each φ.
        num_probes: Hutchinson's probes behind the trace, at least 2.
        epsilons: ε of φ.

    Returns:
        The point.

    Raises:
        ProbeError: If the loss or a derivative is not finite.
    """
    effort = _Effort(
        seed=seed,
        max_examples=max_examples,
        micro_batch=micro_batch,
        num_starts=num_starts,
        num_probes=num_probes,
        epsilons=tuple(epsilons),
    )
    with preserved_state(), torch.inference_mode(False), torch.enable_grad():
        copied = _copy(training.model, training.device)
        return _measure(
            training.workload, copied, training.device, training.steps, effort, lambda *_: None
        )


def _check(
    model: nn.Module | None,
    state: Mapping[str, Any] | None,
    recipe: Recipe | None,
    steps: Sequence[int],
    epsilons: Sequence[float],
) -> None:
    given = [
        n for n, x in (("model", model), ("state", state), ("recipe", recipe)) if x is not None
    ]
    if len(given) > 1:
        raise UsageError(f"{' and '.join(given)} are given; each says whose weights. Give one.")
    if not steps or steps[0] < 0:
        raise UsageError(f"trajectory_steps is {list(steps)}; give steps, counted from 0.")
    if steps != [0] and recipe is None:
        raise UsageError(
            f"trajectory_steps is {list(steps)} without a recipe. Say how to train: "
            "recipe=Recipe(global_batch=…, learning_rate=…)."
        )
    if not epsilons or not all(math.isfinite(e) and e > 0 for e in epsilons):
        raise UsageError(f"epsilons is {tuple(epsilons)}; give positive numbers, such as 1e-3.")


def _check_counts(
    max_examples: int | None, micro_batch: int | None, num_starts: int, num_probes: int
) -> None:
    numbers = {"max_examples": max_examples, "micro_batch": micro_batch, "num_starts": num_starts}
    for name, value in numbers.items():
        if value is not None and value < 1:
            raise UsageError(f"{name} is {value}; it must be at least 1.")
    if num_probes < 2:
        raise UsageError(f"num_probes is {num_probes}; an interval needs at least 2.")


def _along(
    workload: Workload,
    recipe: Recipe | None,
    steps: Sequence[int],
    device: str,
    effort: _Effort,
    tell: Progress,
) -> tuple[list[SharpnessPoint], int]:
    """Points along a training, and the examples that it took."""
    if recipe is None:
        fresh = workload.build_model(effort.seed, device)
        return [_measure(workload, fresh, device, 0, effort, _portion(tell, 0, 1))], 0
    training = Training(workload, recipe, seed=effort.seed, device=device)
    points = list[SharpnessPoint]()
    try:
        for index, step in enumerate(steps):
            tell(f"training to update {step:,}", index / len(steps))
            training.advance(step - training.steps)
            if training.diverged:
                raise DivergedError(
                    f"The training diverged by update {training.steps} at learning rate "
                    f"{recipe.learning_rate:g}. Lower it."
                )
            own = _portion(tell, index, len(steps))
            copied = _copy(training.model, device)
            points.append(_measure(workload, copied, device, step, effort, own))
    finally:
        training.close()
    return points, training.examples


def _portion(tell: Progress, index: int, count: int) -> Progress:
    return lambda what, share: tell(what, (index + share) / count)


def _copy(model: nn.Module, device: str) -> nn.Module:
    copied = copy.deepcopy(model).to(device)
    keep_activations(copied)  # recomputing them has no place in a second derivative
    return copied


def _load(workload: Workload, state: Mapping[str, Any] | None, device: str) -> nn.Module:
    fresh = workload.build_model(0, device)
    assert state is not None
    try:
        fresh.load_state_dict(state)
    except (RuntimeError, TypeError) as error:
        raise UsageError(
            f"The state does not fit the model of workload {workload.name!r} ({error}). Give the "
            "state_dict of a model that its make_model makes."
        ) from error
    return fresh


def _measure(
    workload: Workload,
    model: nn.Module,
    device: str,
    step: int | None,
    effort: _Effort,
    tell: Progress,
) -> SharpnessPoint:
    """All of it at one set of weights; the model is used up."""
    # Of the seed alone: all points of a comparison are about the same examples and directions.
    numbers = np.random.SeedSequence((effort.seed, _STREAM))
    order = np.random.Generator(np.random.PCG64(numbers)).permutation(workload.num_examples)
    generator = torch.Generator().manual_seed(int(numbers.generate_state(1)[0]))
    fixed = FixedLoss(
        workload,
        model,
        device=device,
        indices=_examples(workload, model, order, effort.max_examples, device),
        micro_batch=effort.micro_batch,
        seed=effort.seed,
    )
    tell("sharpness: λ_max by Lanczos", 0.0)
    loss, gradient = fixed.loss_and_gradient()
    if not (math.isfinite(loss) and bool(torch.isfinite(gradient).all())):
        raise ProbeError(
            f"The loss is {loss:g} and its gradient is not finite at these weights. Sharpness is "
            "that of a place with a loss: take weights from before the training diverged."
            if not math.isfinite(loss)
            else f"The loss is {loss:g}, but its gradient is not finite at these weights. Check "
            "the loss for operations without a slope, such as a root at 0."
        )
    top = estimate_largest_eigenvalue(
        fixed.hessian_product,
        fixed.num_weights,
        generator=generator,
        epsilon=fixed.epsilon,
        device=device,
    )
    tell("sharpness: trace by Hutchinson", 0.2)
    trace = estimate_hessian_trace(
        fixed.hessian_product,
        top.basis,
        top.trace_in_basis,
        generator=generator,
        num_probes=effort.num_probes,
    )
    kinds: list[tuple[Directions, float]] = [
        (directions, epsilon) for directions in ("all", "random") for epsilon in effort.epsilons
    ]
    keskar = list[Any]()
    for index, (directions, epsilon) in enumerate(kinds):
        tell(f"sharpness: φ in {directions} directions", 0.4 + 0.6 * index / len(kinds))
        keskar.append(
            measure_keskar(
                fixed,
                loss,
                epsilon=epsilon,
                directions=directions,
                num_starts=effort.num_starts,
                generator=generator,
            )
        )
    rise = measure_sam_rise(fixed, loss, gradient)
    tell("sharpness", 1.0)
    return SharpnessPoint(
        step=step,
        loss=loss,
        gradient_norm=float(gradient.norm()),
        largest_eigenvalue=top.estimate,
        residual=top.residual,
        iterations=top.iterations,
        converged=top.converged,
        trace=trace,
        keskar=tuple(keskar),
        sam_rise=rise,
        sam_radius=RADIUS,
        num_examples=fixed.num_examples,
        num_weights=fixed.num_weights,
        cost_examples=math.ceil(fixed.cost),
    )


def _examples(
    workload: Workload, model: nn.Module, order: Any, most: int | None, device: str
) -> Tensor:
    """Which examples are used, in their own order."""
    if most is None:
        first = torch.from_numpy(np.sort(order[:16]))
        with torch.no_grad(), evaluating(model):
            batch = to_device(workload.train_examples.batch(first), device)
            terms = float(workload.loss_sum(model, batch)[1]) / len(first)
        most = max(1, min(MAX_EXAMPLES, int(MAX_TERMS / terms) if terms > 0 else MAX_EXAMPLES))
    return torch.from_numpy(np.sort(order[:most]))


def _notes(points: Sequence[SharpnessPoint], population: int) -> list[str]:
    last = points[-1]
    found = list[str]()
    if last.num_examples < population:
        found.append(
            f"The numbers are about {last.num_examples:,} of {population:,} training examples; "
            "λ_max of fewer examples is on average too high."
        )
    if any(not point.converged for point in points):
        found.append(
            "λ_max did not converge: its interval is wide, because no eigenvalue stands apart."
        )
    # Along the SAM step, the slope raises the loss by ρ|∇f|, curvature by at most ½ρ²λ_max.
    if last.gradient_norm > last.sam_radius / 2 * max(last.largest_eigenvalue.value or 0.0, 0.0):
        found.append(
            f"The gradient is not small (norm {last.gradient_norm:.3g}): this is a slope and no "
            "minimum, and the SAM rise, and likely φ, are mostly that slope."
        )
    found.extend(
        f"φ at ε = {own.epsilon:g} over {own.directions} directions: {own.phi.method}."
        for own in last.keskar
        if not own.phi.resolved
    )
    return found
