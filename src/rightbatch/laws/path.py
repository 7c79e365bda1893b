"""How jagged the path of one number is, such as a weight's over a training."""

from __future__ import annotations

import math
from dataclasses import dataclass

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
    return float(roughness_of(float(np.abs(np.diff(scaled)).sum()), covered))


def roughness_of(travel: ArrayLike, covered: ArrayLike) -> NDArray[np.float64]:
    """The roughness of paths of which only sums are known.

    Args:
        travel: Σ |x_{i+1} − x_i|, any shape.
        covered: max x − min x, of the same shape.

    Returns:
        At least 1; NaN where a path never moved, or left the numbers.

    Example:
        >>> roughness_of([3.0, 0.0], [1.0, 0.0])
        array([ 3., nan])
    """
    way, range_ = np.asarray(travel, np.float64), np.asarray(covered, np.float64)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        ratio: NDArray[np.float64] = np.maximum(way / range_, 1.0)
        moved = (range_ > 0) & np.isfinite(range_) & np.isfinite(way)
    return np.where(moved, ratio, np.nan)


@dataclass(kw_only=True)
class RunningPath:
    """A path as it grows, in constant memory: what its roughness needs, and no more.

    Attributes:
        last: The latest value.
        low: The least so far.
        high: The greatest so far.
        travel: Σ |x_{i+1} − x_i| so far.

    Example:
        >>> path = RunningPath(last=0.0, low=0.0, high=0.0)
        >>> for value in (1.0, 0.0, 1.0):
        ...     path.add(value)
        >>> path.roughness
        3.0
    """

    last: float
    low: float
    high: float
    travel: float = 0.0

    def add(self, value: float) -> None:
        """Goes on to the next value."""
        self.travel += abs(value - self.last)
        self.last = value
        if value < self.low:
            self.low = value
        elif not value <= self.high:  # NaN as well, which then stays
            self.high = value

    @property
    def roughness(self) -> float:
        """As `path_roughness` of all the values."""
        return float(roughness_of(self.travel, self.high - self.low))
