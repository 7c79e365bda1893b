"""The law of progress: its limits, a naive likelihood, and what draws given runs recover."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from rightbatch.laws.progress import (
    PARAMETERS,
    ProgressObservation,
    ProgressPrior,
    log_extra_steps,
    log_rate,
    make_log_likelihood,
    make_prior,
    relative_log_steps,
    sample_posterior,
)

Array = NDArray[np.float64]
BASE_BATCH, BASE_LR = 32, 0.1
CELLS = [
    (batch, lr)
    for batch in (8, 32, 128, 512)
    for lr in (0.05, 0.1, 0.2, 0.4)
    if (batch, lr) != (BASE_BATCH, BASE_LR)
]


def a_prior(*, normalised: bool = False) -> ProgressPrior:
    return make_prior(reference_batch=BASE_BATCH, learning_rate=BASE_LR, normalised=normalised)


def a_law(**changes: float) -> Array:
    """One law, shape (1, 8): no edge, no noise, no slow-down, unless they are asked for."""
    given = {
        "ln_edge": math.log(1e9),
        "ln_edge_power": math.log(3.0),
        "ln_noise_lr": math.log(1e9),
        "noise_batch_power": 1.0,
        "ln_noise_power": 0.0,
        "rate_power": 0.0,
        "ln_rate_batch": math.log(100.0),
        "ln_start_penalty": 0.0,
    }
    return np.array([[{**given, **changes}[name] for name in PARAMETERS]])


def logs(*values: float) -> Array:
    return np.log(np.array(values))


# ------------------------------------------------------------------------------ the law's limits


def test_at_small_rates_of_sgd_steps_are_one_over_the_rate_whatever_the_batch() -> None:
    """ε = 0: S ∝ 1/η."""
    rates = logs(1e-4, 1e-3, 1e-2)
    for batch in (1.0, 32.0, 4096.0):
        steps = relative_log_steps(a_prior(), a_law(), np.full(3, math.log(batch)), rates)
        np.testing.assert_allclose(steps[0], -rates, atol=1e-6)


def test_a_normalising_optimizer_makes_shorter_steps_on_noisy_gradients() -> None:
    """ε = 1: S ∝ 1/(η√B) far below B_r, and ∝ 1/η far above it."""
    law = a_law(rate_power=1.0, ln_rate_batch=math.log(1e4))
    steps = relative_log_steps(a_prior(), law, logs(1, 4, 16), np.full(3, math.log(1e-3)))[0]
    np.testing.assert_allclose(np.diff(steps), -0.5 * math.log(4), atol=1e-3)
    np.testing.assert_allclose(log_rate(law, logs(1e8, 1e9))[0], 0.0, atol=1e-4)
    # Half way, at B = B_r, r² = 1/2.
    np.testing.assert_allclose(log_rate(law, logs(1e4))[0], -0.5 * math.log(2))


def test_the_extra_steps_are_one_e_fold_at_the_noise_rate_and_at_the_edge() -> None:
    noisy = a_law(ln_noise_lr=math.log(0.2), noise_batch_power=0.5, ln_noise_power=math.log(1.3))
    # η_n(B) = η_0 (B/B_0)^γ: at 4 × the batch, 2 × the rate.
    at = log_extra_steps(a_prior(), noisy, logs(32, 128, 8), logs(0.2, 0.4, 0.1), from_fresh=1.0)
    np.testing.assert_allclose(at[0], 1.0, atol=1e-12)
    double = log_extra_steps(a_prior(), noisy, logs(32), logs(0.4), from_fresh=1.0)
    np.testing.assert_allclose(double[0], 2**1.3, atol=1e-12)
    curved = a_law(ln_edge=math.log(0.2))
    at = log_extra_steps(a_prior(), curved, logs(2, 32, 9999), logs(0.2, 0.2, 0.2), from_fresh=0.0)
    np.testing.assert_allclose(at[0], 1.0, atol=1e-6)
    half = log_extra_steps(a_prior(), curved, logs(32), logs(0.1), from_fresh=0.0)
    np.testing.assert_allclose(half[0], 2.0**-3, atol=1e-6)


def test_the_best_rate_scales_linearly_until_curvature_ends_it() -> None:
    """γ = 1: the least of S over η grows like B, then stands still at the edge (McCandlish)."""
    law = a_law(ln_noise_lr=math.log(0.01), ln_edge=math.log(1.0))
    rates = np.linspace(math.log(1e-5), math.log(10.0), 4001)

    def best(batch: float) -> float:
        at = np.full(len(rates), math.log(batch))
        return float(rates[relative_log_steps(a_prior(), law, at, rates)[0].argmin()])

    step = rates[1] - rates[0]
    assert best(8) - best(4) == pytest.approx(math.log(2), abs=2 * step)
    assert best(64) - best(32) == pytest.approx(math.log(2), abs=0.05)
    assert best(2**22) - best(2**18) == pytest.approx(0.0, abs=0.01)
    assert best(2**22) < 0.0, "the best rate is beyond the edge"


def test_fresh_runs_meet_the_edge_sooner_than_branches() -> None:
    """By a factor e^δ of the learning rate; the noise is the same for both."""
    law = a_law(ln_edge=math.log(0.4), ln_start_penalty=math.log(2.0), ln_noise_lr=math.log(3.0))
    fresh = log_extra_steps(a_prior(), law, logs(32), logs(0.1), from_fresh=1.0)
    branch = log_extra_steps(a_prior(), law, logs(32), logs(0.1), from_fresh=0.0)
    assert fresh[0, 0] == pytest.approx(0.5**3 + 1 / 30)
    assert branch[0, 0] == pytest.approx(0.25**3 + 1 / 30)
    mixed = log_extra_steps(
        a_prior(), law, logs(32, 32), logs(0.1, 0.1), from_fresh=np.array([1.0, 0.0])
    )
    np.testing.assert_allclose(mixed[0], [fresh[0, 0], branch[0, 0]])


def test_what_lies_far_beyond_the_cliff_is_as_good_as_never_and_finite() -> None:
    law = a_law(ln_edge=math.log(0.1), ln_noise_lr=math.log(0.1))
    extra = log_extra_steps(a_prior(), law, logs(32, 32), logs(1e3, 1e30), from_fresh=1.0)[0]
    assert np.isfinite(extra).all()
    assert extra[0] == extra[1] > math.log(1000)


# ------------------------------------------------------------------------------------- the prior


@pytest.mark.parametrize("normalised", [False, True])
def test_prior_draws_stay_where_the_prior_has_density(*, normalised: bool) -> None:
    prior = a_prior(normalised=normalised)
    wide = replace(prior, deviations=tuple(10 * d for d in prior.deviations))
    rng = np.random.default_rng(0)
    for given in (prior, wide):
        draws = given.draw(20_000, rng)
        assert draws.shape == (20_000, len(PARAMETERS))
        assert np.isfinite(given.log_density(draws)).all()


def test_outside_its_ranges_the_prior_has_no_density() -> None:
    prior = a_prior()
    mean = np.array([prior.means])
    assert np.isfinite(prior.log_density(mean)).all()
    for name, value in (("noise_batch_power", -0.5), ("rate_power", -0.1), ("rate_power", 9.0)):
        outside = mean.copy()
        outside[0, PARAMETERS.index(name)] = value
        assert prior.log_density(outside) == [-np.inf]


def test_the_prior_moves_with_the_learning_rate_and_widens_with_the_doubt() -> None:
    one = a_prior()
    ten = make_prior(reference_batch=BASE_BATCH, learning_rate=10 * BASE_LR, normalised=False)
    moved = np.array(ten.means) - np.array(one.means)
    for name, shift in zip(PARAMETERS, moved, strict=True):
        expected = math.log(10) if name in {"ln_edge", "ln_noise_lr"} else 0.0
        assert shift == pytest.approx(expected), name
    doubtful = make_prior(
        reference_batch=BASE_BATCH,
        learning_rate=BASE_LR,
        normalised=False,
        learning_rate_deviation=2.0,
    )
    index = PARAMETERS.index("ln_noise_lr")
    assert doubtful.deviations[index] > one.deviations[index]


def test_a_normalising_optimizer_is_expected_to_depend_on_the_batch() -> None:
    index = PARAMETERS.index("rate_power")
    sgd, adam = (a_prior(normalised=n).draw(4000, np.random.default_rng(1)) for n in (False, True))
    assert np.median(sgd[:, index]) < 0.3 < 0.5 < np.median(adam[:, index]) < 1.2


# -------------------------------------------------------------------------------- the likelihood


def naive_log_likelihood(
    prior: ProgressPrior, law: Sequence[float], seen: Sequence[ProgressObservation]
) -> float:
    """The same in scalars, written from the law's description."""
    edge, edge_power, noise, gamma, noise_power, rate_power, rate_batch, start = law

    def extra(batch: float, lr: float, *, fresh: bool) -> float:
        noise_lr = math.exp(noise) * (batch / prior.reference_batch) ** gamma
        edge_lr = math.exp(edge) * (math.exp(-start) if fresh else 1.0)
        most = math.exp(2.5)
        return min((lr / noise_lr) ** math.exp(noise_power), most) + min(
            (lr / edge_lr) ** math.exp(edge_power), most
        )

    def rate(batch: float) -> float:
        return (1 + math.exp(rate_batch) / batch) ** (-rate_power / 2)

    total = 0.0
    for o in seen:
        penalty = extra(o.global_batch, o.learning_rate, fresh=o.start_progress == 0)
        spared = extra(BASE_BATCH, BASE_LR, fresh=True) - penalty
        progress = o.start_progress + o.learning_rate * o.steps * rate(o.global_batch) / rate(
            BASE_BATCH
        )
        expected = progress * math.exp(o.slope_ratio * spared)
        z = math.log(o.equivalent_progress / expected) / o.deviation
        if o.at_most and o.equivalent_progress > expected:
            z = 0.0  # it stands even further behind than the bound: no contradiction
        total += -(4 + 1) / 2 * math.log(1 + z * z / 4)
    return total


