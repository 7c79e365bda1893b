"""What every sink shares: points are thinned, queued, and written on a thread of their own.

A training must not feel what it is shown on. So the training's thread only puts points into a
bounded queue, and drops them where it is full; what the writer raises, or how long it hangs, stays
on its thread, which is a daemon and cannot keep the process alive.
"""

from __future__ import annotations

import atexit
import importlib.util
import logging
import math
import queue
import sys
import threading
from abc import abstractmethod
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from rightbatch.errors import MissingExtraError, UsageError
from rightbatch.training.watching.callbacks import Callback, Point, StepRecord, StepRecords

if TYPE_CHECKING:
    from rightbatch.training.loop import Training
    from rightbatch.training.run import Run

FAILURES_ALLOWED = 3
"""Failures in a row after which a sink is switched off."""
QUEUE_LENGTH = 1000
"""Points that may wait to be written; more are dropped."""
_LONGEST_REASON = 160

_log = logging.getLogger(__name__)


class Writer(Protocol):
    """Writes points somewhere. May raise and may hang; it is called on one thread only."""

    def write(self, values: Mapping[str, float], step: int) -> None:
        """Writes the values of one step; steps never decrease."""

    def close(self) -> None:
        """Writes what is left, and ends."""


class Sink(Callback):
    """Forwards a run's records and evaluations to a writer. Abstract: define `open_writer`.

    Args:
        every: Forward the records of every so many updates. Default: by `per_second`.
        per_second: Forward at most so many records for each second of training.
        patience_seconds: How long the writer is waited for, once before the first update and once
            after the last; between them, never.

    Attributes:
        name: What the sink is called in messages.
        package: What must be installed.
        extra: Which extra of rightbatch installs it.
        dropped: Points that were not written, since the writer was too slow.
        switched_off: Whether the sink gave up.

    Raises:
        UsageError: If a number is out of range.
        MissingExtraError: If the package is not installed.
    """

    name: ClassVar[str]
    package: ClassVar[str]
    extra: ClassVar[str]

    def __init__(
        self,
        *,
        every: int | None = None,
        per_second: float = 10.0,
        patience_seconds: float = 5.0,
    ) -> None:
        if every is not None and every < 1:
            raise UsageError(f"every is {every}. Give 1 or more updates.")
        if not per_second > 0:
            raise UsageError(f"per_second is {per_second}. Give more than 0.")
        if not is_installed(self.package):
            raise MissingExtraError(self.package, self.extra)
        self._every = every
        self._seconds_between = 1 / per_second
        self._patience = patience_seconds
        self.dropped = 0
        self.switched_off = False
        self._worker: _Worker | None = None
        self._since_last = math.inf
        self._elapsed = 0.0

    @abstractmethod
    def open_writer(self, settings: Mapping[str, Any]) -> Writer:
        """Makes the writer, on the sink's own thread. May raise and may hang.

        Args:
            settings: Of the run: workload, seed and the recipe's fields, as plain values.
        """

    def on_start(self, training: Training) -> None:
        """Opens the writer; waits a little for it, so that its start falls before the run's."""
        self.close()
        self.dropped, self.switched_off = 0, False
        self._since_last, self._elapsed = math.inf, training.seconds
        settings = _settings(training)
        self._worker = _Worker(self.name, lambda: self.open_writer(settings))
        atexit.register(self.close)
        self._worker.start(self._patience)

    def on_records(self, training: Training, records: StepRecords) -> None:
        """Forwards some of the records."""
        for record in records:
            self._elapsed += record.seconds
            self._since_last += record.seconds
            if self._is_due(record):
                self._since_last = 0.0
                self._put(_record_values(record, self._elapsed), record.step)

    def _is_due(self, record: StepRecord) -> bool:
        if self._every is not None:
            return record.step % self._every == 0
        return self._since_last >= self._seconds_between

    def on_evaluation(self, training: Training, point: Point) -> None:
        """Forwards an evaluation."""
        self._put(_point_values(point), point.step)

    def on_end(self, training: Training, run: Run) -> None:
        """Writes what is left, but waits no longer than a few seconds for it."""
        self.close()

    def close(self) -> None:
        """Ends the writer. Called after the run, and at exit if the run did not end."""
        worker, self._worker = self._worker, None
        if worker is not None:
            atexit.unregister(self.close)
            worker.stop(self._patience)
            self.dropped, self.switched_off = worker.dropped, worker.off

    def _put(self, values: Mapping[str, float], step: int) -> None:
        if self._worker is not None:
            self._worker.put(values, step)
            self.dropped, self.switched_off = self._worker.dropped, self._worker.off


