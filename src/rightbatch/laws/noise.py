"""Gradient noise: how much of a batch's gradient is signal.

With g_i the gradient of one example, G = E g_i and Σ = cov(g_i), a batch of B examples has

    E|g_B|² = |G|² + S/B,    S = tr Σ,    B_simple = S/|G|²

(McCandlish, Kaplan, Amodei et al. 2018, "An Empirical Model of Large-Batch Training", eq. 2.9 and
appendix A.1). B_simple is where signal and noise are equal. It is a guide to the critical batch,
of the right order, and not the same thing.

Both |G|² and S are estimated without bias and the ratio is taken last: a ratio of averages, not an
average of ratios. Small samples often cannot tell |G|² from 0. Then the noise scale is
*unresolved*: it has a lower bound and no value. It is never clamped to something that looks fine.

A training set of N examples is a finite population. Drawn without replacement,

    var(g_B) = S (1/B − 1/N),    so    |G_N|² = |g_B|² − S (1/B − 1/N),

and at B = N the answer is exact. Forgetting 1/N estimates |G_N|² − S/N instead.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rightbatch.laws.estimate import Estimate, unresolved
from rightbatch.laws.interval import accepted_ratios, student_quantile, symmetric

Array = NDArray[np.float64]

RESOLUTION = 1e-12
"""|G|² below this share of S is rounding of single-precision gradients, whatever the sample."""
_CLEAR = 2.0
"""Standard errors of |G|² at which a gradient stands out half clearly."""
MIN_GROUPS = 3
"""Micro-batches without which no interval can be given."""


@dataclass(frozen=True, kw_only=True)
class NoiseEstimate:
    """The noise scale and what it is made of.

    Attributes:
        noise_scale: B_simple = S/|G|², in examples; None as value when |G|² cannot be told from 0.
        gradient_norm_squared: |G|², unbiased, so it may be negative when unresolved.
        trace: S = tr Σ.
    """

    noise_scale: Estimate
    gradient_norm_squared: Estimate
    trace: Estimate


@dataclass(frozen=True, kw_only=True, eq=False)
class GradientSample:
    """What is kept of a sample of gradients: numbers, not the gradients themselves.

    The sample is cut into K groups (micro-batches). Without `squared_sums` only the groups' mean
    gradients are known; with them the form is the per-example one, which has the least variance.

    Attributes:
        sizes: b_k, the examples in each group, shape (K,).
        gram: Inner products g_k·g_l of the groups' mean gradients, shape (K, K).
        squared_sums: Σ |g_i|² over the examples of each group, shape (K,); None where the
            gradient of a single example is not defined.
        population: N, when the examples were drawn without replacement from N and the gradient of
            those N is meant; None when they stand for an endless stream.
        mean_norm_squared: |ḡ|² where it is known better than from `gram` (which may come from a
            random projection).
    """

    sizes: Array
    gram: Array
    squared_sums: Array | None = None
    population: int | None = None
    mean_norm_squared: float | None = None

    def __post_init__(self) -> None:
        groups = len(self.sizes)
        if self.gram.shape != (groups, groups):
            raise ValueError(
                f"gram has shape {self.gram.shape} for {groups} groups; make it ({groups}, "
                f"{groups})."
            )
        if self.squared_sums is not None and self.squared_sums.shape != (groups,):
            raise ValueError(
                f"squared_sums has shape {self.squared_sums.shape} for {groups} groups; make it "
                f"({groups},)."
            )
        if groups and float(np.min(self.sizes)) < 1:
            raise ValueError(f"A group has {np.min(self.sizes):g} examples; each needs at least 1.")
        if self.population is not None and self.population < self.num_examples:
            raise ValueError(
                f"{self.num_examples} examples cannot be drawn without replacement from "
                f"{self.population}. Pass the size of the set they were drawn from."
            )

    @property
    def num_examples(self) -> int:
        """Examples in the sample, n."""
        return round(float(np.sum(self.sizes)))

    @property
    def sampling_factor(self) -> float:
        """F with var(ḡ) = S·f: 1/n − 1/N, or 1/n without a population."""
        whole = 0.0 if self.population is None else 1 / self.population
        return 1 / self.num_examples - whole


def make_gradient_sample(
    gradients: ArrayLike,
    *,
    sizes: Sequence[int] | None = None,
    per_example: bool = False,
    population: int | None = None,
) -> GradientSample:
    """Summarises gradients that are all at hand (small models, tests).

    Args:
        gradients: Mean gradient of each micro-batch, shape (K, D).
        sizes: Examples in each micro-batch, length K. Default: 1 each.
        per_example: Whether rows are single examples, so that their squared norms may be used.
        population: N when drawn without replacement.

    Returns:
        The sample.

    Raises:
        ValueError: If `per_example` is given with sizes other than 1.
    """
    rows = np.asarray(gradients, dtype=float)
    counts = np.ones(len(rows)) if sizes is None else np.asarray(sizes, dtype=float)
    if per_example and np.any(counts != 1):
        raise ValueError("per_example needs groups of one example each; leave sizes out.")
    gram = rows @ rows.T
    return GradientSample(
        sizes=counts,
        gram=gram,
        squared_sums=np.diagonal(gram).copy() if per_example else None,
        population=population,
    )


def two_batch_moments(
    small_norm_squared: ArrayLike,
    big_norm_squared: ArrayLike,
    *,
    small_batch: float,
    big_batch: float,
) -> tuple[Array, Array]:
    """Unbiased |G|² and S from the squared gradient norms of two batch sizes.

    |G|² = (B_b|g_b|² − B_s|g_s|²)/(B_b − B_s),  S = (|g_s|² − |g_b|²)/(1/B_s − 1/B_b)

    (McCandlish et al. 2018, eq. A.2 and A.3). The small norm is to be averaged over *all* the
    micro-batches at hand, not taken from the last one. Average both results over many draws before
    dividing them.

    Args:
        small_norm_squared: |g_s|², any shape.
        big_norm_squared: |g_b|², the same shape.
        small_batch: B_s.
        big_batch: B_b > B_s.

    Returns:
        |G|² and S, each of the shape given; single draws may be negative.

    Raises:
        ValueError: If `big_batch` is not above `small_batch`.

    Example:
        >>> g, s = two_batch_moments(5.0, 1.5, small_batch=1, big_batch=8)
        >>> float(g), float(s)
        (1.0, 4.0)
    """
    if not big_batch > small_batch > 0:
        raise ValueError(
            f"Two batch sizes are needed, the second larger; got {small_batch} and {big_batch}."
        )
    small, big = np.asarray(small_norm_squared, float), np.asarray(big_norm_squared, float)
    norm_squared = (big_batch * big - small_batch * small) / (big_batch - small_batch)
    trace = (small - big) / (1 / small_batch - 1 / big_batch)
    return norm_squared, trace


def micro_batch_moments(sample: GradientSample) -> tuple[float, float]:
    """Unbiased |G|² and S from K micro-batches, equal or not.

    S = Σ_k b_k|g_k − ḡ|²/(K − 1), or Σ_i|g_i − ḡ|²/(n − 1) where single examples are known;
    |G|² = |ḡ|² − S(1/n − 1/N), with ḡ the mean over all n examples.

    Args:
        sample: The sample, of at least two micro-batches.

    Returns:
        |G|² and S.

    Raises:
        ValueError: If there are fewer than two micro-batches (or two examples).
    """
    mean_squared = _mean_norm_squared(sample)
    if sample.squared_sums is not None:
        total, freedom = float(np.sum(sample.squared_sums)), sample.num_examples - 1
    else:
        total = float(np.sum(sample.sizes * np.diagonal(sample.gram)))
        freedom = len(sample.sizes) - 1
    if freedom < 1:
        raise ValueError("One gradient says nothing about noise; give at least two.")
    trace = max(total - sample.num_examples * mean_squared, 0.0) / freedom
    return mean_squared - trace * sample.sampling_factor, trace


def _mean_norm_squared(sample: GradientSample) -> float:
    if sample.mean_norm_squared is not None:
        return sample.mean_norm_squared
    weights = sample.sizes / np.sum(sample.sizes)
    return float(weights @ sample.gram @ weights)


@dataclass(frozen=True, kw_only=True)
class _Spread:
    """What the interval needs besides |G|² and S.

    Var(Ĝ²) = 4|G|²·along·f + 2·square·f² + f²·trace_variance.
    """

    along: float
    """σ_∥² = GᵀΣG/|G|², the noise along the gradient."""
    square: float
    """Tr Σ²."""
    trace_variance: float
    """Var(Ŝ)."""
    covariance: float
    """Cov(Ŝ, Ĝ²)."""


def _spread(sample: GradientSample, trace: float) -> _Spread:
    sizes, gram, n = sample.sizes, sample.gram, sample.num_examples
    groups, factor = len(sizes), sample.sampling_factor
    # Projections on the mean of the *other* groups; with the group itself in it, its own noise
    # would look like signal.
    onto_mean = gram @ sizes / n
    outside = (n * onto_mean - sizes * np.diagonal(gram)) / (n - sizes)
    centred = outside - np.average(outside, weights=sizes)
    mean_squared = float(sizes @ gram @ sizes) / n**2
    square = max(_trace_of_square(gram, sizes), 0.0)
    along = _noise_along(
        float(np.sum(sizes * centred**2)) / (groups - 1),
        mean_squared=mean_squared,
        expected_noise=trace * factor,
        square=square * factor,
        pure_noise=2 * square * factor**2,
        groups=groups,
    )
    if sample.squared_sums is not None:
        pieces = sample.squared_sums / sizes - 2 * onto_mean + mean_squared
        weights, drawn = sizes / np.mean(sizes), n * factor  # n·f = 1 − n/N
    else:
        pieces = sizes * (np.diagonal(gram) - 2 * onto_mean + mean_squared)
        # The random cut into micro-batches leaves noise in S even when the whole set was used.
        weights, drawn = np.ones(groups), 1.0
    deviations = weights * (pieces - np.average(pieces, weights=weights))
    trace_variance = float(np.sum(deviations**2)) / (groups - 1) / groups * drawn
    shared = float(np.sum(deviations * 2 * centred)) / (groups - 1) / groups * n * factor
    # |g − ḡ|² and g·ḡ share the noise of ḡ, which would show as a covariance of −4 tr Σ²/n.
    shared += 4 * square * factor / (groups if sample.squared_sums is None else n)
    # No larger than two variances allow at the point estimate, or the interval could be empty.
    norm_squared = mean_squared - trace * factor
    fixed = 2 * square * factor**2 + factor**2 * trace_variance
    norm_variance = 4 * max(norm_squared, 0.0) * along * factor + fixed
    bound = math.sqrt(norm_variance * trace_variance)
    return _Spread(
        along=along,
        square=square,
        trace_variance=trace_variance,
        covariance=min(max(shared - factor * trace_variance, -bound), bound),
    )


def _noise_along(
    projected: float,
    *,
    mean_squared: float,
    expected_noise: float,
    square: float,
    pure_noise: float,
    groups: int,
) -> float:
    """σ_∥², the noise along the gradient, whether or not the gradient is resolved.

    The variance of the projections on ḡ is |G|²σ_∥² + tr(Σ²)f, and |ḡ|² is |G|² + S·f. Their
    quotient is positive always; where the gradient is lost it is the mean noise of a direction that
    noise chose. Where the gradient stands out, the noise is taken out of both, which matters: in
    trained networks the gradient often points where there is little noise.

    Args:
        projected: Variance of the projections of single gradients on ḡ.
        mean_squared: |ḡ|².
        expected_noise: S·f.
        square: tr(Σ²)·f.
        groups: K.
        pure_noise: 2 tr(Σ²)f², the variance of Ĝ² where G = 0.

    Returns:
        σ_∥² ≥ 0.
    """
    # A mean gradient much shorter than chance makes it would blow the quotient up.
    scale = max(mean_squared, expected_noise / 2)
    if scale <= 0:
        return 0.0
    blended = projected / scale
    signal = mean_squared - expected_noise
    if signal <= 0:
        return blended
    # One standard error up: a difference of two near numbers would otherwise often be too small.
    upper = projected * (1 + math.sqrt(2 / (groups - 1)))
    corrected = max(upper - square, 0.0) / signal
    # How clearly the gradient stands out, against the variance of Ĝ² without any.
    clear = signal**2 / (signal**2 + _CLEAR**2 * pure_noise)
    return clear * corrected + (1 - clear) * blended


def _trace_of_square(gram: Array, sizes: Array) -> float:
    """Unbiased tr Σ² from inner products of distinct groups only (Chen and Qin 2010, sec. 3).

    With √b_k g_k the noise of each group has covariance Σ; sums run over distinct indices, so
    heavy tails of single gradients do not enter.

    Args:
        gram: Inner products of the groups' mean gradients, shape (K, K).
        sizes: b_k, shape (K,).

    Returns:
        tr Σ², which may come out negative; of fewer than four groups, its largest value (tr Σ)².
    """
    groups = len(sizes)
    if groups < 4:
        return float(np.sum(np.diagonal(gram) * sizes)) ** 2
    root = np.sqrt(sizes)
    # Centring first loses little and keeps the differences below from cancelling when the signal
    # is much larger than the noise.
    centre = gram @ sizes / np.sum(sizes)
    both = gram - centre[:, None] - centre[None, :] + float(sizes @ centre) / np.sum(sizes)
    product = both * root[:, None] * root[None, :]
    np.fill_diagonal(product, 0.0)
    rows = product.sum(axis=1)
    pair, chain, whole = float(np.sum(product**2)), float(np.sum(rows**2)), float(rows.sum()) ** 2
    two = groups * (groups - 1)
    three = two * (groups - 2)
    four = three * (groups - 3)
    return pair / two - 2 * (chain - pair) / three + (whole - 4 * chain + 2 * pair) / four


def estimate_noise_scale(sample: GradientSample, *, method: str = "") -> NoiseEstimate:
    """B_simple with a 95 % interval that is honest when the gradient drowns in noise.

    A noise scale x is kept when the data do not reject S − x|G|² = 0 (Fieller 1954). The variance
    is that under x, not the one at the point estimate (Wilson 1927): with γ = S/x,

        var(Ĝ² | γ) = 4γσ_∥²f + 2 tr(Σ²) f² + f² var(Ŝ),    f = 1/n − 1/N.

    The kept x solve a quadratic inequality. When they have no upper end, |G|² cannot be told from
    0 and the value is None.

    Args:
        sample: The sample, of at least `MIN_GROUPS` micro-batches.
        method: Said in the estimate. Default: which form was used.

    Returns:
        Noise scale, |G|² and S, each with its interval.

    Raises:
        ValueError: If there are fewer than `MIN_GROUPS` micro-batches.

    Example:
        >>> import numpy as np
        >>> draws = np.random.default_rng(0).normal(loc=1.0, scale=2.0, size=(500, 20))
        >>> estimate = estimate_noise_scale(make_gradient_sample(draws, per_example=True))
        >>> estimate.noise_scale.low < 4.0 < estimate.noise_scale.high
        True
    """
    groups = len(sample.sizes)
    if groups < MIN_GROUPS:
        raise ValueError(
            f"{groups} micro-batches cannot give an interval; use at least {MIN_GROUPS}."
        )
    if not method:
        method = "micro-batches" if sample.squared_sums is None else "per-example"
    norm_squared, trace = micro_batch_moments(sample)
    spread = _spread(sample, trace)
    quantile = student_quantile(groups - 1)
    factor, n = sample.sampling_factor, sample.num_examples
    noise = 2 * spread.square * factor**2 + factor**2 * spread.trace_variance
    z = quantile**2
    low, high = accepted_ratios(
        norm_squared,
        floor=z * noise + (RESOLUTION * trace) ** 2,
        b=-2 * trace * norm_squared
        + 2 * z * spread.covariance
        - 4 * z * trace * spread.along * factor,
        c=trace**2 - z * spread.trace_variance,
    )
    if trace == 0 and norm_squared > 0:
        low, high = 0.0, 0.0
    if high is None:
        scale = unresolved(n, method, low=low)
    else:
        scale = Estimate(value=trace / norm_squared, low=low, high=high, n=n, method=method)
    # The same with γ in place of S/x: γ² − 2γ(Ĝ² + 2zσ_∥²f) + Ĝ⁴ − z·noise ≤ 0.
    middle = norm_squared + 2 * z * spread.along * factor
    root = math.sqrt(max(middle**2 - norm_squared**2 + z * noise, 0.0))
    return NoiseEstimate(
        noise_scale=scale,
        gradient_norm_squared=Estimate(
            value=norm_squared, low=middle - root, high=middle + root, n=n, method=method
        ),
        trace=symmetric(trace, quantile * math.sqrt(spread.trace_variance), n, method),
    )
