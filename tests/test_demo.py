"""The demonstration says what the fresh seeds say, and no more."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest

import rightbatch
from rightbatch.demo import (
    Outcome,
    Side,
    comparison_text,
    contestants,
    find_default_rate,
    measure_side,
    speedup,
)
from rightbatch.plan import probe
from rightbatch.recipe import Recipe


def side(
    title: str,
    seconds: list[float],
    *,
    batch: int = 32,
    reached: bool = True,
    measured: list[float] | None = None,
) -> Side:
    outcomes = tuple(
        Outcome(
            reached=reached,
            steps=100,
            examples=100 * batch,
            epochs=2.0,
            measured_seconds=clock,
            modelled_seconds=s,
        )
        for s, clock in zip(seconds, measured or seconds, strict=True)
    )
    return Side(
        title=title, recipe=Recipe(global_batch=batch, learning_rate=0.5), outcomes=outcomes
    )


def test_the_speed_up_is_the_geometric_mean_with_students_interval() -> None:
    """ln ratios ln 2 + {−d, 0, d}: mean ln 2, standard error d/√3, t(0.975, 2) = 4.3027."""
    d = 0.1
    slow = [2 * math.exp(x) for x in (-d, 0.0, d)]
    found = speedup(side("fast", [1.0] * 3), side("slow", slow), lambda o: o.modelled_seconds)
    half = 4.3027 * d / math.sqrt(3)
    assert found.value == 2.0
    assert found.low == pytest.approx(2 * math.exp(-half), rel=0.03)
    assert found.high == pytest.approx(2 * math.exp(half), rel=0.03)


@pytest.mark.parametrize(
    ("recipe", "default", "words"),
    [
        ([1.0, 1.0, 1.1], [2.0, 2.1, 2.0], "times as fast as batch 32"),
        ([1.0, 1.5, 0.7], [1.2, 1.0, 1.1], "a difference within the noise"),
        ([2.0, 2.1, 2.0], [1.0, 1.0, 1.1], "0.51 (0.42–0.61) times as fast"),
    ],
)
def test_the_verdict_is_honest(recipe: list[float], default: list[float], words: str) -> None:
    sides = [side("the recipe", recipe, batch=128), side("default", default)]
    text = comparison_text(sides, "val_loss<=0.12")
    assert words in " ".join(text.split())
    assert ("within the noise" in " ".join(text.split())) == ("noise" in words)
    assert max(len(line) for line in text.splitlines()) <= 80


def test_a_model_that_the_clock_contradicts_is_not_believed() -> None:
    """What a busy machine does: the probe timed one size while something else ran."""
    other = side("default", [3.0, 3.1, 3.0], measured=[1.0, 1.1, 1.0])
    same = side("the recipe", [1.0, 1.0, 1.1], measured=[1.1, 1.0, 1.0], batch=64)
    text = " ".join(comparison_text([same, other], "val_loss<=1").split())
    assert "The two disagree" in text
    agreeing = side("default", [3.0, 3.1, 3.0])
    faster = side("the recipe", [1.0, 1.0, 1.1], batch=64)
    assert "disagree" not in comparison_text([faster, agreeing], "val_loss<=1")


def test_it_is_told_what_the_learning_rate_alone_would_have_given() -> None:
    recipe = side("the recipe", [1.0, 1.0, 1.1], batch=128)
    default = side("default", [2.0, 2.1, 2.0])
    quick = side("same rate", [0.9, 1.1, 1.0])
    text = " ".join(comparison_text([recipe, default, quick], "val_loss<=1").split())
    assert "at the recipe's own learning rate it is 0.97 (" in text
    assert "times as fast: a difference within the noise." in text
    failed = side("same rate", [1.0] * 3, reached=False)
    text = comparison_text([recipe, default, failed], "val_loss<=1")
    assert "not all runs met it" in " ".join(text.split())


def test_a_target_that_is_missed_is_told() -> None:
    missed = side("the recipe", [1.0] * 3, reached=False)
    met = side("default", [1.0] * 3)
    assert "did not meet val_loss<=1 in 3 of 3 runs" in comparison_text(
        [missed, met], "val_loss<=1"
    )
    assert "met val_loss<=1 in all runs" in comparison_text([met, missed], "val_loss<=1")
    assert "0 of 3" in comparison_text([met, missed], "val_loss<=1")
    assert "is the usual default" in comparison_text([met], "val_loss<=1")


def plan_with(recipe: Recipe) -> Any:
    return SimpleNamespace(recipe=recipe, evidence=None)


def test_the_default_is_compared_at_its_own_rate_and_at_the_recipes() -> None:
    found = contestants(plan_with(Recipe(global_batch=128, learning_rate=1.5)), 1.0)
    assert {title: (r.global_batch, r.learning_rate) for title, r in found.items()} == {
        "the recipe": (128, 1.5),
        "default, best rate": (32, 1.0),
        "default, same rate": (32, 1.5),
    }
    assert list(found) == ["the recipe", "default, best rate", "default, same rate"]


def test_nothing_is_compared_twice() -> None:
    same = contestants(plan_with(Recipe(global_batch=32, learning_rate=1.0)), 1.0)
    assert list(same) == ["the recipe"]
    alike = contestants(plan_with(Recipe(global_batch=128, learning_rate=1.0)), 1.0)
    assert list(alike) == ["the recipe", "default, best rate"]


@pytest.mark.parametrize("leader", [0, 1])
def test_the_defaults_best_rate_is_what_a_race_of_batch_32_alone_finds(
    monkeypatch: pytest.MonkeyPatch, leader: int
) -> None:
    asked: list[Any] = []

    def race(_: Any, __: Any, sizes: Any, **___: Any) -> Any:
        asked.append(sizes)
        trials = [SimpleNamespace(learning_rate=rate) for rate in (0.25, 0.5)]
        return SimpleNamespace(trials=trials, leader=leader)

    monkeypatch.setattr("rightbatch.demo.run_race", race)
    plan = plan_with(Recipe(global_batch=128, learning_rate=1.5))
    assert find_default_rate(rightbatch.load_workload("quadratic"), plan) == (0.25, 0.5)[leader]
    assert asked == [[32]]


def test_without_a_race_the_default_begins_where_the_probe_says(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("rightbatch.demo.run_race", lambda *_, **__: None)
    monkeypatch.setattr("rightbatch.demo.starting_rate", lambda _: 0.125)
    plan = plan_with(Recipe(global_batch=128, learning_rate=1.5))
    assert find_default_rate(rightbatch.load_workload("quadratic"), plan) == 0.125


def test_the_defaults_best_rate_is_found_by_real_runs() -> None:
    workload = rightbatch.load_workload("quadratic")
    plan: Any = SimpleNamespace(evidence=probe(workload, memory_limit="1GiB"))
    rate = find_default_rate(workload, plan)
    steps = {
        factor: measure_side(
            workload,
            plan,
            "it",
            Recipe(global_batch=32, learning_rate=factor * rate),
            seeds=(1, 2, 3),
        ).outcomes
        for factor in (0.25, 1.0)
    }
    assert all(o.reached for o in steps[1.0])
    assert sum(o.steps for o in steps[1.0]) < sum(o.steps for o in steps[0.25])


def test_runs_go_to_the_target_on_each_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    workload = rightbatch.load_workload("quadratic")
    monkeypatch.setattr("rightbatch.demo.step_seconds", lambda *_: 0.25)
    monkeypatch.setattr("rightbatch.demo.max_micro_batch", lambda *_: 1024)
    plan: Any = SimpleNamespace(evidence=SimpleNamespace(throughput=None))
    recipe = Recipe(global_batch=64, learning_rate=0.2)
    found = measure_side(workload, plan, "it", recipe, seeds=(1, 2))
    for outcome in found.outcomes:
        assert outcome.reached
        assert outcome.steps % 4 == 0, "a look every 256 examples"
        assert outcome.examples == outcome.steps * 64
        assert outcome.epochs == outcome.examples / 1024
        assert outcome.modelled_seconds == 0.25 * outcome.steps
        assert outcome.measured_seconds > 0
    assert found.outcomes[0] != found.outcomes[1]
