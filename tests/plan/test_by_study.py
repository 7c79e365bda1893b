"""A plan by a study: the least cost to the target, or the least loss at equal cost."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.plan.planted import known, plant
from tests.plan.test_make import small

from rightbatch.cli.render_plan import plan_text
from rightbatch.laws.estimate import Estimate, unresolved
from rightbatch.plan import Evidence, Plan, choose, make_plan, replay_plan
from rightbatch.plan.price import make_price
from rightbatch.plan.study_around import NO_STUDY, predict_seconds, sizes_around
from rightbatch.store import read_record, write_record
from rightbatch.study.design import Unit, make_design
from rightbatch.study.findings import Best, Comparison, EqualCost, Fits, SizeFinding
from rightbatch.study.gradients import StudyGradients
from rightbatch.study.study import Study, StudyCost


def near(value: float, factor: float = 1.02) -> Estimate:
    return Estimate(value=value, low=value / factor, high=value * factor, n=3)


def finding(batch: int, steps: float | None, **changes: Any) -> SizeFinding:
    target = unresolved(3) if steps is None else near(steps)
    given: dict[str, Any] = {
        "batch_size": batch, "learning_rate": near(0.01 * batch, 2.0), "at_edge": None,
        "stable_edge": 0.1 * batch, "steps": 1000, "train_loss": known(0.1),
        "val_loss": known(0.2), "val_metric": unresolved(0), "gap": known(0.1),
        "reached": 0 if steps is None else 3, "trials": 3, "steps_to_target": target,
        "examples_to_target": unresolved(3) if steps is None else near(steps * batch),
        "seconds_to_target": unresolved(3), "rates": (), **changes,
    }  # fmt: skip
    fields = SizeFinding.__dataclass_fields__
    blank = {name: unresolved(0) for name in fields if name not in given}
    return SizeFinding(**{**blank, **given})


def planted_study(
    steps: dict[int, float | None], losses: dict[Unit, dict[int, float]] | None = None
) -> Study:
    comparisons = tuple(
        Comparison(
            unit=unit,
            amount=10.0,
            sizes=tuple(
                EqualCost(batch_size=B, learning_rate=0.02 * B, loss=known(x), metric=unresolved(0))
                for B, x in of.items()
            ),
        )
        for unit, of in (losses or {}).items()
    )
    nothing = unresolved(0)
    return Study(
        workload="planted",
        num_examples=16_384,
        metric=None,
        design=make_design(16_384, batch_sizes=list(steps), learning_rates="auto", seeds=3,
                           epochs=9, target="val_loss<=0.3"),
        state="complete",
        engines=(),
        trials=(),
        sizes=tuple(finding(B, s) for B, s in steps.items()),
        fits=Fits(critical_batch=nothing, min_steps=nothing, min_examples=nothing,
                  rate_exponent=nothing, rate_rules=(), pareto=(), notes=()),
        comparisons=comparisons,
        watching="0.weight[0,0]",
        contrasts=(),
        gradients=StudyGradients(record=None, skipped="planted"),
        best=Best(batch_size=max(steps), learning_rate=1.0, because="planted"),
        cost=StudyCost(examples=10_000, seconds=1.0),
        warnings=("A warning of the study.",),
    )  # fmt: skip


def planted(evidence: Evidence, study: Study, **changes: Any) -> Evidence:
    given = plant(evidence, alpha=1e-3, beta=1e-5, noise=400.0)
    setting = replace(given.setting, **{"effort": "study", "target": "val_loss<=0.3", **changes})
    return replace(given, setting=setting, race=None, study=study)


def decide(evidence: Evidence) -> Plan:
    return choose("planted", evidence, seconds=1.0)


STEPS: dict[int, float | None] = {8: 4000, 32: 1100, 128: 400, 512: 300, 2048: None}


@pytest.mark.parametrize(("goal", "best"), [("time", 128), ("examples", 8), ("steps", 512)])
def test_the_size_of_least_cost_to_the_target_is_chosen(
    evidence: Evidence, goal: Any, best: int
) -> None:
    given = planted(evidence, planted_study(STEPS), goal=goal)
    price = make_price(goal, given.throughput, 16_384)
    costs = {B: steps * price(B) for B, steps in STEPS.items() if steps}
    assert min(costs, key=lambda B: costs[B]) == best  # what was planted
    plan = decide(given)
    assert (plan.recipe.global_batch, plan.effort) == (best, "study")
    assert plan.recipe.learning_rate == pytest.approx(0.01 * best)
    assert plan.near_best.low <= best <= plan.near_best.high <= 8 * plan.near_best.low
    assert plan.prediction is not None
    assert plan.prediction.steps.value == STEPS[best]
    assert "A warning of the study." in plan.warnings
    assert [r.source for r in plan.reasons][:2] == ["study", "study"]


def test_what_it_gains_over_the_usual_default_is_a_quotient_of_costs(evidence: Evidence) -> None:
    given = planted(evidence, planted_study(STEPS))
    plan = decide(given)
    price = make_price("time", given.throughput, 16_384)
    assert plan.prediction is not None and plan.prediction.speedup is not None
    speedup = plan.prediction.speedup
    assert speedup.value == pytest.approx(1100 * price(32) / (400 * price(128)))
    # Two intervals of ± 2 % in logs, independent: √2 times as wide.
    assert speedup.high == pytest.approx((speedup.value or 0) * 1.02**2**0.5, rel=1e-6)
    assert plan.cost.full_trainings == pytest.approx(plan.cost.examples / (1100 * 32))
    assert "found to be" in " ".join(plan_text(plan).split())


def test_sizes_whose_interval_reaches_the_best_are_as_good(evidence: Evidence) -> None:
    wide = planted_study({**STEPS, 64: 700, 256: 390})
    sizes = tuple(
        replace(f, steps_to_target=near(f.steps_to_target.value or 1.0, 3.0))
        if f.batch_size in (32, 64, 256) else f
        for f in wide.sizes
    )  # fmt: skip
    ordered = tuple(sorted(sizes, key=lambda f: f.batch_size))
    plan = decide(planted(evidence, replace(wide, sizes=ordered)))
    assert plan.recipe.global_batch == 128
    assert (plan.near_best.low, plan.near_best.high) == (32, 256)


def test_without_a_target_the_least_loss_at_equal_cost_of_the_goal_decides(
    evidence: Evidence,
) -> None:
    study = planted_study(
        dict.fromkeys(STEPS),
        {"seconds": {8: 0.5, 32: 0.2, 128: 0.3}, "steps": {8: 0.5, 32: 0.4, 128: 0.3}},
    )
    for goal, best in [("time", 32), ("quality", 32), ("steps", 128)]:
        plan = decide(planted(evidence, study, goal=goal, target=None))
        assert plan.recipe.global_batch == best
        assert plan.recipe.learning_rate == pytest.approx(0.02 * best)
        assert plan.prediction is None
    plan = decide(planted(evidence, study))
    assert any("was met by all seeds at no batch size" in w for w in plan.warnings)


def test_the_sizes_are_those_around_what_probes_suggest(evidence: Evidence) -> None:
    given = plant(evidence, alpha=1e-3, beta=1e-5, noise=400.0)
    sizes = sizes_around(given)
    assert len(sizes) == 7 and sizes[-1] == 64 * sizes[0]
    assert predict_seconds(given, sizes, 20) == pytest.approx(2 * predict_seconds(given, sizes, 10))


def test_a_real_study_can_be_replayed_and_printed(tmp_path: Path) -> None:
    said: list[str] = []
    plan = make_plan(
        small(256), effort="study", budget="1s", progress=lambda text, *_: said.append(text)
    )
    assert plan.effort == "study" and plan.evidence.race is None
    study = plan.evidence.study
    assert study is not None and study.state == "complete"
    assert plan.recipe.global_batch in study.design.batch_sizes
    assert any("trainings of" in text for text in said)
    write_record(tmp_path / "plan.json", plan, schema="rightbatch.plan/1")
    again = read_record(tmp_path / "plan.json", Plan, schema="rightbatch.plan/1")
    assert again == plan and replay_plan(again) == plan
    assert json.dumps(plan_text(plan))
    assert all(len(line) <= 80 for line in plan_text(plan).splitlines())


def test_auto_says_what_a_study_would_cost() -> None:
    plan = make_plan(small(64), effort="auto", budget=0.5)
    (note,) = [w for w in plan.warnings if w.startswith(NO_STUDY)]
    assert "trainings would take up to" in note and "effort='study'" in note
