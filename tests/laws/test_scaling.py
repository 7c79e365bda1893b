import math
from typing import get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rightbatch.errors import UsageError
from rightbatch.laws.scaling import (
    AdamSettings,
    Rule,
    carry_rate,
    estimate_surge_batch,
    noise_temperature,
    scale_adam,
    scale_beta_by_half_life,
    scale_learning_rate,
    sign_descent_learning_rate,
    sum_loss_learning_rate,
    surge_factor,
)

RULES: list[Rule] = list(get_args(Rule))
positive = st.floats(1e-3, 1e3)


@pytest.mark.parametrize("rule", RULES)
@given(lr=positive, a=positive, b=positive, c=positive, noise=positive)
def test_every_rule_is_the_identity_reversible_and_composes(
    rule: Rule, lr: float, a: float, b: float, c: float, noise: float
) -> None:
    def scale(value: float, old: float, new: float) -> float:
        return scale_learning_rate(value, old, new, rule=rule, noise_scale=noise)

    assert scale(lr, a, a) == pytest.approx(lr)
    assert scale(scale(lr, a, b), b, a) == pytest.approx(lr)
    assert scale(scale(lr, a, b), b, c) == pytest.approx(scale(lr, a, c))


def test_saturating_is_linear_below_the_noise_scale_and_flat_above() -> None:
    small = scale_learning_rate(1, 1, 10, rule="saturating", noise_scale=1e6)
    assert small == pytest.approx(10, rel=1e-4)
    large = scale_learning_rate(1, 1e4, 1e6, rule="saturating", noise_scale=10)
    assert large == pytest.approx(1, rel=2e-3)


def test_saturating_agrees_with_gaussian_regression_where_the_best_lr_is_known() -> None:
    # C = I, no label noise: η*(B) = 1/(1 + (d + 1)/B) exactly (B_noise = d + 1).
    d = 6
    best = {B: 1 / (1 + (d + 1) / B) for B in (1, 8, 64, 512)}
    for old in best:
        for new in best:
            scaled = scale_learning_rate(best[old], old, new, rule="saturating", noise_scale=d + 1)
            assert scaled == pytest.approx(best[new], rel=1e-12)


def curvature(n: int, coupling: float) -> np.ndarray:
    return (1 - coupling) * np.eye(n) + coupling * np.ones((n, n))


def test_surge_peaks_near_7_1_with_coupled_curvature() -> None:
    # science 6.8: n = 100, μ/σ = .05, H = .1 I + .9·11ᵀ.
    n, mean, std = 100, np.full(100, 0.05), np.ones(100)
    H = curvature(n, 0.9)
    sizes = np.geomspace(0.5, 200, 4000)
    rates = [sign_descent_learning_rate(B, mean, std, H) for B in sizes]
    peak = sizes[int(np.argmax(rates))]
    assert peak == pytest.approx(7.1, abs=0.05)
    # At the peak the off-diagonal part equals the trace: e² = tr H / Σ_{i≠j} H_ij = 1/89.1.
    assert max(rates) == pytest.approx(n * 0.05 * math.sqrt(1 / 89.1) / (2 * n), rel=1e-6)
    batch = estimate_surge_batch(mean, std, H)
    assert batch is not None
    assert batch == pytest.approx(math.pi / (2 * 89.1 * 0.05**2), rel=1e-12)
    assert batch == pytest.approx(peak, rel=0.01)


def test_the_surge_law_follows_the_exact_expression_around_its_peak() -> None:
    mean, std, H = np.full(100, 0.05), np.ones(100), curvature(100, 0.9)
    batch = estimate_surge_batch(mean, std, H)
    assert batch is not None
    at_peak = sign_descent_learning_rate(batch, mean, std, H)
    for B in (1, 2, 4, 8, 16, 32, 64):
        exact = sign_descent_learning_rate(B, mean, std, H)
        assert at_peak * surge_factor(B, batch) == pytest.approx(exact, rel=0.06)
        scaled = scale_learning_rate(at_peak, batch, B, rule="surge", noise_scale=batch)
        assert scaled == pytest.approx(at_peak * surge_factor(B, batch))


def test_the_exact_sign_descent_rate_against_simulation() -> None:
    # Naive reference: draw batch gradients, take signs, minimise the sampled quadratic.
    rng = np.random.default_rng(0)
    mean, std = np.array([0.4, 0.1, -0.2]), np.array([1.0, 0.5, 2.0])
    H = np.array([[2.0, 0.5, 0.1], [0.5, 1.0, -0.2], [0.1, -0.2, 0.7]])
    for B in (1, 9, 49):
        signs = np.sign(mean + std / math.sqrt(B) * rng.standard_normal((400_000, 3)))
        sampled = (signs @ mean).mean() / np.einsum("si,ij,sj->s", signs, H, signs).mean()
        assert sign_descent_learning_rate(B, mean, std, H) == pytest.approx(sampled, rel=0.02)


