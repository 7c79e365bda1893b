"""Buffers on several ranks: those that a forward pass changes are rank 0's afterwards."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from rightbatch.training.distributed import Ranks


class SharedBuffers:
    """Keeps the buffers of all ranks the same.

    Each rank's BatchNorm has seen other examples. As in `DistributedDataParallel`, rank 0's
    statistics count, which it has from its share of the examples. What no forward pass changes
    (masks, tables of positions) is not sent.

    Args:
        model: Its buffers are the same on all ranks at first.
        ranks: Who shares.
    """

    def __init__(self, model: nn.Module, ranks: Ranks) -> None:
        self._ranks = ranks
        # Where they are, and not which: a module may put a new tensor in the place.
        self._places = [
            (module._buffers, name)
            for module in model.modules()
            for name, buffer in module._buffers.items()
            if buffer is not None
        ]
        self._known = self._versions()

    def changed(self) -> list[float]:
        """Of each buffer: 1 if it changed on this rank since `take_over`, else 0."""
        return [
            float(buffer is not old or version != old_version)
            for (buffer, version), (old, old_version) in zip(
                self._versions(), self._known, strict=True
            )
        ]

    def take_over(self, changed: Sequence[float]) -> None:
        """Takes rank 0's values of what changed.

        Args:
            changed: Of each buffer: on how many ranks it changed.
        """
        kinds: defaultdict[torch.dtype, list[Tensor]] = defaultdict(list)
        for (buffer, _), number in zip(self._versions(), changed, strict=True):
            if number and buffer is not None:
                kinds[buffer.dtype].append(buffer)
        if not kinds:
            return
        with torch.no_grad():
            for buffers in kinds.values():
                flat = torch.cat([buffer.reshape(-1) for buffer in buffers])
                self._ranks.spread(flat)
                parts = flat.split([buffer.numel() for buffer in buffers])
                for buffer, part in zip(buffers, parts, strict=True):
                    buffer.copy_(part.view_as(buffer))
        self._known = self._versions()

    def _versions(self) -> list[tuple[Tensor | None, int]]:
        held = [places[name] for places, name in self._places]
        return [(buffer, -1 if buffer is None else buffer._version) for buffer in held]
