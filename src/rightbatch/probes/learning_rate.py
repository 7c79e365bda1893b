"""Learning-rate probe: a range test at one global batch, repeated over seeds.

Each seed trains a fresh throw-away model, with its own initial weights and data order, while the
learning rate rises exponentially, and stops when the loss explodes (laws/range_test.py). The
answer is the median over seeds; the spread is what one ramp alone would not have shown.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from rightbatch.errors import DivergedError, UsageError
from rightbatch.isolate import preserved_state
from rightbatch.laws.estimate import Estimate, unresolved
from rightbatch.laws.range_test import (
    RangeTest,
    analyse_range_test,
    find_explosion,
    make_ramp,
)
from rightbatch.laws.rounds import student_95
from rightbatch.laws.split import split_batch
from rightbatch.probes.timing_session import Progress
from rightbatch.recipe import Precision, Recipe
from rightbatch.training import Training
from rightbatch.workload import Workload

FEWEST_STEPS = 20
"""A ramp of fewer steps cannot be read: a decade would be crossed in two or three."""


@dataclass(frozen=True, kw_only=True)
class RampCurve:
    """One ramp.

    Attributes:
        seed: Of initial weights and data order.
        learning_rates: Of each step, up to the last finite loss.
        losses: Training loss of each step before its update; not smoothed.
        stopped_at: Learning rate at which the loss had exploded, or None if it did not.
        result: Suggestions and edge of this ramp alone.
    """

    seed: int
    learning_rates: tuple[float, ...]
    losses: tuple[float, ...]
    stopped_at: float | None
    result: RangeTest


@dataclass(frozen=True, kw_only=True)
class LearningRateRecord:
    """What the learning-rate probe found. Every value is the median over seeds.

    Attributes:
        workload: Name of the workload.
        device: Where it ran.
        precision: Arithmetic of the forward pass.
        global_batch: Examples per update; the suggestions hold for this one.
        lr_min: Where the ramp starts.
        lr_max: Where it ends.
        num_steps: Steps of a full ramp.
        steepest: Learning rate of the steepest fall per decade.
        minimum_div_10: A tenth of the learning rate of least loss.
        valley: Middle of the longest fall, in log learning rate.
        edge: Where the loss starts to explode; without a value, `low` is the end of the range.
        curves: The ramps.
        notes: What a reader should know.
        num_threads: Threads torch used.
        cost_examples: Examples processed.
        cost_seconds: Seconds spent.
    """

    workload: str
    device: str
    precision: Precision
    global_batch: int
    lr_min: float
    lr_max: float
    num_steps: int
    steepest: Estimate
    minimum_div_10: Estimate
    valley: Estimate
    edge: Estimate
    curves: tuple[RampCurve, ...]
    notes: tuple[str, ...]
    num_threads: int
    cost_examples: int
    cost_seconds: float


def find_learning_rate(
    workload: Workload,
    *,
    global_batch: int,
    max_micro_batch: int | None = None,
    seeds: int = 3,
    lr_min: float = 1e-6,
    lr_max: float = 10.0,
    num_steps: int = 100,
    max_examples: int | None = None,
    seed: int = 0,
    device: str = "cpu",
    precision: Precision = "float32",
    progress: Progress | None = None,
) -> LearningRateRecord:
    """Runs the range test at a global batch, on fresh models, and says how sure it is.

    Leaves no trace: the models are throw-away ones, and all random state is put back. The same
    arguments give the same answer.

    Args:
        workload: What to train.
        global_batch: Examples per update. The answer holds for this batch only.
        max_micro_batch: Largest micro-batch that fits; larger batches are accumulated.
        seeds: How many ramps.
        lr_min: First learning rate.
        lr_max: Last learning rate, unless the loss explodes before.
        num_steps: Steps of a full ramp.
        max_examples: Limit on the examples processed. Ramps are shortened first, then made
            fewer. Default: no limit.
        seed: The first of the seeds.
        device: Where.
        precision: Arithmetic of the forward pass.
        progress: Called with what is being measured and the share done.

    Returns:
        Suggestions, edge and curves.

    Raises:
        UsageError: If an argument is out of range, or `max_examples` does not pay for one ramp.
        DivergedError: If the loss is not finite before the first update.

    Example:
        >>> from rightbatch.catalog.load import get
        >>> record = find_learning_rate(get("max3"), global_batch=10, seeds=2, num_steps=40)
        >>> len(record.curves), record.cost_examples <= 2 * 40 * 10
        (2, True)
    """
    if not 1 <= global_batch <= workload.num_examples:
        raise UsageError(
            f"global_batch is {global_batch}; it must be between 1 and the "
            f"{workload.num_examples} training examples."
        )
    if seeds < 1:
        raise UsageError(f"seeds is {seeds}; it must be at least 1.")
    make_ramp(lr_min, lr_max, num_steps)  # refuses an empty range before anything is run
    seeds, steps, notes = _fit_into(max_examples, global_batch, seeds, num_steps)
    ramp = [float(lr) for lr in make_ramp(lr_min, lr_max, steps)]
    recipe = _make_recipe(global_batch, max_micro_batch, lr_min, precision)
    start = time.perf_counter()
    curves: list[RampCurve] = []
    examples = 0
    with preserved_state(), torch.inference_mode(False), torch.enable_grad():
        notes += _note_disproportion(workload, lr_min, lr_max)
        for index in range(seeds):
            what = f"Learning-rate ramp {index + 1} of {seeds} at global batch {global_batch}"
            curve, cost = _run_ramp(
                workload,
                recipe,
                ramp,
                seed=seed + index,
                device=device,
                tell=_make_teller(progress, what, index, seeds),
            )
            curves.append(curve)
            examples += cost
    _tell(progress, "Learning rates measured", 1.0)
    return LearningRateRecord(
        workload=workload.name,
        device=device,
        precision=precision,
        global_batch=global_batch,
        lr_min=lr_min,
        lr_max=lr_max,
        num_steps=steps,
        steepest=_combine(curves, ramp, lambda result: result.steepest),
        minimum_div_10=_combine(curves, ramp, lambda result: result.minimum_div_10),
        valley=_combine(curves, ramp, lambda result: result.valley),
        edge=_combine_edges(curves, ramp),
        curves=tuple(curves),
        notes=tuple(notes),
        num_threads=torch.get_num_threads(),
        cost_examples=examples,
        cost_seconds=time.perf_counter() - start,
    )


def _fit_into(
    max_examples: int | None, global_batch: int, seeds: int, num_steps: int
) -> tuple[int, int, list[str]]:
    """Seeds and steps that keep to the limit, and what had to be given up for it."""
    if max_examples is None or seeds * num_steps * global_batch <= max_examples:
        return seeds, num_steps, []
    fewest = min(FEWEST_STEPS, num_steps)
    updates = max_examples // global_batch
    if updates < fewest:
        raise UsageError(
            f"max_examples is {max_examples}, but one ramp of {fewest} steps at global batch "
            f"{global_batch} takes {fewest * global_batch} examples. Raise the limit, or lower "
            "the batch."
        )
    fitting = min(seeds, updates // fewest)
    steps = min(num_steps, updates // fitting)
    note = f"To keep to {max_examples} examples, {fitting} ramp(s) of {steps} steps were run"
    return fitting, steps, [f"{note} instead of {seeds} of {num_steps}."]


def _make_recipe(
    global_batch: int, max_micro_batch: int | None, lr: float, precision: Precision
) -> Recipe:
    split = split_batch(global_batch, max_micro_batch or global_batch)
    return Recipe(
        global_batch=global_batch,
        micro_batch=split.micro_batch,
        accumulation=split.accumulation,
        learning_rate=lr,
        precision=precision,
    )


def _run_ramp(
    workload: Workload,
    recipe: Recipe,
    ramp: Sequence[float],
    *,
    seed: int,
    device: str,
    tell: Callable[[float], None],
) -> tuple[RampCurve, int]:
    """One ramp, and the examples it processed."""
    # Data sets may draw their augmentations from these.
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    training = Training(workload, recipe, seed=seed, device=device)
    groups = training.optimizer.param_groups
    # Relative to what make_optimizer gave each group, so that their proportions stay.
    factors = [float(group["lr"]) / recipe.learning_rate for group in groups]
    losses: list[float] = []
    for index, lr in enumerate(ramp):
        for group, factor in zip(groups, factors, strict=True):
            group["lr"] = lr * factor
        training.advance(1)
        losses.append(training.recent_train_loss())
        tell((index + 1) / len(ramp))
        if training.diverged or find_explosion(losses) is not None:
            break
    if not math.isfinite(losses[0]):
        raise DivergedError(
            f"The loss of workload {workload.name!r} is {losses[0]} at the first step, before any "
            "update. Look for NaN in the data or in the loss."
        )
    return _make_curve(seed, ramp, losses, exploded=training.diverged), training.examples


def _make_curve(
    seed: int, ramp: Sequence[float], losses: Sequence[float], *, exploded: bool
) -> RampCurve:
    explosion = find_explosion(losses)
    # The loop's own test looks at single losses and may see an explosion a step earlier.
    last = len(losses) - 1
    stopped = last if exploded and explosion is None else explosion
    given = list(losses)
    if stopped is not None and explosion is None:
        given[stopped] = math.inf
    result = analyse_range_test(ramp[: len(given)], given)
    finite = [loss for loss in losses if math.isfinite(loss)]
    return RampCurve(
        seed=seed,
        learning_rates=tuple(ramp[: len(finite)]),
        losses=tuple(finite),
        stopped_at=None if stopped is None else ramp[stopped],
        result=result,
    )


def _combine(
    curves: Sequence[RampCurve],
    ramp: Sequence[float],
    pick: Callable[[RangeTest], float | None],
) -> Estimate:
    """The median of the seeds' suggestions, with an interval on log learning rate."""
    values = [value for curve in curves if (value := pick(curve.result)) is not None]
    if 2 * len(values) <= len(curves):
        return _from_mean_curve(curves, ramp, pick)
    method = f"median of {len(values)} of {len(curves)} ramps"
    return _median_on_log(values, ramp, method)


