import math
from collections.abc import Sequence

import numpy as np
import pytest
from pydantic import TypeAdapter

from rightbatch.errors import UsageError
from rightbatch.laws.rounds import student_95
from rightbatch.laws.timing import (
    StepTime,
    StepTimeFit,
    accumulated_seconds,
    fit_step_time,
    powers_of_two,
    replicated_seconds,
)

ALPHA, BETA, KNEE = 2e-4, 1e-6, 200.0
SIZES = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024]


def plant(
    rng: np.random.Generator,
    *,
    sizes: Sequence[int] = SIZES,
    rounds: int = 8,
    noise: float = 0.03,
    outliers: float = 0.0,
    drift: float = 0.0,
    floor: float = 0.0,
    dear_rounds: int | None = None,
    num_draws: int = 200,
) -> StepTimeFit:
    """A planted law with noise, outliers, drift; the dearest three sizes in the first rounds."""
    samples: list[tuple[int, float, int]] = []
    for i in range(rounds):
        for j, B in enumerate(sizes):
            if dear_rounds is not None and j >= len(sizes) - 3 and i >= dear_rounds:
                continue
            seconds = max(floor, ALPHA + BETA * B) * math.exp(
                noise * rng.standard_normal() + drift * i / rounds
            )
            if rng.random() < outliers:
                seconds *= 1 + rng.exponential(3)
            samples.append((B, seconds, i))
    micro_batches, seconds, indices = zip(*samples, strict=True)
    return fit_step_time(micro_batches, seconds, indices, num_draws=num_draws)


def value(estimate: object) -> float:
    number = getattr(estimate, "value", None)
    assert isinstance(number, float)
    return number


def covers(estimate: object, truth: float) -> bool:
    low, high = getattr(estimate, "low", None), getattr(estimate, "high", None)
    return (low is None or low <= truth) and (high is None or truth <= high)


def test_an_exact_law_is_found_exactly() -> None:
    fit = plant(np.random.default_rng(0), noise=0)
    assert value(fit.law.alpha_seconds) == pytest.approx(ALPHA, rel=1e-9)
    assert value(fit.law.beta_seconds) == pytest.approx(BETA, rel=1e-9)
    assert value(fit.law.knee) == pytest.approx(KNEE, rel=1e-9)
    assert fit.law.floor_seconds.value is None
    assert fit.law.misfit == pytest.approx(0, abs=1e-9) and fit.law.note == ""
    for B in (1, 3, 100, 5000):
        assert fit.step_time.seconds(B) == pytest.approx(ALPHA + BETA * B, rel=1e-9)


def test_an_exact_floor_is_found_and_moves_the_knee() -> None:
    fit = plant(np.random.default_rng(0), noise=0, floor=6e-4)
    assert value(fit.law.floor_seconds) == pytest.approx(6e-4, rel=1e-6)
    assert value(fit.law.alpha_seconds) == pytest.approx(ALPHA, rel=1e-4)
    # Half of the greatest throughput 1/β: B/max(floor, α + βB) = 1/2β at floor/2β = 300.
    knee = value(fit.law.knee)
    assert knee == pytest.approx(300, rel=1e-4)
    assert knee / fit.law.predict(knee) == pytest.approx(0.5 / BETA, rel=1e-4)


@pytest.mark.parametrize(
    "trouble",
    [
        {"noise": 0.05},
        {"noise": 0.05, "outliers": 0.15},
        {"noise": 0.02, "drift": 1.0, "dear_rounds": 3},
        {"noise": 0.02, "drift": -1.0, "dear_rounds": 3, "outliers": 0.1},
    ],
)
def test_noise_outliers_and_drift_do_not_tilt_the_law(trouble: dict[str, float]) -> None:
    rng = np.random.default_rng(1)
    knees = [value(plant(rng, **trouble, num_draws=50).law.knee) for _ in range(20)]  # pyright: ignore[reportArgumentType]
    assert np.median(knees) == pytest.approx(KNEE, rel=0.03)
    assert max(abs(knee / KNEE - 1) for knee in knees) < 0.15


def test_a_plain_median_per_size_would_be_tilted_by_that_drift() -> None:
    # The dear sizes ran only while the machine was still fast: the drift of the others must not
    # be read as a smaller β. (Guards against a test that could not fail.)
    rng = np.random.default_rng(2)
    log_drift = [i / 8 for i in range(8)]
    cheap = ALPHA * np.median(np.exp(log_drift))
    dear = BETA * 1024 * np.median(np.exp(log_drift[:3]))
    assert cheap / dear * 1024 / KNEE > 1.3
    knee = value(plant(rng, noise=0.01, drift=1.0, dear_rounds=3).law.knee)
    assert knee == pytest.approx(KNEE, rel=0.05)


