"""Bounds of the largest eigenvalue against matrices whose eigenvalues are known."""

from __future__ import annotations

import math

import numpy as np
import pytest

from rightbatch.laws.lanczos import top_ritz_pair

Array = np.ndarray


def naive_lanczos(matrix: Array, start: Array, steps: int) -> tuple[list[float], list[float]]:
    """Textbook Lanczos, orthogonalised against every vector before."""
    basis = [start / np.linalg.norm(start)]
    alpha, beta = [], []
    for _ in range(steps):
        product = matrix @ basis[-1]
        alpha.append(float(basis[-1] @ product))
        for _ in range(2):
            product = product - sum((q @ product) * q for q in basis)
        beta.append(float(np.linalg.norm(product)))
        if beta[-1] < 1e-12:
            beta[-1] = 0.0
            break
        basis.append(product / beta[-1])
    return alpha, beta


def with_eigenvalues(values: Array, rng: np.random.Generator) -> Array:
    q, _ = np.linalg.qr(rng.standard_normal((len(values), len(values))))
    return (q * values) @ q.T


SPECTRA = {
    "even": np.linspace(-1, 1, 60),
    "outlier": np.concatenate([np.zeros(50), np.linspace(0, 1, 9), [10.0]]),
    "clustered at the top": np.concatenate([np.linspace(-2, 0.5, 50), 1 - 1e-3 * np.arange(10)]),
    "degenerate": np.repeat([-3.0, 0.0, 2.0], 20),
    "indefinite": np.concatenate([[-50.0, -49.0], np.linspace(-1, 1, 58)]),
    "negative": -np.geomspace(0.01, 10, 60),
}


@pytest.mark.parametrize("values", SPECTRA.values(), ids=SPECTRA.keys())
@pytest.mark.parametrize("steps", [1, 3, 10, 30])
def test_the_largest_eigenvalue_is_inside_in_at_least_95_of_100(values: Array, steps: int) -> None:
    rng = np.random.default_rng(0)
    top, draws, inside = float(values.max()), 200, 0
    for _ in range(draws):
        # Rotating the start is rotating the matrix.
        alpha, beta = naive_lanczos(np.diag(values), rng.standard_normal(len(values)), steps)
        pair = top_ritz_pair(alpha, beta, dimension=len(values))
        assert pair.value <= top + 1e-9
        inside += pair.high >= top - 1e-9
    assert inside >= 0.93 * draws  # 95 % at least, less two deviations of the count


def test_the_bound_is_met_exactly_in_two_dimensions() -> None:
    """One step on diag(1, 0) from (c, s): θ = c², β = cs, and (λ − θ)² = c²s²/part."""
    angle, part = 0.7, 0.006155829702431111  # of Beta(1/2, 1/2): sin²(π·0.05/2)
    assert part == pytest.approx(math.sin(math.pi * 0.05 / 2) ** 2)
    c, s = math.cos(angle), math.sin(angle)
    pair = top_ritz_pair([c * c], [c * s], dimension=2)
    assert pair.value == pytest.approx(c * c)
    assert pair.high == pytest.approx(c * c + c * s / math.sqrt(part))
    assert pair.residual == pytest.approx(c * s)


def test_the_residual_is_that_of_the_ritz_vector() -> None:
    rng = np.random.default_rng(1)
    matrix = with_eigenvalues(SPECTRA["indefinite"], rng)
    start = rng.standard_normal(60)
    alpha, beta = naive_lanczos(matrix, start, 12)
    pair = top_ritz_pair(alpha, beta, dimension=60)
    basis = [start / np.linalg.norm(start)]
    for _ in range(11):
        product = matrix @ basis[-1]
        for _ in range(2):
            product = product - sum((q @ product) * q for q in basis)
        basis.append(product / np.linalg.norm(product))
    vector = np.array(basis).T @ pair.vector
    assert np.linalg.norm(matrix @ vector - pair.value * vector) == pytest.approx(
        pair.residual, rel=1e-6
    )


@pytest.mark.parametrize("name", ["outlier", "indefinite"])
def test_the_bound_closes_where_the_top_stands_apart(name: str) -> None:
    values = SPECTRA[name]
    alpha, beta = naive_lanczos(
        np.diag(values), np.random.default_rng(2).standard_normal(len(values)), 25
    )
    pair = top_ritz_pair(alpha, beta, dimension=len(values))
    assert pair.high - pair.value < 0.05 * np.abs(values).max()


def test_an_invariant_space_is_exact() -> None:
    """Three different eigenvalues: after three steps nothing is left."""
    values = SPECTRA["degenerate"]
    alpha, beta = naive_lanczos(np.diag(values), np.random.default_rng(3).standard_normal(60), 9)
    assert len(alpha) == 3 and beta[-1] == 0
    pair = top_ritz_pair(alpha, beta, dimension=60)
    assert pair.value == pytest.approx(2.0) and pair.high == pair.value
    assert pair.size == pytest.approx(3.0)


def test_all_rows_are_exact() -> None:
    pair = top_ritz_pair([3.0], [1e-17], dimension=1)
    assert (pair.value, pair.high) == (3.0, 3.0)


def test_scale_and_shift() -> None:
    values = SPECTRA["clustered at the top"]
    start = np.random.default_rng(4).standard_normal(60)
    one = top_ritz_pair(*naive_lanczos(np.diag(values), start, 8), dimension=60)
    other = top_ritz_pair(*naive_lanczos(np.diag(1e6 * values + 5e6), start, 8), dimension=60)
    assert other.high == pytest.approx(1e6 * one.high + 5e6, rel=1e-9)
    assert other.value == pytest.approx(1e6 * one.value + 5e6, rel=1e-9)


def test_wrong_arguments() -> None:
    with pytest.raises(ValueError, match="2 numbers on the diagonal and 1 beside it"):
        top_ritz_pair([1.0, 2.0], [1.0], dimension=5)
    with pytest.raises(ValueError, match="at most the rows"):
        top_ritz_pair([1.0, 2.0], [1.0, 1.0], dimension=1)
    with pytest.raises(ValueError, match="β before the last is 0"):
        top_ritz_pair([1.0, 2.0], [0.0, 1.0], dimension=5)
