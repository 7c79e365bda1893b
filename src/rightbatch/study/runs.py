"""The runs of a race while they are under way, and the purse that pays for them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

from rightbatch.laws.curve import LossCurve, make_loss_curve
from rightbatch.laws.progress import spaced_steps
from rightbatch.study.records import Cell, State, TrialPoint, TrialRecord

_SPACING = 1.1
"""Later evaluations are a tenth apart: what is won by more is less than they cost."""


@dataclass(frozen=True)
class Look:
    """One evaluation: the loss the race compares (inf when not finite), and the target's verdict.

    `reached` is None when no target was given.
    """

    loss: float
    reached: bool | None


class Contestant(Protocol):
    """A training that can be advanced and looked at."""

    def advance(self, num_steps: int) -> None:
        """Does `num_steps` updates."""
        ...

    def look(self) -> Look:
        """Evaluates."""
        ...


class OutOfBudgetError(Exception):
    """The race has to end now; carries why, which so far is always `time`."""


class Purse:
    """Pays for steps and counts what was spent.

    Args:
        seconds: Wall time, or None.
        clock: Seconds.
    """

    def __init__(self, seconds: float | None, clock: Callable[[], float] = time.monotonic) -> None:
        self.examples = 0
        self.looks = 0
        self._seconds = seconds
        self._clock = clock
        self._started = clock()

    @property
    def elapsed(self) -> float:
        """Seconds since the purse was made."""
        return self._clock() - self._started

    def pay(self, examples: int) -> None:
        """Pays for a step or several.

        Args:
            examples: That are about to be processed.

        Raises:
            OutOfBudgetError: If time is up.
        """
        if self._seconds is not None and self.elapsed > self._seconds:
            raise OutOfBudgetError("time")
        self.examples += examples


@dataclass
class Run:
    """One run: where it is and what was seen of it.

    Attributes:
        cell: Its batch and learning rate.
        seed: Of its weights and data order.
        contestant: What is trained.
        purse: Pays.
        most_steps: It goes no further; without a target this is where it ends.
        steps: Updates done.
        state: `stopped` as long as nothing else is known.
        steps_to_target: When the target was first met.
        points: Its evaluations.
    """

    cell: Cell
    seed: int
    contestant: Contestant
    purse: Purse
    most_steps: int
    steps: int = 0
    state: State = "stopped"
    steps_to_target: int | None = None
    points: list[TrialPoint] = field(default_factory=list[TrialPoint])
    _curve: LossCurve | None = None

    @property
    def dead(self) -> bool:
        """Whether it diverged."""
        return self.state == "diverged"

    @property
    def finished(self) -> bool:
        """Whether it met the target, or did all the steps it is allowed."""
        return self.state == "reached" or self.steps >= self.most_steps

    @property
    def curve(self) -> LossCurve:
        """Its evaluations as a curve."""
        if self._curve is None or len(self._curve.steps) != len(self.points):
            self._curve = make_loss_curve(
                [p.steps for p in self.points], [p.loss for p in self.points]
            )
        return self._curve

    @property
    def examples(self) -> int:
        """Examples processed."""
        return self.steps * self.cell.global_batch

    def price_to(self, step: int) -> int:
        """Examples that going on to `step` would take."""
        if self.dead or self.finished:
            return 0
        return max(0, min(step, self.most_steps) - self.steps) * self.cell.global_batch

    def advance_to(self, step: int) -> None:
        """Goes on to a step, with evaluations on the way; stops where it arrives or diverges.

        Args:
            step: Where to.

        Raises:
            OutOfBudgetError: If time is up before.
        """
        goal = min(step, self.most_steps)
        for at in _steps_of_looks(self.steps, goal):
            if self.dead or self.finished:
                return
            self.purse.pay((at - self.steps) * self.cell.global_batch)
            self.contestant.advance(at - self.steps)
            self.steps = at
            self._look()

    def _look(self) -> None:
        look = self.contestant.look()
        self.purse.looks += 1
        finite = math.isfinite(look.loss)
        self.points.append(TrialPoint(steps=self.steps, loss=look.loss if finite else None))
        if not finite:
            self.state = "diverged"
        elif look.reached:
            self.state, self.steps_to_target = "reached", self.steps

    def record(self) -> TrialRecord:
        """What is kept of it."""
        return TrialRecord(
            global_batch=self.cell.global_batch,
            learning_rate=self.cell.learning_rate,
            seed=self.seed,
            state=self.state,
            steps_to_target=self.steps_to_target,
            points=tuple(self.points),
        )


def look_steps() -> Iterator[int]:
    """Steps at which every run is evaluated, the same for all so that losses can be compared.

    Returns:
        1, 2, … 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 22, 24, …
    """
    return spaced_steps(_SPACING)


def _steps_of_looks(begin: int, end: int) -> Iterator[int]:
    """The steps of looks after `begin` up to `end`, and `end` itself."""
    for step in look_steps():
        if step >= end:
            break
        if step > begin:
            yield step
    if end > begin:
        yield end
