"""SIGINT and SIGTERM during a training: finish the update, save, then end as asked."""

from __future__ import annotations

import os
import signal
from types import FrameType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rightbatch.training.loop import Training

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopOnSignal:
    """While it is entered, the first signal asks the training to stop; a second ends the process.

    When the block ends, the handlers from before are back, and the signal is raised again for
    them: a script sees its KeyboardInterrupt, after everything was saved.

    Args:
        training: What is stopped.
    """

    def __init__(self, training: Training) -> None:
        self._training = training
        self._received: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopOnSignal:
        """Installs the handlers, in the main thread; elsewhere signals are someone else's."""
        try:
            for number in _SIGNALS:
                self._before[number] = signal.signal(number, self._receive)
        except ValueError:
            pass
        return self

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        if self._received is not None:
            # Whoever asks twice wants the process gone, not saved.
            os._exit(128 + number)
        self._received = number
        self._training.stop_requested = True

    def __exit__(self, *_: object) -> None:
        """Puts the handlers back, and hands a signal that came on to them."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self._received is not None:
            signal.raise_signal(self._received)
