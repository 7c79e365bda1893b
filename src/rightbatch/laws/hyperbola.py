"""Steps and examples against batch size: the hyperbola, its interval, and where it fails.

With the learning rate retuned at each batch, training to a target takes about

    S(B) = S_min (1 + B_c/B) steps,    E(B) = B·S(B) = E_min (1 + B/B_c) examples,

with B_c = E_min/S_min the critical batch: there, steps are twice the fewest and examples twice the
fewest (McCandlish et al. 2018, eq. 5.1). The hyperbola is an approximation that fails in some
cases known exactly: S ∝ 1/ln(1 + B/(d + 1)) never levels off. The fit says so when it does not
describe the data, and says that there is no critical batch when the data show none.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import special  # pyright: ignore[reportMissingTypeStubs]

from rightbatch.laws.estimate import Estimate
from rightbatch.laws.interval import student_quantile

Array = NDArray[np.float64]

MIN_SIZES = 3
"""Batch sizes that met the target without which no hyperbola is fitted."""
SIDE = 8.0
"""How far the sizes must reach on each side of the critical batch, as a factor."""
RESAMPLES = 400
"""Bootstrap samples behind an interval."""
MATERIAL_MISFIT = 0.05
"""A misfit below this share of the steps does not matter, however clear it is."""
_EM_ROUNDS = 200
_BEYOND = 100.0
"""How far beyond the sizes tried a critical batch is looked for. Further out is 'none found'."""


@dataclass(frozen=True, kw_only=True)
class StepsToTarget:
    """How many steps one training took to the target.

    Attributes:
        global_batch: B.
        steps: Steps to the target; where it was missed, the steps after which it was given up.
        missed: Whether the target was missed: it takes *more* than `steps`.
    """

    global_batch: float
    steps: float
    missed: bool = False

    def __post_init__(self) -> None:
        if not (self.global_batch > 0 and self.steps > 0 and math.isfinite(self.steps)):
            raise ValueError(
                f"A training of {self.steps} steps at batch {self.global_batch} cannot be fitted; "
                "both must be positive and finite. A missed target is steps=limit, missed=True."
            )


@dataclass(frozen=True, kw_only=True)
class HyperbolaFit:
    """S(B) = S_min(1 + B_c/B), fitted.

    Attributes:
        critical_batch: B_c, where steps are twice the fewest. Value None: none was found; `low`
            or `high` then say beyond what it lies, where that much is known.
        min_steps: S_min; value None when steps still fall in proportion to 1/B.
        min_examples: E_min = S_min·B_c; value None when steps do not depend on B.
        relative_error: Root mean square of ln S about the fit.
        describes_data: Whether the hyperbola is good enough; False when the data clearly and
            materially bend in another way.
        warnings: What a reader has to know, in sentences.
    """

    critical_batch: Estimate
    min_steps: Estimate
    min_examples: Estimate
    relative_error: float
    describes_data: bool
    warnings: tuple[str, ...]

    def steps(self, global_batch: float) -> float | None:
        """The fitted S(B).

        Args:
            global_batch: B.

        Returns:
            Steps; None when no critical batch was found.
        """
        return hyperbola_steps(
            global_batch,
            min_steps=self.min_steps.value,
            critical_batch=self.critical_batch.value,
        )


def hyperbola_steps(
    global_batch: float, *, min_steps: float | None, critical_batch: float | None
) -> float | None:
    """S(B) = S_min(1 + B_c/B).

    Args:
        global_batch: B.
        min_steps: S_min.
        critical_batch: B_c.

    Returns:
        Steps; None when either number is None.
    """
    if min_steps is None or critical_batch is None:
        return None
    return min_steps * (1 + critical_batch / global_batch)


def fit_hyperbola(observations: Sequence[StepsToTarget], *, seed: int = 0) -> HyperbolaFit:
    """Fits S(B) = S_min(1 + B_c/B) to trainings, in logarithms.

    Errors of ln S are taken as alike at all B. A missed target counts as 'more than': its ln S is
    replaced by the mean of the normal distribution above the limit, in turn with the fit (the EM
    form of Tobin's censored regression). The interval is a bootstrap of the residuals, enlarged by
    √(n/(n − 2)) for the two parameters fitted and by Student's t over 1.96.

    Args:
        observations: Trainings, with the learning rate retuned at each batch; several per batch
            (seeds) are welcome.
        seed: Of the bootstrap.

    Returns:
        The fit, which may be that there is no critical batch in sight.

    Raises:
        ValueError: If fewer than `MIN_SIZES` batch sizes met the target.

    Example:
        >>> runs = [StepsToTarget(global_batch=2**k, steps=10 * (1 + 64 / 2**k)) for k in range(13)]
        >>> round(fit_hyperbola(runs).critical_batch.value, 3)
        64.0
    """
    data = _Data.of(observations)
    grid = np.linspace(
        math.log(data.batches.min() / _BEYOND),
        math.log(data.batches.max() * _BEYOND),
        401,
    )
    curves = np.log1p(np.exp(grid[:, None] - data.log_batch[None, :]))
    central = _fit_grid(data.log_steps[None, :], data.limit[None, :], curves)
    samples, limits = _resample(data, central, curves, np.random.default_rng(seed))
    boot = _fit_grid(samples, limits, curves)
    misfit = _misfit(data, central.filled[0], central.losses[0], grid, curves)
    return _summarise(data, grid, central, boot, misfit)


@dataclass(frozen=True, kw_only=True)
class _Data:
    batches: Array
    log_batch: Array
    log_steps: Array
    limit: Array
    """ln of the limit where missed, −∞ where met."""

    @staticmethod
    def of(observations: Sequence[StepsToTarget]) -> _Data:
        met = {o.global_batch for o in observations if not o.missed}
        if len(met) < MIN_SIZES:
            raise ValueError(
                f"Only {len(met)} batch sizes met the target; a fit needs at least {MIN_SIZES}. "
                "Try more sizes, an easier target or more steps."
            )
        batches = np.array([float(o.global_batch) for o in observations])
        log_steps = np.log([o.steps for o in observations])
        missed = np.array([o.missed for o in observations])
        return _Data(
            batches=batches,
            log_batch=np.log(batches),
            log_steps=log_steps,
            limit=np.where(missed, log_steps, -np.inf),
        )


@dataclass(frozen=True, kw_only=True)
class _GridFit:
    """Fits of R samples of n trainings over a grid of G critical batches."""

    filled: Array
    """ln S with the missed ones replaced by their expectation, shape (R, n)."""
    losses: Array
    """Residual sum of squares, shape (R, G)."""
    index: NDArray[np.intp]
    """The best critical batch, shape (R,)."""
    level: Array
    """ln S_min there, shape (R,)."""


def _fit_grid(samples: Array, limits: Array, curves: Array) -> _GridFit:
    """Least squares over the grid, the level in closed form; EM for the missed targets."""
    missed = np.isfinite(limits)
    fit = _least_squares(samples, curves)
    for _ in range(_EM_ROUNDS if missed.any() else 0):
        updated = _expected(fit, limits, missed, curves)
        moved = float(np.max(np.abs(updated - fit.filled)))
        fit = _least_squares(updated, curves)
        if moved < 1e-4:
            break
    return fit


def _least_squares(filled: Array, curves: Array) -> _GridFit:
    centred = curves - curves.mean(axis=1, keepdims=True)
    spread = filled - filled.mean(axis=1, keepdims=True)
    losses = np.sum(spread**2, axis=1)[:, None] + np.sum(centred**2, axis=1)[None, :]
    losses = np.maximum(losses - 2 * spread @ centred.T, 0.0)
    index = np.argmin(losses, axis=1)
    level = filled.mean(axis=1) - curves[index].mean(axis=1)
    return _GridFit(filled=filled, losses=losses, index=index, level=level)


def _expected(fit: _GridFit, limits: Array, missed: NDArray[np.bool_], curves: Array) -> Array:
    """Replaces missed ln S by E[y | y > limit] = μ + σφ(z)/(1 − Φ(z))."""
    filled, fitted = fit.filled, fit.level[:, None] + curves[fit.index]
    met_residual = np.where(missed, 0.0, filled - fitted)
    freedom = np.maximum(filled.shape[1] - missed.sum(axis=1) - 2, 1)
    sigma = np.sqrt(np.sum(met_residual**2, axis=1) / freedom)[:, None]
    sigma = np.maximum(sigma, 1e-3)
    z = np.clip(np.where(missed, (limits - fitted) / sigma, 0.0), -30, 30)
    # erfcx keeps the ratio exact far in the tail.
    tail = np.asarray(special.erfcx(z / math.sqrt(2)), dtype=float)  # pyright: ignore[reportUnknownMemberType, reportUnknownArgumentType]
    expected = fitted + sigma * math.sqrt(2 / math.pi) / tail
    return np.where(missed, np.maximum(limits, expected), filled)


def _refined(grid: Array, losses: Array) -> Array:
    """The minimum between grid points, by a parabola through three; the edges stay edges."""
    index = np.clip(np.argmin(losses, axis=1), 1, len(grid) - 2)
    rows = np.arange(len(losses))
    before: Array = losses[rows, index - 1]
    here: Array = losses[rows, index]
    after: Array = losses[rows, index + 1]
    bend: Array = before - 2 * here + after
    shift: Array = np.where(bend > 0, (before - after) / np.where(bend > 0, 2 * bend, 1.0), 0.0)
    found: Array = grid[index] + np.clip(shift, -1, 1) * (grid[1] - grid[0])
    edge: NDArray[np.intp] = np.argmin(losses, axis=1)
    return np.where(edge == 0, grid[0], np.where(edge == len(grid) - 1, grid[-1], found))


def _resample(
    data: _Data, central: _GridFit, curves: Array, rng: np.random.Generator
) -> tuple[Array, Array]:
    """Bootstrap samples of ln S and of the limits, each of shape (RESAMPLES, n)."""
    fitted = central.level[0] + curves[central.index[0]]
    met = ~np.isfinite(data.limit)
    residuals = (data.log_steps - fitted)[met]
    freedom = len(residuals) - 2
    enlarged = (residuals - residuals.mean()) * math.sqrt(len(residuals) / freedom)
    # The spread is itself known from few residuals: Student's t, not the normal distribution.
    enlarged *= student_quantile(freedom) / 1.96
    samples = fitted + rng.choice(enlarged, size=(RESAMPLES, len(fitted)))
    # What was missed may be met in another sample, where chance made it quicker.
    missed = samples > np.where(met, np.inf, data.limit)
    return np.where(missed, data.limit, samples), np.where(missed, data.limit, -np.inf)


def _misfit(data: _Data, filled: Array, losses: Array, grid: Array, curves: Array) -> bool:
    """Whether a third parameter describes the data clearly (F test, 1 %) and materially better."""
    # The wider family S = S_min (1 + (B_c/B)^p)^(1/p) keeps S ∝ 1/B for small B and bends sharper
    # (p > 1) or softer (p < 1) than the hyperbola, p = 1.
    freedom = len(filled) - 3
    if freedom < 2 or len(np.unique(data.batches)) < 5:
        return False
    best = float(losses.min())
    shape: Array = curves[int(np.argmin(losses))]
    plain: Array = shape + float(np.mean(filled - shape))
    wider, bent = best, plain
    for power in np.geomspace(0.1, 10, 41):
        exponent = power * (grid[:, None] - data.log_batch[None, :])
        family = np.logaddexp(0.0, exponent) / power
        level = np.mean(filled - family, axis=1, keepdims=True)
        rest = np.sum((filled - family - level) ** 2, axis=1)
        index = int(np.argmin(rest))
        if float(rest[index]) < wider:
            wider, bent = float(rest[index]), family[index] + level[index]
    threshold = float(special.fdtri(1, freedom, 0.99))  # pyright: ignore[reportUnknownMemberType]
    clear = best - wider > threshold * max(wider, 1e-300) / freedom
    return clear and float(np.max(np.abs(bent - plain))) > MATERIAL_MISFIT


def _ends(logs: Array, grid: Array) -> tuple[float | None, float | None]:
    """The middle 95 % of the bootstrap; None where it runs out of the range looked at."""
    low, high = (float(q) for q in np.quantile(logs, [0.025, 0.975]))
    step = float(grid[1] - grid[0])
    return (
        None if low < grid[0] + step else math.exp(low),
        None if high > grid[-1] - step else math.exp(high),
    )


def _summarise(
    data: _Data, grid: Array, central: _GridFit, boot: _GridFit, misfit: bool
) -> HyperbolaFit:
    n, method = len(data.batches), f"hyperbola, bootstrap of {RESAMPLES}"
    value = math.exp(float(_refined(grid, central.losses)[0]))
    logs = _refined(grid, boot.losses)
    low, high = _ends(logs, grid)
    found = low is not None and high is not None
    critical = Estimate(value=value if found else None, low=low, high=high, n=n, method=method)
    # The level belongs to the nearest grid point; the steps at the fitted B_c follow from it.
    curve = np.log1p(value / data.batches)
    filled: Array = central.filled[0]
    level = float(np.mean(filled - curve))
    curves = np.log1p(np.exp(logs[:, None] - data.log_batch[None, :]))
    levels: Array = (boot.filled - curves).mean(axis=1)
    steps = _from_logs(level, levels, n=n, known=high is not None)
    examples = _from_logs(level + math.log(value), levels + logs, n=n, known=low is not None)
    residuals: Array = filled - level - curve
    return HyperbolaFit(
        critical_batch=critical,
        min_steps=steps,
        min_examples=examples,
        relative_error=float(np.sqrt(np.mean(residuals**2))),
        describes_data=not misfit,
        warnings=tuple(_warnings(data, critical, misfit)),
    )


def _from_logs(log_value: float, logs: Array, *, n: int, known: bool) -> Estimate:
    """An estimate of exp; of a quantity that may be 0 only the upper end is known."""
    low, high = (math.exp(float(q)) for q in np.quantile(logs, [0.025, 0.975]))
    if not known:
        return Estimate(value=None, low=None, high=high, n=n, method="hyperbola, bootstrap")
    return Estimate(
        value=math.exp(log_value), low=low, high=high, n=n, method="hyperbola, bootstrap"
    )


def _warnings(data: _Data, critical: Estimate, misfit: bool) -> list[str]:
    smallest, largest = float(data.batches.min()), float(data.batches.max())
    found: list[str] = []
    if critical.high is None:
        beyond = "" if critical.low is None else f"; it lies above {critical.low:.3g}"
        found.append(
            f"No critical batch found: steps still fall in proportion to 1/B at {largest:g}"
            f"{beyond}."
        )
    elif critical.low is None:
        found.append(
            f"No critical batch found: steps do not depend on B down to {smallest:g}; it lies "
            f"below {critical.high:.3g}."
        )
    if critical.value is not None:
        if critical.value < SIDE * smallest:
            found.append(
                f"The critical batch {critical.value:.3g} is under {SIDE:g}× the smallest size "
                f"tried, {smallest:g}. Try smaller sizes."
            )
        if largest < SIDE * critical.value:
            found.append(
                f"The largest size tried, {largest:g}, is under {SIDE:g}× the critical batch "
                f"{critical.value:.3g}. Try larger sizes."
            )
    if misfit:
        found.append(
            "The hyperbola does not describe these data: steps bend in another way, and the "
            "critical batch depends on which sizes were tried."
        )
    num_missed = int(np.isfinite(data.limit).sum())
    if num_missed:
        found.append(
            f"{num_missed} of {len(data.batches)} trainings missed the target and count as 'more "
            "steps than that'."
        )
    return found