def is_installed(package: str) -> bool:
    """Whether a package can be imported, without importing it."""
    return package in sys.modules or importlib.util.find_spec(package) is not None


class _Worker:
    """A daemon thread with a bounded queue, in front of a writer.

    Args:
        name: Of the sink.
        open_writer: Makes the writer; called on the thread.
    """

    def __init__(self, name: str, open_writer: Any) -> None:
        self._name = name
        self._open_writer = open_writer
        self._points: queue.Queue[tuple[Mapping[str, float], int] | None]
        self._points = queue.Queue(QUEUE_LENGTH)
        self._opened, self._stopping = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._work, name=f"{name} sink", daemon=True)
        self.dropped = 0
        self.off = False

    def start(self, patience: float) -> None:
        """Starts the thread, and waits a little for the writer to be made."""
        try:
            self._thread.start()
        except RuntimeError as error:  # no more threads
            self._switch_off(f"could not be started ({_describe(error)})")
            return
        if not self._opened.wait(patience):
            self._say(f"is not ready after {patience:g} s. The training goes on without waiting.")

    def put(self, values: Mapping[str, float], step: int) -> None:
        """Queues a point, or drops it. Never waits."""
        if self.off:
            return
        try:
            self._points.put_nowait((values, step))
        except queue.Full:
            self.dropped += 1

    def stop(self, patience: float) -> None:
        """Lets the thread write what is left, for a while."""
        self._stopping.set()
        signals = 0
        with suppress(queue.Full):  # then the thread is busy, and will see that it is to stop
            self._points.put_nowait(None)
            signals = 1
        if self._thread.is_alive():
            self._thread.join(patience)
        if self._thread.is_alive():
            self.dropped += max(0, self._points.qsize() - signals)
            self.off = True
            self._say(f"was not done {patience:g} s after the run, and is not waited for.")
        if self.dropped:
            self._say(f"did not keep up: {self.dropped} points were dropped.")

    def _work(self) -> None:
        try:
            writer: Writer = self._open_writer()
        except BaseException as error:  # also what means to end the process
            self._switch_off(f"could not be opened ({_describe(error)})")
            return
        finally:
            self._opened.set()
        self._write_all(writer)
        try:
            writer.close()
        except BaseException as error:
            self._say(f"could not be closed ({_describe(error)}).")

    def _write_all(self, writer: Writer) -> None:
        failures = 0
        while not self.off:
            point = self._points.get()
            if point is None:
                return
            try:
                writer.write(*point)
                failures = 0
            except BaseException as error:
                failures += 1
                if failures == FAILURES_ALLOWED:
                    self._switch_off(f"failed {failures} times in a row ({_describe(error)})")
            if self._stopping.is_set() and self._points.empty():
                return

    def _switch_off(self, why: str) -> None:
        self.off = True
        self._say(f"{why} and is switched off. The training goes on.")

    def _say(self, text: str) -> None:
        # Not `warnings`, which a filter may turn into an exception.
        _log.warning("The %s sink %s", self._name, text)


def _describe(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    text = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    return text if len(text) <= _LONGEST_REASON else f"{text[:_LONGEST_REASON]}…"


def _settings(training: Training) -> dict[str, Any]:
    recipe = {
        key: value if isinstance(value, str | int | float) else str(value)
        for key, value in asdict(training.recipe).items()
        if value is not None
    }
    return {"workload": training.workload.name, "seed": training.seed, **recipe}


def _record_values(record: StepRecord, elapsed: float) -> dict[str, float]:
    return {
        "train/loss": record.loss,
        "train/gradient_norm": record.gradient_norm,
        "train/learning_rate": record.learning_rate,
        "train/global_batch": record.global_batch,
        "train/epochs": record.epochs,
        "train/examples": record.examples,
        "train/seconds": elapsed,
    }


def _point_values(point: Point) -> dict[str, float]:
    found = {
        "evaluation/train_loss": point.train_loss,
        "evaluation/val_loss": point.val_loss,
        "evaluation/val_metric": point.val_metric,
        "evaluation/epochs": point.epochs,
        "evaluation/examples": point.examples,
        "evaluation/seconds": point.seconds,
    }
    return {name: value for name, value in found.items() if value is not None}
