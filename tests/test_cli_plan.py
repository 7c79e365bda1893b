"""A plan as text: the answer first, honest about its doubt; what an interrupt leaves."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import rightbatch
from rightbatch.cli import main
from rightbatch.cli.render_plan import plan_text
from rightbatch.laws.estimate import Estimate
from rightbatch.plan import Plan, make_plan
from rightbatch.plan.make import describe_environment
from rightbatch.plan.price import max_micro_batch, step_seconds
from rightbatch.plan.records import NearBest, Prediction
from rightbatch.report.answer_plan import advantage_of, answer
from rightbatch.study.records import RaceRecord, TrialPoint, TrialRecord

Captured = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def plan() -> Plan:
    """A real one, with a race."""
    return make_plan(rightbatch.load_workload("max3"), effort="race", memory_limit="1GiB")


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs are kept in ./runs."""
    monkeypatch.chdir(tmp_path)


def race_of(plan: Plan) -> RaceRecord:
    assert plan.evidence.race is not None
    return plan.evidence.race


def with_race(plan: Plan, **changes: Any) -> Plan:
    return replace(plan, evidence=replace(plan.evidence, race=replace(race_of(plan), **changes)))


def with_setting(plan: Plan, **changes: Any) -> Plan:
    setting = replace(plan.evidence.setting, **changes)
    return replace(plan, evidence=replace(plan.evidence, setting=setting))


def choosing(plan: Plan, batch: int, speedup: Estimate | None, **changes: Any) -> Plan:
    recipe = plan.recipe.replace(global_batch=batch, learning_rate=0.512)
    some = Estimate(value=100.0, low=80.0, high=125.0, n=3)
    prediction = Prediction(steps=some, seconds=some, examples=some, speedup=speedup)
    near = NearBest(low=32, high=128)
    return replace(plan, recipe=recipe, prediction=prediction, near_best=near, **changes)


FASTER = Estimate(value=2.13, low=1.62, high=2.74, n=5)


def one_line(text: str) -> str:
    return " ".join(text.split())


# ------------------------------------------------------------------------------------ the answer


def test_the_answer_says_what_to_do_what_it_gains_and_what_it_rests_on(plan: Plan) -> None:
    text = answer(choosing(plan, 64, FASTER))
    target = plan.evidence.setting.target
    assert text.startswith(
        "Train with batch 64 at learning rate 0.512: predicted to be 2.1 (1.6–2.7) times as fast "
        f"to {target} as batch 32 at its best learning rate; the best batch is probably "
        "within 32 to 128. It rests on four probes and "
    )
    race = race_of(plan)
    assert f"{len(race.trials)} runs at " in text
    arrived = sum(t.state == "reached" for t in race.trials)
    assert text.endswith(f", {arrived} of them to the target.")
    assert "doubt" not in text


def test_a_difference_that_may_be_none_is_said_to_be_within_the_doubt(plan: Plan) -> None:
    unsure = Estimate(value=1.3, low=0.83, high=2.1, n=5)
    assert "predicted to be 1.3 (0.83–2.1) times as fast" in answer(choosing(plan, 64, unsure))
    assert "a difference within the doubt;" in answer(choosing(plan, 64, unsure))
    barely = Estimate(value=1.6, low=1.02, high=2.4, n=5)
    shown = answer(choosing(plan, 64, barely))
    assert "(1–2.4)" in shown
    assert "within the doubt" in shown, "what is printed as 1 is no difference"
    slower = Estimate(value=0.5, low=0.4, high=0.6, n=5)
    assert "within the doubt" not in answer(choosing(plan, 64, slower))


def test_the_usual_default_is_said_to_be_the_answer(plan: Plan) -> None:
    text = answer(choosing(plan, 32, None))
    assert text.startswith(
        "Train with batch 32 at learning rate 0.512, the usual default batch; the best batch is"
    )


def test_where_batch_32_is_not_open_nothing_is_compared_with_it(plan: Plan) -> None:
    text = answer(choosing(plan, 64, None))
    assert text.startswith("Train with batch 64 at learning rate 0.512; the best batch is")
    assert "32 at" not in text


def test_without_a_race_nothing_is_claimed_to_be_faster(plan: Plan) -> None:
    probed = replace(plan, evidence=replace(plan.evidence, race=None), prediction=None)
    text = plan_text(replace(probed, cost=replace(plan.cost, full_trainings=None)))
    assert "as far as probes tell" in one_line(text)
    assert "nothing was trained" in one_line(text)
    assert "times as fast" not in answer(probed)
    assert "full trainings" not in text
    assert "how it ended" not in text


def test_a_target_that_was_not_given_or_not_met_is_not_named(plan: Plan) -> None:
    chosen = choosing(plan, 64, FASTER)
    named = with_race(chosen, target_loss=0.4567, target_reached=False)
    assert "times as fast to a loss of 0.457 as batch 32 at" in answer(named)
    unasked = answer(with_setting(chosen, target=None))
    assert "to a loss of" in unasked
    assert "to the target" not in unasked


def test_one_near_best_size_is_said_to_stand_alone(plan: Plan) -> None:
    alone = replace(choosing(plan, 64, FASTER), near_best=NearBest(low=64, high=64))
    assert "no other batch is predicted to be as good" in answer(alone)


