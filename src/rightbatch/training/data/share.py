"""The part of each update that one process computes."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rightbatch.training.data.windows import Window, micro_batch_sizes, share_of_rank


@dataclass(frozen=True, kw_only=True)
class Share:
    """Which part of each window this process trains on, and how it is cut.

    Attributes:
        micro_batch: Examples in one pass.
        smallest: Examples that the model needs at least in one pass.
        rank: Which replica this is.
        weights: Every replica's share of a full window.
    """

    micro_batch: int
    smallest: int = 1
    rank: int = 0
    weights: tuple[int, ...] = (1,)

    def cut(self, window: Window) -> list[torch.Tensor]:
        """The micro-batches of this process's part of a window, as indices."""
        indices, size = window.indices, window.size
        if len(self.weights) > 1:
            first, end = share_of_rank(size, self.rank, self.weights, self.smallest)
            indices, size = indices[first:end], end - first
        if size <= self.micro_batch:
            return [indices] if size else []
        sizes = micro_batch_sizes(size, self.micro_batch, self.smallest)
        return list(indices.split(sizes))

    def place_of(self, window: Window) -> tuple[int, int, int]:
        """What the data set's draws for a window depend on."""
        return window.epoch, window.start, self.rank
