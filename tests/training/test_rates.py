"""Rates: the exact learning rate of every update, and what must follow it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from rightbatch import Recipe, Workload
from rightbatch.errors import RecipeError, UsageError
from rightbatch.laws.efficiency import adascale_gain
from rightbatch.training import Horizon, Training
from rightbatch.training.rates import Rates

X = torch.randn(100, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
Y = (X[:, 0] > 0).long()


def recorded(make_optimizer: Callable[..., Any] = torch.optim.SGD) -> tuple[Workload, list[Any]]:
    """A workload whose optimizer writes down the settings of each update."""
    seen: list[dict[str, Any]] = []

    def make(params: Any, lr: float) -> torch.optim.Optimizer:
        optimizer = make_optimizer(params, lr=lr)
        optimizer.register_step_pre_hook(
            lambda o, *_: seen.append({k: o.param_groups[0].get(k) for k in ("lr", "betas", "eps")})
        )
        return optimizer

    workload = Workload(
        name="toy",
        make_model=lambda: nn.Linear(4, 2, dtype=torch.float64),
        train_data=(X, Y),
        loss=F.cross_entropy,
        make_optimizer=make,
    )
    return workload, seen


def rates_of(recipe: Recipe, steps: int, horizon: Horizon | None = None) -> list[float]:
    workload, seen = recorded()
    Training(workload, recipe, horizon=horizon).advance(steps)
    return [settings["lr"] for settings in seen]


def make(global_batch: int = 10, learning_rate: float = 0.8, **changes: Any) -> Recipe:
    return Recipe(global_batch=global_batch, learning_rate=learning_rate, **changes)


# ------------------------------------------------------------------------------------- over time


def check_the_warm_up() -> None:
    assert rates_of(make(warmup_steps=3), 6) == pytest.approx([0.2, 0.4, 0.6, 0.8, 0.8, 0.8])


def test_the_warm_up() -> None:
    check_the_warm_up()


def test_constant() -> None:
    assert rates_of(make(), 25) == [0.8] * 25


@pytest.mark.parametrize("horizon", [Horizon(steps=20), Horizon(examples=200)])
def test_cosine_over_steps_or_examples(horizon: Horizon) -> None:
    """At the k-th of n updates k/n of the run is done: it begins at the rate, ends before 0."""
    rates = rates_of(make(schedule="cosine", final_factor=0.1), 99, horizon)
    assert rates == pytest.approx(
        [0.8 * (0.1 + 0.9 * (1 + math.cos(math.pi * k / 20)) / 2) for k in range(20)]
    )


def test_steps_at_their_milestones_and_warm_up_beside_them() -> None:
    recipe = make(schedule="step", decay_at=(0.5, 0.75), decay=0.5, warmup_steps=1)
    assert rates_of(recipe, 99, Horizon(steps=8)) == pytest.approx(
        [0.4, 0.8, 0.8, 0.8, 0.4, 0.4, 0.2, 0.2]
    )


def check_that_scale_lr_is_for_one_window() -> None:
    """105 examples by 50: the update of 5 has a tenth of the rate, and no other one."""
    workload, seen = recorded()
    x = torch.cat([X, X[:5]])
    workload = Workload(
        name="toy",
        make_model=workload.make_model,
        train_data=(x, (x[:, 0] > 0).long()),
        loss=F.cross_entropy,
        make_optimizer=workload.make_optimizer,
    )
    Training(workload, make(50, last_batch="scale-lr")).advance(7)
    assert [s["lr"] for s in seen] == pytest.approx([0.8, 0.8, 0.08, 0.8, 0.8, 0.08, 0.8])


def test_scale_lr_is_for_one_window() -> None:
    check_that_scale_lr_is_for_one_window()


def test_a_schedule_over_a_run_of_unknown_length_is_refused() -> None:
    workload, _ = recorded()
    with pytest.raises(RecipeError, match=r"'cosine' runs over the whole training, .* Give epochs"):
        Training(workload, make(schedule="cosine"))


def test_every_group_keeps_its_own_share() -> None:
    model = nn.Linear(4, 2)
    groups = [{"params": [model.weight], "lr": 0.8}, {"params": [model.bias], "lr": 0.2}]
    optimizer = torch.optim.SGD(groups, lr=0.8)
    rates = Rates(optimizer, make(warmup_steps=1), None)
    for steps, expected in ((0, [0.4, 0.1]), (1, [0.8, 0.2]), (2, [0.8, 0.2])):
        rates.set(steps=steps, examples=0, global_batch=10, factor=1.0, gain=1.0)
        assert [group["lr"] for group in optimizer.param_groups] == expected


# --------------------------------------------------------------------------- settled, or not yet


def settled_after(recipe: Recipe, steps: int, horizon: Horizon | None = None) -> bool:
    workload, _ = recorded()
    training = Training(workload, recipe, horizon=horizon)
    training.advance(steps)
    return training._rates.settled


def test_steady_recipes_are_settled_after_the_warm_up() -> None:
    assert settled_after(make(), 1)
    assert settled_after(make(batch_ramp=((20, 20),)), 1)
    assert not settled_after(make(warmup_steps=3), 3)
    assert settled_after(make(warmup_steps=3), 4)


@pytest.mark.parametrize(
    "changes",
    [
        {"last_batch": "scale-lr"},
        {"schedule": "cosine"},
        {"schedule": "step", "decay_at": (0.5,)},
        {"batch_ramp": ((20, 20),), "rate_rule": "linear"},
    ],
)
def test_others_never_are(changes: dict[str, Any]) -> None:
    assert not settled_after(make(**changes), 9, Horizon(steps=10))


@given(
    st.integers(0, 6),
    st.sampled_from(["constant", "cosine", "step"]),
    st.sampled_from(["keep", "scale-lr"]),
    st.sampled_from(["none", "linear", "sqrt"]),
    st.sampled_from([(), ((30, 20),), ((30, 20), (110, 40))]),
)
@settings(deadline=None, max_examples=25)
def test_being_settled_changes_no_rate(
    warmup_steps: int, schedule: Any, last_batch: Any, rule: Any, ramp: Any
) -> None:
    recipe = make(
        12, warmup_steps=warmup_steps, schedule=schedule, last_batch=last_batch, rate_rule=rule,
        batch_ramp=ramp, decay_at=(0.4, 0.7), final_factor=0.2,
    )  # fmt: skip
    horizon = Horizon(steps=16)
    workload, seen = recorded()
    Training(workload, recipe, horizon=horizon).advance(16)
    careful, every = recorded()
    training = Training(careful, recipe, horizon=horizon)
    for _ in range(16):
        training._rates.unsettle()
        training.advance(1)
    assert seen == every


# ----------------------------------------------------------------------- when the batch changes

RAMP = ((20, 20), (60, 40))


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("none", [0.8, 0.8, 0.8, 0.8, 0.8]),
        ("linear", [0.8, 0.8, 1.6, 1.6, 3.2]),
        ("sqrt", [0.8, 0.8, 0.8 * 2**0.5, 0.8 * 2**0.5, 1.6]),
    ],
)
def test_rules(rule: Any, expected: list[float]) -> None:
    recipe = make(batch_ramp=RAMP, rate_rule=rule)
    assert rates_of(recipe, 5) == pytest.approx(expected)


def test_a_rule_and_a_schedule_are_multiplied() -> None:
    recipe = make(batch_ramp=RAMP, rate_rule="linear", schedule="cosine")
    factors = [(1 + math.cos(math.pi * done / 200)) / 2 for done in (0, 10, 20, 40, 60)]
    expected = [0.8 * s * f for s, f in zip((1, 1, 2, 2, 4), factors, strict=True)]
    assert rates_of(recipe, 5, Horizon(examples=200)) == pytest.approx(expected)


def test_a_batch_beyond_the_training_set_raises_the_rate_no_further() -> None:
    recipe = make(batch_ramp=((100, 5000),), rate_rule="linear")
    assert rates_of(recipe, 12) == pytest.approx([0.8] * 10 + [8.0] * 2)


def test_adam_sde_moves_betas_and_eps() -> None:
    workload, seen = recorded(torch.optim.Adam)
    Training(workload, make(batch_ramp=RAMP, rate_rule="adam-sde")).advance(5)
    for settings_, kappa in zip(seen, (1, 1, 2, 2, 4), strict=True):
        assert settings_["lr"] == pytest.approx(0.8 * math.sqrt(kappa))
        assert settings_["betas"] == pytest.approx((1 - kappa * 0.1, 1 - kappa * 0.001))
        assert settings_["eps"] == pytest.approx(1e-8 / math.sqrt(kappa))


def test_adam_sde_refuses_too_steep_a_ramp_before_training() -> None:
    workload, seen = recorded(torch.optim.Adam)
    steep = make(2, batch_ramp=((50, 4), (100, 20)), rate_rule="adam-sde")
    with pytest.raises(UsageError, match=r"cannot scale beta 0\.9 by 10: .* Go up by less than 10"):
        Training(workload, steep)
    follows: dict[str, Any] = {"micro_batch": 1, "batch_policy": "follow-noise"}
    with pytest.raises(UsageError, match=r"cannot scale beta 0\.9 by 50"):
        Training(workload, make(2, rate_rule="adam-sde", **follows))
    Training(workload, make(2, rate_rule="adam-sde", largest_batch=19, **follows))
    assert not seen


def test_adam_sde_refuses_what_is_not_adam() -> None:
    workload, _ = recorded(torch.optim.SGD)
    with pytest.raises(RecipeError, match=r"optimizer is SGD, which has no betas .* Use 'linear'"):
        Training(workload, make(batch_ramp=RAMP, rate_rule="adam-sde"))


def test_a_fork_starts_from_its_own_recipes_rates() -> None:
    workload, seen = recorded(torch.optim.Adam)
    parent = Training(workload, make(batch_ramp=RAMP, rate_rule="adam-sde"))
    parent.advance(5)
    parent.fork(make(10, 0.3)).advance(1)
    assert seen[-1] == {"lr": 0.3, "betas": (0.9, 0.999), "eps": 1e-8}


# -------------------------------------------------------------------------------------- AdaScale


@given(st.floats(1, 1000), st.floats(0, 1e6), st.floats(1e-6, 1e6))
def test_the_gain_lies_between_one_and_the_scale(s: float, trace: float, norm: float) -> None:
    gain = adascale_gain(s, trace=trace, gradient_norm_squared=norm)
    assert 1 - 1e-9 <= gain <= s * (1 + 1e-9)


def test_adascale_raises_the_rate_by_the_measured_gain() -> None:
    """Regression with known noise: μ² = |G|², σ² = S/B₀, the gain within a few per cent."""
    d, s = 6, 4
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(60_000, d, dtype=torch.float64, generator=draw)
    y = x.sum(1, keepdim=True) / 2
    seen: list[float] = []

    def make_sgd(params: Any, lr: float) -> torch.optim.Optimizer:
        optimizer = torch.optim.SGD(params, lr=lr)
        optimizer.register_step_pre_hook(lambda o, *_: seen.append(o.param_groups[0]["lr"]))
        return optimizer

    def half_square(outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs - targets).square().mean() / 2

    def zero() -> nn.Module:
        model = nn.Linear(d, 1, bias=False, dtype=torch.float64)
        nn.init.zeros_(model.weight)
        return model

    workload = Workload(
        name="regression", make_model=zero, train_data=(x, y), loss=half_square,
        make_optimizer=make_sgd,
    )  # fmt: skip
    # A rate too small to move: the noise scale stays d + 1.
    recipe = Recipe(
        global_batch=8, micro_batch=4, learning_rate=1e-7, rate_rule="adascale",
        batch_ramp=((8000, s * 8),),
    )  # fmt: skip
    training = Training(workload, recipe)
    training.advance(1600)
    assert seen[:1000] == [1e-7] * 1000
    gains = torch.tensor(seen[1000:]) / 1e-7
    assert gains.min() > 1
    assert gains.max() < s
    truth = (d + 1 + 8) / ((d + 1) / s + 8)
    assert float(gains.mean()) == pytest.approx(truth, rel=0.05)
    # And the schedule's clock runs by what the steps were worth.
    assert training.gained == pytest.approx(8000 + 8 * float(gains.sum()), rel=1e-6)


def test_adascale_counts_a_smaller_last_batch_as_its_share() -> None:
    workload, _ = recorded()
    recipe = make(30, micro_batch=10, batch_ramp=((10_000, 60),), rate_rule="adascale")
    training = Training(workload, recipe, horizon=Horizon(examples=300))
    training.advance()
    assert training.finished
    assert (training.steps, training.gained, training.consumed) == (12, 300, 300)
