"""From evidence to a plan: planted laws with a known best batch, reasons, warnings, replay."""

from __future__ import annotations

import json
import math
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from tests.plan.conftest import Made
from tests.plan.planted import plant

from rightbatch import Recipe
from rightbatch.laws.estimate import Estimate
from rightbatch.plan import Evidence, Plan, choose, replay_plan
from rightbatch.plan.choose import (
    interval_text,
    make_price,
    noise_guide,
    open_sizes,
    rate_at,
    step_seconds,
)
from rightbatch.store import read_record, write_record

SCHEMA = "rightbatch.plan/1"


def decide(evidence: Evidence) -> Plan:
    return choose("planted", evidence, seconds=1.0)


# ----------------------------------------------------------------------- the planted planner, 6.5


@pytest.mark.parametrize("noise", [30.0, 400.0, 3000.0])
@pytest.mark.parametrize("knee", [10.0, 100.0, 2000.0])
def test_the_batch_is_the_root_of_noise_scale_times_knee(
    evidence: Evidence, noise: float, knee: float
) -> None:
    """B* = √(φ·α/β), to the nearest power of two."""
    plan = decide(plant(evidence, alpha=knee * 1e-5, beta=1e-5, noise=noise))
    best = math.sqrt(noise * knee)
    assert abs(math.log2(plan.recipe.global_batch / best)) <= 0.55
    assert plan.near_best.low <= plan.recipe.global_batch <= plan.near_best.high
    assert plan.near_best.high <= 8 * plan.near_best.low


def test_no_batch_is_larger_than_the_data(evidence: Evidence) -> None:
    plan = decide(plant(evidence, alpha=1.0, beta=1e-6, noise=1e4, num_examples=1000))
    assert plan.recipe.global_batch == 1000
    assert plan.near_best.high <= 1000


def test_the_price_decides(evidence: Evidence) -> None:
    """Only examples cost: the smallest batch. Only steps cost: the largest."""
    numbers: dict[str, Any] = {"alpha": 1e-3, "beta": 1e-5, "noise": 400.0}
    batches = {
        goal: decide(plant(evidence, **numbers, goal=goal)).recipe.global_batch
        for goal in ("examples", "time", "steps")
    }
    assert batches["examples"] == 1
    assert batches["steps"] == 16_384
    assert batches["examples"] < batches["time"] < batches["steps"]


@pytest.mark.parametrize("ceiling", [1, 3, 24, 100, 4096])
def test_a_memory_ceiling_is_met_by_exact_accumulation(evidence: Evidence, ceiling: int) -> None:
    plan = decide(plant(evidence, alpha=1e-2, beta=1e-5, noise=100.0, ceiling=ceiling))
    recipe = plan.recipe
    assert recipe.micro_batch <= ceiling
    assert recipe.micro_batch * recipe.accumulation * recipe.replicas == recipe.global_batch
    assert recipe.global_batch in open_sizes(16_384)
    why = {reason.field: reason.because for reason in plan.reasons}
    assert f"{recipe.micro_batch} × {recipe.accumulation} × 1" in why["accumulation"]


@pytest.mark.parametrize("replicas", [2, 4, 16])
def test_replicas_share_the_global_batch(evidence: Evidence, replicas: int) -> None:
    given = plant(evidence, alpha=1e-2, beta=1e-5, noise=100.0, ceiling=48, replicas=replicas)
    recipe = decide(given).recipe
    assert recipe.replicas == replicas
    assert recipe.micro_batch <= 48
    assert recipe.micro_batch * recipe.accumulation * replicas == recipe.global_batch


def test_a_split_that_cannot_be_exact_says_so(evidence: Evidence) -> None:
    plan = decide(plant(evidence, alpha=1e-2, beta=1e-5, noise=100.0, replicas=3))
    assert plan.recipe.global_batch % 3 == 0
    reasons = " ".join(r.because for r in plan.reasons)
    assert "asked for" in reasons


