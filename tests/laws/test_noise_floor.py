"""The noise floor: planted curves, coverage, and the exact stationary loss of SGD."""

from __future__ import annotations

import math

import numpy as np
import pytest

from rightbatch.laws.linear_regression import (
    LinearRegression,
    divergence_edge,
    loss_by_recursion,
    stationary_loss,
)
from rightbatch.laws.noise_floor import NoiseFloor, estimate_noise_floor
from rightbatch.laws.progress import spaced_steps

STEPS = np.array(list(spaced_steps(1.12, 2000)), dtype=float)
PROBLEM = LinearRegression(
    eigenvalues=(2.0, 1.0, 0.5, 0.25), offsets=(1.0, -1.0, 2.0, 1.0), noise_variance=1.0
)


def planted(
    rng: np.random.Generator, shape: np.ndarray, *, floor: float, noise: float, seeds: int = 5
) -> NoiseFloor:
    """Curves that come down to a floor, which differs by seed, and waver around it."""
    return estimate_noise_floor(
        [
            (
                STEPS.tolist(),
                (
                    floor * (1 + 0.3 * noise * rng.normal())
                    + shape
                    + floor * noise * rng.normal(size=len(STEPS))
                ).tolist(),
            )
            for _ in range(seeds)
        ]
    )


def covers(found: NoiseFloor, truth: float) -> bool:
    low, high = found.level.low, found.level.high
    return low is not None and high is not None and low <= truth <= high


@pytest.mark.parametrize("seeds", [3, 5])
@pytest.mark.parametrize("time_scale", [20.0, 100.0])
def test_a_curve_that_came_to_its_floor_is_settled_and_the_interval_covers_it(
    seeds: int, time_scale: float
) -> None:
    rng = np.random.default_rng(seeds)
    shape = 2 * np.exp(-STEPS / time_scale)
    found = [planted(rng, shape, floor=0.5, noise=0.03, seeds=seeds) for _ in range(500)]
    settled = [f for f in found if f.verdict == "settled"]
    assert len(settled) > 0.85 * len(found)
    # Three seeds: a little wide, since how two parts of a curve hang together is hardly known.
    assert 0.91 <= np.mean([covers(f, 0.5) for f in settled]) <= (0.985 if seeds > 3 else 0.995)
    assert not any(f.verdict == "falling" and f.level.value is not None for f in found)


@pytest.mark.parametrize(
    "shape",
    [STEPS**-0.5, 3 * STEPS**-0.3, 2 * np.exp(-STEPS / 1500), 1 - STEPS / 4000],
    ids=["root", "slow power", "slow exponential", "line"],
)
def test_a_curve_that_still_falls_has_no_floor_but_an_upper_bound(shape: np.ndarray) -> None:
    rng = np.random.default_rng(2)
    found = [planted(rng, shape, floor=0.05, noise=0.02) for _ in range(100)]
    assert np.mean([f.verdict == "falling" for f in found]) > 0.95
    assert not any(f.verdict == "settled" for f in found)
    for floor in (f for f in found if f.verdict == "falling"):
        assert floor.level.value is None and floor.level.high is not None
        assert floor.level.high > 0.05


def test_a_slow_fall_to_a_high_floor_is_not_taken_for_the_floor() -> None:
    rng = np.random.default_rng(3)
    slow = 0.1 * np.exp(-STEPS / 4000)  # falls faster and faster per doubling, all of it small
    found = [planted(rng, slow, floor=0.5, noise=0.002) for _ in range(100)]
    assert np.mean([f.verdict == "settled" for f in found]) < 0.05


def test_seeds_that_crawl_over_a_plateau_at_different_paces_have_not_settled() -> None:
    # Their falls differ so much that the spread over three seeds has 0 inside.
    curves = [
        (STEPS.tolist(), (1 - pace * (STEPS / STEPS[-1]) ** 1.5).tolist())
        for pace in (0.01, 0.03, 0.12)
    ]
    found = estimate_noise_floor(curves)
    assert found.fall.low is not None and found.fall.low < 0 < (found.fall.high or 0)
    assert found.verdict == "falling" and found.level.value is None


def test_a_loss_that_rises_again_is_not_settled() -> None:
    rng = np.random.default_rng(4)
    shape = 2 * np.exp(-STEPS / 100) + 0.05 * np.log1p(STEPS / 200)
    found = [planted(rng, shape, floor=0.2, noise=0.02) for _ in range(50)]
    assert np.mean([f.verdict == "rising" for f in found]) > 0.9
    assert all(f.level.value is None for f in found)


