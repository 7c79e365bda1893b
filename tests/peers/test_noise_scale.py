"""Peers' failure 9: tensight's noise scale is low by a factor of B, and clamped to [8, 4096]."""

import math

import numpy as np
import pytest

from rightbatch.laws.noise import estimate_noise_scale, make_gradient_sample

Array = np.ndarray


def gradients_of_batches(dimension: int, batch: int, num_batches: int) -> Array:
    """Mean gradients of batches: a standard normal signal along one axis, unit noise in all.

    tr Σ = dimension and |G|² = 1, so B_simple is the dimension exactly.
    """
    rng = np.random.default_rng(0)
    means = rng.standard_normal((num_batches, dimension)) / math.sqrt(batch)
    means[:, 0] += 1.0
    return means


def peers_noise_scale(means: Array) -> float:
    """Variance of the batches' gradients over the mean's square: B times too small, clamped."""
    variance = float(means.var(axis=0, ddof=1).sum())
    scale = variance / float((means.mean(axis=0) ** 2).sum())
    return float(np.clip(2.0 ** round(math.log2(scale)), 8, 4096))


@pytest.mark.parametrize("batch", [4, 16, 64])
@pytest.mark.parametrize("dimension", [3, 100, 8000])
def test_the_noise_scale_does_not_depend_on_the_batch_it_was_measured_with(
    dimension: int, batch: int
) -> None:
    means = gradients_of_batches(dimension, batch, 400)
    found = estimate_noise_scale(
        make_gradient_sample(means, sizes=[batch] * len(means))
    ).noise_scale
    assert found.value == pytest.approx(dimension, rel=0.35)
    assert found.low is not None
    assert found.low <= dimension
    assert found.high is None or dimension <= found.high


def test_the_peers_formula_is_low_by_the_batch_and_ends_at_its_clamps() -> None:
    for batch in (16, 64):
        found = peers_noise_scale(gradients_of_batches(2000, batch, 4000))
        assert found == pytest.approx(2000 / batch, rel=0.5)
    assert peers_noise_scale(gradients_of_batches(3, 4, 400)) == 8
