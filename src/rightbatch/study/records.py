"""What a race leaves behind: every run and every evaluation, enough to conclude again from it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

State = Literal["reached", "stopped", "diverged"]


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One (batch, learning rate)."""

    global_batch: int
    learning_rate: float


@dataclass(frozen=True, kw_only=True)
class TrialPoint:
    """One evaluation of a run.

    Attributes:
        steps: Updates since the run began.
        loss: The loss the race compares; None when it was not finite.
    """

    steps: int
    loss: float | None


@dataclass(frozen=True, kw_only=True)
class TrialRecord:
    """One run of a race, from fresh weights at a constant batch and learning rate.

    Attributes:
        global_batch: Examples per update.
        learning_rate: Learning rate.
        seed: Decides initial weights and data order.
        state: How it ended.
        steps_to_target: Updates after which the target was first met, or None.
        points: Its evaluations.
    """

    global_batch: int
    learning_rate: float
    seed: int
    state: State
    steps_to_target: int | None
    points: tuple[TrialPoint, ...]

    @property
    def steps(self) -> int:
        """Updates done."""
        return self.points[-1].steps if self.points else 0

    @property
    def examples(self) -> int:
        """Training examples processed."""
        return self.steps * self.global_batch


@dataclass(frozen=True, kw_only=True)
class RaceRecord:
    """A race: what it was about, and all its runs.

    Attributes:
        leader: Index of the run that all others are compared with: the best learning rate that
            was found at one size.
        leader_share: How far the leader came, as a share of its way to the target.
        target_loss: The loss that counted as trained in the race's comparison.
        target_reached: Whether the leader met the target that was asked for.
        normalised: Whether the optimizer divides by the gradient's size.
        usual_batch: The critical batch that was expected before anything was run.
        sizes: The batch sizes that were open to choice.
        trials: All runs.
        examples: Training examples processed in all.
        evaluation_examples: Examples evaluated (forward only) in all.
        seconds: Wall time.
        stopped_by: What ended the race: `done`, `time`, `interrupt` or `diverged`.
    """

    leader: int
    leader_share: float
    target_loss: float
    target_reached: bool
    normalised: bool
    usual_batch: float
    sizes: tuple[int, ...]
    trials: tuple[TrialRecord, ...]
    examples: int
    evaluation_examples: int
    seconds: float
    stopped_by: str
