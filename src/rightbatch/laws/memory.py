"""The memory law: peak(B) = fixed + per_example · B.

Parameters, gradients, optimizer state, libraries and data are fixed; activations grow with the
micro-batch. Workspaces and allocator granularity bend the line, so the law only says where to look
next. What is returned to a user was run (see `search`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rightbatch.errors import UsageError
from rightbatch.laws.estimate import Estimate
from rightbatch.laws.interval import student_quantile


@dataclass(frozen=True, kw_only=True)
class MemoryLaw:
    """A fitted memory law.

    Attributes:
        fixed_bytes: Memory that does not depend on the micro-batch.
        bytes_per_example: Memory of one more example; `value` is None where the sizes that were
            run are too close or too noisy to tell.
        largest_error: Largest |fitted − measured| / measured over the sizes of the fit.
    """

    fixed_bytes: float
    bytes_per_example: Estimate
    largest_error: float

    def peak_bytes(self, micro_batch: float) -> float:
        """The peak that the law predicts.

        Args:
            micro_batch: Examples.

        Returns:
            Bytes.

        Example:
            >>> fit_memory_law([1, 2], [110, 120]).peak_bytes(10)
            200.0
        """
        return self.fixed_bytes + (self.bytes_per_example.value or 0.0) * micro_batch

    def largest_micro_batch(self, limit_bytes: float) -> int | None:
        """The inverse: the largest micro-batch that the law lets into a limit.

        Args:
            limit_bytes: The limit.

        Returns:
            Examples, 0 when not even one fits, or None when the law sees no growth.

        Example:
            >>> fit_memory_law([1, 2], [110, 120]).largest_micro_batch(200)
            10
        """
        slope = self.bytes_per_example.value
        if slope is None:
            return None
        # A hair is forgiven, so that the inverse undoes the law in floating point too.
        return max(0, math.floor((limit_bytes - self.fixed_bytes) / slope * (1 + 1e-12)))


def fit_memory_law(sizes: Sequence[int], peaks_bytes: Sequence[float]) -> MemoryLaw:
    """Fits the memory law by least squares.

    The noise of a peak is that of an allocator, about the same number of bytes at every size, so
    all sizes weigh the same. The interval of the slope is Student's, with len(sizes) − 2 degrees
    of freedom.

    Args:
        sizes: Micro-batches that were run, two different ones at least.
        peaks_bytes: The measured peak of each.

    Returns:
        The law.

    Raises:
        UsageError: If there are not two different sizes, or the lengths differ.

    Example:
        >>> fit_memory_law([8, 64, 512], [1080, 1640, 6120]).bytes_per_example.value
        10.0
    """
    if len(sizes) != len(peaks_bytes) or len(set(sizes)) < 2:
        raise UsageError(
            f"A memory law needs peaks at two different sizes; it got sizes {list(sizes)} with "
            f"{len(peaks_bytes)} peaks. Run another size."
        )
    B = np.asarray(sizes, dtype=np.float64)
    peaks = np.asarray(peaks_bytes, dtype=np.float64)
    centred = B - B.mean()
    spread = float(centred @ centred)
    slope = float(centred @ (peaks - peaks.mean())) / spread
    fixed = float(peaks.mean() - slope * B.mean())
    if slope <= 0:
        slope, fixed = 0.0, float(peaks.mean())
    residuals = fixed + slope * B - peaks
    low = high = None
    if len(B) > 2:
        deviation = math.sqrt(float(residuals @ residuals) / (len(B) - 2) / spread)
        half = student_quantile(len(B) - 2) * deviation
        low, high = slope - half, slope + half
    return MemoryLaw(
        fixed_bytes=fixed,
        bytes_per_example=Estimate(
            value=slope or None, low=low, high=high, n=len(B), method="least squares on peaks"
        ),
        largest_error=float(np.max(np.abs(residuals) / peaks)),
    )
