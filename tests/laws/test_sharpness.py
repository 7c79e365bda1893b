"""φ, its box and the trace against closed forms."""

from __future__ import annotations

import numpy as np
import pytest

from rightbatch.laws.sharpness import (
    estimate_trace,
    keskar_box,
    keskar_sharpness,
    order_of_pairs,
)


@pytest.mark.parametrize("epsilon", [1e-3, 5e-4])
def test_keskar_of_a_quadratic_at_its_minimum(epsilon: float) -> None:
    """½yᵀHy with diagonal H ≥ 0 at 0 is highest at the corners: φ = 50 ε² Σ h_i."""
    h = np.array([0.0, 0.3, 2.0, 40.0])
    corner = keskar_box(np.zeros(4), epsilon)
    highest = 0.5 * float(corner @ (h * corner))
    assert keskar_sharpness(highest, 0.0) == pytest.approx(50 * epsilon**2 * h.sum())


def test_a_loss_below_minus_one_has_no_keskar_sharpness() -> None:
    assert keskar_sharpness(5.0, -1.0) is None
    assert keskar_sharpness(5.0, float("nan")) is None


def test_the_box_grows_with_the_weights() -> None:
    np.testing.assert_allclose(keskar_box([-2.0, 0.0, 9.0], 1e-3), [3e-3, 1e-3, 1e-2])


@pytest.mark.parametrize("num_known", [0, 3])
def test_the_interval_of_the_trace_covers_it(num_known: int) -> None:
    """Probes of a dense matrix with decaying eigenvalues, the largest of them known or not."""
    rng = np.random.default_rng(5)
    values = np.geomspace(10, 0.01, 40)
    q, _ = np.linalg.qr(rng.standard_normal((40, 40)))
    matrix, known = (q * values) @ q.T, q[:, :num_known]
    part = float(np.trace(known.T @ matrix @ known))
    inside, widths, draws = 0, list[float](), 400
    for _ in range(draws):
        probes = rng.choice([-1.0, 1.0], size=(32, 40))
        probes -= (probes @ known) @ known.T
        samples = np.einsum("ki,ij,kj->k", probes, matrix, probes).tolist()
        found = estimate_trace(part, samples, "test")
        assert found.low is not None and found.high is not None and found.n == 32
        inside += found.low <= values.sum() <= found.high
        widths.append(found.high - found.low)
    assert 0.91 <= inside / draws <= 0.98
    assert np.median(widths) < (0.4 if num_known else 0.7) * values.sum()


# --- pairs over seeds -----------------------------------------------------------------------------


def test_pairs_are_told_apart_although_seeds_differ_much() -> None:
    second = [1.0, 10.0, 100.0, 1000.0]
    first = [0.52 * second[0], 0.48 * second[1], 0.5 * second[2], 0.5 * second[3]]
    order, ratio = order_of_pairs(first, second)
    assert order == "lower" and ratio.n == 4 and ratio.value == pytest.approx(0.5, rel=0.01)
    assert ratio.low is not None and ratio.high is not None and ratio.low < 0.5 < ratio.high < 0.55
    assert order_of_pairs(second, first)[0] == "higher"


def test_one_pair_or_none_tells_nothing() -> None:
    assert order_of_pairs([1.0], [5.0])[0] == "not told apart"
    assert order_of_pairs([1.0, None], [None, 5.0])[1].value is None
    assert order_of_pairs([], [])[0] == "not told apart"


def test_values_that_are_not_positive_are_told_apart_by_differences() -> None:
    order, ratio = order_of_pairs([-1.0, -1.1, -0.9], [1.0, 1.1, 1.0])
    assert order == "lower" and not ratio.resolved


def test_two_seeds_that_are_far_apart() -> None:
    order, ratio = order_of_pairs([1e-9, 1e300], [1.0, 1.0])
    assert order == "not told apart" and ratio.high is None


def test_without_a_difference_one_in_twenty_is_told_apart() -> None:
    rng = np.random.default_rng(8)
    told = 0
    for _ in range(400):
        base = rng.normal(size=5)
        first, second = np.exp(base + rng.normal(size=(2, 5)))
        told += order_of_pairs(first.tolist(), second.tolist())[0] != "not told apart"
    assert 0.02 <= told / 400 <= 0.09
