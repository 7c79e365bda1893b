"""Steps to target against a training whose every loss is known."""

import math
from typing import Any

import numpy as np
import pytest
from benchmarks.regret.running import (
    run_cells,
    run_recipe,
    run_to_target,
)
from hypothesis import given
from hypothesis import strategies as st

from rightbatch import catalog
from rightbatch.catalog.quadratic import NUM_TRAIN, constants
from rightbatch.engines import CopiesEvaluation
from rightbatch.recipe import Recipe
from rightbatch.workload.target import parse_target

TARGET = parse_target("val_loss<=2")


def full_batch_steps(learning_rate: float, target: float) -> float:
    """Where ½Σλδ²(1 − ηλ)²ᵗ + s²/2 meets the target, between whole steps linear in its log."""
    known = constants()
    rates, offsets = np.array(known.eigenvalues), np.array(known.offsets)

    def loss(step: int) -> float:
        shrunk = offsets * (1 - learning_rate * rates) ** step
        return float((rates * shrunk**2).sum() / 2 + known.noise_variance / 2)

    last = next(step for step in range(1, 10_000) if loss(step) <= target)
    first, high, low = last - 1, math.log(loss(last - 1)), math.log(loss(last))
    return first + (high - math.log(target)) / (high - low)


@pytest.mark.parametrize("learning_rate", [0.125, 0.4])
def test_full_batch_descent_arrives_where_the_formula_says(learning_rate: float) -> None:
    workload = catalog.get("quadratic")
    target = workload.parsed_target
    assert target is not None
    expected = full_batch_steps(learning_rate, target.value)
    arrival = run_cells(workload, NUM_TRAIN, [learning_rate], [0], lambda _: 200)[0]
    assert arrival.state == "reached"
    assert arrival.steps_to_target is not None
    # Beyond 15 steps evaluations are more than one step apart, and the curve is not quite straight.
    assert arrival.steps_to_target == pytest.approx(expected, rel=1e-3 if expected < 28 else 0.01)


class PlantedRuns:
    """Runs whose loss is 4·exp(−rate·step); those with a rate of NaN have diverged."""

    def __init__(self, rates: list[float]) -> None:
        self.rates = np.array(rates)
        self.steps = 0

    def advance(self, num_steps: int) -> None:
        self.steps += num_steps

    def evaluate(self) -> CopiesEvaluation:
        loss = 4 * np.exp(-self.rates * self.steps)
        diverged = np.isnan(self.rates)
        return CopiesEvaluation(
            train_loss=loss, val_loss=loss, val_metric=None, diverged=diverged & (self.steps > 0)
        )

    def keep(self, mask: Any) -> None:
        self.rates = self.rates[mask]


@given(rates=st.lists(st.floats(0.001, 0.7) | st.just(math.nan), min_size=1, max_size=12))
def test_each_run_arrives_at_its_own_time_whoever_is_retired_before(rates: list[float]) -> None:
    limit = 300
    arrivals = run_to_target(PlantedRuns(rates), TARGET, len(rates), lambda _: limit)
    for rate, arrival in zip(rates, arrivals, strict=True):
        if math.isnan(rate):
            assert (arrival.state, arrival.steps_run) == ("diverged", 1)
        elif math.log(2) / rate > limit:
            assert (arrival.state, arrival.steps_run) == ("censored", limit)
        else:
            assert arrival.steps_to_target == pytest.approx(math.log(2) / rate, rel=1e-9)


def test_a_group_answers_as_each_run_alone() -> None:
    workload = catalog.get("quadratic")
    rates, seeds = [0.2, 1e-4, 0.125, 50.0], [0, 0, 1, 0]  # retired at different times
    together = run_cells(workload, 128, rates, seeds, lambda _: 300)
    alone = [
        run_cells(workload, 128, [rate], [seed], lambda _: 300)[0]
        for rate, seed in zip(rates, seeds, strict=True)
    ]
    assert [arrival.state for arrival in together] == ["reached", "censored", "reached", "diverged"]
    assert together[1].steps_run == 300
    assert [arrival.state for arrival in alone] == [arrival.state for arrival in together]
    assert [a.steps_to_target or 0 for a in together] == pytest.approx(
        [a.steps_to_target or 0 for a in alone], rel=1e-3
    )


def test_the_limit_may_fall_while_runs_are_under_way() -> None:
    def limit(arrivals: object) -> int:
        known = [a for a in arrivals if a is not None]  # type: ignore[attr-defined]
        return known[0].steps_run + 5 if known else 10_000

    reached, hopeless = run_cells(catalog.get("quadratic"), 64, [0.25, 1e-5], [0, 0], limit)
    assert reached.state == "reached"
    assert hopeless.state == "censored"
    assert hopeless.steps_run <= reached.steps_run + 5


def test_a_warm_up_is_run_and_changes_the_steps() -> None:
    workload = catalog.get("quadratic")
    plain = Recipe(global_batch=NUM_TRAIN, learning_rate=0.25)
    (cold,) = run_recipe(workload, plain, [0], 200)
    (barely,) = run_recipe(workload, plain.replace(warmup_steps=1), [0], 200)
    (warm,) = run_recipe(workload, plain.replace(warmup_steps=10), [0], 200)
    assert cold.steps_to_target is not None
    assert barely.steps_to_target is not None
    assert warm.steps_to_target is not None
    # A first step at half the rate costs about half a step; ten that rise to it about five.
    assert barely.steps_to_target - cold.steps_to_target == pytest.approx(0.5, abs=0.15)
    assert warm.steps_to_target - cold.steps_to_target == pytest.approx(5.0, abs=0.8)
