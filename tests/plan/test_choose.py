"""From evidence to a plan: planted laws with a known best batch, reasons, warnings, replay."""

from __future__ import annotations

import json
import math
import re
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from tests.plan.conftest import Made
from tests.plan.planted import plant, plant_race, plant_trial

from rightbatch import Recipe
from rightbatch.cli.render_plan import plan_text
from rightbatch.laws.scaling import carry_rate
from rightbatch.plan import Evidence, Plan, choose, replay_plan
from rightbatch.plan.predict import expected_critical_batch, predict_rate
from rightbatch.plan.price import make_price, open_sizes, step_seconds
from rightbatch.store import read_record, write_record

SCHEMA = "rightbatch.plan/1"


def decide(evidence: Evidence) -> Plan:
    return choose("planted", evidence, seconds=1.0)


def why(plan: Plan) -> dict[str, str]:
    return {reason.field: reason.because for reason in plan.reasons}


def critical_batch(evidence: Evidence) -> float:
    """Expected before any training."""
    return expected_critical_batch(evidence.noise_scale, averaging=evidence.setting.averaging)


# ----------------------------------------------------------------------- the planted planner, 6.5


@pytest.mark.parametrize("noise", [30.0, 400.0, 3000.0])
@pytest.mark.parametrize("knee", [10.0, 100.0, 2000.0])
def test_the_batch_is_the_root_of_critical_batch_times_knee(
    evidence: Evidence, noise: float, knee: float
) -> None:
    """B* = √(B_c·α/β), to the nearest power of two."""
    given = plant(evidence, alpha=knee * 1e-5, beta=1e-5, noise=noise)
    plan = decide(given)
    best = math.sqrt(critical_batch(given) * knee)
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
    said = why(plan)["accumulation"]
    assert f"{recipe.micro_batch:,} × {recipe.accumulation:,} × 1 = {recipe.global_batch:,}" in said


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


@pytest.mark.parametrize("replicas", [3, 33])
def test_the_batch_is_near_the_best_where_the_replicas_do_not_divide_it(
    evidence: Evidence, replicas: int
) -> None:
    given = plant(evidence, alpha=1e-3, beta=1e-3, noise=100.0, replicas=replicas)
    sizes = (64, 16_384)
    plan = decide(plant_race(given, [plant_trial(64, 0.1, 30.0)], sizes=sizes))
    assert plan.recipe.global_batch == {3: 63, 33: 66}[replicas]
    for near in (plan.near_best, decide(given).near_best):
        assert near.low <= near.high
    assert plan.near_best.low <= plan.recipe.global_batch <= plan.near_best.high
    assert "the recipe: met the target" in plan_text(plan)


@pytest.mark.parametrize("normalised", [False, True])
def test_the_rate_goes_with_the_batch_by_the_saturating_law(
    evidence: Evidence, normalised: bool
) -> None:
    """ε ∝ 1/(1 + B_c/B) for SGD; its root for optimizers that normalise."""
    numbers: dict[str, Any] = {"alpha": 4e-3, "beta": 1e-5, "noise": 1000.0}
    given = plant(evidence, **numbers, normalised=normalised, averaging=normalised)
    at_ramp = predict_rate(given.learning_rate, averaging=normalised, normalised=normalised)
    assert at_ramp < 0.4, "the ramp exploded there"
    critical = critical_batch(given)
    for batch in (1, 32, 500, 10_000):
        carried = carry_rate(
            at_ramp, at=32, to=batch, critical_batch=critical, normalised=normalised
        )
        ratio = (1 + critical / 32) / (1 + critical / batch)
        assert carried / at_ramp == pytest.approx(math.sqrt(ratio) if normalised else ratio)
    plan = decide(given)
    batch = plan.recipe.global_batch
    assert batch != 32
    assert plan.recipe.learning_rate == carry_rate(
        at_ramp, at=32, to=batch, critical_batch=critical, normalised=normalised
    )
    assert "carried from batch 32 by the saturating law" in why(plan)["learning_rate"]


