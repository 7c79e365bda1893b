"""What a race leaves behind: every run and every evaluation, enough to conclude again from it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["ladder", "baseline", "branch", "run"]
State = Literal["reached", "stopped", "diverged"]


@dataclass(frozen=True, kw_only=True)
class TrialPoint:
    """One evaluation of a run.

    Attributes:
        steps: Updates since the run began (for a branch: since it left the baseline).
        progress: Σ learning rate over all its updates, the baseline's before a branch included.
        loss: The loss the race compares; None when it was not finite.
    """

    steps: int
    progress: float
    loss: float | None


@dataclass(frozen=True, kw_only=True)
class TrialRecord:
    """One run of a race.

    Attributes:
        kind: `ladder`: short runs that find a learning rate for the baseline. `baseline`: the one
            run at the baseline's batch that goes to the target; its learning rate may be doubled
            or halved on the way. `branch`: leaves the baseline half way to show what another
            batch and learning rate does to a half-trained model. `run`: from fresh weights.
        global_batch: Examples per update.
        learning_rate: Learning rate (the last one, for the baseline).
        seed: Decides initial weights and data order.
        start_progress: Progress at which a branch left the baseline; 0 for the others.
        state: How it ended.
        steps_to_target: Updates after which the target was first met, or None.
        points: Its evaluations.
    """

    kind: Kind
    global_batch: int
    learning_rate: float
    seed: int
    start_progress: float
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
        baseline_batch: The baseline's batch.
        target_loss: The loss that counted as trained in the race's comparison.
        target_reached: Whether the baseline met the target that was asked for.
        normalised: Whether the optimizer divides by the gradient's size.
        sizes: The batch sizes that were open to choice.
        trials: All runs.
        examples: Training examples processed in all.
        evaluation_examples: Examples evaluated (forward only) in all.
        seconds: Wall time.
        stopped_by: What ended the race: `done`, `cost`, `time` or `interrupt`.
    """

    baseline_batch: int
    target_loss: float
    target_reached: bool
    normalised: bool
    sizes: tuple[int, ...]
    trials: tuple[TrialRecord, ...]
    examples: int
    evaluation_examples: int
    seconds: float
    stopped_by: str

    @property
    def baseline(self) -> TrialRecord:
        """The baseline's run."""
        return next(t for t in self.trials if t.kind == "baseline")
