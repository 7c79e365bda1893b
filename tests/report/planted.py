"""A study with planted laws: S(B) = 200 (1 + 20/B), best rate 0.05 √B, a target missed at 1,000."""

from __future__ import annotations

import math

from rightbatch.laws.estimate import Estimate, unresolved
from rightbatch.laws.noise_floor import NoiseFloor
from rightbatch.report.source import CurvePoint
from rightbatch.study.design import Budget, StudyDesign
from rightbatch.study.findings import Best, Fits, RateFinding, RateRule, SizeFinding
from rightbatch.study.gradients import StudyGradients
from rightbatch.study.study import Study, StudyCost
from rightbatch.study.trials import StudyTrial, TrialState

N = 1000
SIZES = (1, 10, 100, 1000)
SEEDS = (0, 1, 2)
S_MIN, B_C = 200.0, 20.0
STEP_SECONDS = 1e-3
EPOCHS = 50.0


def around(value: float, spread: float = 1.2) -> Estimate:
    return Estimate(value=value, low=value / spread, high=value * spread, n=3, method="planted")


def steps_at(batch: int) -> float:
    return S_MIN * (1 + B_C / batch)


def rate_at(batch: int) -> float:
    return 0.05 * math.sqrt(batch)


def rates_of(batch: int) -> tuple[float, ...]:
    return tuple(rate_at(batch) * 2.0**k for k in (-1, 0, 1))


def loss_at(batch: int, rate: float) -> float:
    return 0.1 + 0.05 * math.log2(rate / rate_at(batch)) ** 2 + 0.001 * batch / 100


def make_trial(batch: int, rate: float, seed: int) -> StudyTrial:
    top = rate == rates_of(batch)[-1]
    state: TrialState = "complete"
    if batch == 100 and top and seed == 2:
        state = "diverged"
    if batch == 10 and top and seed == 2:
        state = "failed"
    met = state == "complete" and batch < N
    steps = round(EPOCHS * N / batch)
    loss = loss_at(batch, rate) if state == "complete" else None
    return StudyTrial(
        batch_size=batch,
        learning_rate=rate,
        seed=seed,
        state=state,
        steps=steps,
        examples=steps * batch,
        seconds=steps * STEP_SECONDS,
        train_loss=loss,
        val_loss=None if loss is None else loss * (1 + 0.01 * seed),
        val_metric=None,
        steps_to_target=steps_at(batch) if met else None,
        distance=1.0,
        relative_distance=0.5,
        roughness=2.0,
        dead=False,
    )


FLOOR = NoiseFloor(
    verdict="unresolved", level=unresolved(3), wavering=unresolved(3), fall=unresolved(3)
)


def make_size(batch: int) -> SizeFinding:
    met = batch < N
    steps = around(steps_at(batch)) if met else unresolved(3, "missed", low=EPOCHS)
    return SizeFinding(
        batch_size=batch,
        learning_rate=around(rate_at(batch), 1.5),
        at_edge=None,
        stable_edge=rate_at(batch) if batch == 100 else None,
        steps=round(EPOCHS * N / batch),
        train_loss=around(0.1),
        val_loss=around(0.1),
        val_metric=unresolved(0),
        gap=Estimate(value=0.02 * batch / 100, low=0.0, high=0.04 * batch / 100, n=3),
        reached=3 if met else 0,
        trials=3,
        steps_to_target=steps,
        examples_to_target=around(steps_at(batch) * batch) if met else unresolved(3),
        seconds_to_target=around(steps_at(batch) * STEP_SECONDS) if met else unresolved(3),
        distance=around(1.0),
        relative_distance=around(0.5),
        roughness=around(2.0),
        dead=0,
        noise_floor=FLOOR,
        rates=tuple(
            RateFinding(
                learning_rate=rate, trials=3, diverged=0, reached=3 if met else 0,
                loss=around(loss_at(batch, rate)), steps_to_target=steps, distance=around(1.0),
                roughness=around(2.0), noise_floor=FLOOR,
            )
            for rate in rates_of(batch)
        ),
    )  # fmt: skip


def make_study() -> Study:
    trials = tuple(make_trial(B, lr, seed) for B in SIZES for lr in rates_of(B) for seed in SEEDS)
    return Study(
        workload="planted",
        num_examples=N,
        metric=None,
        design=StudyDesign(
            batch_sizes=SIZES,
            learning_rates=None,
            seeds=SEEDS,
            budget=Budget(unit="epochs", amount=EPOCHS),
            target="val_loss<=0.12",
        ),
        state="complete",
        engines=("loop: planted",),
        trials=trials,
        sizes=tuple(make_size(B) for B in SIZES),
        fits=Fits(
            critical_batch=around(B_C),
            min_steps=around(S_MIN),
            min_examples=around(S_MIN * B_C),
            rate_exponent=Estimate(value=0.5, low=0.4, high=0.6, n=4),
            rate_rules=(
                RateRule(rule="linear", begins_at=1, holds_to=1, breaks_at=10),
                RateRule(rule="sqrt", begins_at=1, holds_to=1000, breaks_at=None),
            ),
            pareto=(1, 10, 100),
            notes=("A note.",),
        ),
        comparisons=(),
        watching="0.weight[0,0]",
        contrasts=(),
        gradients=StudyGradients(record=None, skipped="planted"),
        best=Best(
            batch_size=100, learning_rate=rate_at(100), because="fewest modelled seconds"
        ),
        cost=StudyCost(examples=sum(t.examples for t in trials), seconds=1.0),
        warnings=("A warning.",),
    )  # fmt: skip


def make_points() -> tuple[CurvePoint, ...]:
    """Losses 2·0.5^epochs at every seed, spread by a factor of 1.1 about it."""
    return tuple(
        CurvePoint(
            batch_size=batch,
            learning_rate=rate_at(batch),
            seed=seed,
            step=round(epoch * N / batch),
            examples=round(epoch * N / batch) * batch,
            train_loss=None if epoch == 0 else 2 * 0.5**epoch,
            val_loss=2 * 0.5**epoch * 1.1 ** (seed - 1),
        )
        for batch in SIZES
        for seed in SEEDS
        for epoch in range(4)
    )
