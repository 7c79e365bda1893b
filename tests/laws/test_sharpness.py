"""φ, its box and the trace against closed forms."""

from __future__ import annotations

import numpy as np
import pytest

from rightbatch.laws.sharpness import estimate_trace, keskar_box, keskar_sharpness


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