def test_the_rate_goes_with_the_batch_by_the_saturating_law(evidence: Evidence) -> None:
    """ε ∝ 1/(1 + φ/B) for SGD, up to the curvature; its root for optimizers that normalise."""
    sgd = plant(evidence, alpha=1e-3, beta=1e-5, noise=1000.0, normalised=False)
    adam = plant(evidence, alpha=1e-3, beta=1e-5, noise=1000.0, normalised=True)
    for batch in (1, 32, 500, 10_000):
        ratio = (1 + 1000 / 32) / (1 + 1000 / batch)
        assert rate_at(sgd, batch) / rate_at(sgd, 32) == pytest.approx(min(ratio, 1.5))
        assert rate_at(adam, batch) / rate_at(adam, 32) == pytest.approx(math.sqrt(ratio))
    for given in (sgd, adam):
        plan = decide(given)
        assert plan.recipe.learning_rate == rate_at(given, plan.recipe.global_batch)
        # The ramp exploded at 0.4.
        assert rate_at(given, 32) < 0.4


def test_the_last_resolved_noise_scale_is_the_guide(evidence: Evidence) -> None:
    given = plant(evidence, alpha=1e-3, beta=1e-5, noise=50.0)
    points = given.noise_scale.trajectory
    assert len(points) >= 2
    later = (*points[:-1], replace(points[-1], value=700.0))
    grown = replace(given, noise_scale=replace(given.noise_scale, trajectory=later))
    assert noise_guide(grown) == 700.0
    lost = (*points[:-1], replace(points[-1], value=None))
    assert noise_guide(
        replace(given, noise_scale=replace(given.noise_scale, trajectory=lost))
    ) == pytest.approx(50.0)


# ---------------------------------------------------------------------------------- the price


def test_prices_are_seconds_examples_or_steps(evidence: Evidence) -> None:
    given = plant(evidence, alpha=1e-3, beta=1e-5, noise=100.0).throughput
    for batch in (1, 64, 4096):
        seconds = 1e-3 + 1e-5 * batch
        assert make_price("time", given, 10**6)(batch) == pytest.approx(seconds, rel=1e-3)
        assert make_price("examples", given, 10**6)(batch) == batch
        assert make_price("steps", given, 10**6)(batch) == 1


def test_accumulated_steps_cost_all_their_micro_batches(evidence: Evidence) -> None:
    given = plant(evidence, alpha=1e-3, beta=1e-5, noise=100.0).throughput
    one = step_seconds(given, 64, 64)
    assert step_seconds(given, 256, 64) == pytest.approx(4 * one, rel=1e-3)
    assert step_seconds(given, 256, 64, replicas=4) == pytest.approx(one, rel=1e-3)


def test_open_sizes_are_powers_of_two_and_full_batch() -> None:
    assert open_sizes(20) == (1, 2, 4, 8, 16, 20)
    assert open_sizes(16) == (1, 2, 4, 8, 16)
    assert open_sizes(1) == (1,)
    assert open_sizes(100, replicas=5) == (8, 16, 32, 64, 100)


# ---------------------------------------------------------------------------- reasons, warnings


def test_every_field_of_the_recipe_has_one_reason(made: Made, evidence: Evidence) -> None:
    without_race = decide(replace(evidence, race=None))
    for plan in (made.plan, without_race):
        assert sorted(r.field for r in plan.reasons) == sorted(f.name for f in fields(Recipe))
        for reason in plan.reasons:
            assert reason.because.strip().endswith((".", ")")), reason
            assert reason.because[0].isupper() or reason.because[0].isdigit(), reason
            assert reason.source


def test_a_plan_without_a_race_says_that_nothing_was_trained(evidence: Evidence) -> None:
    plan = decide(replace(evidence, race=None))
    assert plan.effort == "probe"
    assert plan.prediction is None
    assert plan.cost.full_trainings is None
    assert any("No training was run" in w for w in plan.warnings)


def raced(evidence: Evidence, **changes: Any) -> Plan:
    assert evidence.race is not None
    return decide(replace(evidence, race=replace(evidence.race, **changes)))


def test_without_a_target_the_plan_says_which_loss_it_is_for(evidence: Evidence) -> None:
    no_target = replace(evidence, setting=replace(evidence.setting, target=None))
    warnings = raced(no_target, target_reached=False).warnings
    assert evidence.race is not None
    (said,) = [w for w in warnings if "No target was given" in w]
    assert f"{evidence.race.target_loss:.4g}" in said


def test_a_target_that_was_not_reached_is_said(evidence: Evidence) -> None:
    warnings = raced(evidence, target_reached=False).warnings
    assert any("was not reached" in w and str(evidence.setting.target) in w for w in warnings)


