"""Buffers on several ranks: those that a forward pass changes are rank 0's afterwards."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from rightbatch.training.ranks.distributed import Ranks


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
        self._modules = [module for module in model.modules() if module._buffers]
        self._known = self._versions()

    def changed(self) -> list[float]:
        """Of each module with buffers: 1 if they changed on this rank since `take_over`, else 0."""
        now = self._versions()
        return [
            float(
                # torch's normalisation writes running statistics without counting a version.
                isinstance(module, _NormBase)
                or any(a is not b or v != w for (a, v), (b, w) in zip(new, old, strict=True))
            )
            for module, new, old in zip(self._modules, now, self._known, strict=True)
        ]

    def take_over(self, changed: Sequence[float]) -> None:
        """Takes rank 0's values of what changed.

        Args:
            changed: Of each module with buffers: on how many ranks they changed.
        """
        kinds: defaultdict[torch.dtype, list[Tensor]] = defaultdict(list)
        for module, number in zip(self._modules, changed, strict=True):
            if number:
                for buffer in module._buffers.values():
                    if buffer is not None:
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

    def _versions(self) -> list[list[tuple[Tensor | None, int]]]:
        # A module may put a new tensor in a buffer's place.
        return [
            [(b, -1 if b is None else b._version) for b in module._buffers.values()]
            for module in self._modules
        ]
