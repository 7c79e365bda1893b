"""Random numbers of a training: its own, and none of the caller's."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rightbatch.device.random_state import (
    get_random_states,
    seeded_random_states,
    set_random_states,
)


class OwnRandomState:
    """The random state that dropout and the like draw from, swapped in while a training runs.

    Args:
        seed: Decides it.
        device: Where the training runs.
    """

    def __init__(self, seed: int, device: str | torch.device) -> None:
        self.device = device
        # Another stream than the one that drew the initial weights.
        self.states: list[Tensor] = seeded_random_states(seed + 0x5EED, device)
        self._outside: list[list[Tensor]] = []

    def copy(self) -> OwnRandomState:
        """Another state that begins where this one is."""
        copied = object.__new__(OwnRandomState)
        copied.device, copied.states = self.device, [state.clone() for state in self.states]
        copied._outside = []
        return copied

    def swapped_in(self) -> OwnRandomState:
        """Draws inside a `with` block of this come from this state; the caller's is put back."""
        return self

    # By hand: a generator's context costs as much as the swap, 3 % of a small step.
    def __enter__(self) -> None:
        self._outside.append(get_random_states(self.device))
        set_random_states(self.states, self.device)

    def __exit__(self, *failure: object) -> None:
        self.states = get_random_states(self.device)
        set_random_states(self._outside.pop(), self.device)


def global_draws() -> dict[str, Any]:
    """The states of Python's and NumPy's global generators.

    Returns:
        Plain values and tensors, as a checkpoint holds them.
    """
    version, words, gauss = random.getstate()
    name, keys, *rest = np.random.get_state()
    place, has_gauss, cached = rest
    return {
        "python": [version, torch.tensor(words), gauss],
        "numpy": [
            str(name),
            torch.from_numpy(np.asarray(keys).astype(np.int64)),
            int(place),
            int(has_gauss),
            float(cached),
        ],
    }


def set_global_draws(states: dict[str, Any]) -> None:
    """Puts the states of Python's and NumPy's global generators back.

    Args:
        states: What `global_draws` gave.
    """
    version, words, gauss = states["python"]
    random.setstate((version, tuple(words.tolist()), gauss))
    name, keys, *rest = states["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))


@contextmanager
def drawing_from(seed: int, *place: int) -> Iterator[None]:
    """Python's, NumPy's and torch's draws inside the block depend on seed and place alone.

    So a data set that augments its examples gives the same ones in a resumed run, and with any
    number of loader workers.

    Args:
        seed: Seed of the run.
        *place: Where in the data.

    Yields:
        Nothing; the states are put back afterwards.
    """
    python, numpy, torch_state = random.getstate(), np.random.get_state(), torch.get_rng_state()
    words = np.random.SeedSequence((seed, *place)).generate_state(3)
    random.seed(int(words[0]))
    np.random.seed(int(words[1]))
    # The default generator alone: seeding CUDA's as well would disturb dropout there.
    torch.default_generator.manual_seed(int(words[2]))
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(torch_state)
