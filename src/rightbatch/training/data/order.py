"""Data order as a pure function of (seed, epoch), so that any run can be resumed or compared."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def epoch_order(num_examples: int, *, seed: int, epoch: int) -> Tensor:
    """The order in which an epoch visits the training set.

    The same (seed, epoch) gives the same order at every batch size, on every platform, whatever
    was drawn before: sizes are compared on the same data order, and a resumed run continues
    exactly where it stopped.

    Args:
        num_examples: Size of the training set.
        seed: Seed of the run.
        epoch: Epoch, counted from 0.

    Returns:
        A permutation of 0 … num_examples − 1, int64, shape (num_examples,).

    Example:
        >>> sorted(epoch_order(4, seed=0, epoch=1).tolist())
        [0, 1, 2, 3]
    """
    generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence((seed, epoch))))
    return torch.from_numpy(generator.permutation(num_examples))
