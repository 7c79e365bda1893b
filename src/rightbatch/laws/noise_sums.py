"""The noise scale from running sums, measured along a training that goes on anyway."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from rightbatch.laws.estimate import Estimate, unresolved
from rightbatch.laws.interval import accepted_ratios, student_quantile, symmetric
from rightbatch.laws.noise import MIN_GROUPS, NoiseEstimate


def group_moments(
    sizes: Sequence[float], squared_norms: Sequence[float], mean_squared: float
) -> tuple[float, float]:
    """One unbiased draw of (|G|², S) from the K micro-batches of one update, equal or not.

    S = (Σ_k b_k|g_k|² − n|ḡ|²)/(K − 1),  |G|² = |ḡ|² − S/n,  n = Σ_k b_k

    Args:
        sizes: b_k, in examples; need not be whole where losses weight them.
        squared_norms: |g_k|² of the micro-batches' mean gradients.
        mean_squared: |ḡ|² of the whole update's.

    Returns:
        |G|², negative or not, and S.

    Raises:
        ValueError: If there are fewer than two micro-batches.

    Example:
        >>> group_moments([1, 3], [4.0, 2.0], 2.0)
        (1.5, 2.0)
    """
    if len(sizes) < 2:
        raise ValueError("One gradient says nothing about noise; give at least two.")
    total = math.fsum(b * square for b, square in zip(sizes, squared_norms, strict=True))
    return summed_moments(total, len(sizes), math.fsum(sizes), mean_squared)


def summed_moments(
    weighted_squares: float, num_groups: int, num_examples: float, mean_squared: float
) -> tuple[float, float]:
    """`group_moments` from sums over the micro-batches, which is all that ranks must exchange.

    Args:
        weighted_squares: Σ_k b_k|g_k|².
        num_groups: K, at least 2.
        num_examples: n = Σ_k b_k.
        mean_squared: |ḡ|² of the whole update's.

    Returns:
        |G|², negative or not, and S.

    Example:
        >>> summed_moments(10.0, 2, 4.0, 2.0)
        (1.5, 2.0)
    """
    trace = max(weighted_squares - num_examples * mean_squared, 0.0) / (num_groups - 1)
    return mean_squared - trace / num_examples, trace


@dataclass(frozen=True, kw_only=True)
class NoiseSums:
    """Running sums over draws of (|G|², S), for a noise scale measured along the way.

    Each update of a training with accumulation or several replicas gives one draw for free. The
    sums are added; the ratio is taken last.

    Attributes:
        num_draws: Draws added.
        norm_squared: Σ |G|².
        trace: Σ S.
        norm_squared_squares: Σ (|G|²)².
        trace_squares: Σ S².
        products: Σ |G|²·S.

    Example:
        >>> sums = NoiseSums()
        >>> for norm_squared, trace in [(1.0, 4.0), (1.2, 3.8), (0.9, 4.1), (1.1, 4.0)]:
        ...     sums = sums.add(norm_squared, trace)
        >>> round(sums.estimate().noise_scale.value, 3)
        3.786
    """

    num_draws: int = 0
    norm_squared: float = 0.0
    trace: float = 0.0
    norm_squared_squares: float = 0.0
    trace_squares: float = 0.0
    products: float = 0.0

    def add(self, norm_squared: float, trace: float) -> NoiseSums:
        """The sums with one more draw.

        Args:
            norm_squared: An unbiased draw of |G|², negative or not.
            trace: An unbiased draw of S.

        Returns:
            New sums; these are left as they were.
        """
        return replace(
            self,
            num_draws=self.num_draws + 1,
            norm_squared=self.norm_squared + norm_squared,
            trace=self.trace + trace,
            norm_squared_squares=self.norm_squared_squares + norm_squared**2,
            trace_squares=self.trace_squares + trace**2,
            products=self.products + norm_squared * trace,
        )

    def estimate(self, *, method: str = "running sums") -> NoiseEstimate:
        """The noise scale of the draws so far, by Fieller's interval for a ratio of means.

        Draws are taken as independent; consecutive updates of a slow training nearly are.

        Args:
            method: Said in the estimate.

        Returns:
            Noise scale (unresolved while fewer than three draws), |G|² and S.
        """
        n = self.num_draws
        if n < MIN_GROUPS:
            nothing = unresolved(n, method)
            return NoiseEstimate(noise_scale=nothing, gradient_norm_squared=nothing, trace=nothing)
        norm_squared, trace = self.norm_squared / n, self.trace / n
        scale = n * (n - 1)
        var_norm = max(self.norm_squared_squares - n * norm_squared**2, 0.0) / scale
        var_trace = max(self.trace_squares - n * trace**2, 0.0) / scale
        covariance = (self.products - n * norm_squared * trace) / scale
        quantile = student_quantile(n - 1)
        z = quantile**2
        low, high = accepted_ratios(
            norm_squared,
            floor=z * var_norm,
            b=-2 * trace * norm_squared + 2 * z * covariance,
            c=trace**2 - z * var_trace,
        )
        return NoiseEstimate(
            noise_scale=unresolved(n, method, low=low)
            if high is None
            else Estimate(value=trace / norm_squared, low=low, high=high, n=n, method=method),
            gradient_norm_squared=symmetric(
                norm_squared, quantile * math.sqrt(var_norm), n, method
            ),
            trace=symmetric(trace, quantile * math.sqrt(var_trace), n, method),
        )
