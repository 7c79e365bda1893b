"""Whether a choice carries over: orders and regrets on studies whose answer is known."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from rightbatch import Study, compare_choices
from rightbatch.errors import UsageError
from rightbatch.laws.estimate import unresolved
from rightbatch.study.design import Budget, StudyDesign
from rightbatch.study.findings import Fits
from rightbatch.study.gradients import StudyGradients
from rightbatch.study.size_costs import GOALS, size_costs
from rightbatch.study.study import StudyCost
from rightbatch.study.trials import StudyTrial

SPREAD = (0.95, 1.0, 1.05)
Cells = Mapping[tuple[int, float], float | None]


def planted(cells: Cells, *, seconds: float | None = 0.01, **changes: Any) -> Study:
    """A study whose steps to the target are known: of 100 steps, a step of `seconds`."""
    seeds = changes.pop("seeds", range(3))
    trials = tuple(
        StudyTrial(
            batch_size=size, learning_rate=rate, seed=seed, state="complete", steps=100,
            examples=100 * size, seconds=None if seconds is None else 100 * seconds,
            train_loss=0.1, val_loss=0.001 * (steps or 100) * SPREAD[seed % 3], val_metric=None,
            steps_to_target=None if steps is None else steps * SPREAD[seed % 3],
        )
        for (size, rate), steps in sorted(cells.items())
        for seed in seeds
    )  # fmt: skip
    nothing = unresolved(0)
    made: dict[str, Any] = {
        "workload": "planted", "num_examples": 640, "metric": None, "state": "complete",
        "design": StudyDesign(
            batch_sizes=tuple(sorted({size for size, _ in cells})), learning_rates=None,
            seeds=tuple(seeds), budget=Budget(unit="steps", amount=100), target="val_loss<=0.1",
        ),
        "engines": (), "trials": trials, "sizes": (), "comparisons": (), "contrasts": (),
        "watching": "",
        "gradients": StudyGradients(record=None, skipped="planted"), "best": None,
        "fits": Fits(
            critical_batch=nothing, min_steps=nothing, min_examples=nothing, rate_exponent=nothing,
            rate_rules=(), pareto=(), notes=(),
        ),
        "cost": StudyCost(examples=0, seconds=0.0), "warnings": (), **changes,
    }  # fmt: skip
    return Study(**made)


def by_size(steps: Sequence[float | None], rate: float = 0.5) -> dict[tuple[int, float], Any]:
    return {(size, rate): s for size, s in zip((8, 16, 32, 64), steps, strict=True)}


def test_the_same_order_carries_over_without_regret() -> None:
    carried = compare_choices(
        planted(by_size([90, 60, 40, 20])), planted(by_size([80, 50, 30, 10]))
    )
    assert [found.goal for found in carried.goals] == list(GOALS)
    steps = carried.under("steps")
    assert steps is not None and steps.agreement.value == 1.0
    assert (steps.small_best.value, steps.large_best.value, steps.learning_rate) == (64, 64, 0.5)
    assert (steps.regret.value, steps.regret.low) == (0.0, 0.0)
    assert [size.batch_size for size in steps.sizes] == [8, 16, 32, 64]
    assert steps.sizes[0].regret.value == pytest.approx(7.0)
    assert steps.regret_blind.value == pytest.approx((7 + 4 + 2 + 0) / 4)
    examples = carried.under("examples")
    assert examples is not None and examples.sizes[1].large.value == pytest.approx(800, rel=0.01)


def test_the_opposite_order_costs_what_the_best_there_saves() -> None:
    carried = compare_choices(
        planted(by_size([80, 40, 20, 10])), planted(by_size([10, 20, 40, 80]))
    )
    seconds = carried.under("seconds")
    assert seconds is not None and seconds.agreement.value == -1.0
    assert seconds.regret.value == pytest.approx(7.0) and (seconds.regret.low or 0) > 5
    loss = carried.under("loss")
    assert loss is not None and loss.regret.value == pytest.approx(0.07)


def test_the_rate_is_carried_or_retuned() -> None:
    small = planted({**by_size([80, 40, 20, 10]), **by_size([90, 90, 90, 90], 0.1)})
    large = planted({**by_size([99, 99, 99, 80]), **by_size([40, 30, 25, 20], 0.1)})
    steps = compare_choices(small, large).under("steps")
    assert steps is not None and steps.learning_rate == 0.5
    assert (steps.regret.value, steps.regret_retuned.value) == (pytest.approx(3.0), 0.0)
    elsewhere = compare_choices(small, planted(by_size([40, 30, 25, 20], 0.1))).under("steps")
    assert elsewhere is not None and elsewhere.regret.value is None
    assert elsewhere.regret.method == "learning rate 0.5 was not tried on the larger model"


def test_sizes_that_missed_are_last_and_tied_and_bound_the_regret() -> None:
    small, large = planted(by_size([40, 20, 10, None])), planted(by_size([20, 10, None, None]))
    steps = compare_choices(small, large).under("steps")
    assert steps is not None
    # Small: 32, 16, 8, 64. Larger: 16, 8, then 32 and 64 tied. One way: 16-8, 16-64, 8-64; the
    # other: 32-16, 32-8; tied: 32-64.
    assert steps.agreement.value == pytest.approx((3 - 2) / (6 * 5) ** 0.5)
    assert steps.regret.value is None and steps.regret.low == pytest.approx(9.0, rel=0.02)
    assert steps.sizes[3].small.value is None and steps.sizes[3].small.low == pytest.approx(100)
    nothing = compare_choices(planted(by_size([None] * 4)), large).under("steps")
    assert nothing is not None and nothing.small_best.value is None and not nothing.regret.resolved


def test_what_cannot_be_told_is_left_out() -> None:
    plain = planted(by_size([40, 30, 20, 10]), seconds=None)
    assert [g.goal for g in compare_choices(plain, plain).goals] == ["examples", "steps", "loss"]
    design = dataclasses.replace(plain.design, target=None)
    aimless = dataclasses.replace(plain, design=design)
    carried = compare_choices(aimless, plain)
    assert [g.goal for g in carried.goals] == ["loss"]
    assert any(
        text.startswith("The targets differ: None and val_loss") for text in carried.warnings
    )
    assert any(text.startswith("3 seeds: the intervals are wide") for text in carried.warnings)


def test_studies_that_cannot_be_compared_are_refused() -> None:
    study = planted(by_size([40, 30, 20, 10]))
    with pytest.raises(UsageError, match=r"The study of the larger model, 'planted', was stopped"):
        compare_choices(study, dataclasses.replace(study, state="stopped"))
    with pytest.raises(UsageError, match=r"have 1 batch sizes in common: \[8, 16, 32, 64\] and"):
        compare_choices(study, planted({(8, 0.5): 10, (7, 0.5): 10}))
    with pytest.raises(UsageError, match="The goal is 'fun'"):
        size_costs(study, "fun")  # type: ignore[arg-type]
