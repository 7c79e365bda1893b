"""Runs under way: where they are looked at, where they end, and what they cost."""

from __future__ import annotations

import math
from itertools import islice, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.study.fakes import PlantedProblem

from rightbatch.study.records import Cell
from rightbatch.study.runs import OutOfBudgetError, Purse, Run, look_steps

PROBLEM = PlantedProblem(critical=32.0, cliff_at_large=2.0)
"""At batch 32 the cliff is at 1."""


def make_run(
    rate: float = 0.5,
    *,
    problem: PlantedProblem = PROBLEM,
    most_steps: int = 10_000,
    purse: Purse | None = None,
) -> Run:
    return Run(
        cell=Cell(global_batch=32, learning_rate=rate),
        seed=0,
        contestant=problem(32, rate, 0),
        purse=purse or Purse(None),
        most_steps=most_steps,
    )


def steps_seen(run: Run) -> list[int]:
    return [point.steps for point in run.points]


# ------------------------------------------------------------------------------------------ looks


def test_the_first_ten_steps_are_all_looked_at_and_later_ones_a_tenth_apart() -> None:
    steps = list(islice(look_steps(), 80))
    assert steps[:22] == [*range(1, 21), 22, 24]
    assert all(1 <= b - a <= max(1, 0.1 * a) for a, b in pairwise(steps))
    assert all(b - a >= 0.09 * a - 1 for a, b in pairwise(steps[10:]))


@given(st.lists(st.integers(1, 200), min_size=1, max_size=8))
def test_a_run_is_looked_at_at_the_same_steps_and_where_it_was_asked_to_stop(
    goals: list[int],
) -> None:
    """Whatever the order of the advances: the losses are the same, and comparable."""
    problem = PlantedProblem(critical=32.0, target=None)
    run, straight = make_run(problem=problem), make_run(problem=problem)
    for goal in goals:
        run.advance_to(goal)
    straight.advance_to(max(goals))
    shared = {step for step in islice(look_steps(), 100) if step <= max(goals)}
    assert shared <= set(steps_seen(run)) <= shared | set(goals)
    assert steps_seen(run) == sorted(set(steps_seen(run)))
    losses = {point.steps: point.loss for point in straight.points}
    assert all(losses[p.steps] == pytest.approx(p.loss) for p in run.points if p.steps in losses)
    assert run.steps == straight.steps == max(goals)


def test_going_back_does_nothing() -> None:
    run = make_run()
    run.advance_to(20)
    before = (run.steps, run.purse.examples, len(run.points))
    run.advance_to(10)
    assert (run.steps, run.purse.examples, len(run.points)) == before


# ------------------------------------------------------------------------------------------- ends


def test_a_run_stops_at_the_look_at_which_it_meets_the_target() -> None:
    exact = PROBLEM.steps(32, 0.5)
    run = make_run()
    run.advance_to(100_000)
    assert run.state == "reached"
    assert run.finished
    assert run.steps == run.steps_to_target
    assert steps_seen(run)[-2] < exact <= run.steps <= 1.1 * exact
    assert run.price_to(100_000) == 0
    paid = run.purse.examples
    run.advance_to(100_000)
    assert run.purse.examples == paid == 32 * run.steps


def test_a_run_that_diverges_stops_at_once_and_costs_no_more() -> None:
    run = make_run(rate=1.1)
    run.advance_to(50)
    assert run.dead
    assert not run.finished
    assert run.steps == 1
    assert run.points[0].loss is None
    run.advance_to(60)
    assert run.steps == 1
    assert run.price_to(60) == 0
    assert run.purse.examples == 32
    assert run.curve.log_loss_at(1) == math.inf


def test_without_a_target_a_run_ends_at_its_most_steps() -> None:
    run = make_run(problem=PlantedProblem(critical=32.0, target=None), most_steps=37)
    run.advance_to(30)
    assert not run.finished
    run.advance_to(1000)
    assert run.finished
    assert run.steps == steps_seen(run)[-1] == 37
    assert run.state == "stopped"
    assert run.steps_to_target is None


# ------------------------------------------------------------------------------------------ prices


@given(st.lists(st.integers(0, 120), min_size=1, max_size=6))
def test_a_run_pays_what_it_said_and_what_it_trained(goals: list[int]) -> None:
    problem = PlantedProblem(critical=32.0, target=None)
    run = make_run(problem=problem, most_steps=100)
    for goal in goals:
        price, before = run.price_to(goal), run.purse.examples
        run.advance_to(goal)
        assert run.purse.examples - before == price
    assert run.purse.examples == problem.counter.examples == run.examples == 32 * run.steps
    assert run.purse.looks == problem.counter.looks == len(run.points)


def test_two_runs_pay_from_one_purse() -> None:
    purse = Purse(None)
    one, other = make_run(purse=purse), make_run(0.25, purse=purse)
    one.advance_to(5)
    other.advance_to(7)
    assert purse.examples == 12 * 32
    assert purse.looks == 12


def test_no_step_is_done_when_time_is_up() -> None:
    now = [10.0]
    purse = Purse(5.0, lambda: now[0])
    purse.pay(3)
    now[0] = 15.0
    purse.pay(4)
    assert purse.elapsed == 5.0
    now[0] = 15.1
    run = make_run(purse=purse)
    with pytest.raises(OutOfBudgetError, match=r"^time$"):
        run.advance_to(1)
    assert purse.examples == 7
    assert run.steps == 0
    assert not run.points


def test_without_a_limit_time_is_never_up() -> None:
    now = [0.0]
    purse = Purse(None, lambda: now[0])
    now[0] = 1e12
    purse.pay(1)
    assert purse.elapsed == 1e12


# ----------------------------------------------------------------------------------------- records


def test_the_curve_follows_the_run_and_the_record_keeps_it() -> None:
    run = make_run()
    assert run.curve.last_step == 0.0
    run.advance_to(4)
    assert run.curve.last_step == 4
    run.advance_to(12)
    assert run.curve.last_step == 12
    record = run.record()
    assert record.points == tuple(run.points)
    assert (record.global_batch, record.learning_rate, record.seed) == (32, 0.5, 0)
    assert (record.state, record.steps, record.examples) == ("stopped", 12, 12 * 32)
