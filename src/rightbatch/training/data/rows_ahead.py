"""Rows of tensors, gathered for many small updates at once."""

from __future__ import annotations

from typing import Any

from rightbatch.training.data.share import Share
from rightbatch.training.data.windows import Window
from rightbatch.workload.data import TensorExamples

AHEAD_BYTES = 2**18
"""Of examples that are gathered for several updates at once: what a processor's cache holds."""
_LEAST_UPDATES = 8
"""Gathering for fewer updates at once gains nothing."""


class RowsAhead:
    """Gathers rows for many small updates at once; an update is then a slice.

    Gathering costs more per call than per row. What is gathered lies on a grid of the epoch's
    positions, so that the bits of a training depend on its place in the data alone.

    Args:
        source: The training set.
        share: This process's part of each update.
    """

    def __init__(self, source: TensorExamples, share: Share) -> None:
        self._source = source
        self._share = share
        self._rows = max(AHEAD_BYTES // max(source.bytes_per_example, 1), 1)
        # Larger updates, and those of several parts, are gathered one by one.
        self._most = (
            min(share.micro_batch, self._rows // _LEAST_UPDATES) if len(share.weights) == 1 else 0
        )
        self._order: Any = None
        self._block = -1
        self._held: Any = None

    def batches(self, window: Window) -> list[Any]:
        """A window's micro-batches."""
        block, first = divmod(window.start, self._rows)
        end = first + window.size
        if window.size > self._most or window.padding or end > self._rows:
            return [self._source.batch(indices) for indices in self._share.cut(window)]
        if block != self._block or window.order is not self._order:
            self._order, self._block = window.order, block
            rows = window.order[block * self._rows : (block + 1) * self._rows]
            self._held = self._source.batch(rows)
        return [self._source.cut(self._held, first, end)]
