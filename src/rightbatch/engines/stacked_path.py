"""Where stacked copies are: their distance from the beginning, and the path of one weight."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from rightbatch.engines.copies import FloatArray, IntArray
from rightbatch.laws.path import roughness_of
from rightbatch.training.watching.distance import norm_of_weights

WeightPlace = tuple[str, tuple[int, ...]]
"""Name of a tensor and a place in it."""


class StackedPath:
    """Follows one weight of each copy in constant memory, and knows where the copies began.

    Args:
        names: Of the trained tensors.
        held: Initial tensors by name, of each distinct seed.
        models: Initial models, likewise.
        which: Of each copy, the number of its seed, shape (copies,).
        watched: The weight.
    """

    def __init__(
        self,
        names: Sequence[str],
        held: Sequence[Mapping[str, Tensor]],
        models: Sequence[nn.Module],
        which: IntArray,
        watched: WeightPlace,
    ) -> None:
        # Once for each seed, and not for each copy.
        self._initial = [torch.stack([h[name].detach() for h in held]) for name in names]
        self._initial_norm = np.array([norm_of_weights(model) for model in models])
        name, self._index = watched
        self._which = torch.from_numpy(which).to(self._initial[0].device)
        start = torch.stack([h[name][self._index].detach().double() for h in held])
        self._last = start[self._which]
        self._low, self._high = self._last.clone(), self._last.clone()
        self._travel = torch.zeros_like(self._last)
        # One that has no gradient never moves.
        self._position = names.index(name) if name in names else None
        self._noted: list[Tensor] = []

    def note(self, trained: Sequence[Tensor]) -> None:
        """Notes where the weight is after an update.

        Args:
            trained: The stacked tensors.
        """
        if self._position is not None:
            self._noted.append(trained[self._position][(slice(None), *self._index)].clone())

    def add_noted(self) -> None:
        """Adds what was noted to the path."""
        if not self._noted:
            return
        values = torch.stack(self._noted).double()
        self._noted = []
        path = torch.cat([self._last[None], values])
        self._travel += path.diff(dim=0).abs().sum(dim=0)
        self._low = torch.minimum(self._low, values.amin(dim=0))
        self._high = torch.maximum(self._high, values.amax(dim=0))
        self._last = values[-1]

    def look(
        self, trained: Sequence[Tensor]
    ) -> tuple[FloatArray, FloatArray, FloatArray, FloatArray]:
        """Where the copies are.

        Args:
            trained: The stacked tensors.

        Returns:
            Distance from the initial weights, norm of those, the weight and the roughness of its
            path, each of shape (copies,).
        """
        squares = torch.zeros_like(self._last)
        for now, before in zip(trained, self._initial, strict=True):
            moved = (now - before[self._which]).flatten(1)
            squares += torch.linalg.vector_norm(moved, dim=1).double() ** 2
        numbers = [t.cpu().numpy() for t in (squares, self._last, self._travel)]
        covered = (self._high - self._low).cpu().numpy()
        norms = self._initial_norm[self._which.cpu().numpy()]
        return np.sqrt(numbers[0]), norms, numbers[1], roughness_of(numbers[2], covered)

    def keep(self, rows: Tensor) -> None:
        """Leaves the other copies out.

        Args:
            rows: Of the copies that stay.
        """
        self._which = self._which[rows]
        self._last, self._travel = self._last[rows], self._travel[rows]
        self._low, self._high = self._low[rows], self._high[rows]