def some_observations(
    prior: ProgressPrior, law: Array, rng: np.random.Generator, *, num: int = 8, noise: float = 0.1
) -> tuple[ProgressObservation, ...]:
    """What a race would see under a law: fresh runs and branches, with Student's t noise."""
    base = log_extra_steps(prior, law, logs(BASE_BATCH), logs(BASE_LR), from_fresh=1.0)[0, 0]
    found: list[ProgressObservation] = []
    for i in range(num):
        batch, lr = int(2 ** rng.integers(2, 11)), BASE_LR * 2.0 ** (rng.integers(-3, 6) / 2)
        start, steps = 5.0 * (i % 2), float(rng.integers(50, 500))
        ratio = float(rng.uniform(0.5, 1.5))
        at, with_lr = logs(batch), logs(lr)
        extra = log_extra_steps(prior, law, at, with_lr, from_fresh=float(start == 0))[0, 0]
        rate = (log_rate(law, at) - log_rate(law, logs(BASE_BATCH)))[0, 0]
        seen = math.log(start + lr * math.exp(rate) * steps) + ratio * (base - extra)
        found.append(
            ProgressObservation(
                global_batch=batch,
                learning_rate=lr,
                start_progress=start,
                steps=steps,
                equivalent_progress=math.exp(seen + noise * rng.standard_t(4)),
                slope_ratio=ratio,
                deviation=max(noise, 0.02),
            )
        )
    return tuple(found)