@pytest.mark.parametrize(
    ("conditions", "least"),
    [
        ({"noise": 0.05, "outliers": 0.05}, 0.91),
        ({"noise": 0.1, "rounds": 3}, 0.91),
        ({"noise": 0.05, "floor": 6e-4}, 0.91),
    ],
)
def test_intervals_cover_the_truth(conditions: dict[str, float], least: float) -> None:
    rng = np.random.default_rng(3)
    num = 100
    covered = np.zeros(4)
    floor = float(conditions.get("floor", 0.0))
    for _ in range(num):
        fit = plant(rng, **conditions)  # pyright: ignore[reportArgumentType]
        times = [s.low <= max(floor, ALPHA + BETA * s.micro_batch) <= s.high for s in fit.sizes]
        covered += [
            covers(fit.law.alpha_seconds, ALPHA),
            covers(fit.law.beta_seconds, BETA),
            covers(fit.law.knee, max(KNEE, floor / 2 / BETA)),
            np.mean(times),
        ]
    assert np.all(covered / num >= least), covered / num


def test_intervals_narrow_with_rounds() -> None:
    def width(rounds: int) -> float:
        knee = plant(np.random.default_rng(4), rounds=rounds, noise=0.1).law.knee
        assert knee.low is not None and knee.high is not None
        return math.log(knee.high / knee.low)

    assert width(64) < 0.5 * width(4)


def test_a_knee_that_the_sizes_do_not_reach_is_open_above() -> None:
    rng = np.random.default_rng(5)
    flat = plant(rng, sizes=[1, 2, 4, 8], noise=0.05)
    assert flat.law.knee.high is None
    samples = [(B, 1.0, r) for r in range(4) for B in (1, 2, 4, 8)]
    constant = fit_step_time(*zip(*samples, strict=True))
    assert constant.law.beta_seconds.value == pytest.approx(0, abs=1e-9)
    assert constant.law.knee.high is None
    falling = fit_step_time([1, 2, 4, 8] * 3, [4.0, 3, 2, 1] * 3, [0] * 4 + [1] * 4 + [2] * 4)
    assert falling.law.beta_seconds.value == 0
    assert falling.law.knee.value is None and not falling.law.knee.resolved


def test_a_proportional_time_has_its_knee_at_zero() -> None:
    samples = [(B, 1e-3 * B, r) for r in range(3) for B in (1, 2, 4, 8, 16)]
    law = fit_step_time(*zip(*samples, strict=True)).law
    assert value(law.alpha_seconds) == pytest.approx(0, abs=1e-9)
    assert value(law.beta_seconds) == pytest.approx(1e-3)


@pytest.mark.parametrize("odd_size", [1, 32, 1024])
def test_one_odd_size_does_not_move_the_law_but_is_kept(odd_size: int) -> None:
    def seconds(B: int) -> float:
        return (ALPHA + BETA * B) * (2.5 if odd_size == B else 1.0)

    rng = np.random.default_rng(9)
    samples = [
        (B, seconds(B) * math.exp(0.01 * rng.standard_normal()), r) for r in range(6) for B in SIZES
    ]
    fit = fit_step_time(*zip(*samples, strict=True))
    assert value(fit.law.knee) == pytest.approx(KNEE, rel=0.12)
    assert f"micro-batch {odd_size} takes" in fit.law.note
    assert fit.step_time.seconds(odd_size) == pytest.approx(seconds(odd_size), rel=0.02)


def kinked(B: int) -> float:
    """A cache that overflows at 256: every further example costs three times as much."""
    return 1e-4 + 1e-6 * B + 2e-6 * max(0, B - 256)


def test_where_the_law_misfits_measured_times_are_used_and_it_says_so() -> None:
    rng = np.random.default_rng(6)
    samples = [
        (B, kinked(B) * math.exp(0.01 * rng.standard_normal()), r) for r in range(8) for B in SIZES
    ]
    fit = fit_step_time(*zip(*samples, strict=True))
    assert fit.law.misfit > 0.1
    assert "The law misfits: micro-batch" in fit.law.note
    for B in SIZES:
        assert fit.step_time.seconds(B) == pytest.approx(kinked(B), rel=0.02)
    # Beyond the largest, the ratio stays, so there is no jump.
    at, beyond = fit.step_time.seconds(1024), fit.step_time.seconds(1025)
    assert beyond == pytest.approx(at, rel=2e-3) and beyond > at
    # The misfit widens the interval: no false certainty about a β that does not exist.
    beta = fit.law.beta_seconds
    assert beta.low is not None and beta.high is not None and beta.high / beta.low > 1.3


