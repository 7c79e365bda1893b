"""What a study found, as data: per batch size, over all sizes, and at equal costs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from rightbatch.laws.estimate import Estimate
from rightbatch.laws.noise_floor import NoiseFloor
from rightbatch.study.design import Unit

Edge = Literal["lowest", "highest"]
Rule = Literal["linear", "sqrt"]
RULES: tuple[Rule, ...] = ("linear", "sqrt")


@dataclass(frozen=True, kw_only=True)
class RateFinding:
    """One learning rate at one batch size, over the seeds.

    Attributes:
        learning_rate: The rate.
        trials: Trainings that ended.
        diverged: How many of them left the numbers.
        reached: How many met the target; 0 without one.
        loss: Mean of the last losses of those that did not diverge.
        steps_to_target: Geometric mean of those that met it.
        distance: ‖w − w₀‖ at the end, mean over seeds that did not diverge.
        roughness: Of the watched weight's path, likewise; see `SizeFinding`.
        noise_floor: The loss around which they waver in the end.
        share: Of their way, how far they went; below 1 where a race dropped the rate.
    """

    learning_rate: float
    trials: int
    diverged: int
    reached: int
    loss: Estimate
    steps_to_target: Estimate
    distance: Estimate
    roughness: Estimate
    noise_floor: NoiseFloor
    share: float = 1.0


@dataclass(frozen=True, kw_only=True)
class SizeFinding:
    """One batch size at its best learning rate.

    Attributes:
        batch_size: Examples per update.
        learning_rate: The best of those tried, and the interval in which the best one lies.
        at_edge: Where it is the lowest or highest that was tried: the best may lie beyond.
        stable_edge: The highest rate tried at which no training diverged and above which one did;
            None where none diverged, or all did.
        steps: Updates of each training.
        train_loss: At the end, mean over seeds.
        val_loss: Likewise.
        val_metric: Likewise.
        gap: Validation loss − training loss at the end.
        distance: ‖w − w₀‖ over all parameters at the end.
        relative_distance: ‖w − w₀‖/‖w₀‖.
        roughness: Of the watched weight's path, over as many epochs as all sizes did: more updates
            give a path more room to turn round. A geometric mean; seeds at which the weight never
            moved are left out.
        dead: Seeds at which the watched weight never moved.
        noise_floor: The loss around which trainings waver in the end, where they have come to it.
        reached: Trainings that met the target.
        trials: Trainings at this rate.
        steps_to_target: Geometric mean; without a value where one missed it.
        examples_to_target: Likewise.
        seconds_to_target: Likewise, by the measured step time.
        rates: Every rate that was tried.
    """

    batch_size: int
    learning_rate: Estimate
    at_edge: Edge | None
    stable_edge: float | None
    steps: int
    train_loss: Estimate
    val_loss: Estimate
    val_metric: Estimate
    gap: Estimate
    distance: Estimate
    relative_distance: Estimate
    roughness: Estimate
    dead: int
    noise_floor: NoiseFloor
    reached: int
    trials: int
    steps_to_target: Estimate
    examples_to_target: Estimate
    seconds_to_target: Estimate
    rates: tuple[RateFinding, ...]


@dataclass(frozen=True, kw_only=True)
class RateRule:
    """A rule that carries the learning rate from a small size on, and where it stops holding.

    Attributes:
        rule: `linear` (in proportion to the batch) or `sqrt`.
        begins_at: The smallest size whose best rate is inside the rates tried.
        holds_to: The largest size up to which every best rate agrees with it.
        breaks_at: The first size at which it does not; None where it holds at all.
    """

    rule: Rule
    begins_at: int
    holds_to: int
    breaks_at: int | None


@dataclass(frozen=True, kw_only=True)
class Fits:
    """What holds over the sizes.

    Attributes:
        critical_batch: Where steps to the target are twice the fewest; without a value, none was
            found or it is not resolved, and the notes say which.
        min_steps: S_min of S(B) = S_min (1 + B_c/B).
        min_examples: E_min = S_min B_c.
        rate_exponent: p of best learning rate ∝ Bᵖ: 1 is the linear rule, 0.5 the square root.
        rate_rules: How far the two rules hold.
        pareto: Sizes that no other beats both in steps and in examples to the target.
        notes: What a reader has to know.
    """

    critical_batch: Estimate
    min_steps: Estimate
    min_examples: Estimate
    rate_exponent: Estimate
    rate_rules: tuple[RateRule, ...]
    pareto: tuple[int, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class EqualCost:
    """One size at the rate that is best at a common cost.

    Attributes:
        batch_size: Examples per update.
        learning_rate: The best at that cost.
        loss: Validation loss there (training loss without validation data), mean over seeds.
        metric: Validation metric there, likewise.
    """

    batch_size: int
    learning_rate: float
    loss: Estimate
    metric: Estimate


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """All sizes after the same number of epochs, steps, examples or modelled seconds.

    Attributes:
        unit: What is the same.
        amount: How many of it: as far as all sizes came.
        sizes: The sizes that were evaluated before and after it.
    """

    unit: Unit
    amount: float
    sizes: tuple[EqualCost, ...]


@dataclass(frozen=True, kw_only=True)
class Contrast:
    """The smallest and the largest batch after as many epochs, seed by seed.

    Attributes:
        quantity: `roughness` and `distance` as a ratio, `gap` as a difference: of the smaller
            batch over (or minus) the larger.
        at: Each at its `best` rate, or both at the `same`, where one was tried at both.
        sizes: The smaller and the larger batch.
        learning_rates: Of each.
        epochs: After how many.
        difference: The ratio, a geometric mean over seeds, or the difference, a mean.
        certain: Whether its interval leaves out "no difference"; None without an interval.
    """

    quantity: Literal["roughness", "distance", "gap"]
    at: Literal["best", "same"]
    sizes: tuple[int, int]
    learning_rates: tuple[float, float]
    epochs: float
    difference: Estimate
    certain: bool | None


@dataclass(frozen=True, kw_only=True)
class Best:
    """The recommended pair.

    Attributes:
        batch_size: Examples per update.
        learning_rate: Learning rate.
        because: What it is best in.
    """

    batch_size: int
    learning_rate: float
    because: str


@dataclass(frozen=True, kw_only=True)
class RaceRung:
    """One rung of a race over the grid.

    Attributes:
        amount: What a training costs that goes as far as this rung; one that costs less in all has
            come to its end.
        unit: Of the amount.
        cells: Pairs of batch size and learning rate on it.
        dropped: How many of them went no farther.
    """

    amount: float
    unit: Unit
    cells: int
    dropped: int


@dataclass(frozen=True, kw_only=True)
class RaceFinding:
    """What a race over the grid dropped, and what it cost.

    Attributes:
        rungs: Those that ended, the first one first.
        examples_of_grid: Examples of all trainings, those that were begun anew included, over those
            of the full grid.
        seconds_of_grid: Likewise in modelled seconds; None where the step time was not measured.
        repeated_examples: Of trainings that were begun again to go farther.
    """

    rungs: tuple[RaceRung, ...]
    examples_of_grid: float
    seconds_of_grid: float | None
    repeated_examples: int
