"""Every batch size and learning rate that was trained, however the trainings ended."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from rightbatch.laws.estimate import Estimate
from rightbatch.laws.seeds import mean_over_seeds
from rightbatch.report.source import Source
from rightbatch.study.records import RaceRecord
from rightbatch.study.study import Study
from rightbatch.study.trials import FINAL, StudyTrial

CellState = Literal["fine", "missed", "diverged", "failed", "stopped"]


@dataclass(frozen=True, kw_only=True)
class RateCell:
    """The trainings at one batch size and learning rate.

    Attributes:
        batch_size: Examples per update.
        learning_rate: Learning rate.
        trials: How many there are.
        diverged: How many left the numbers.
        failed: How many raised an error.
        stopped: How many were stopped before their end.
        reached: How many met the target.
        steps: Updates of the longest.
        loss: Mean last loss of those that ended with one.
    """

    batch_size: int
    learning_rate: float
    trials: int
    diverged: int
    failed: int
    stopped: int
    reached: int
    steps: int
    loss: Estimate

    def state(self, *, has_target: bool) -> CellState:
        """How the trainings ended: the worst that befell one of them.

        Args:
            has_target: Whether they had a target to meet.

        Returns:
            One word.
        """
        if self.diverged:
            return "diverged"
        if self.failed:
            return "failed"
        if self.stopped:
            return "stopped"
        return "missed" if has_target and self.reached < self.trials else "fine"

    def outcome(self, *, has_target: bool) -> str:
        """The same with its numbers, such as `2 of 5 diverged`."""
        state = self.state(has_target=has_target)
        if state == "fine":
            return f"{self.trials} of {self.trials} {'met the target' if has_target else 'ended'}"
        if state == "missed":
            return f"{self.trials - self.reached} of {self.trials} missed the target"
        return f"{getattr(self, state)} of {self.trials} {state}"


@dataclass(frozen=True, kw_only=True)
class RateCells:
    """All of them.

    Attributes:
        cells: By batch size and learning rate, ascending.
        loss_name: Which loss.
        has_target: Whether the trainings had a target to meet.
        seeds: Trainings of each pair.
    """

    cells: tuple[RateCell, ...]
    loss_name: str
    has_target: bool
    seeds: int

    @property
    def sizes(self) -> tuple[int, ...]:
        """Batch sizes, ascending."""
        return tuple(sorted({cell.batch_size for cell in self.cells}))

    def at(self, batch_size: int) -> tuple[RateCell, ...]:
        """The cells of one size, by learning rate."""
        return tuple(cell for cell in self.cells if cell.batch_size == batch_size)

    def least(self, batch_size: int | None = None) -> RateCell | None:
        """The cell of least loss, of one size or of all; those that diverged do not count."""
        known = [
            (cell.loss.value, cell)
            for cell in (self.cells if batch_size is None else self.at(batch_size))
            if cell.loss.value is not None and not cell.diverged and not cell.failed
        ]
        return min(known, key=lambda pair: pair[0], default=(0.0, None))[1]


def collect_cells(source: Source) -> RateCells | None:
    """The cells of a study, or of a plan's race.

    Args:
        source: What the report is made of.

    Returns:
        The cells, or None where nothing was trained.
    """
    if source.study is not None and source.study.trials:
        return _of_study(source.study)
    race = None if source.plan is None else source.plan.evidence.race
    return None if race is None or not race.trials else _of_race(race)


def _of_study(study: Study) -> RateCells:
    by_cell: dict[tuple[int, float], list[StudyTrial]] = {}
    for trial in study.trials:
        by_cell.setdefault((trial.batch_size, trial.learning_rate), []).append(trial)
    has_validation = any(trial.val_loss is not None for trial in study.trials)
    return RateCells(
        cells=tuple(_cell(*key, by_cell[key], has_validation) for key in sorted(by_cell)),
        loss_name="validation loss" if has_validation else "training loss",
        has_target=study.design.target is not None,
        seeds=len(study.design.seeds),
    )


def _cell(
    batch_size: int, learning_rate: float, trials: Sequence[StudyTrial], has_validation: bool
) -> RateCell:
    complete = [trial for trial in trials if trial.state == "complete"]
    losses = [trial.val_loss if has_validation else trial.train_loss for trial in complete]
    return RateCell(
        batch_size=batch_size,
        learning_rate=learning_rate,
        trials=len(trials),
        diverged=sum(trial.state == "diverged" for trial in trials),
        failed=sum(trial.state == "failed" for trial in trials),
        stopped=sum(trial.state not in FINAL for trial in trials),
        reached=sum(trial.steps_to_target is not None for trial in complete),
        steps=max(trial.steps for trial in trials),
        loss=mean_over_seeds(losses),
    )


def _of_race(race: RaceRecord) -> RateCells:
    def cell(index: int) -> RateCell:
        trial = race.trials[index]
        losses = [point.loss for point in trial.points if point.loss is not None]
        return RateCell(
            batch_size=trial.global_batch,
            learning_rate=trial.learning_rate,
            trials=1,
            diverged=int(trial.state == "diverged"),
            failed=0,
            stopped=int(trial.state == "stopped"),
            reached=int(trial.state == "reached"),
            steps=trial.steps,
            loss=mean_over_seeds(losses[-1:]),
        )

    cells = [cell(i) for i in range(len(race.trials))]
    return RateCells(
        cells=tuple(sorted(cells, key=lambda c: (c.batch_size, c.learning_rate))),
        loss_name="loss",
        has_target=True,
        seeds=1,
    )
