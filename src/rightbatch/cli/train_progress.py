"""The progress of `rightbatch train`: loss, examples per second and time left."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

from rightbatch.report.units import show_number, show_seconds
from rightbatch.training.watching.callbacks import Callback, StepRecords

if TYPE_CHECKING:
    from rightbatch.training import Training

_SECONDS_BETWEEN = 0.1
_REPORTS_OF_RATE = 20
"""The examples per second are those of so many reports: about two seconds."""


class TrainProgress(Callback):
    """Reports how far a training is, at most ten times a second.

    Args:
        report: Called with a message and the share that is done, as `Output.progress` yields it.
        may_stop_early: Whether the run ends where a target is met, so that what is left is a limit.
        clock: Seconds.
    """

    needs_gradient_norm = False

    def __init__(
        self,
        report: Callable[..., None],
        *,
        may_stop_early: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._report = report
        self._limit = "at most " if may_stop_early else ""
        self._clock = clock
        self._due = -math.inf
        self._loss: float | None = None
        self._start = (0.0, 0.0)
        self._marks: deque[tuple[int, float]] = deque(maxlen=_REPORTS_OF_RATE)

    def on_start(self, training: Training) -> None:
        """Notes where the run begins: a resumed one has a share done already."""
        self._start = (self._clock(), _share(training) or 0.0)
        self._marks.append((training.examples, training.seconds))
        self._due = self._start[0] + _SECONDS_BETWEEN

    def on_step(self, training: Training) -> None:
        """Reports, where it is time."""
        now = self._clock()
        if now >= self._due:
            self._due = now + _SECONDS_BETWEEN
            self._tell(training, now)

    def on_records(self, training: Training, records: StepRecords) -> None:
        """Notes the loss of now, as the mean of some updates."""
        losses = [record.loss for record in records if math.isfinite(record.loss)]
        if losses:
            self._loss = sum(losses) / len(losses)

    def _tell(self, training: Training, now: float) -> None:
        parts: list[str] = []
        if self._loss is not None:
            parts.append(f"loss {show_number(self._loss)}")
        (examples, seconds), *_ = self._marks
        self._marks.append((training.examples, training.seconds))
        if training.seconds > seconds:
            rate = (training.examples - examples) / (training.seconds - seconds)
            parts.append(f"{show_number(rate)} examples/s")
        share = _share(training)
        left = self._seconds_left(share, now)
        if left is not None:
            parts.append(f"{self._limit}{show_seconds(left)} left")
        self._report(f"{training.workload.name}: {', '.join(parts)}", share)

    def _seconds_left(self, share: float | None, now: float) -> float | None:
        begun, share_then = self._start
        if share is None or share <= share_then:
            return None
        return (now - begun) * (1 - share) / (share - share_then)


def _share(training: Training) -> float | None:
    """Share of the run that is done, or None where its length is not known."""
    if training.horizon is None:
        return None
    # AdaScale counts a step as what it is worth.
    scaled = training.recipe.rate_rule == "adascale"
    examples = training.gained if scaled else training.consumed
    return min(1.0, training.horizon.progress(training.steps, examples))