@pytest.mark.parametrize("normalised", [False, True])
def test_the_likelihood_agrees_with_a_naive_one(*, normalised: bool) -> None:
    prior, rng = a_prior(normalised=normalised), np.random.default_rng(3)
    draws = prior.draw(40, rng)
    seen = some_observations(prior, draws[:1], rng)
    seen = tuple(replace(o, at_most=i % 3 == 0) for i, o in enumerate(seen))
    fast = make_log_likelihood(prior, seen, baseline_batch=BASE_BATCH, baseline_lr=BASE_LR)
    naive = [naive_log_likelihood(prior, draw.tolist(), seen) for draw in draws]
    np.testing.assert_allclose(fast(draws), naive, rtol=1e-10)


def test_what_the_law_says_is_the_likeliest_and_one_odd_run_does_not_decide() -> None:
    prior, rng = a_prior(), np.random.default_rng(4)
    law = prior.draw(1, rng)
    seen = some_observations(prior, law, rng, noise=0.0)
    exact = make_log_likelihood(prior, seen, baseline_batch=BASE_BATCH, baseline_lr=BASE_LR)
    np.testing.assert_allclose(exact(law), [0.0], atol=1e-12)
    assert (exact(prior.draw(200, rng)) < 0).all()
    odd = (*seen[1:], replace(seen[0], equivalent_progress=seen[0].equivalent_progress * 1e6))
    robust = make_log_likelihood(prior, odd, baseline_batch=BASE_BATCH, baseline_lr=BASE_LR)
    # A normal law would take (ln 1e6 / 0.02)²/2 ≈ 240 000.
    assert -50 < robust(law)[0] < 0


