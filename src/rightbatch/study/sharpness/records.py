"""What a comparison of sharpness over batch sizes found, as data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from rightbatch.laws.estimate import Estimate
from rightbatch.laws.sharpness import Order

Matched = Literal["epochs", "steps"]
Rate = Literal["fixed", "tuned"]
Measure = Literal["λ_max", "trace", "φ", "SAM rise"]
Verdict = Literal["flatter", "sharper", "not told apart", "measures disagree"]
MEASURES: tuple[Measure, ...] = ("λ_max", "trace", "φ", "SAM rise")


@dataclass(frozen=True, kw_only=True)
class SharpnessOfRun:
    """One training at one moment.

    Attributes:
        batch_size: Examples per update.
        learning_rate: Its rate.
        seed: Of weights, data order and what is drawn.
        steps: Updates done.
        diverged: Whether it left the numbers; it has no values then.
        largest_eigenvalue: λ_max.
        trace: tr H.
        phi: Keskar's φ over all directions at ε = 1e-3.
        phi_random: Likewise in random subspaces.
        sam_rise: SAM rise.
        gradient_norm: Of the training loss.
        train_loss: Mean over the training set, in evaluation mode.
        val_loss: Over the validation set, or None without one.
        distance: |w − w₀| from the initial weights.
    """

    batch_size: int
    learning_rate: float
    seed: int
    steps: int
    diverged: bool
    largest_eigenvalue: float | None = None
    trace: float | None = None
    phi: float | None = None
    phi_random: float | None = None
    sam_rise: float | None = None
    gradient_norm: float | None = None
    train_loss: float | None = None
    val_loss: float | None = None
    distance: float | None = None

    @property
    def gap(self) -> float | None:
        """Validation loss − training loss."""
        if self.val_loss is None or self.train_loss is None:
            return None
        return self.val_loss - self.train_loss

    def value(self, measure: Measure) -> float | None:
        """One of the four measures of sharpness."""
        return {
            "λ_max": self.largest_eigenvalue,
            "trace": self.trace,
            "φ": self.phi,
            "SAM rise": self.sam_rise,
        }[measure]


@dataclass(frozen=True, kw_only=True)
class SizeSharpness:
    """One batch size in one setting; every number is a mean over seeds.

    The mean is the geometric one where all values are positive.

    Attributes:
        batch_size: Examples per update.
        learning_rate: Its rate.
        steps: Updates of each training.
        epochs: Passes of each training.
        diverged: Trainings that left the numbers; the means are of the others.
        largest_eigenvalue: λ_max.
        trace: tr H.
        phi: Keskar's φ over all directions at ε = 1e-3.
        phi_random: Likewise in random subspaces.
        sam_rise: SAM rise.
        gradient_norm: Of the training loss.
        train_loss: Over the training set, in evaluation mode.
        val_loss: Over the validation set.
        gap: Validation loss − training loss.
        distance: |w − w₀| from the initial weights.
    """

    batch_size: int
    learning_rate: float
    steps: int
    epochs: float
    diverged: int
    largest_eigenvalue: Estimate
    trace: Estimate
    phi: Estimate
    phi_random: Estimate
    sam_rise: Estimate
    gradient_norm: Estimate
    train_loss: Estimate
    val_loss: Estimate
    gap: Estimate
    distance: Estimate


@dataclass(frozen=True, kw_only=True)
class SharpnessRatio:
    """The smallest batch size against the largest in one measure, paired over seeds.

    Attributes:
        measure: Which.
        order: Whether the smallest one's is lower (flatter) or higher, at 95 %.
        ratio: Smallest over largest.
    """

    measure: Measure
    order: Order
    ratio: Estimate


@dataclass(frozen=True, kw_only=True)
class SharpnessSetting:
    """All batch sizes at matched epochs or steps, at a fixed or at tuned learning rates.

    Attributes:
        matched: What is the same for all sizes.
        amount: How many of it.
        rate: Whether the learning rate is the same for all, or each size's own.
        sizes: By batch size.
        ratios: The smallest against the largest.
        verdict: Whether the smallest one's place is flatter.
        finding: One sentence.
    """

    matched: Matched
    amount: int
    rate: Rate
    sizes: tuple[SizeSharpness, ...]
    ratios: tuple[SharpnessRatio, ...]
    verdict: Verdict
    finding: str


@dataclass(frozen=True, kw_only=True)
class SharpnessComparison:
    """Whether small batches end in flatter places than large ones, here.

    Attributes:
        workload: Name of the workload.
        device: Where.
        num_examples: N.
        batch_sizes: What was compared.
        seeds: Of the trainings.
        epochs: Of the settings at matched epochs.
        steps: Of the settings at matched steps.
        learning_rate: The fixed one.
        tuned_rates: (batch size, its own learning rate).
        rates_from: Where the tuned ones come from.
        settings: Matched epochs and steps, each at fixed and tuned rates.
        runs: Every training at every moment it was measured.
        notes: What a reader should know, in sentences.
        trainings: How many.
        cost_examples: Examples processed in trainings and measurements, not counting a study that
            was made for the tuned rates.
        seconds: Wall time, such a study included.
    """

    workload: str
    device: str
    num_examples: int
    batch_sizes: tuple[int, ...]
    seeds: tuple[int, ...]
    epochs: int
    steps: int
    learning_rate: float
    tuned_rates: tuple[tuple[int, float], ...]
    rates_from: str
    settings: tuple[SharpnessSetting, ...]
    runs: tuple[SharpnessOfRun, ...]
    notes: tuple[str, ...]
    trainings: int
    cost_examples: int
    seconds: float