@pytest.mark.parametrize(
    ("goal", "expected", "words"),
    [
        ("steps", 3.0, "predicted to take 3 (2–4) times fewer steps to"),
        ("examples", 1.5, "predicted to take 1.5 (1–2) times fewer examples to"),
        ("time", None, "times as fast to"),
        ("quality", None, "times as fast to"),
    ],
)
def test_the_gain_is_told_in_the_goals_unit(
    plan: Plan, goal: Any, expected: float | None, words: str
) -> None:
    """Three times fewer steps at twice the batch are 1.5 times fewer examples."""

    def seconds(batch: int) -> float:
        return step_seconds(plan.evidence.throughput, batch, max_micro_batch(plan.evidence))

    per_step = seconds(32) / seconds(64)
    speedup = Estimate(value=3 * per_step, low=2 * per_step, high=4 * per_step, n=5)
    chosen = choosing(plan, 64, speedup, goal=goal)
    found = advantage_of(chosen)
    assert found is not None
    assert found.value == pytest.approx(expected if expected is not None else 3 * per_step)
    assert words in answer(chosen)


# ---------------------------------------------------------------------------------- the whole text


def test_the_text_shows_all_that_a_reader_needs_in_80_columns(plan: Plan) -> None:
    text = plan_text(plan)
    assert max(len(line) for line in text.splitlines()) <= 80
    assert text.startswith(answer(plan)[:40])
    shown = one_line(text)
    for reason in plan.reasons:
        assert reason.source in shown
    for label in ("batch size", "learning rate", "micro-batch", "accumulation", "precision"):
        assert f"\n{label}  " in text
    race = race_of(plan)
    rows = text[text.index("\nrun  ") :].splitlines()
    for trial in race.trials:
        if trial.steps >= 0.2 * race.trials[race.leader].steps:
            rate = f"{trial.learning_rate:.3g}"
            assert any({rate, f"{trial.steps:,}"} <= set(row.split()) for row in rows), trial
    (recipe,) = [row for row in rows if row.startswith("the recipe: ")]
    assert f"{plan.recipe.learning_rate:.3g}" in recipe.split()
    for warning in plan.warnings:
        assert one_line(warning) in shown
    assert f"{plan.cost.examples:,} examples" in shown
    assert "full trainings with batch 32" in shown
    assert f"torch {torch.__version__}" in shown


def test_runs_that_were_given_up_early_are_told_in_a_sentence(plan: Plan) -> None:
    leader = race_of(plan).trials[race_of(plan).leader]
    last = TrialPoint(steps=1, loss=2.0)
    quick = replace(leader, learning_rate=7.0, state="stopped", steps_to_target=None)
    one = replace(quick, points=(last,))
    dead = replace(one, learning_rate=9.0, state="diverged", points=(replace(last, loss=None),))

    def shown(*short: TrialRecord) -> str:
        return one_line(plan_text(with_race(plan, leader=0, trials=(leader, *short))))

    assert "given up early" not in shown()
    assert "1 more, with learning rate 7, was given up early." in shown(one)
    assert "with learning rate 9, was given up early when it diverged." in shown(dead)
    assert "2 more, with learning rates 7 to 9, were given up early, 1 of them diverged" in shown(
        one, dead
    )


def test_every_reason_stands_beside_its_value(plan: Plan) -> None:
    rows = plan_text(plan).splitlines()
    batch = next(row for row in rows if row.startswith("batch size"))
    assert batch.split()[2] == f"{plan.recipe.global_batch:,}"
    rate = next(row for row in rows if row.startswith("learning rate"))
    assert float(rate.split()[2]) == pytest.approx(plan.recipe.learning_rate, rel=0.01)


# -------------------------------------------------------------------------------------- interrupts


def test_an_interrupted_race_prints_its_best_keeps_it_and_exits_130(
    plan: Plan, tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    partial = with_race(plan, stopped_by="interrupt")
    monkeypatch.setattr("rightbatch.cli.run_plan.make_plan", lambda *_, **__: partial)
    out = tmp_path / "plan.json"
    assert main(["plan", "max3", "--out", str(out), "--quiet"]) == 130
    captured = capsys.readouterr()
    assert captured.out.startswith("Train with batch")
    assert captured.err == "rightbatch: Interrupted.\n"
    assert main(["plan", "--replay", str(out)]) == 0, "to replay it is no interruption"
    assert "ended early (interrupted)" in one_line(capsys.readouterr().out)


@pytest.mark.parametrize(("moment", "prints"), [("memory:", False), ("race: looking", True)])
def test_ctrl_c_ends_a_plan_with_what_it_has(moment: str, prints: bool) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "rightbatch", "plan", "source-lm", "--effort", "race", "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )
    assert process.stderr is not None
    for line in process.stderr:
        if moment in line:
            break
    if prints:
        time.sleep(3)  # far more than the first comparison takes, far less than the race
    begin = time.perf_counter()
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to children too
    out, err = process.communicate(timeout=20)
    seconds = time.perf_counter() - begin
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert err.splitlines()[-1] == "rightbatch: Interrupted."
    if prints:
        found = json.loads(out)
        race = found["evidence"]["race"]
        assert race["stopped_by"] == "interrupt"
        assert found["effort"] == "race"
        assert found["recipe"]["learning_rate"] in [t["learning_rate"] for t in race["trials"]]
        assert any("ended early (interrupted)" in warning for warning in found["warnings"])
        assert seconds < 4
    else:
        assert out == ""
        assert seconds < 2


# ----------------------------------------------------------------------------------------- threads


def test_threads_are_set_for_the_measurement(capsys: Captured) -> None:
    train = ["train", "max3", "--batch-size", "full", "--learning-rate", "0.3", "--epochs", "1"]
    before = torch.get_num_threads()
    try:
        for threads in (2, 1):
            assert main([*train, "--threads", str(threads), "--quiet"]) == 0
            assert torch.get_num_threads() == describe_environment("cpu").num_threads == threads
    finally:
        torch.set_num_threads(before)
    assert main([*train, "--threads", "0"]) == 2
    assert "--threads" in capsys.readouterr().err