def test_the_last_resolved_noise_scale_moves_what_is_usual(evidence: Evidence) -> None:
    given = plant(evidence, alpha=1e-3, beta=1e-5, noise=50.0)
    points = given.noise_scale.trajectory
    assert len(points) >= 2

    def ended_with(value: float | None) -> float:
        later = (*points[:-1], replace(points[-1], value=value))
        return critical_batch(
            replace(given, noise_scale=replace(given.noise_scale, trajectory=later))
        )

    assert ended_with(50.0) < ended_with(700.0) < 700.0
    assert ended_with(None) == ended_with(50.0) == critical_batch(given)


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


DECIDED = {
    *("global_batch", "micro_batch", "accumulation", "replicas"),
    *("learning_rate", "warmup_steps", "precision"),
}


def test_every_field_that_a_plan_decides_has_one_reason(made: Made, evidence: Evidence) -> None:
    without_race = decide(replace(evidence, race=None))
    for plan in (made.plan, without_race):
        assert sorted(r.field for r in plan.reasons) == sorted(DECIDED)
        others = [field for field in fields(Recipe) if field.name not in DECIDED]
        assert others
        assert all(getattr(plan.recipe, field.name) == field.default for field in others)
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
    assert "'train_loss<=…' without validation data" in said


@pytest.mark.parametrize(("scale", "words"), [(1 / 9, "1 step:"), (2 / 9, "2 steps:")])
def test_a_target_that_is_met_at_once_is_said_to_be_too_easy(
    evidence: Evidence, scale: float, words: str
) -> None:
    race = plant_race(flat_price(evidence, target="val_loss<=0.3"), [plant_trial(64, 0.1, scale)])
    assert any(f"The target is met within {words}" in w for w in decide(race).warnings)


def test_a_target_that_was_not_reached_is_said(evidence: Evidence) -> None:
    warnings = raced(evidence, target_reached=False).warnings
    assert any("was not reached" in w and str(evidence.setting.target) in w for w in warnings)


@pytest.mark.parametrize(
    ("stopped_by", "words"),
    [("time", "the time budget was used up"), ("interrupt", "interrupted")],
)
def test_a_race_that_was_ended_early_is_said(
    evidence: Evidence, stopped_by: str, words: str
) -> None:
    assert not any("ended early" in w for w in raced(evidence).warnings)
    warnings = raced(evidence, stopped_by=stopped_by).warnings
    assert any(f"ended early ({words})" in w for w in warnings)


def test_a_stream_that_was_cut_is_said(evidence: Evidence) -> None:
    cut = replace(evidence, setting=replace(evidence.setting, num_examples_is_cut=True))
    assert any("stream" in w for w in decide(cut).warnings)
    assert not any("stream" in w for w in decide(evidence).warnings)


def test_a_noise_scale_that_is_not_resolved_is_said_and_the_usual_one_taken(
    evidence: Evidence,
) -> None:
    plan = decide(plant(evidence, alpha=1e-3, beta=1e-5, noise=None))
    assert any("not resolved" in w for w in plan.warnings)
    low, high = (
        decide(plant(evidence, alpha=1e-3, beta=1e-5, noise=n)).recipe.global_batch
        for n in (1.0, 1e5)
    )
    assert low < plan.recipe.global_batch < high


# -------------------------------------------------------------------------------- a planted race

CRITICAL = 100.0


def scale_at(batch: int) -> float:
    """Steps per unit of progress, by the hyperbola."""
    return 30 * (1 + CRITICAL / batch)


def flat_price(evidence: Evidence, **setting: Any) -> Evidence:
    """Steps of nearly equal price up to a thousand examples: larger batches are cheaper."""
    return plant(evidence, alpha=5e-3, beta=1e-6, noise=80.0, **setting)


def three_sizes(evidence: Evidence, **changes: Any) -> Evidence:
    """Batch 64 leads; 256 and 512 were run to the target as well."""
    trials = [plant_trial(b, 0.2, scale_at(b)) for b in (64, 256, 512)]
    return plant_race(flat_price(evidence), trials, **changes)


def test_the_batch_reason_names_what_was_measured_and_the_critical_batch(
    evidence: Evidence,
) -> None:
    plan = decide(three_sizes(evidence))
    assert plan.recipe.global_batch == 512
    said = why(plan)["global_batch"]
    # (1 + 100/256) / (1 + 100/64) = 0.543, and 0.466 for 512.
    assert "batch 256 took 0.54× and batch 512 took 0.47× the steps of batch 64" in said
    assert said.startswith("Least time predicted")
    found = re.search(r"critical batch is about ([\d,]+) \(([\d,]+) to ([\d,]+)\)", said)
    assert found is not None, said
    median, low, high = (float(number.replace(",", "")) for number in found.groups())
    assert low < CRITICAL < high
    assert 0.75 * CRITICAL < median < CRITICAL / 0.75


