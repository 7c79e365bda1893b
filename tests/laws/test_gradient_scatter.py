"""Scatter of gradients: the finite-population law, coverage of the slope, the cosine."""

from __future__ import annotations

import numpy as np
import pytest

from rightbatch.laws.gradient_scatter import BatchDraws, Scatter, estimate_scatter

N = 256


def draw(gradients: np.ndarray, sizes: list[int], count: int, rng: np.random.Generator) -> Scatter:
    """Real batches, without replacement, of a set of gradients at hand."""
    full = gradients.mean(axis=0)
    found: list[BatchDraws] = []
    for size in sizes:
        batches = np.array(
            [gradients[rng.permutation(N)[:size]].mean(axis=0) for _ in range(count)]
        )
        cosines = batches @ full / np.linalg.norm(batches, axis=1) / np.linalg.norm(full)
        errors = ((batches - full) ** 2).sum(axis=1)
        found.append(
            BatchDraws(
                batch_size=size,
                squared_errors=tuple(errors.tolist()),
                cosines=tuple(cosines.tolist()),
            )
        )
    return estimate_scatter(found, gradient_norm=float(np.linalg.norm(full)), population=N)


def test_the_slope_is_a_half_until_n_matters_and_the_error_at_n_is_0() -> None:
    rng = np.random.default_rng(0)
    gradients = rng.normal(size=(N, 60)) + 0.3
    found = [draw(gradients, [1, 4, 16, 64, N], 16, rng) for _ in range(200)]
    covered = [(s.slope.low or 0) <= -0.5 <= (s.slope.high or -1) for s in found]
    assert 0.91 <= np.mean(covered) <= 0.985
    scatter = found[-1]
    last = scatter.sizes[-1]
    assert last.standard_error.value == pytest.approx(0, abs=1e-12) and last.predicted_error == 0
    assert last.cosine.value == pytest.approx(1) and last.predicted_cosine_squared == 1
    exact = float(gradients.var(axis=0, ddof=1).sum())
    assert scatter.trace.value == pytest.approx(exact, rel=0.1)
    for size in scatter.sizes[:-1]:
        assert size.standard_error.value == pytest.approx(size.predicted_error, rel=0.15)


def test_in_many_dimensions_the_cosine_is_as_predicted_and_in_one_it_is_not() -> None:
    rng = np.random.default_rng(1)
    wide = draw(rng.normal(size=(N, 2000)) + 0.2, [2, 8, 32, 128], 64, rng)
    for size in wide.sizes:
        assert size.cosine_squared.value == pytest.approx(size.predicted_cosine_squared, rel=0.05)
        assert size.cosine_low <= size.cosine_median <= size.cosine_high
    assert [size.cosine_median for size in wide.sizes] == sorted(
        size.cosine_median for size in wide.sizes
    )
    narrow = draw(rng.normal(size=(N, 1)) + 0.2, [2], 64, rng)
    assert narrow.sizes[0].cosine_squared.value == pytest.approx(1)
    assert narrow.sizes[0].predicted_cosine_squared < 0.5


def test_gradients_that_do_not_follow_the_law_show_another_slope() -> None:
    rng = np.random.default_rng(2)
    draws = [
        BatchDraws(
            batch_size=m,
            squared_errors=tuple((m**-0.5 * rng.chisquare(9, size=40)).tolist()),
            cosines=(0.5,) * 40,
        )
        for m in (1, 4, 16)
    ]
    slope = estimate_scatter(draws, gradient_norm=1.0, population=10**6).slope
    assert slope.low is not None and slope.high is not None
    assert slope.low <= -0.25 <= slope.high < -0.2


def test_one_size_has_no_slope_and_none_is_refused() -> None:
    one = BatchDraws(batch_size=1, squared_errors=(1.0, 2.0, 3.0, 2.0), cosines=(0.1,) * 4)
    assert not estimate_scatter([one], gradient_norm=1.0, population=N).slope.resolved
    with pytest.raises(ValueError, match="no draws of fewer than 1 examples"):
        estimate_scatter([one], gradient_norm=1.0, population=1)
