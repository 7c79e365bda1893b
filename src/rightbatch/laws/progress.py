"""How many steps a (batch, learning rate) takes: a law with few parameters, fitted with its doubt.

*Progress* p = Σ η over the steps, the time of gradient flow. Runs at small learning rates trace
one curve ℓ = F(p), whatever their batch and learning rate; a larger learning rate pays more steps
than 1/η says. For the steps to a loss level:

    ln S(B, η) = ln p_level − ln η − ln r(B) + w(B, η)
    r(B)       = (1 + B_r/B)^(−ε/2)               rate of progress at small η
    w(B, η)    = (η/η_n(B))^κ_n + (η/η_e)^κ_e     extra steps, in e-folds
    η_n(B)     = η_0 (B/B_0)^γ                    where gradient noise costs one e-fold of steps
    η_e                                           where curvature does, whatever the batch

ε is 0 for plain SGD (an update is unbiased at any batch) and near 1 for optimizers that normalise
by the gradient's size, where a noisy gradient makes a shorter step: S ∝ 1/(η √B). The noise term
with γ = 1 is linear scaling of the best learning rate, the curvature term is where it ends: the
saturating law ε_max/(1 + B_noise/B) of McCandlish et al. 2018 (eq. 2.6) and the √B scaling of
Malladi et al. 2022 are special cases. A run from fresh weights meets the edge a factor e^δ sooner
than one that branches off a trained state.

The parameters are never taken as known: `sample_posterior` draws them given what was observed
(an affine-invariant ensemble sampler, Goodman & Weare 2010), and decisions average over the draws.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

PARAMETERS = (
    "ln_edge",
    "ln_edge_power",
    "ln_noise_lr",
    "noise_batch_power",
    "ln_noise_power",
    "rate_power",
    "ln_rate_batch",
    "ln_start_penalty",
)
"""Columns of a draw, in order: ln η_e, ln κ_e, ln η_0, γ, ln κ_n, ε, ln B_r, δ."""

_LOWEST = np.array([-np.inf, -np.inf, -np.inf, 0.2, -np.inf, 0.0, -np.inf, 0.0])
_HIGHEST = np.array([np.inf, np.inf, np.inf, 1.2, np.inf, 1.4, np.inf, np.inf])
_MOST_EXTRA = 2.5
"""Each penalty is capped at e^2.5 ≈ 12 e-folds of steps: as good as never."""


@dataclass(frozen=True, kw_only=True)
class ProgressPrior:
    """What is believed of the law before any run: independent normals, cut to their ranges.

    Attributes:
        reference_batch: B_0, where η_0 is defined.
        means: Mean of each of `PARAMETERS`.
        deviations: Standard deviation of each.
    """

    reference_batch: float
    means: tuple[float, ...]
    deviations: tuple[float, ...]

    def log_density(self, draws: Array) -> Array:
        """Log density up to a constant; shape (draws,)."""
        z = (draws - np.array(self.means)) / np.array(self.deviations)
        inside = ((draws >= _LOWEST) & (draws <= _HIGHEST)).all(axis=1)
        return np.where(inside, -0.5 * (z**2).sum(axis=1), -np.inf)

    def draw(self, num_draws: int, rng: np.random.Generator) -> Array:
        """Draws from the prior, shape (num_draws, parameters)."""
        z = rng.standard_normal((num_draws, len(PARAMETERS)))
        draws = np.array(self.means) + np.array(self.deviations) * z
        # Reflected into the range, so that the bounds are not piled up on.
        draws = np.where(draws < _LOWEST, 2 * _LOWEST - draws, draws)
        return np.clip(draws, _LOWEST, _HIGHEST)


def make_prior(
    *,
    reference_batch: float,
    learning_rate: float,
    normalised: bool,
    learning_rate_deviation: float = 1.0,
    noise_batch: float = 150.0,
    noise_batch_deviation: float = 1.5,
) -> ProgressPrior:
    """The prior around a learning rate that is known to train at the reference batch.

    Args:
        reference_batch: The batch at which `learning_rate` trains.
        learning_rate: A learning rate near the best there.
        normalised: Whether the optimizer divides by the gradient's size (Adam and its kin).
        learning_rate_deviation: Doubt about it, standard deviation in e-folds.
        noise_batch: Guess of the batch below which normalised progress slows.
        noise_batch_deviation: Doubt about that, in e-folds.

    Returns:
        The prior.
    """
    ln_lr, doubt = math.log(learning_rate), learning_rate_deviation
    rate, rate_doubt = (0.8, 0.3) if normalised else (0.05, 0.1)
    return ProgressPrior(
        reference_batch=reference_batch,
        means=(ln_lr + 1.6, math.log(3.0), ln_lr + 0.7, 0.8, 0.0, rate, math.log(noise_batch), 0.3),
        deviations=(1.2 * doubt, 0.4, doubt, 0.2, 0.25, rate_doubt, noise_batch_deviation, 0.35),
    )


def log_extra_steps(
    prior: ProgressPrior, draws: Array, ln_batch: Array, ln_lr: Array, *, from_fresh: Array | float
) -> Array:
    """w(B, η), in e-folds of steps.

    Args:
        prior: Says where η_0 is defined.
        draws: Parameters, shape (draws, 8).
        ln_batch: ln B, shape (points,).
        ln_lr: ln η, shape (points,).
        from_fresh: 1 for runs from fresh weights, 0 for branches; scalar or shape (points,).

    Returns:
        Shape (draws, points).
    """
    edge, edge_power, noise, gamma, noise_power, _, _, start = draws.T[:, :, None]
    ln_noise_lr = noise + gamma * (ln_batch - math.log(prior.reference_batch))
    by_noise = np.exp(noise_power) * (ln_lr - ln_noise_lr)
    by_edge = np.exp(edge_power) * (ln_lr - edge + start * from_fresh)
    return np.exp(np.minimum(by_noise, _MOST_EXTRA)) + np.exp(np.minimum(by_edge, _MOST_EXTRA))


def log_rate(draws: Array, ln_batch: Array) -> Array:
    """The rate as ln r(B), shape (draws, points)."""
    power, ln_rate_batch = draws.T[5, :, None], draws.T[6, :, None]
    return -0.5 * power * np.logaddexp(0.0, ln_rate_batch - ln_batch)


def relative_log_steps(prior: ProgressPrior, draws: Array, ln_batch: Array, ln_lr: Array) -> Array:
    """The steps as ln S(B, η) − ln p_level, for runs from fresh weights, shape (draws, points)."""
    extra = log_extra_steps(prior, draws, ln_batch, ln_lr, from_fresh=1.0)
    return extra - ln_lr - log_rate(draws, ln_batch)


@dataclass(frozen=True, kw_only=True)
class ProgressObservation:
    """One look at a run, compared with the baseline's curve at the same loss.

    Attributes:
        global_batch: Its batch.
        learning_rate: Its learning rate.
        start_progress: The baseline's progress where it branched off; 0 for a fresh run.
        steps: Its own steps since then.
        equivalent_progress: The progress at which the baseline had the loss seen.
        slope_ratio: Baseline's log slope of loss at the target over that at this loss: noise
            raises the loss by a share, which costs more steps where the curve is flatter.
        deviation: Standard deviation of ln equivalent_progress.
        at_most: Whether the equivalent progress is only known to be no more than this, as of a
            run that diverged.
    """

    global_batch: int
    learning_rate: float
    start_progress: float
    steps: float
    equivalent_progress: float
    slope_ratio: float
    deviation: float
    at_most: bool = False


def make_log_likelihood(
    prior: ProgressPrior,
    observations: tuple[ProgressObservation, ...],
    *,
    baseline_batch: int,
    baseline_lr: float,
) -> Callable[[Array], Array]:
    """The log likelihood of the law's parameters given what was seen.

    A run with progress p and penalty w stands where the baseline stands at p·exp(w_base − w).
    Deviations follow Student's t with 4 degrees of freedom, so that one odd run does not decide.

    Args:
        prior: Says where η_0 is defined.
        observations: What was seen.
        baseline_batch: The baseline's batch.
        baseline_lr: Its learning rate.

    Returns:
        A function from draws, shape (draws, 8), to log likelihoods, shape (draws,).
    """
    ln_batch = np.log([float(o.global_batch) for o in observations])
    ln_lr = np.log([o.learning_rate for o in observations])
    start = np.array([o.start_progress for o in observations])
    steps = np.array([o.steps for o in observations])
    seen = np.log([o.equivalent_progress for o in observations])
    slope_ratio = np.array([o.slope_ratio for o in observations])
    deviation = np.array([o.deviation for o in observations])
    at_most = np.array([o.at_most for o in observations])
    fresh = (start == 0).astype(float)
    base_batch, base_lr = np.log([float(baseline_batch)]), np.log([baseline_lr])

    def log_likelihood(draws: Array) -> Array:
        if not observations:
            return np.zeros(len(draws))
        extra = log_extra_steps(prior, draws, ln_batch, ln_lr, from_fresh=fresh)
        base = log_extra_steps(prior, draws, base_batch, base_lr, from_fresh=1.0)
        rate = log_rate(draws, ln_batch) - log_rate(draws, base_batch)
        own = np.log(start + np.exp(ln_lr + rate) * steps)
        z = (seen - own - slope_ratio * (base - extra)) / deviation
        z = np.where(at_most, np.minimum(z, 0.0), z)
        return -2.5 * np.log1p(z**2 / 4.0).sum(axis=1)

    return log_likelihood


def sample_posterior(
    prior: ProgressPrior,
    log_likelihood: Callable[[Array], Array],
    *,
    seed: int,
    num_walkers: int = 64,
    num_sweeps: int = 400,
) -> Array:
    """Draws from the posterior by the stretch move (Goodman & Weare 2010, eq. 7-10).

    Args:
        prior: The prior.
        log_likelihood: Maps draws to log likelihoods.
        seed: Makes the draws reproducible: the same evidence gives the same plan, bit for bit.
        num_walkers: Size of the ensemble.
        num_sweeps: Moves of each walker; the first half is discarded.

    Returns:
        Draws, shape (draws, 8).
    """
    rng = np.random.default_rng(seed)

    def log_density(draws: Array) -> Array:
        return prior.log_density(draws) + log_likelihood(draws)

    candidates = prior.draw(4000, rng)
    densities = log_density(candidates)
    best = np.argsort(-densities, kind="stable")[:num_walkers]
    walkers, current = candidates[best], densities[best]
    half = num_walkers // 2
    halves = (slice(0, half), slice(half, num_walkers))
    kept: list[Array] = []
    for sweep in range(num_sweeps):
        for moving, standing in (halves, halves[::-1]):
            stretch = (1.0 + rng.random(half)) ** 2 / 2.0
            partners = walkers[standing][rng.integers(0, half, half)]
            proposal = partners + stretch[:, None] * (walkers[moving] - partners)
            density = log_density(proposal)
            gain = (len(PARAMETERS) - 1) * np.log(stretch) + density - current[moving]
            accepted = np.log(rng.random(half)) < gain
            walkers[moving] = np.where(accepted[:, None], proposal, walkers[moving])
            current[moving] = np.where(accepted, density, current[moving])
        if sweep >= num_sweeps // 2 and sweep % 10 == 0:
            kept.append(walkers.copy())
    return np.concatenate(kept)