def test_no_surge_with_a_diagonal_hessian() -> None:
    mean, std, H = np.full(100, 0.05), np.ones(100), np.eye(100)
    assert estimate_surge_batch(mean, std, H) is None
    rates = [sign_descent_learning_rate(B, mean, std, H) for B in np.geomspace(0.5, 1e5, 200)]
    assert np.all(np.diff(rates) >= 0)
    assert estimate_surge_batch(mean, std, curvature(100, -0.005)) is None


def test_no_best_step_without_curvature() -> None:
    with pytest.raises(UsageError, match="The curvature along the step is -2, so no step is"):
        sign_descent_learning_rate(4, [1.0, 1.0], [1.0, 1.0], -np.eye(2))


def test_adam_settings_scale_together() -> None:
    old = AdamSettings(learning_rate=1e-3, beta1=0.9, beta2=0.99, eps=1e-8)
    new = scale_adam(old, 32, 128)
    assert new.learning_rate == pytest.approx(2e-3)
    assert new.beta1 == pytest.approx(0.6)
    assert new.beta2 == pytest.approx(0.96)
    assert new.eps == pytest.approx(5e-9)
    back = scale_adam(new, 128, 32)
    assert back.beta1 == pytest.approx(old.beta1) and back.eps == pytest.approx(old.eps)


def test_adam_is_refused_where_a_beta_would_vanish() -> None:
    # κ = 10 makes 1 − κ(1 − 0.9) = 0 exactly; below that it is allowed.
    settings = AdamSettings(learning_rate=1e-3)
    assert scale_adam(settings, 1, 9.9).beta1 == pytest.approx(0.01)
    with pytest.raises(UsageError, match=r"cannot scale beta 0\.9 by 16: .* less than 10 ×"):
        scale_adam(settings, 32, 512)
    with pytest.raises(UsageError, match=r"cannot scale beta 0\.9 by 16"):
        scale_learning_rate(1e-3, 32, 512, rule="adam-sde", betas=(0.9, 0.999))


def test_a_beta_keeps_its_half_life_in_examples() -> None:
    for old, new in ((1, 512), (256, 32), (64, 64)):
        beta = scale_beta_by_half_life(0.95, old, new)
        half_life_old = old * math.log(0.5) / math.log(0.95)
        assert new * math.log(0.5) / math.log(beta) == pytest.approx(half_life_old)
    # For small changes it is Adam's linear rule.
    near = scale_beta_by_half_life(0.9999, 10, 20)
    assert 1 - near == pytest.approx(2e-4, rel=1e-3)


def test_the_temperature_keeps_when_batch_and_rate_grow_together() -> None:
    assert noise_temperature(0.1, 64, 1000) == pytest.approx(noise_temperature(0.2, 128, 1000))
    momentum = noise_temperature(0.01, 64, 1000, momentum=0.9)
    assert momentum == pytest.approx(noise_temperature(0.1, 64, 1000))
    with pytest.raises(UsageError, match="momentum is 1; it must be at least 0 and below 1"):
        noise_temperature(0.1, 64, 1000, momentum=1)


def test_a_sum_reduced_loss_takes_the_same_step() -> None:
    # One SGD step on ½(θ − x)² summed and averaged over a batch lands in the same place.
    x, theta, lr = np.array([1.0, 2.0, 6.0]), 0.5, 0.1
    by_mean = theta - lr * (theta - x).mean()
    by_sum = theta - sum_loss_learning_rate(lr, len(x)) * (theta - x).sum()
    assert by_sum == pytest.approx(by_mean, rel=1e-12)


@pytest.mark.parametrize("rule", ["saturating", "surge"])
def test_a_missing_noise_scale_is_named(rule: Rule) -> None:
    with pytest.raises(UsageError, match=f"The rule '{rule}' needs noise_scale and got None"):
        scale_learning_rate(0.1, 1, 2, rule=rule)


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(UsageError, match="lr is 0; it must be a positive finite number"):
        scale_learning_rate(0, 1, 2)
    with pytest.raises(UsageError, match="new_batch is inf; it must be a positive finite"):
        scale_learning_rate(1, 1, math.inf)
    with pytest.raises(UsageError, match="noise_scale is -3; it must be a positive finite"):
        scale_learning_rate(1, 1, 2, rule="surge", noise_scale=-3)
    with pytest.raises(UsageError, match=r"rule 'cubic' is not known. Use one of: linear, sqrt"):
        scale_learning_rate(1, 1, 2, rule="cubic")  # pyright: ignore[reportArgumentType]
    with pytest.raises(UsageError, match=r"beta is 1\.0; it must be at least 0 and below 1"):
        scale_beta_by_half_life(1.0, 1, 2)


def test_a_rate_is_carried_by_the_saturating_law_or_its_root() -> None:
    ratio = (1 + 100 / 32) / (1 + 100 / 128)
    plain = carry_rate(0.1, at=32, to=128, critical_batch=100, normalised=False)
    assert plain == pytest.approx(0.1 * ratio)
    adam = carry_rate(0.1, at=32, to=128, critical_batch=100, normalised=True)
    assert adam == pytest.approx(0.1 * math.sqrt(ratio))
    back = carry_rate(plain, at=128, to=32, critical_batch=100, normalised=False)
    assert back == pytest.approx(0.1)
