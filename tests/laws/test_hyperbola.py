"""The hyperbola S(B) = S_min(1 + B_c/B): exact data, noise, censoring, and where it fails."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from pydantic import TypeAdapter

from rightbatch.laws.hyperbola import HyperbolaFit, StepsToTarget, fit_hyperbola, hyperbola_steps
from rightbatch.laws.linear_regression import (
    LinearRegression,
    best_steps,
    initial_loss,
    isotropic_steps,
    simple_noise_scale,
)

SIZES = [2**k for k in range(13)]


def observe(steps_at: dict[int, float]) -> list[StepsToTarget]:
    return [StepsToTarget(global_batch=b, steps=s) for b, s in steps_at.items()]


@pytest.mark.parametrize("critical", [10.0, 64.0, 300.0])
def test_exact_data_are_recovered(critical: float) -> None:
    fit = fit_hyperbola(observe({b: 7 * (1 + critical / b) for b in SIZES}))
    assert fit.critical_batch.value == pytest.approx(critical, rel=1e-3)
    assert fit.min_steps.value == pytest.approx(7, rel=1e-3)
    assert fit.min_examples.value == pytest.approx(7 * critical, rel=1e-3)
    assert fit.steps(critical) == pytest.approx(14, rel=1e-3)
    assert fit.describes_data and fit.warnings == ()
    assert fit.relative_error < 1e-3


def test_mean_estimation_has_no_critical_batch() -> None:
    """science.md 6.4: ½|θ − x|² with lr 1/t needs examples, whatever the batch: S = E/B."""
    fit = fit_hyperbola(observe({b: 1e5 / b for b in SIZES}))
    assert fit.critical_batch.value is None and fit.critical_batch.high is None
    assert fit.critical_batch.low is not None and fit.critical_batch.low > SIZES[-1]
    assert fit.min_steps.value is None and fit.steps(64) is None
    assert fit.min_examples.value == pytest.approx(1e5, rel=0.01)
    assert "No critical batch found" in fit.warnings[0]


def test_noisy_perfect_scaling_has_no_critical_batch() -> None:
    none = 0
    for seed in range(20):
        noise = np.exp(0.1 * np.random.default_rng(seed).normal(size=len(SIZES)))
        fit = fit_hyperbola(observe({b: 1e5 / b * e for b, e in zip(SIZES, noise, strict=True)}))
        none += fit.critical_batch.value is None
        assert fit.critical_batch.low is not None and fit.critical_batch.low > SIZES[-1] / 8
    assert none >= 18


def test_steps_that_do_not_depend_on_the_batch() -> None:
    fit = fit_hyperbola(observe(dict.fromkeys(SIZES, 100.0)))
    assert fit.critical_batch.value is None and fit.critical_batch.low is None
    assert fit.critical_batch.high is not None and fit.critical_batch.high < 1
    assert fit.min_steps.value == pytest.approx(100, rel=0.01)
    assert fit.min_examples.value is None
    assert "do not depend on B" in fit.warnings[0]


@pytest.mark.parametrize("dimension", [5, 100])
def test_the_fit_notices_where_the_hyperbola_fails(dimension: int) -> None:
    """science.md 6.3, exact: S ∝ 1/ln(1 + B/(d + 1)) never levels off."""
    fit = fit_hyperbola(
        observe({b: isotropic_steps(dimension, global_batch=b, loss_ratio=50) for b in SIZES})
    )
    assert not fit.describes_data
    assert any("does not describe" in warning for warning in fit.warnings)
    assert fit.critical_batch.value is not None
    assert fit.critical_batch.value > 3 * (dimension + 1)  # it is not the noise scale d + 1


def test_below_the_noise_scale_the_same_law_is_a_fine_hyperbola() -> None:
    sizes = [2**k for k in range(8)]
    fit = fit_hyperbola(
        observe({b: isotropic_steps(200, global_batch=b, loss_ratio=50) for b in sizes})
    )
    assert fit.describes_data


def test_the_critical_batch_depends_on_the_target() -> None:
    """science.md 6.2: one problem, one noise scale at the start, two critical batches."""
    eigenvalues = np.geomspace(4, 0.1, 6)
    problem = LinearRegression(
        eigenvalues=tuple(eigenvalues.tolist()),
        offsets=tuple((eigenvalues**-0.5).tolist()),
        noise_variance=5.0,
    )
    assert simple_noise_scale(problem) == pytest.approx(12)
    critical = {}
    for share in (0.02, 0.3):
        target = share * initial_loss(problem)
        steps = {
            b: best_steps(problem, global_batch=b, target_loss=target, max_steps=1e5).steps
            for b in SIZES
        }
        fit = fit_hyperbola(observe({b: s for b, s in steps.items() if s is not None}))
        assert fit.describes_data and fit.relative_error < 0.03
        critical[share] = fit.critical_batch.value
    assert critical[0.02] == pytest.approx(154, rel=0.02)
    assert critical[0.3] == pytest.approx(31, rel=0.02)


def noisy(
    critical: float, sigma: float, seeds: int, *, rng: np.random.Generator, limit: float = math.inf
) -> list[StepsToTarget]:
    runs = []
    for batch, _ in itertools.product(SIZES[:10], range(seeds)):
        steps = 10 * (1 + critical / batch) * math.exp(sigma * rng.normal())
        runs.append(
            StepsToTarget(global_batch=batch, steps=min(steps, limit), missed=steps > limit)
        )
    return runs


@pytest.mark.parametrize(("seeds", "sigma", "limit"), [(1, 0.1, math.inf), (3, 0.15, 220.0)])
def test_coverage(seeds: int, sigma: float, limit: float) -> None:
    rng = np.random.default_rng(0)
    covered, values = 0, []
    for _ in range(200):
        estimate = fit_hyperbola(noisy(64, sigma, seeds, rng=rng, limit=limit)).critical_batch
        assert estimate.low is not None and estimate.high is not None
        assert estimate.value is not None
        covered += estimate.low <= 64 <= estimate.high
        values.append(estimate.value)
    assert 0.91 <= covered / 200 <= 0.985
    assert np.median(values) == pytest.approx(64, rel=0.05)


def test_missed_targets_are_not_steps_at_the_limit() -> None:
    rng = np.random.default_rng(1)
    honest, taken_as_met, dropped = [], [], []
    runs: list[StepsToTarget] = []
    for _ in range(30):
        runs = noisy(64, 0.3, 3, rng=rng, limit=150.0)
        as_met = [StepsToTarget(global_batch=r.global_batch, steps=r.steps) for r in runs]
        met = [r for r in runs if not r.missed]
        for found, data in ((honest, runs), (taken_as_met, as_met), (dropped, met)):
            found.append(fit_hyperbola(data).critical_batch.value or math.inf)
    errors = [abs(math.log(np.median(v) / 64)) for v in (honest, taken_as_met, dropped)]
    assert errors[0] < 0.1
    assert errors[1] > 3 * errors[0]
    assert errors[2] > errors[0]
    assert any("missed the target" in w for w in fit_hyperbola(runs).warnings)


@pytest.mark.parametrize(
    ("sizes", "warns"),
    [(SIZES[:8], "Try larger sizes"), (SIZES[5:], "Try smaller sizes"), (SIZES[2:11], None)],
)
def test_sizes_must_reach_8_times_to_each_side(sizes: list[int], warns: str | None) -> None:
    fit = fit_hyperbola(observe({b: 7 * (1 + 64 / b) for b in sizes}))
    assert any(warns in w for w in fit.warnings) if warns else fit.warnings == ()


def test_the_record_survives_json_and_is_repeatable() -> None:
    runs = noisy(64, 0.2, 1, rng=np.random.default_rng(2))
    fit = fit_hyperbola(runs)
    adapter = TypeAdapter(HyperbolaFit)
    assert adapter.validate_python(adapter.dump_python(fit, mode="json")) == fit
    assert fit_hyperbola(runs) == fit
    assert fit_hyperbola(runs, seed=1) != fit


def test_wrong_input_is_refused() -> None:
    with pytest.raises(ValueError, match="Only 2 batch sizes met the target"):
        fit_hyperbola(observe({1: 5.0, 2: 4.0}))
    with pytest.raises(ValueError, match="A missed target is steps=limit"):
        StepsToTarget(global_batch=4, steps=math.inf)
    assert hyperbola_steps(64, min_steps=10, critical_batch=None) is None


def test_three_sizes_are_enough_to_answer() -> None:
    fit = fit_hyperbola(observe({b: 7 * (1 + 30 / b) for b in (2, 32, 512)}))
    assert fit.critical_batch.value == pytest.approx(30, rel=1e-2)
