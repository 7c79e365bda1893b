"""What a few measured step ratios say of the critical batch, and of steps at every other batch.

The hyperbola S(B) = S_min (1 + B_c/B), the learning rate retuned at each B, has one unknown when
steps are counted against those at one batch. Its posterior is kept on a grid of ln B_c, so it is
exact and the same bit for bit. The hyperbola is a good first guess and no law of nature
(science.md 3.3): a size that was measured is allowed to depart from it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

USUAL = {"plain": 100.0, "averaging": 300.0}
"""Before anything is measured: plain SGD, and optimizers that average gradients over steps
(momentum, Adam), which carry on to larger batches (Zhang et al. 2019)."""
_SPREAD = 1.0
"""Standard deviation of ln B_c around the usual one: reported workloads go from 20 to 900."""
MISFIT = 0.2
"""How far a size is off the hyperbola, standard deviation of ln steps."""
_GRID = np.linspace(math.log(2.0), math.log(20_000.0), 400)


@dataclass(frozen=True, kw_only=True)
class MeasuredSize:
    """Steps at one batch over those at the reference, to the same loss.

    Attributes:
        global_batch: The batch.
        log_ratio: ln of the ratio.
        deviation: Its standard deviation.
    """

    global_batch: int
    log_ratio: float
    deviation: float


@dataclass(frozen=True)
class CriticalBatch:
    """The posterior of ln B_c on its grid.

    Attributes:
        ln_batch: Grid, shape (points,).
        weight: Sums to 1, shape (points,).
    """

    ln_batch: Array
    weight: Array

    @property
    def median(self) -> float:
        """Geometric middle of the posterior, in examples."""
        return self.quantile(0.5)

    def quantile(self, share: float) -> float:
        """The critical batch below which this share of the posterior lies."""
        return float(np.exp(np.interp(share, np.cumsum(self.weight), self.ln_batch)))

    def log_steps(self, batch: float, reference: float) -> float:
        """Expected ln S(batch)/S(reference)."""
        return float((self.weight * _log_steps(self.ln_batch, batch, reference)).sum())

    def draw(self, num_draws: int, rng: np.random.Generator) -> Array:
        """Draws of ln B_c, shape (num_draws,)."""
        return rng.choice(self.ln_batch, size=num_draws, p=self.weight)


def _log_steps(ln_critical: Array, batch: float, reference: float) -> Array:
    return np.logaddexp(0.0, ln_critical - math.log(batch)) - np.logaddexp(
        0.0, ln_critical - math.log(reference)
    )


def infer_critical_batch(
    measured: Sequence[MeasuredSize],
    reference: int,
    *,
    usual: float,
) -> CriticalBatch:
    """The posterior of the critical batch, given step ratios.

    Args:
        measured: Ratios against the reference batch; those at the reference tell nothing.
        reference: The batch they are counted against.
        usual: Median of the prior, in examples.

    Returns:
        The posterior.

    Example:
        >>> ratio = math.log((1 + 64 / 256) / (1 + 64 / 64))
        >>> seen = MeasuredSize(global_batch=256, log_ratio=ratio, deviation=0.01)
        >>> bool(40 < infer_critical_batch([seen], 64, usual=100).median < 150)
        True
    """
    density = -0.5 * ((_GRID - math.log(usual)) / _SPREAD) ** 2
    for size in measured:
        predicted = _log_steps(_GRID, size.global_batch, reference)
        deviation = math.hypot(size.deviation, MISFIT / 2)
        density = density - 0.5 * ((size.log_ratio - predicted) / deviation) ** 2
    weight = np.exp(density - density.max())
    return CriticalBatch(_GRID, weight / weight.sum())


def draw_log_steps(
    measured: Sequence[MeasuredSize],
    reference: int,
    sizes: Sequence[int],
    *,
    usual: float,
    num_draws: int = 2000,
    seed: int = 0,
) -> Array:
    """Draws of ln S(B)/S(reference) for every size.

    A size that was measured is its hyperbola and its measurement, weighed by their precision; one
    that was not departs from the hyperbola the more, the further it is from a measured one.

    Args:
        measured: Ratios against the reference.
        reference: The batch they are counted against.
        sizes: The batches asked for.
        usual: Median of the prior of the critical batch, in examples.
        num_draws: How many.
        seed: Of the draws.

    Returns:
        Shape (num_draws, sizes); 0 at the reference.
    """
    rng = np.random.default_rng((seed, 2))
    posterior = infer_critical_batch(measured, reference, usual=usual)
    ln_critical = posterior.draw(num_draws, rng)
    known = {size.global_batch: size for size in measured}
    columns: list[Array] = []
    for size in sizes:
        by_law = _log_steps(ln_critical, size, reference)
        noise = rng.standard_normal(num_draws)
        if size == reference:
            columns.append(np.zeros(num_draws))
        elif size in known:
            own = known[size]
            precision = own.deviation**-2 + MISFIT**-2
            mean = (own.log_ratio * own.deviation**-2 + by_law * MISFIT**-2) / precision
            columns.append(mean + noise * precision**-0.5)
        else:
            near = min(abs(math.log2(size / k)) for k in (reference, *known))
            columns.append(by_law + noise * MISFIT * min(1.0, near / 2))
    return np.stack(columns, axis=1)
