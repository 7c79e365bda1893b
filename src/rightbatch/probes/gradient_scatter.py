"""Gradient scatter: error and direction of batches' gradients, against the full gradient.

Batches of each size are drawn without replacement and passed through the model as they are, so that
BatchNorm sees batches of the true size. Of a large training set, a part that is drawn once stands
for all of it: the full gradient is that of the part, and what holds of N holds of its size.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from rightbatch.errors import ProbeError, UsageError
from rightbatch.isolate import preserved_state
from rightbatch.laws.gradient_scatter import BatchDraws, Scatter, estimate_scatter
from rightbatch.probes.example_gradients import MAX_CHUNK, ExampleGradients
from rightbatch.recipe import Recipe
from rightbatch.training import Training
from rightbatch.workload import Workload

MAX_POPULATION = 2048
FEWEST_EXAMPLES = 64
"""Of a part of the training set: fewer say little of it."""
MOST_DRAWS = 32
FEWEST_DRAWS = 4
BUDGET_SECONDS = 1.0
"""For the gradients at one point."""
_PASSES = 8.0
"""Passes over the population that all draws take together, about."""
_STREAM = 0x5CA77


@dataclass(frozen=True, kw_only=True)
class GradientPoint:
    """How gradients scatter at one moment of a training.

    Attributes:
        step: Updates done before.
        examples: Training examples processed before.
        scatter: The scatter.
    """

    step: int
    examples: int
    scatter: Scatter


@dataclass(frozen=True, kw_only=True)
class GradientRecord:
    """The gradient picture of a workload.

    Attributes:
        workload: Name of the workload.
        seed: Of weights, data order and draws.
        num_examples: N.
        population: Examples whose mean gradient is the full one: N, or a part of them.
        points: At the initial weights, and after a training where one was asked for.
        global_batch: Of that training; None without one.
        learning_rate: Likewise.
        notes: What a reader should know.
        cost_examples: Examples processed, the training included.
        seconds: Wall time.
    """

    workload: str
    seed: int
    num_examples: int
    population: int
    points: tuple[GradientPoint, ...]
    global_batch: int | None
    learning_rate: float | None
    notes: tuple[str, ...]
    cost_examples: int
    seconds: float


def measure_gradient_scatter(
    workload: Workload,
    *,
    batch_sizes: Sequence[int] = (),
    recipe: Recipe | None = None,
    steps: int = 0,
    seed: int = 0,
    device: str = "cpu",
    budget_seconds: float = BUDGET_SECONDS,
) -> GradientRecord:
    """Measures how batches' gradients differ from the full one, at each of several sizes.

    Args:
        workload: What to train.
        batch_sizes: Sizes to look at, beside the powers of four.
        recipe: Of a training after which it is measured once more.
        steps: Updates of it; 0 trains nothing.
        seed: Of weights, data order and draws.
        device: Where.
        budget_seconds: Wall time for each of the two points, about.

    Returns:
        The record.

    Raises:
        UsageError: If a number is out of range.
        ProbeError: If it would take too long, or the gradient at the initial weights is 0 or no
            number.

    Example:
        >>> import rightbatch
        >>> record = measure_gradient_scatter(rightbatch.load_workload("max3"))
        >>> slope = record.points[0].scatter.slope
        >>> slope.low < -0.5 < slope.high
        True
    """
    if steps < 0 or (steps > 0 and recipe is None):
        raise UsageError(f"steps is {steps}. Give 0, or more with the recipe of a training.")
    if any(size < 1 for size in batch_sizes):
        raise UsageError(f"batch_sizes holds {min(batch_sizes)}. Give sizes of at least 1.")
    start = time.perf_counter()
    with preserved_state(), torch.inference_mode(False), torch.enable_grad():
        first = recipe or Recipe(global_batch=min(32, workload.num_examples), learning_rate=1e-3)
        training = Training(workload, first, seed=seed, device=device)
        picture = _Picture(training, batch_sizes, budget_seconds)
        points, notes = [picture.measure()], picture.notes()
        if steps:
            training.advance(steps)
            points += _after(training, picture, notes)
    return GradientRecord(
        workload=workload.name,
        seed=seed,
        num_examples=workload.num_examples,
        population=picture.population,
        points=tuple(points),
        global_batch=first.global_batch if steps else None,
        learning_rate=first.learning_rate if steps else None,
        notes=tuple(notes),
        cost_examples=picture.cost + training.examples,
        seconds=time.perf_counter() - start,
    )


def _after(training: Training, picture: _Picture, notes: list[str]) -> list[GradientPoint]:
    if training.diverged:
        notes.append(f"The training diverged within {training.steps} updates.")
        return []
    try:
        return [picture.measure()]
    except ProbeError as error:
        notes.append(f"After {training.steps} updates it is not known. {error}")
        return []


class _Picture:
    """The measurement for one training.

    Attributes:
        population: Examples whose mean gradient is the full one.
        cost: Examples processed so far.
    """

    def __init__(self, training: Training, sizes: Sequence[int], budget_seconds: float) -> None:
        self._training = training
        torch.manual_seed(training.seed)
        self._gradients = ExampleGradients(
            training.workload, training.model, device=training.device
        )
        self._form = self._gradients.form
        self._draw = np.random.default_rng((training.seed, _STREAM))
        self.cost = self._form.checked_examples
        N = training.workload.num_examples
        self._order = self._draw.permutation(N)
        self.population = self._affordable(min(N, MAX_POPULATION), budget_seconds)
        # A batch norm needs two examples.
        least = 2 if self._form.form == "micro-batches" else 1
        powers = [4**k for k in range(1, 12)]
        wanted = {least, *powers, *sizes, self.population}
        self._sizes = sorted(size for size in wanted if least <= size <= self.population)

    def _affordable(self, most: int, seconds: float) -> int:
        """Examples for which the whole picture takes about so long."""
        some = min(most, MAX_CHUNK)
        # Most calls have few examples: a batch of one takes nearly as long as of many.
        self._timed(1)
        call, piece = self._timed(1), self._timed(some)
        each = max(piece - call, 1e-9) / max(1, some - 1)
        left = seconds - 5 * MOST_DRAWS * call
        N = self._training.workload.num_examples
        if left >= _PASSES * most * each:
            return most
        fits = int(max(left, 0.0) / (_PASSES * each))
        if fits < min(FEWEST_EXAMPLES, N):
            needed = 5 * MOST_DRAWS * call + _PASSES * min(FEWEST_EXAMPLES, N) * each
            raise ProbeError(
                f"The picture of the gradients would take {needed:.3g} s and has {seconds:.3g} s. "
                "Give it more time, or a smaller model."
            )
        return min(most, fits)

    def _timed(self, count: int) -> float:
        whole = self._form.form == "micro-batches"
        indices = torch.from_numpy(self._order[: max(count, 2 if whole else 1)])
        begun = time.perf_counter()
        self._gradients.of_batch(indices)
        self.cost += len(indices)
        return time.perf_counter() - begun

    def notes(self) -> list[str]:
        """What a reader should know of all points."""
        found: list[str] = []
        N = self._training.workload.num_examples
        if self.population < N:
            found.append(
                f"The full gradient is that of {self.population:,} examples drawn from {N:,}."
            )
        if self._form.stochastic:
            found.append(
                "The loss draws random numbers (dropout): that noise is in every gradient, also in "
                "that of all examples."
            )
        if self._form.form == "micro-batches":
            found.append(
                f"{self._form.because}: gradients of small batches are not only noisier than the "
                "full one but others on average."
            )
        return found

    def measure(self) -> GradientPoint:
        """At the training's present weights.

        Returns:
            The point.

        Raises:
            ProbeError: If the full gradient is 0 or no number.
        """
        training = self._training
        everything = torch.from_numpy(self._order[: self.population])
        full = self._gradients.of_batch(everything)
        self.cost += self.population
        norm = float(full.norm())
        if not norm > 0 or not np.isfinite(norm):
            raise ProbeError(f"The norm of the full gradient is {norm:.3g}: it has no direction.")
        draws = [self._draws(size, full, norm) for size in self._sizes]
        return GradientPoint(
            step=training.steps,
            examples=training.examples,
            scatter=estimate_scatter(draws, gradient_norm=norm, population=self.population),
        )

    def _draws(self, size: int, full: torch.Tensor, norm: float) -> BatchDraws:
        affordable = 2 * self.population // size
        count = 1 if size == self.population else min(MOST_DRAWS, max(FEWEST_DRAWS, affordable))
        errors, cosines = list[float](), list[float]()
        for _ in range(count):
            chosen = self._order[self._draw.permutation(self.population)[:size]]
            gradient = self._gradients.of_batch(torch.from_numpy(chosen))
            own = float(gradient.norm())
            errors.append(float((gradient - full).square().sum()))
            # A gradient of 0 has no direction: it says nothing of the full one's.
            cosines.append(float(gradient @ full) / own / norm if own > 0 else 0.0)
        self.cost += count * size
        return BatchDraws(batch_size=size, squared_errors=tuple(errors), cosines=tuple(cosines))