def test_a_bound_speaks_only_against_laws_on_its_wrong_side() -> None:
    prior, law = a_prior(), a_law(ln_edge=math.log(0.2))
    seen = some_observations(prior, law, np.random.default_rng(1), num=1, noise=0.0)[0]

    def likelihood(factor: float) -> float:
        bound = replace(seen, equivalent_progress=seen.equivalent_progress * factor, at_most=True)
        given = make_log_likelihood(prior, (bound,), baseline_batch=BASE_BATCH, baseline_lr=BASE_LR)
        return float(given(law)[0])

    assert likelihood(1.0) == likelihood(2.0) == likelihood(1e9) == 0.0
    assert 0.0 > likelihood(0.9) > likelihood(0.1)


def test_no_observations_say_nothing() -> None:
    prior = a_prior()
    nothing = make_log_likelihood(prior, (), baseline_batch=BASE_BATCH, baseline_lr=BASE_LR)
    assert nothing(prior.draw(5, np.random.default_rng(0))).tolist() == [0.0] * 5


# --------------------------------------------------------------------------------- the posterior


def posterior(
    prior: ProgressPrior, seen: tuple[ProgressObservation, ...], *, seed: int = 0
) -> Array:
    likelihood = make_log_likelihood(prior, seen, baseline_batch=BASE_BATCH, baseline_lr=BASE_LR)
    return sample_posterior(prior, likelihood, seed=seed)


def steps_ratios(prior: ProgressPrior, draws: Array) -> Array:
    """ln S of each cell less that of the baseline's cell, shape (draws, cells)."""
    batches = logs(*[float(batch) for batch, _ in CELLS], BASE_BATCH)
    rates = logs(*[lr for _, lr in CELLS], BASE_LR)
    steps = relative_log_steps(prior, draws, batches, rates)
    return steps[:, :-1] - steps[:, -1:]


def truncated_moments(prior: ProgressPrior) -> tuple[Array, Array]:
    """Mean and deviation of the prior's density, by rejection of plain normals."""
    rng = np.random.default_rng(9)
    z = rng.standard_normal((100_000, len(PARAMETERS)))
    plain = np.array(prior.means) + np.array(prior.deviations) * z
    inside = plain[np.isfinite(prior.log_density(plain))]
    return inside.mean(axis=0), inside.std(axis=0)


@pytest.mark.parametrize("normalised", [False, True])
def test_without_observations_the_posterior_is_the_prior(*, normalised: bool) -> None:
    prior = a_prior(normalised=normalised)
    draws = np.concatenate([posterior(prior, (), seed=seed) for seed in range(8)])
    mean, deviation = truncated_moments(prior)
    np.testing.assert_allclose((draws.mean(axis=0) - mean) / deviation, 0.0, atol=0.15)
    np.testing.assert_allclose(draws.std(axis=0) / deviation, 1.0, atol=0.12)