def _from_mean_curve(
    curves: Sequence[RampCurve],
    ramp: Sequence[float],
    pick: Callable[[RangeTest], float | None],
) -> Estimate:
    """Where single ramps are too noisy, their mean may still tell; but not how surely."""
    shortest = min(len(curve.losses) for curve in curves)
    mean = np.mean([curve.losses[:shortest] for curve in curves], axis=0)
    value = pick(analyse_range_test(ramp[:shortest], mean)) if shortest > 2 else None
    if value is None or len(curves) == 1:
        return unresolved(len(curves), "the loss did not fall by more than its noise")
    return Estimate(value=value, n=len(curves), method=f"mean curve of {len(curves)} ramps")


def _combine_edges(curves: Sequence[RampCurve], ramp: Sequence[float]) -> Estimate:
    edges = [curve.result.edge for curve in curves if curve.result.edge is not None]
    if 2 * len(edges) <= len(curves):
        method = f"{len(edges)} of {len(curves)} ramps exploded"
        return unresolved(len(curves), method, low=min(edges, default=ramp[-1]))
    return _median_on_log(edges, ramp, f"median of {len(edges)} of {len(curves)} ramps")


def _median_on_log(values: Sequence[float], ramp: Sequence[float], method: str) -> Estimate:
    """Median and Student's interval of the mean on log lr, no narrower than a step of the ramp."""
    logs = np.log(values)
    centre, median = float(np.mean(logs)), float(np.median(logs))
    # Where a curve turns is seen to a step of the ramp, however well the seeds agree.
    step = math.log(ramp[1] / ramp[0])
    n = len(values)
    if n == 1:
        return Estimate(value=math.exp(median), n=1, method=method)
    spread = float(np.std(logs, ddof=1)) / math.sqrt(n)
    half_width = max(student_95(n - 1) * spread, step)
    low = math.exp(max(min(centre - half_width, median), -700))
    high = math.exp(min(max(centre + half_width, median), 700))
    return Estimate(
        value=math.exp(median),
        # Beyond the ramp nothing was seen.
        low=low if low >= ramp[0] else None,
        high=high if high <= ramp[-1] else None,
        n=n,
        method=method,
    )


def _note_disproportion(workload: Workload, lr_min: float, lr_max: float) -> list[str]:
    """The ramp scales each group's rate; says so where make_optimizer would not have."""
    model = workload.build_model(0)
    ends = [
        [
            float(group["lr"])
            for group in workload.make_optimizer(model.parameters(), lr).param_groups
        ]
        for lr in (lr_min, lr_max)
    ]
    ratios = [high / low for low, high in zip(*ends, strict=True) if low > 0]
    if all(abs(ratio / (lr_max / lr_min) - 1) < 1e-6 for ratio in ratios) and ratios:
        return []
    return [
        "make_optimizer does not set learning rates in proportion to its lr argument; the ramp "
        "scaled what it set for the smallest."
    ]


def _make_teller(
    progress: Progress | None, what: str, index: int, seeds: int
) -> Callable[[float], None]:
    return lambda share: _tell(progress, what, (index + share) / (seeds + 1))


def _tell(progress: Progress | None, what: str, share: float) -> None:
    if progress is not None:
        progress(what, share)