def test_where_the_law_fits_noise_is_not_followed() -> None:
    errors_of_law, errors_of_median = [], []
    rng = np.random.default_rng(7)
    for _ in range(20):
        fit = plant(rng, noise=0.15, rounds=3, num_draws=20)
        for size in fit.sizes:
            truth = ALPHA + BETA * size.micro_batch
            errors_of_law.append(math.log(fit.step_time.seconds(size.micro_batch) / truth))
            errors_of_median.append(math.log(size.seconds / truth))
    assert np.std(errors_of_law) < 0.8 * np.std(errors_of_median)


def test_a_single_size_is_a_constant() -> None:
    fit = fit_step_time([4, 4, 4], [1.0, 1.1, 0.9], [0, 1, 2])
    assert fit.step_time.seconds(4) == pytest.approx(1.0)
    assert not fit.law.beta_seconds.resolved and not fit.law.knee.resolved


def test_two_sizes_are_a_line_through_both() -> None:
    fit = fit_step_time([1, 101] * 3, [1.0, 2.0] * 3, [0, 0, 1, 1, 2, 2])
    assert value(fit.law.alpha_seconds) == pytest.approx(0.99)
    assert value(fit.law.beta_seconds) == pytest.approx(0.01)


def test_intervals_exist_where_three_sizes_misfit_the_law() -> None:
    """One degree of freedom for the scatter: some redraws are beyond what numbers can hold."""
    rng = np.random.default_rng(5)
    for _ in range(20):
        sizes = [1, 8, 32] * 6
        seconds = [1e-5 * (4.0 if B == 8 else 1.0) * math.exp(rng.normal(0, 0.4)) for B in sizes]
        law = fit_step_time(sizes, seconds, [i // 3 for i in range(18)], num_draws=4000).law
        assert law.alpha_seconds.low is not None and math.isfinite(law.alpha_seconds.low)


def test_the_same_seed_gives_the_same_record_and_it_survives_json() -> None:
    first, second = plant(np.random.default_rng(8)), plant(np.random.default_rng(8))
    assert first == second
    adapter = TypeAdapter(StepTimeFit)
    assert adapter.validate_json(adapter.dump_json(first)) == first


def test_accumulation_pays_the_update_once() -> None:
    assert accumulated_seconds(1.0, 1, 0.25) == 1.0
    assert accumulated_seconds(1.0, 8, 0.25) == pytest.approx(8 * 0.75 + 0.25)
    # A misjudged update never makes the micro-batches free of cost or negative.
    assert accumulated_seconds(1.0, 8, 2.0) == 1.0
    fit = fit_step_time([1, 101] * 3, [1.0, 2.0] * 3, [0, 0, 1, 1, 2, 2], update_seconds=0.5)
    assert fit.step_time.seconds(101, accumulation=4) == pytest.approx(4 * 1.5 + 0.5)


def test_replicas_add_or_overlap() -> None:
    assert replicated_seconds(3, 4) == 7
    assert replicated_seconds(3, 4, overlap=2) == pytest.approx(5)
    assert replicated_seconds(3, 4, overlap=math.inf) == 4
    assert replicated_seconds(3, 4, overlap=1e6) == pytest.approx(4)
    assert replicated_seconds(0, 0, overlap=3) == 0
    with pytest.raises(UsageError, match=r"overlap is 0\.5; it must be at least 1"):
        replicated_seconds(1, 1, overlap=0.5)
    with pytest.raises(UsageError, match="A time is -1 s; times cannot be negative"):
        replicated_seconds(1, -1)


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(UsageError, match="0 timings, of which 0 are not positive and finite"):
        fit_step_time([], [], [])
    with pytest.raises(UsageError, match="2 timings, of which 1 are not positive and finite"):
        fit_step_time([1, 2], [1.0, float("nan")], [0, 0])
    step_time: StepTime = fit_step_time([1], [1.0], [0]).step_time
    with pytest.raises(UsageError, match="micro_batch is 0 and accumulation 1; both must be"):
        step_time.seconds(0)


def test_the_list_of_sizes_ends_with_the_limit() -> None:
    assert powers_of_two(1) == [1]
    assert powers_of_two(8) == [1, 2, 4, 8]
    assert powers_of_two(1000)[-2:] == [512, 1000]


def test_students_quantile_against_scipy() -> None:
    from scipy.stats import t as student

    for dof in (1, 2, 3, 4, 5, 7, 10, 30, 1000):
        assert student_95(dof) == pytest.approx(float(student.ppf(0.975, dof)), rel=2e-3)
