"""Whether examples that are read again are those that were read before, by hashes of a few."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor

FIRST, EVERY = 8, 64
"""The first examples of a pass are hashed, and then one of so many."""


class Fingerprint:
    """A running hash of a few examples of a pass.

    Another order, another beginning, and an example more or less change it within `EVERY` examples.
    Values are hashed; of objects that are no arrays, numbers, text or containers, only the kind is.
    """

    def __init__(self) -> None:
        self._hash = hashlib.sha256()

    def see(self, place: int, example: Any) -> None:
        """Takes an example in, or passes it over.

        Args:
            place: Examples of the pass before it.
            example: The example.
        """
        if place < FIRST or place % EVERY == 0:
            self._add(example)

    @property
    def digest(self) -> str:
        """The hash of what was taken in."""
        return self._hash.hexdigest()

    def _add(self, part: Any) -> None:
        """Every part with its kind, so that no two structures give the same bytes."""
        self._hash.update(f"{type(part).__name__} ".encode())
        if isinstance(part, dict):
            for key, value in part.items():
                self._add(key)
                self._add(value)
        elif isinstance(part, tuple | list):
            for value in part:
                self._add(value)
        elif isinstance(part, Tensor):
            values = part.detach().cpu().contiguous().flatten()
            self._hash.update(f"{part.dtype} {tuple(part.shape)} ".encode())
            self._hash.update(values.view(torch.uint8).numpy().tobytes())
        elif isinstance(part, str | bytes | int | float | complex) or part is None:
            self._hash.update(repr(part).encode())
        elif hasattr(part, "tobytes"):  # NumPy's, and images
            self._hash.update(part.tobytes())
