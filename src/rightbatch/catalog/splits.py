"""Fixed splits and scaling, so that a catalog workload is the same on every machine."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

VALIDATION_SHARE = 0.2

Pair = tuple[Tensor, Tensor]
FloatArray = NDArray[np.float64]


def split_fixed(inputs: NDArray[np.generic], targets: NDArray[np.generic]) -> tuple[Pair, Pair]:
    """Splits 80/20 by one fixed permutation.

    Args:
        inputs: Shape (examples, …); becomes float32.
        targets: Shape (examples,); integers become int64, the rest float32.

    Returns:
        `((train inputs, train targets), (validation inputs, validation targets))`.
    """
    order = np.random.Generator(np.random.PCG64(0)).permutation(len(inputs))
    num_val = round(VALIDATION_SHARE * len(inputs))
    x = torch.from_numpy(np.asarray(inputs, dtype=np.float32)[order])
    kind = np.int64 if np.issubdtype(targets.dtype, np.integer) else np.float32
    y = torch.from_numpy(np.asarray(targets, dtype=kind)[order])
    return (x[num_val:], y[num_val:]), (x[:num_val], y[:num_val])


def standardise(train: Tensor, val: Tensor) -> tuple[Tensor, Tensor]:
    """Shifts and scales columns to mean 0 and standard deviation 1 *of the training set*.

    Args:
        train: Shape (examples, …).
        val: Shape (examples, …), transformed with the training set's numbers.

    Returns:
        Both, transformed.
    """
    mean, scale = train.mean(dim=0), train.std(dim=0, correction=0)
    return (train - mean) / scale, (val - mean) / scale


def scale_to_unit(train: Tensor, val: Tensor) -> tuple[Tensor, Tensor]:
    """Shifts and scales columns to the range 0 to 1 *of the training set*.

    Args:
        train: Shape (examples, …).
        val: Shape (examples, …), transformed with the training set's numbers.

    Returns:
        Both, transformed.
    """
    low, high = train.amin(dim=0), train.amax(dim=0)
    return (train - low) / (high - low), (val - low) / (high - low)
