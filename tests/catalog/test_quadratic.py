"""`quadratic`: the workload is what its constants and the closed forms say."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from rightbatch import Recipe, catalog, train
from rightbatch.catalog import quadratic
from rightbatch.laws.linear_regression import (
    curvature_noise_scale,
    initial_loss,
    simple_noise_scale,
)

KNOWN = quadratic.constants()


@pytest.mark.parametrize(("num_examples", "seed"), [(1024, 1), (512, 2)])
def test_second_moments_are_exactly_the_constants(num_examples: int, seed: int) -> None:
    x, y = (t.double().numpy() for t in quadratic.draw(KNOWN, num_examples, seed))
    noise = y + x @ np.array(KNOWN.offsets)  # w* = −offsets
    np.testing.assert_allclose(x.T @ x / len(x), np.diag(KNOWN.eigenvalues), atol=2e-6)
    np.testing.assert_allclose(x.T @ noise / len(x), 0, atol=2e-6)
    assert np.mean(noise**2) == pytest.approx(KNOWN.noise_variance, rel=1e-6)


def test_the_first_loss_and_gradient_are_the_formulas() -> None:
    workload = catalog.get("quadratic")
    model = workload.build_model(0)
    loss_sum, count = workload.loss_sum(model, workload.train_data)
    (loss_sum / count).backward()
    eigenvalues, offsets = np.array(KNOWN.eigenvalues), np.array(KNOWN.offsets)
    floor = KNOWN.noise_variance / 2
    assert float(loss_sum.detach() / count) == pytest.approx(
        0.5 * np.sum(eigenvalues * offsets**2) + floor, rel=1e-5
    )
    assert initial_loss(KNOWN) in (pytest.approx(3.0), pytest.approx(3.0 + floor))
    (weight,) = model.parameters()
    assert weight.grad is not None
    np.testing.assert_allclose(weight.grad.numpy(), eigenvalues * offsets, rtol=1e-4)


def test_the_noise_scale_is_the_formula_up_to_fourth_moments() -> None:
    (x, y), offsets = quadratic.draw(KNOWN, 200_000, seed=3), KNOWN.offsets
    assert len(offsets) == 6
    gradients = (x @ torch.zeros(6) - y)[:, None] * x
    mean = gradients.double().mean(0)
    trace = float(gradients.double().var(0).sum())
    scale = trace / float(mean.square().sum())
    assert scale == pytest.approx(simple_noise_scale(KNOWN), rel=0.03)
    curvature = torch.tensor(KNOWN.eigenvalues, dtype=torch.float64)
    weighted = float((curvature * gradients.double().var(0)).sum() / (curvature * mean**2).sum())
    assert weighted == pytest.approx(curvature_noise_scale(KNOWN), rel=0.03)


def test_full_batch_descent_follows_the_closed_form_exactly() -> None:
    workload = catalog.get("quadratic")
    lr, steps = 0.2, 40
    run = train(workload, Recipe(global_batch=1024, learning_rate=lr), steps=steps)
    eigenvalues, offsets = np.array(KNOWN.eigenvalues), np.array(KNOWN.offsets)
    errors = offsets * (1 - lr * eigenvalues) ** steps
    expected = 0.5 * np.sum(eigenvalues * errors**2) + KNOWN.noise_variance / 2
    assert run.val_loss == pytest.approx(expected, rel=1e-5)


def test_the_target_is_above_the_floor() -> None:
    target = catalog.get("quadratic").parsed_target
    assert target is not None
    floor = KNOWN.noise_variance / 2
    assert math.isclose((target.value - floor) / 3.0, 1 / 300, rel_tol=0.01)