@pytest.mark.parametrize(
    ("goal", "word", "batch"), [("steps", "steps", 512), ("examples", "examples", 64)]
)
def test_the_batch_reason_is_in_the_goals_unit(
    evidence: Evidence, goal: Any, word: str, batch: int
) -> None:
    given = three_sizes(evidence, sizes=(64, 256, 512))
    plan = decide(replace(given, setting=replace(given.setting, goal=goal)))
    assert plan.recipe.global_batch == batch
    assert why(plan)["global_batch"].startswith(f"Least {word} predicted. To the same loss")


def test_a_size_that_may_be_better_and_was_not_run_is_named(evidence: Evidence) -> None:
    given = plant_race(flat_price(evidence), [plant_trial(64, 0.2, scale_at(64))])
    plan = decide(given)
    assert plan.recipe.global_batch == 64, "only what was run can be chosen"
    said = why(plan)["global_batch"]
    assert said.startswith("No other size was run far enough to compare.")
    found = re.search(r"batch ([\d,]+) may take (0\.\d+)× the time", said)
    assert found is not None, said
    assert int(found[1].replace(",", "")) > 64
    dear = plant(evidence, alpha=1e-9, beta=1e-3, noise=80.0)
    alone = plant_race(dear, [plant_trial(1, 0.2, scale_at(1))])
    assert "no size takes less time" in why(decide(alone))["global_batch"]


def test_a_single_open_size_is_said_to_be_no_choice(evidence: Evidence) -> None:
    given = plant_race(flat_price(evidence), [plant_trial(64, 0.2, scale_at(64))], sizes=[64])
    assert why(decide(given))["global_batch"] == "No other size was open to choice."


def test_the_rate_reason_says_how_the_neighbours_did_at_the_same_loss(evidence: Evidence) -> None:
    root = math.sqrt(2)
    trials = [
        plant_trial(64, 0.4, 60.0, steps=40, state="diverged"),
        plant_trial(64, 0.2, 40.0),
        plant_trial(64, 0.2 * root, 50.0, steps=300),
        plant_trial(64, 0.2 / root, 60.0, steps=300),
        plant_trial(64, 0.1, 80.0, steps=100),
        plant_trial(64, 0.05, 80.0, steps=20),
    ]
    said = why(decide(plant_race(flat_price(evidence), trials, leader=1)))["learning_rate"]
    assert said == (
        "Best of 6 tried at batch 64. Steps to the same loss, against its own: 0.4 diverged; "
        "0.283 took 1.3×; 0.141 took 1.5×; 0.1 took 2×, early on. "
        "The range test at batch 32 exploded near 0.4."
    )


def test_a_higher_rate_that_is_hardly_ahead_is_passed_over_and_the_plan_reckons_with_it(
    evidence: Evidence,
) -> None:
    """What is chosen takes 1.1 times the steps of the leader, and is predicted to."""
    root = math.sqrt(2)
    trials = [plant_trial(64, 0.2, 40.0), plant_trial(64, 0.2 / root, 44.0, steps=250)]
    plan = decide(plant_race(flat_price(evidence), trials))
    assert plan.recipe.learning_rate == trials[1].learning_rate
    said = why(plan)["learning_rate"]
    assert said.startswith("Chosen among 2 tried at batch 64.")
    assert re.search(r"0\.2 took 0\.(89|9|91)×\.", said), said
    assert "A higher one that is ahead by little is passed over" in said
    assert any("stopped before it met the target" in w for w in plan.warnings)
    assert plan.prediction is not None
    assert plan.prediction.steps.value == pytest.approx(9 * 44, rel=0.03)
    leading = decide(plant_race(flat_price(evidence), trials[:1])).prediction
    assert leading is not None
    assert leading.speedup is not None
    assert plan.prediction.speedup is not None
    assert leading.speedup.value is not None
    assert plan.prediction.speedup.value == pytest.approx(leading.speedup.value / 1.1, rel=0.03)