def test_a_known_gaussian_likelihood_gives_the_known_posterior() -> None:
    """Normal prior × normal likelihood: precisions add. Checks the sampler apart from the law."""
    prior = a_prior()
    index = PARAMETERS.index("ln_edge")
    mean, deviation = prior.means[index], prior.deviations[index]
    seen, noise = mean + 2.0, 0.5

    def likelihood(draws: Array) -> Array:
        return -0.5 * ((draws[:, index] - seen) / noise) ** 2

    draws = np.concatenate([sample_posterior(prior, likelihood, seed=s) for s in range(8)])
    precision = deviation**-2 + noise**-2
    expected = (mean * deviation**-2 + seen * noise**-2) / precision
    assert draws[:, index].mean() == pytest.approx(expected, abs=0.1 * precision**-0.5)
    assert draws[:, index].std() == pytest.approx(precision**-0.5, rel=0.12)


def test_the_same_seed_gives_the_same_draws_another_seed_does_not() -> None:
    prior, rng = a_prior(), np.random.default_rng(5)
    seen = some_observations(prior, prior.draw(1, rng), rng)
    np.random.seed(3)
    expected = np.random.rand()
    np.random.seed(3)
    first, again, other = (posterior(prior, seen, seed=seed) for seed in (7, 7, 8))
    assert first.tobytes() == again.tobytes()
    assert not np.array_equal(first, other)
    assert np.random.rand() == expected, "it drew from the global generator"


def a_law_that_trains(prior: ProgressPrior, rng: np.random.Generator) -> Array:
    """A law from the prior under which the baseline trains: a race makes sure of that."""
    laws = prior.draw(500, rng)
    spent = log_extra_steps(prior, laws, logs(BASE_BATCH), logs(BASE_LR), from_fresh=1.0)
    return laws[spent[:, 0] < 1.5][:1]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("normalised", [False, True])
def test_many_good_observations_recover_every_ratio_of_steps(
    seed: int, *, normalised: bool
) -> None:
    prior, rng = a_prior(normalised=normalised), np.random.default_rng(seed)
    law = a_law_that_trains(prior, rng)
    seen = some_observations(prior, law, rng, num=40, noise=0.05)
    truth = steps_ratios(prior, law)[0]
    found = steps_ratios(prior, posterior(prior, seen))
    # Beyond e^3 both say never; how much never is, is not there to be recovered.
    possible = truth < 3.0
    assert possible.sum() >= 8
    error = np.median(found, axis=0) - truth
    doubt, doubt_before = (
        np.quantile(x, 0.95, axis=0) - np.quantile(x, 0.05, axis=0)
        for x in (found, steps_ratios(prior, posterior(prior, ())))
    )
    # What lies on the cliff is left in doubt: no run that was seen went there.
    assert (np.abs(error) < 0.1 + doubt)[possible].all()
    assert np.median(np.abs(error[possible])) < 0.05
    assert np.median(doubt[possible] / doubt_before[possible]) < 0.2


def test_intervals_of_90_percent_cover_planted_laws_about_90_percent_of_the_time() -> None:
    """Over 50 laws from the prior, each seen 8 times; ratios of steps at cells not all seen."""
    rng = np.random.default_rng(0)
    covered: list[Array] = []
    for k in range(50):
        prior = a_prior(normalised=k % 2 == 0)
        law = prior.draw(1, rng)
        found = steps_ratios(prior, posterior(prior, some_observations(prior, law, rng), seed=k))
        low, high = np.quantile(found, [0.05, 0.95], axis=0)
        truth = steps_ratios(prior, law)[0]
        # The cap ties a law's hopeless cells to exactly the same number as the draws'.
        covered.append((truth >= low - 1e-9) & (truth <= high + 1e-9))
    share = float(np.mean(covered))
    assert 0.80 <= share <= 0.97
