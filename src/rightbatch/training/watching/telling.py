"""Callbacks are told of updates: of each one that it is done, and of their records in blocks.

Many records made together cost less than one by one, and reading a loss waits for a GPU.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from rightbatch.training.step import StepResult
from rightbatch.training.watching.callbacks import Callback, StepRecords, watches_steps
from rightbatch.training.watching.norms import Measured, norms_of_kept, norms_of_parts

if TYPE_CHECKING:
    from rightbatch.training.loop import Training

_BLOCK, _BLOCK_SECONDS = 64, 0.1
"""Updates whose records are told together; fewer of them where they take longer than this."""


class Telling:
    """What the callbacks of a run have not yet been told.

    Args:
        callbacks: Who is told.
        kept: Parameters whose gradients are kept by the step for their norms, or none: then the
            step gives the norms themselves.
        read_at_once: Whether a norm is read when it is there, as on a CPU, where it is no waiting.

    Attributes:
        losses: Of the updates that were noted and not yet told, as far as they were read; for the
            loop to add to, in order.
    """

    def __init__(
        self, callbacks: Sequence[Callback], *, kept: Sequence[Tensor], read_at_once: bool
    ) -> None:
        self.losses: list[float | None] = []
        self._callbacks = callbacks
        self._on_step = [c.on_step for c in callbacks if watches_steps(c)]
        self._norms = norms_of_kept if kept else norms_of_parts
        self._read_at_once = read_at_once
        self._untold: list[tuple[int, int, int, int, float, float, Any]] = []
        self._seconds = 0.0

    @property
    def waiting(self) -> bool:
        """Whether there is something to tell."""
        return bool(self._untold)

    def note(self, training: Training, size: int, result: StepResult, seconds: float) -> bool:
        """Tells of an update that it is done, and notes what its record needs.

        Args:
            training: The run, after the update.
            size: Examples of the update.
            result: Of the update.
            seconds: What it took.

        Returns:
            Whether a block is full, which is to be told.
        """
        for on_step in self._on_step:
            on_step(training)
        measured: Measured | list[Tensor | None] = result.gradients
        if result.gradient_norms is not None:
            measured = result.gradient_norms
            if self._read_at_once:  # many small tensors are dear to keep
                measured = math.hypot(*[norm.item() for norm in measured])
        rate = training.optimizer.param_groups[0]["lr"]
        self._untold.append(
            (training.steps, training.consumed, training.examples, size, rate, seconds, measured)
        )
        self._seconds += seconds
        return len(self._untold) >= _BLOCK or self._seconds >= _BLOCK_SECONDS

    def tell(self, training: Training, num_examples: float) -> None:
        """Gives the callbacks the records of what was noted, all of whose losses were read.

        Args:
            training: The run.
            num_examples: Of a pass.
        """
        untold, self._untold, self._seconds = self._untold, [], 0.0
        losses, self.losses = self.losses, []
        steps, consumed, examples, sizes, rates, seconds, measured = zip(*untold, strict=True)
        epochs = [place / num_examples for place in consumed]
        values = [math.nan if loss is None else loss for loss in losses]
        norms = self._norms(measured)
        records = StepRecords((steps, epochs, examples, sizes, rates, values, norms, seconds))
        for callback in self._callbacks:
            callback.on_records(training, records)
