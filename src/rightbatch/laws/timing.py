"""Step-time law t(B) = max(floor, α + βB), fitted robustly, and the step time that planning uses.

1. Timings come in *rounds*: each round times the sizes once, in random order, so that whatever
   the machine does meanwhile falls on all sizes. In logarithms a sample is
   size level + round effect + noise; alternating medians (Tukey's median polish) separate them,
   so neither a drifting machine nor single outliers tilt the law, even when dear sizes were
   timed in fewer rounds.
2. The law is fitted to the size levels in relative error, with Huber's weights: a microsecond
   matters at B = 1 and not at B = 4096. The floor is kept only if it explains the sizes better
   than its extra parameter costs (Bayesian information criterion).
3. Intervals: the size levels are redrawn with their measurement error *and* the law's own misfit,
   and the law is fitted again. A law that a kinked curve does not follow has wide intervals.
4. Real curves are kinked (caches, vector widths, thread hand-over). `StepTime.seconds` therefore
   goes through the measured levels, as far as they leave the law by more than noise, and follows
   the law between and beyond them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rightbatch.errors import UsageError
from rightbatch.laws.affine import (
    FloorFit,
    fit_affine,
    fit_floor_law,
    floor_level,
    redraw_levels,
    shrink_residuals,
)
from rightbatch.laws.estimate import Estimate, unresolved
from rightbatch.laws.rounds import SizeLevels, estimate_size_levels, student_95

Array = NDArray[np.float64]

_MISFIT_WORTH_SAYING = 0.05


@dataclass(frozen=True, kw_only=True)
class SizeTime:
    """The measured time of one size.

    Attributes:
        micro_batch: Examples in the step.
        seconds: Median over rounds, the rounds' common ups and downs taken out.
        low: Lower end of its 95 % interval.
        high: Upper end of its 95 % interval.
        n: Rounds it was timed in.
    """

    micro_batch: int
    seconds: float
    low: float
    high: float
    n: int


@dataclass(frozen=True, kw_only=True)
class StepTimeLaw:
    """t(B) = max(floor, α + βB).

    Attributes:
        alpha_seconds: α, what a step costs whatever its size.
        beta_seconds: β, what each further example costs.
        floor_seconds: Latency below which no step gets; unresolved where the sizes show none.
        knee: The batch at half of the greatest throughput 1/β, beyond which throughput soon stops
            growing: α/β, or floor/2β where the floor is higher than 2α. Its value is None when
            the time does not grow with the batch; `high` is None when that cannot be excluded.
        misfit: Largest relative error of the law at a measured size.
        note: The misfit in words; empty when the law fits.
    """

    alpha_seconds: Estimate
    beta_seconds: Estimate
    floor_seconds: Estimate
    knee: Estimate
    misfit: float
    note: str = ""

    def predict(self, micro_batch: float) -> float:
        """Seconds of a step with `micro_batch` examples, by the law alone."""
        alpha = self.alpha_seconds.value or 0.0
        beta = self.beta_seconds.value or 0.0
        return max(self.floor_seconds.value or 0.0, alpha + beta * micro_batch)


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """Seconds of a step at any size: measured where measured, by the law elsewhere.

    t(B) = law(B) · ρ(B), with ρ the ratio of measured to lawful time: at each measured size the
    measured one (shrunk towards 1 as far as noise explains it), between them interpolated in
    log B, beyond them that of the nearest.

    Attributes:
        law: The fitted law.
        micro_batches: The measured sizes, ascending.
        ratios: ρ at each.
        update_seconds: The part of a step that is the optimizer's update.
    """

    law: StepTimeLaw
    micro_batches: tuple[int, ...]
    ratios: tuple[float, ...]
    update_seconds: float = 0.0

    def seconds(self, micro_batch: float, *, accumulation: int = 1) -> float:
        """Seconds of one update: `accumulation` micro-batches, then the optimizer.

        Args:
            micro_batch: Examples in one forward and backward pass.
            accumulation: Micro-batches before the update.

        Returns:
            Seconds.

        Raises:
            UsageError: If a number is below 1.
        """
        if micro_batch < 1 or accumulation < 1:
            raise UsageError(
                f"micro_batch is {micro_batch} and accumulation {accumulation}; both must be at "
                "least 1."
            )
        log_ratio = np.interp(
            math.log(micro_batch), np.log(self.micro_batches), np.log(self.ratios)
        )
        step = self.law.predict(micro_batch) * math.exp(float(log_ratio))
        return accumulated_seconds(step, accumulation, self.update_seconds)


@dataclass(frozen=True, kw_only=True)
class StepTimeFit:
    """What the timings say: each size, the law, and the step time built from both."""

    sizes: tuple[SizeTime, ...]
    law: StepTimeLaw
    step_time: StepTime


def accumulated_seconds(step_seconds: float, accumulation: int, update_seconds: float) -> float:
    """Time of an update that accumulates: k·(t − u) + u, with t a whole step and u its update.

    Args:
        step_seconds: t, one step of one micro-batch, update included.
        accumulation: k, micro-batches per update.
        update_seconds: u, the optimizer's part of a step.

    Returns:
        Seconds per update.

    Example:
        >>> accumulated_seconds(1.0, 4, 0.25)
        3.25
    """
    update = min(update_seconds, step_seconds)
    return accumulation * (step_seconds - update) + update


def replicated_seconds(
    compute_seconds: float, network_seconds: float, *, overlap: float = 1.0
) -> float:
    """Time of a data-parallel step: (T_c^γ + T_n^γ)^{1/γ}.

    γ = 1 adds the times (nothing overlaps); γ → ∞ takes the larger one (everything overlaps).

    Args:
        compute_seconds: T_c, forward, backward and update on one replica.
        network_seconds: T_n, the gradient exchange.
        overlap: γ, at least 1.

    Returns:
        Seconds per step.

    Raises:
        UsageError: If γ is below 1 or a time is negative.

    Example:
        >>> replicated_seconds(3.0, 4.0), replicated_seconds(3.0, 4.0, overlap=2.0)
        (7.0, 5.0)

    References:
        The form is Pollux's (Qiao et al. 2021).
    """
    if not overlap >= 1:
        raise UsageError(f"overlap is {overlap}; it must be at least 1 (no overlap).")
    longer = max(compute_seconds, network_seconds)
    shorter = min(compute_seconds, network_seconds)
    if shorter < 0:
        raise UsageError(f"A time is {shorter} s; times cannot be negative.")
    if longer == 0 or math.isinf(overlap):
        return longer
    return longer * (1 + (shorter / longer) ** overlap) ** (1 / overlap)


def fit_step_time(
    micro_batches: ArrayLike,
    seconds: ArrayLike,
    rounds: ArrayLike,
    *,
    update_seconds: float = 0.0,
    num_draws: int = 400,
    seed: int = 0,
) -> StepTimeFit:
    """Fits the step-time law to timings taken in rounds.

    Args:
        micro_batches: Examples in each timed step, shape (samples,).
        seconds: Seconds of each, shape (samples,).
        rounds: The round each belongs to, shape (samples,).
        update_seconds: The optimizer's part of a step, for accumulation.
        num_draws: Redraws for the intervals.
        seed: Of the redraws.

    Returns:
        Sizes, law and step time. With a single size the law is a constant and β is unresolved.

    Raises:
        UsageError: If there are no samples, or some are not positive finite numbers.

    Example:
        >>> B = [1, 2, 4, 8] * 3
        >>> fit = fit_step_time(B, [2 + 0.5 * b for b in B], [0] * 4 + [1] * 4 + [2] * 4)
        >>> round(fit.law.alpha_seconds.value, 6), round(fit.law.beta_seconds.value, 6)
        (2.0, 0.5)
        >>> round(fit.law.knee.value, 6)
        4.0
    """
    levels = estimate_size_levels(micro_batches, seconds, rounds)
    fitted = fit_floor_law(levels)
    law = _law_with_intervals(levels, fitted, num_draws, np.random.default_rng(seed))
    step_time = StepTime(
        law=law,
        micro_batches=tuple(int(b) for b in levels.sizes),
        ratios=tuple(float(r) for r in np.exp(shrink_residuals(levels, fitted))),
        update_seconds=update_seconds,
    )
    return StepTimeFit(sizes=_size_times(levels), law=law, step_time=step_time)


def _law_with_intervals(
    levels: SizeLevels, fitted: FloorFit, num_draws: int, rng: np.random.Generator
) -> StepTimeLaw:
    n = int(levels.counts.sum())
    logs, common = redraw_levels(levels, fitted, num_draws, rng)
    k = fitted.num_floored
    variance = levels.variance + fitted.misfit_variance + 1e-12
    alphas, betas = fit_affine(levels.sizes[k:], logs[:, k:], variance[k:])
    floors = floor_level(logs, variance, k) if k else np.zeros(num_draws)
    level = np.exp(common)
    method = f"Huber fit to {len(levels.sizes)} sizes, redrawn"
    one_size = len(levels.sizes) == 1
    misfit = float(np.max(np.abs(np.expm1(-fitted.residuals))))
    return StepTimeLaw(
        alpha_seconds=_interval(fitted.alpha, alphas * level, n, method),
        beta_seconds=unresolved(n, "one size only")
        if one_size
        else _interval(fitted.beta, betas * level, n, method),
        floor_seconds=_interval(fitted.floor, floors * level, n, method)
        if k
        else unresolved(n, "no floor seen"),
        knee=unresolved(n, "one size only")
        if one_size
        else _knee(fitted, alphas, betas, floors, n, method),
        misfit=misfit,
        note=_misfit_note(levels, fitted, misfit),
    )


def _interval(value: float, draws: Array, n: int, method: str) -> Estimate:
    low, high = (float(q) for q in np.quantile(draws, (0.025, 0.975)))
    return Estimate(value=value, low=min(low, value), high=max(high, value), n=n, method=method)


def _knee(
    fitted: FloorFit, alphas: Array, betas: Array, floors: Array, n: int, method: str
) -> Estimate:
    """B at half the greatest throughput: the root of 2βB = max(floor, α + βB)."""
    with np.errstate(divide="ignore"):
        draws = np.maximum(alphas, floors / 2) / betas
    low, high = (float(q) for q in np.quantile(draws, (0.025, 0.975), method="nearest"))
    finite_low = low if math.isfinite(low) else None
    if fitted.beta == 0:
        return unresolved(n, "the time does not grow with the batch", low=finite_low)
    value = max(fitted.alpha, fitted.floor / 2) / fitted.beta
    return Estimate(
        value=value,
        low=min(low, value),
        high=max(high, value) if math.isfinite(high) else None,
        n=n,
        method=method,
    )


def _misfit_note(levels: SizeLevels, fitted: FloorFit, misfit: float) -> str:
    worst = int(np.argmax(np.abs(fitted.residuals)))
    noise = math.sqrt(float(levels.variance[worst]))
    if misfit < _MISFIT_WORTH_SAYING or abs(float(fitted.residuals[worst])) < 3 * noise:
        return ""
    side = "more" if fitted.residuals[worst] > 0 else "less"
    percent = abs(math.expm1(float(fitted.residuals[worst])))
    return (
        f"The law misfits: micro-batch {int(levels.sizes[worst])} takes {percent:.0%} {side} time "
        "than α + βB. Measured times are used where there are any."
    )


def _size_times(levels: SizeLevels) -> tuple[SizeTime, ...]:
    return tuple(_size_time(levels, i) for i in range(len(levels.sizes)))


def _size_time(levels: SizeLevels, i: int) -> SizeTime:
    half_width = student_95(float(levels.dof[i])) * math.sqrt(
        float(levels.variance[i]) + levels.common_variance
    )
    seconds = math.exp(float(levels.logs[i]))
    return SizeTime(
        micro_batch=int(levels.sizes[i]),
        seconds=seconds,
        low=seconds * math.exp(-half_width),
        high=seconds * math.exp(half_width),
        n=int(levels.counts[i]),
    )


def powers_of_two(limit: int) -> Sequence[int]:
    """1, 2, 4, … and the limit itself.

    Args:
        limit: Largest size.

    Returns:
        The sizes, ascending.

    Example:
        >>> powers_of_two(24)
        [1, 2, 4, 8, 16, 24]
    """
    sizes = [1 << k for k in range(limit.bit_length()) if 1 << k <= limit]
    return sizes if sizes and sizes[-1] == limit else [*sizes, limit]