@pytest.mark.parametrize("stopped_by", ["time", "interrupt"])
def test_a_race_that_was_ended_early_is_said(evidence: Evidence, stopped_by: str) -> None:
    warnings = raced(evidence, stopped_by=stopped_by).warnings
    assert any(f"ended early ({stopped_by})" in w for w in warnings)


def test_a_stream_that_was_cut_is_said(evidence: Evidence) -> None:
    cut = replace(evidence, setting=replace(evidence.setting, num_examples_is_cut=True))
    assert any("stream" in w for w in decide(cut).warnings)
    assert not any("stream" in w for w in decide(evidence).warnings)


def test_a_noise_scale_that_is_not_resolved_is_said_and_the_usual_one_taken(
    evidence: Evidence,
) -> None:
    plan = decide(plant(evidence, alpha=1e-3, beta=1e-5, noise=None))
    assert any("not resolved" in w for w in plan.warnings)
    # Between the extremes of reported ones.
    low, high = (
        decide(plant(evidence, alpha=1e-3, beta=1e-5, noise=n)).recipe.global_batch
        for n in (10.0, 5000.0)
    )
    assert low < plan.recipe.global_batch < high


# ---------------------------------------------------------------------------------- a real plan


def test_the_raced_plan_is_consistent(made: Made) -> None:
    plan = made.plan
    race = plan.evidence.race
    assert plan.effort == "race"
    assert race is not None
    trained = {
        (t.global_batch, t.learning_rate) for t in race.trials if t.kind in {"baseline", "run"}
    }
    assert (plan.recipe.global_batch, plan.recipe.learning_rate) in trained
    assert plan.near_best.low <= plan.recipe.global_batch <= plan.near_best.high
    assert plan.near_best.high <= 8 * plan.near_best.low
    assert plan.prediction is not None
    steps, seconds = plan.prediction.steps, plan.prediction.seconds
    assert steps.value is not None
    assert seconds.value is not None
    assert steps.low is not None
    assert steps.high is not None
    assert steps.low < steps.value < steps.high
    examples = plan.prediction.examples.value
    assert examples == pytest.approx(steps.value * plan.recipe.global_batch)
    per_step = make_price("time", plan.evidence.throughput, 10**6)(plan.recipe.global_batch)
    assert seconds.value == pytest.approx(steps.value * per_step)
    assert plan.cost.examples > race.examples
    assert plan.cost.full_trainings == pytest.approx(plan.cost.examples / race.baseline.examples)


def test_a_plan_survives_its_file_and_replays_bit_for_bit(made: Made, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    write_record(path, made.plan, schema=SCHEMA)
    again = read_record(path, Plan, schema=SCHEMA)
    assert again == made.plan
    replayed = replay_plan(again)
    assert replayed == made.plan
    write_record(tmp_path / "replayed.json", replayed, schema=SCHEMA)
    assert (tmp_path / "replayed.json").read_bytes() == path.read_bytes()
    content = json.loads(path.read_text())
    for key in ("schema", "workload", "goal", "effort", "recipe", "near_best", "reasons"):
        assert key in content
    assert {"evidence", "cost", "warnings"} <= content.keys()


def test_a_plan_without_a_race_replays_too(evidence: Evidence, tmp_path: Path) -> None:
    plan = decide(replace(evidence, race=None))
    plan = replace(plan, warnings=(*plan.warnings, "No race was run: it would need 7 minutes."))
    path = tmp_path / "plan.json"
    write_record(path, plan, schema=SCHEMA)
    assert replay_plan(read_record(path, Plan, schema=SCHEMA)) == plan


def test_a_replay_follows_the_evidence_not_the_stored_answer(made: Made) -> None:
    forged = replace(made.plan, recipe=made.plan.recipe.replace(learning_rate=123.0), reasons=())
    assert replay_plan(forged) == made.plan


def test_intervals_in_words() -> None:
    assert interval_text(Estimate(value=2.1, low=1.5, high=2.9, n=3)) == "2.1 (1.5 to 2.9)"
    assert interval_text(Estimate(value=2.1, low=None, high=2.9, n=3)) == "2.1 (? to 2.9)"
    assert interval_text(Estimate(value=None, n=3)) == "unresolved"