def test_a_converged_curve_without_noise_is_settled_at_its_last_loss() -> None:
    losses = 0.3 + np.exp(-STEPS / 30)
    found = estimate_noise_floor([(STEPS.tolist(), losses.tolist())] * 3)
    assert found.verdict == "settled"
    assert found.level.value == pytest.approx(0.3, rel=1e-6)
    assert found.wavering.value == pytest.approx(0, abs=1e-6)


def test_what_cannot_be_told_is_not_said() -> None:
    rng = np.random.default_rng(5)
    assert planted(rng, 0 * STEPS, floor=0.5, noise=0.01, seeds=1).verdict == "unresolved"
    wild = [planted(rng, 0 * STEPS, floor=0.5, noise=0.5, seeds=3) for _ in range(50)]
    assert np.mean([f.verdict == "unresolved" for f in wild]) > 0.8
    short = estimate_noise_floor([([1, 2, 3], [1.0, 1.0, 1.0])] * 3)
    assert short.verdict == "unresolved" and short.level.method == "too few evaluations"
    gone = estimate_noise_floor([(STEPS.tolist(), [math.nan] * len(STEPS))] * 3)
    assert gone.verdict == "unresolved"
    with pytest.raises(ValueError, match="ascending updates and as many losses"):
        estimate_noise_floor([([2, 1], [1.0, 1.0])])


@pytest.mark.parametrize(("share", "batch"), [(0.5, 1), (0.5, 8), (0.1, 1), (0.7, 32)])
def test_the_stationary_loss_is_where_the_exact_recursion_ends(share: float, batch: int) -> None:
    rate = share * divergence_edge(PROBLEM, global_batch=batch)
    end = loss_by_recursion(PROBLEM, learning_rates=rate, global_batch=batch, num_steps=5000)[0, -1]
    assert stationary_loss(PROBLEM, learning_rate=rate, global_batch=batch) == pytest.approx(end)


def test_beyond_the_edge_there_is_no_stationary_loss() -> None:
    edge = divergence_edge(PROBLEM, global_batch=4)
    assert stationary_loss(PROBLEM, learning_rate=1.01 * edge, global_batch=4) == math.inf


def sgd(rate: float, batch: int, runs: int, rng: np.random.Generator) -> np.ndarray:
    """Losses of real SGD on the problem, at the study's evaluations; shape (runs, evaluations)."""
    eigenvalues = np.array(PROBLEM.eigenvalues)
    offsets = np.tile(PROBLEM.offsets, (runs, 1))
    losses: list[np.ndarray] = []
    wanted = set(STEPS.astype(int).tolist())
    for step in range(1, int(STEPS[-1]) + 1):
        x = rng.normal(size=(runs, batch, 4)) * np.sqrt(eigenvalues)
        error = np.einsum("rbd,rd->rb", x, offsets) - rng.normal(size=(runs, batch))
        offsets -= rate * np.einsum("rb,rbd->rd", error, x) / batch
        if step in wanted:
            losses.append(0.5 * offsets**2 @ eigenvalues + 0.5 * PROBLEM.noise_variance)
    return np.array(losses).T


@pytest.mark.parametrize(("share", "batch"), [(0.3, 1), (0.5, 4)])
def test_the_floor_of_real_sgd_is_the_stationary_loss(share: float, batch: int) -> None:
    rate = share * divergence_edge(PROBLEM, global_batch=batch)
    truth = stationary_loss(PROBLEM, learning_rate=rate, global_batch=batch) + 0.5
    losses = sgd(rate, batch, runs=1000, rng=np.random.default_rng(batch))
    found = [
        estimate_noise_floor([(STEPS.tolist(), row.tolist()) for row in losses[i : i + 5]])
        for i in range(0, 1000, 5)
    ]
    settled = [f for f in found if f.verdict == "settled"]
    assert not any(f.verdict in ("falling", "rising") and f.fall.value is None for f in found)
    assert len(settled) >= 90
    assert 0.91 <= np.mean([covers(f, truth) for f in settled]) <= 0.985
    every = np.mean([f.level.value for f in settled if f.level.value is not None])
    assert every == pytest.approx(truth, rel=0.03)


def test_a_larger_rate_or_a_smaller_batch_has_a_higher_floor() -> None:
    floors = [
        stationary_loss(PROBLEM, learning_rate=rate, global_batch=batch)
        for rate, batch in [(0.05, 8), (0.05, 1), (0.1, 1)]
    ]
    assert floors == sorted(floors) and floors[0] > 0