@pytest.mark.parametrize(
    ("normalised", "law"), [(False, "by the saturating"), (True, "by the square root of the")]
)
def test_a_size_with_a_single_rate_says_from_where_it_was_carried(
    evidence: Evidence, normalised: bool, law: str
) -> None:
    given = three_sizes(evidence, normalised=normalised)
    said = why(decide(given))["learning_rate"]
    assert said.startswith(f"Carried from 0.2, the best at batch 64, {law}")
    assert "No other was tried at batch 512" in said


def test_a_leader_with_a_single_rate_is_not_carried_from_itself(evidence: Evidence) -> None:
    """Interrupted when another size had just taken the lead."""
    trials = [plant_trial(64, 0.2, scale_at(64)), plant_trial(256, 0.35, scale_at(256))]
    given = plant_race(flat_price(evidence), trials, leader=1, stopped_by="interrupt")
    plan = decide(given)
    assert plan.recipe.global_batch == 256
    assert why(plan)["learning_rate"].startswith("Carried from 0.2 at batch 64,")
    alone = decide(plant_race(flat_price(evidence), trials[:1]))
    assert why(alone)["learning_rate"] == "The only one that was tried, by the range test."


def test_numbers_are_written_in_full(made: Made, evidence: Evidence) -> None:
    for plan in (made.plan, decide(three_sizes(evidence)), decide(flat_price(evidence))):
        for text in (*plan.warnings, *why(plan).values()):
            assert not re.search(r"\de\+", text), text


def test_the_cost_is_told_in_predicted_trainings_of_batch_32(evidence: Evidence) -> None:
    """32 was not run: its steps follow from the leader's and the critical batch."""
    plan = decide(three_sizes(evidence))
    training = 32 * 9 * scale_at(32)
    assert plan.cost.full_trainings == pytest.approx(plan.cost.examples / training, rel=0.1)
    run = [plant_trial(b, 0.2, scale_at(b)) for b in (32, 64)]
    own = decide(plant_race(flat_price(evidence), run))
    assert own.cost.full_trainings == pytest.approx(own.cost.examples / training, rel=0.01)


def test_the_speed_up_is_that_over_batch_32_in_modelled_seconds(evidence: Evidence) -> None:
    plan = decide(three_sizes(evidence))
    assert plan.prediction is not None
    speedup = plan.prediction.speedup
    assert speedup is not None
    throughput = plan.evidence.throughput
    seconds = {b: 9 * scale_at(b) * step_seconds(throughput, b, 16_384) for b in (32, 512)}
    assert speedup.value == pytest.approx(seconds[32] / seconds[512], rel=0.1)
    assert speedup.value is not None
    assert speedup.low is not None
    assert speedup.high is not None
    assert speedup.low < speedup.value < speedup.high


def test_batch_32_is_not_compared_with_itself_nor_where_it_is_not_open(evidence: Evidence) -> None:
    cheap = plant(evidence, alpha=1e-9, beta=1e-3, noise=80.0)
    chosen = decide(plant_race(cheap, [plant_trial(32, 0.2, scale_at(32))], sizes=(32, 64)))
    assert chosen.recipe.global_batch == 32
    assert chosen.prediction is not None
    assert chosen.prediction.speedup is None
    assert chosen.cost.full_trainings is not None
    many = three_sizes(evidence, sizes=(64, 128, 256, 512))
    closed = decide(replace(many, setting=replace(many.setting, replicas=64)))
    assert closed.prediction is not None
    assert closed.prediction.speedup is None
    assert closed.cost.full_trainings is None


def test_a_planted_race_replays_bit_for_bit(evidence: Evidence) -> None:
    plan = decide(three_sizes(evidence))
    assert replay_plan(plan) == plan
    other = three_sizes(evidence)
    other = replace(other, setting=replace(other.setting, seed=1))
    assert decide(other).prediction != plan.prediction, "the draws are seeded by the setting"


# ---------------------------------------------------------------------------------- a real plan


def test_the_raced_plan_is_consistent(made: Made) -> None:
    plan = made.plan
    race = plan.evidence.race
    assert plan.effort == "race"
    assert race is not None
    trained = {(t.global_batch, t.learning_rate) for t in race.trials}
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
    assert plan.cost.full_trainings is not None
    assert 1 < plan.cost.full_trainings < 20


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
