"""How jagged the path of one number is, such as a weight's over a training."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray


def path_roughness(values: ArrayLike) -> float:
    """How many times over a path travels the stretch that it covers.

    roughness = Σ |x_{i+1} − x_i| / (max x − min x)

    The total variation over the range: 1 where the path only ever goes one way, n for a zig-zag of
    n steps between two values. Shift, scale and direction of time do not matter. The range stands
    below the line, and not the distance from first to last value, so that a path that comes back
    is not infinitely rough. More updates give a path more room to turn round: compare batch sizes
    over the same epochs.

    Args:
        values: The path, in order, shape (points,).

    Returns:
        At least 1; NaN where the path never moves, or leaves the numbers.

    Raises:
        ValueError: If there are fewer than two values, or not one number each.

    Example:
        >>> path_roughness([0.0, 0.2, 0.5, 1.0]), path_roughness([0.0, 1.0, 0.0, 1.0])
        (1.0, 3.0)
    """
    path: NDArray[np.float64] = np.asarray(values, dtype=np.float64)
    if path.ndim != 1 or len(path) < 2:
        raise ValueError(f"A path needs at least two numbers in a row; got shape {path.shape}.")
    if not np.isfinite(path).all():
        return math.nan
    # Scaled first, by a power of two: very large or small differences would leave the floats.
    _, exponent = math.frexp(float(np.abs(path).max()))
    scaled: NDArray[np.float64] = np.ldexp(path, -exponent)
    covered = float(scaled.max() - scaled.min())
    if covered == 0:
        return math.nan
    return max(1.0, float(np.abs(np.diff(scaled)).sum()) / covered)
