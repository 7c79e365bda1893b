"""`quadratic`: linear regression on Gaussian inputs, with every constant known.

Inputs x ~ N(0, C), y = x·w* + noise of variance s², loss ½(x·w − y)². With the error δ = w − w*
the loss is ½δᵀCδ + s²/2, the gradient Cδ and the Hessian C. The drawn examples are then corrected
linearly so that their second moments are *exactly* C, 0 and s², in the training and in the
validation set: the minimum, the gradient at any w and the validation loss are the formulas'
values, and only fourth moments are those of a sample.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor, nn

from rightbatch.catalog.entries import target_of
from rightbatch.catalog.splits import FloatArray
from rightbatch.laws.linear_regression import LinearRegression
from rightbatch.workload import Workload

NUM_TRAIN, NUM_VAL = 1024, 512


def constants() -> LinearRegression:
    """Everything that decides how SGD behaves on the catalog's `quadratic`.

    Six eigenvalues from 4 to 0.1, an initial error that puts the same loss on each, and s² = 4.
    C is diagonal and training starts from zero weights, so w* = −offsets.

    Returns:
        The problem, for the formulas of `rightbatch.laws.linear_regression`.

    Example:
        >>> from rightbatch.laws.linear_regression import simple_noise_scale
        >>> round(simple_noise_scale(constants()), 6)
        11.0
    """
    eigenvalues = np.geomspace(4.0, 0.1, 6)
    return LinearRegression(
        eigenvalues=tuple(eigenvalues.tolist()),
        offsets=tuple((-1 / np.sqrt(eigenvalues)).tolist()),
        noise_variance=4.0,
    )


class _Linear(nn.Module):
    """x·w, from zero weights: the start is one of the known constants."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(constants().dimension))

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs @ self.weight


def _make_optimizer(params: Iterable[nn.Parameter], lr: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=lr)


def half_squared_error(outputs: Tensor, targets: Tensor) -> Tensor:
    """½(output − target)², the mean over examples.

    Args:
        outputs: Shape (examples,).
        targets: Shape (examples,).

    Returns:
        A scalar tensor.
    """
    return (outputs - targets).square().mean() / 2


def draw(known: LinearRegression, num_examples: int, seed: int) -> tuple[Tensor, Tensor]:
    """Draws examples whose second moments are exactly those of the constants.

    Args:
        known: The constants.
        num_examples: How many; more than there are dimensions plus one.
        seed: Seed of the draw.

    Returns:
        `(inputs, targets)`: float32, shapes (num_examples, dimensions) and (num_examples,).
    """
    generator = np.random.Generator(np.random.PCG64(seed))
    dimensions = known.dimension
    white = _whiten(generator.standard_normal((num_examples, dimensions + 1)))
    inputs = white[:, :dimensions] * np.sqrt(known.eigenvalues)
    noise = white[:, dimensions] * np.sqrt(known.noise_variance)
    solution = -np.array(known.offsets)
    targets = inputs @ solution + noise
    return torch.from_numpy(inputs).float(), torch.from_numpy(targets).float()


def _whiten(values: FloatArray) -> FloatArray:
    """The nearest columns that are exactly uncorrelated, of mean square 1."""
    left, _, right = np.linalg.svd(values, full_matrices=False)
    return left @ right * np.sqrt(len(values))


def build(name: str) -> Workload:
    """Builds `quadratic`; its numbers are in `constants()`."""
    known = constants()
    return Workload(
        name=name,
        make_model=_Linear,
        train_data=draw(known, NUM_TRAIN, seed=1),
        val_data=draw(known, NUM_VAL, seed=2),
        loss=half_squared_error,
        make_optimizer=_make_optimizer,
        target=target_of(name),
    )
