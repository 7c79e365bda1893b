"""From a record to a choice: what observations are made of runs, and what is read off the draws."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from tests.study.fakes import SIZES, LawfulProblem, linear_price

from rightbatch.laws.curve import make_loss_curve
from rightbatch.laws.progress import make_prior
from rightbatch.study.conclude import (
    Cell,
    Outlook,
    conclude,
    make_lattice,
    near_best,
    observe,
)
from rightbatch.study.records import TrialPoint, TrialRecord

TIME = linear_price(1e-3, 1e-5)
TARGET = 3 * 61**-0.5


def problem(**changes: float) -> LawfulProblem:
    """Noise at 0.2 at batch 32, linear in the batch; the edge at 1."""
    given = {
        "ln_edge": math.log(1.0),
        "ln_edge_power": math.log(3.0),
        "ln_noise_lr": math.log(0.2),
        "noise_batch_power": 0.9,
        "ln_noise_power": 0.0,
        "rate_power": 0.0,
        "ln_rate_batch": math.log(150.0),
        "ln_start_penalty": 0.0,
    }
    prior = make_prior(reference_batch=32, learning_rate=0.1, normalised=False)
    return LawfulProblem(prior, np.array([[*{**given, **changes}.values()]]), TARGET, noise=0.0)


def trial(
    made: LawfulProblem,
    kind: Any,
    batch: int,
    rate: float,
    steps: int,
    *,
    start: float = 0.0,
    num: int = 24,
) -> TrialRecord:
    """A run under the planted law, evaluated at `num` steps."""
    contestant = made(batch, rate, 0)
    contestant.progress = start
    points: list[TrialPoint] = []
    reached: int | None = None
    for at in sorted({max(1, round(s)) for s in np.geomspace(max(1, steps / 20), steps, num)}):
        contestant.advance(at - (points[-1].steps if points else 0))
        look = contestant.look()
        loss = look.loss if math.isfinite(look.loss) else None
        points.append(TrialPoint(steps=at, progress=start + rate * at, loss=loss))
        if look.reached and reached is None and kind != "branch":
            reached = at
    dead = points[-1].loss is None
    return TrialRecord(
        kind=kind,
        global_batch=batch,
        learning_rate=rate,
        seed=0,
        start_progress=start,
        state="diverged" if dead else "reached" if reached else "stopped",
        steps_to_target=reached,
        points=tuple(points),
    )


def evidence(made: LawfulProblem) -> tuple[TrialRecord, ...]:
    """A baseline to the target, branches off its middle, two fresh runs."""
    baseline = trial(made, "baseline", 32, 0.1, round(1.1 * steps_of(made, 32, 0.1)))
    half = baseline.points[-1].progress / 2
    branches = [
        trial(made, "branch", batch, rate, round(0.25 * half / rate) + 5, start=half)
        for batch, rate in [(32, 0.2), (128, 0.4), (128, 1.2), (512, 0.8), (8, 0.1), (64, 0.4)]
    ]
    runs = [
        trial(made, "run", batch, rate, round(1.1 * steps_of(made, batch, rate)))
        for batch, rate in [(128, 0.4), (256, 0.4)]
    ]
    return (baseline, *branches, *runs)


def steps_of(made: LawfulProblem, batch: int, rate: float) -> float:
    """Exact steps to the target: F(ηS e^−w) = 3/√61 at a clean progress of 60."""
    return 60 * math.exp(made.extra(batch, rate)) / rate


def look(trials: tuple[TrialRecord, ...], **changes: Any) -> Outlook:
    given: dict[str, Any] = {
        "target_loss": TARGET,
        "normalised": False,
        "sizes": SIZES,
        "price": TIME,
    }
    return conclude(trials, **{**given, **changes})


@pytest.fixture(scope="module")
def outlook() -> Outlook:
    return look(evidence(problem()))


# ---------------------------------------------------------------------------------- conclusions


def test_the_outlook_knows_the_steps_of_cells_that_ran_and_that_did_not(outlook: Outlook) -> None:
    made = problem()
    for batch, octaves in [(32, 0), (32, 1), (128, 2), (64, 1), (64, 2), (256, 1)]:
        cell = Cell(global_batch=batch, learning_rate=0.1 * 2.0**octaves)
        exact = steps_of(made, batch, cell.learning_rate)
        assert outlook.steps_to_target(cell) == pytest.approx(exact, rel=0.25), cell


def test_the_best_cell_is_nearly_as_cheap_as_the_cheapest(outlook: Outlook) -> None:
    best = outlook.best()
    assert problem().regret(TIME, best.global_batch, best.learning_rate) < 0.2


def test_the_best_among_a_few_is_the_cheapest_of_them(outlook: Outlook) -> None:
    among = [Cell(global_batch=32, learning_rate=0.1), Cell(global_batch=128, learning_rate=0.4)]
    made = problem()
    costs = [made.cost(c.global_batch, c.learning_rate, TIME) for c in among]
    assert outlook.best(among) == among[int(np.argmin(costs))]


def test_the_same_evidence_gives_the_same_outlook_bit_for_bit(outlook: Outlook) -> None:
    again = look(evidence(problem()))
    assert again.cells == outlook.cells
    for name in ("log_cost", "expected", "log_steps"):
        assert getattr(again, name).tobytes() == getattr(outlook, name).tobytes()


def test_costs_are_against_the_cheapest_of_each_draw(outlook: Outlook) -> None:
    assert (
        outlook.log_cost.shape
        == outlook.log_steps.shape
        == (len(outlook.log_cost), len(outlook.cells))
    )
    np.testing.assert_allclose(outlook.log_cost.min(axis=1), 0.0, atol=1e-12)
    assert np.isfinite(outlook.log_cost).all()
    assert np.isfinite(outlook.log_steps).all()


def test_another_price_leaves_the_steps_and_changes_the_choice() -> None:
    """By the example no batch is too small, by the step none too large."""
    trials = evidence(problem())
    by_example, by_step = (look(trials, price=p) for p in (float, lambda _: 1.0))
    np.testing.assert_array_equal(by_example.log_steps, by_step.log_steps)
    assert by_example.best().global_batch <= 8
    assert by_step.best().global_batch >= 256


def test_more_evidence_leaves_less_doubt(outlook: Outlook) -> None:
    few = look(evidence(problem())[:1])
    at = few.index(Cell(global_batch=128, learning_rate=0.4))
    assert outlook.log_steps[:, at].std() < 0.6 * few.log_steps[:, at].std()


@pytest.mark.parametrize("octaves", [2, 3, 4, 5])
def test_a_run_that_diverged_speaks_against_its_cell(octaves: int) -> None:
    """It is at least so far behind: where more was feared, it is no reason to fear less."""
    trials = evidence(problem())[:1]
    cell = Cell(global_batch=256, learning_rate=0.1 * 2.0**octaves)
    run = trial(problem(), "run", 256, cell.learning_rate, 6, num=4)
    dead = replace(run, state="diverged", steps_to_target=None)
    before, after = look(trials), look((*trials, dead))
    at = before.index(cell)
    feared, fears = (np.quantile(o.log_steps[:, at], [0.25, 0.5]) for o in (before, after))
    assert (fears > feared - 0.5).all()
    assert after.expected[at] >= before.expected[at]


def test_a_portfolio_is_the_best_and_what_may_be_better(outlook: Outlook) -> None:
    few = look(evidence(problem())[:1])
    for given in (few, outlook):
        chosen = given.portfolio(3)
        assert chosen[0] == given.best()
        assert len(set(chosen)) == len(chosen) <= 3
    assert len(few.portfolio(3)) == 3


def test_the_lattice_holds_every_size_with_the_baselines_rate() -> None:
    cells = make_lattice((1, 32, 100), 0.3)
    assert {c.global_batch for c in cells} == {1, 32, 100}
    for size in (1, 32, 100):
        rates = [c.learning_rate for c in cells if c.global_batch == size]
        assert 0.3 in rates
        assert min(rates) < 0.03 < 3.0 < max(rates)
        np.testing.assert_allclose(np.diff(np.log2(rates)), 0.5)


# --------------------------------------------------------------------------------- observations


def observations(*trials: TrialRecord) -> Any:
    baseline = trial(problem(), "baseline", 32, 0.1, 1200)
    losses = np.array([p.loss for p in baseline.points])
    ruler = make_loss_curve(np.array([p.progress for p in baseline.points]), losses)
    return observe(trials, ruler, TARGET)


def test_a_branch_and_a_run_are_seen_where_the_law_puts_them() -> None:
    """At the progress p·e^(w_base − w) of the baseline, whatever their batch and rate."""
    made = problem()
    run = trial(made, "run", 128, 0.4, 120)
    branch = trial(made, "branch", 128, 0.4, 60, start=40.0)
    spared = made.extra(32, 0.1) - made.extra(128, 0.4)
    (of_run,) = observations(run)
    expected = 0.4 * of_run.steps * math.exp(spared)
    assert of_run.equivalent_progress == pytest.approx(expected, rel=0.1)
    assert (of_run.global_batch, of_run.learning_rate, of_run.start_progress) == (128, 0.4, 0.0)
    first, last = observations(branch)
    assert first.steps < last.steps
    for seen in (first, last):
        assert seen.start_progress == 40.0
        expected = (40.0 + 0.4 * seen.steps) * math.exp(spared)
        assert seen.equivalent_progress == pytest.approx(expected, rel=0.1)


def test_the_further_a_run_came_the_more_it_counts() -> None:
    made = problem()
    deviations = [
        observations(trial(made, "run", 128, 0.4, steps))[0].deviation for steps in (20, 100, 400)
    ]
    assert deviations == sorted(deviations, reverse=True)
    assert deviations[0] > deviations[-1] > 0


def test_the_ladder_and_the_baseline_are_no_observations() -> None:
    made = problem()
    assert (
        observations(trial(made, "ladder", 32, 0.2, 10), trial(made, "baseline", 32, 0.1, 50)) == ()
    )
    nothing = replace(trial(made, "run", 32, 0.2, 10), points=())
    assert observations(nothing) == ()


@pytest.mark.parametrize("kind", ["branch", "run"])
def test_a_divergence_is_seen_as_far_behind(kind: str) -> None:
    dead = replace(
        trial(problem(), kind, 32, 0.2, 10, start=20.0 if kind == "branch" else 0.0),
        state="diverged",
        steps_to_target=None,
        points=(TrialPoint(steps=10, progress=22.0, loss=None),),
    )
    (seen,) = observations(dead)
    own = dead.start_progress + 0.2 * 10
    assert seen.equivalent_progress < 0.5 * own
    assert math.isfinite(seen.deviation)


# ------------------------------------------------------------------------------------ near best


def made_up(log_cost: np.ndarray, sizes: tuple[int, ...]) -> Outlook:
    """An outlook with one learning rate per size."""
    cells = tuple(Cell(global_batch=size, learning_rate=0.1) for size in sizes)
    return Outlook(cells, log_cost, log_cost.mean(axis=0), log_cost)


def test_near_best_is_the_sizes_within_5_percent_when_all_is_known() -> None:
    cost = np.log(np.array([[1.5, 1.04, 1.0, 1.04, 1.06, 2.0]])) * np.ones((100, 1))
    known = made_up(cost, (8, 16, 32, 64, 128, 256))
    assert near_best(known, known.cells[2]) == (16, 64)


def test_near_best_holds_what_may_be_best() -> None:
    """Two laws, equally likely: one says 16, one says 64."""
    cost = np.log(np.array([[1.0, 1.3, 1.6], [1.6, 1.3, 1.0]] * 50))
    unsure = made_up(cost, (16, 32, 64))
    assert near_best(unsure, unsure.cells[1]) == (16, 64)


@pytest.mark.parametrize("seed", range(20))
def test_near_best_holds_the_chosen_size_and_spans_at_most_8(seed: int) -> None:
    rng = np.random.default_rng(seed)
    sizes = tuple(sorted({*SIZES, 1000}))
    cost = rng.exponential(rng.choice([0.05, 0.5, 3.0]), size=(200, len(sizes)))
    cost -= cost.min(axis=1, keepdims=True)
    any_outlook = made_up(cost, sizes)
    chosen = any_outlook.cells[int(rng.integers(len(sizes)))]
    low, high = near_best(any_outlook, chosen)
    assert low <= chosen.global_batch <= high <= 8 * low
    assert {low, high} <= set(sizes)


def test_near_best_of_planted_evidence_holds_the_best_size(outlook: Outlook) -> None:
    low, high = near_best(outlook, outlook.best())
    assert low <= problem().best(TIME)[0] <= high
