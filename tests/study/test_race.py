"""The race against contestants whose best (batch, learning rate) is known exactly."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import pytest
from pydantic import TypeAdapter
from tests.study.fakes import (
    SIZES,
    LawfulProblem,
    Price,
    Quadratic,
    QuadraticProblem,
    cells_run,
    linear_price,
    make_quadratic,
    make_race,
)

from rightbatch.laws.progress import PARAMETERS, log_extra_steps, make_prior
from rightbatch.study.conclude import Cell, conclude, near_best
from rightbatch.study.race import Contestant, Look, Race, RaceSettings, contenders
from rightbatch.study.records import RaceRecord

TIME = linear_price(2e-4, 1e-5)


def choose(record: RaceRecord, price: Price) -> tuple[Cell, tuple[int, int]]:
    """What follows from a record: the choice, and the sizes that are near the best."""
    outlook = conclude(
        record.trials,
        target_loss=record.target_loss,
        normalised=record.normalised,
        sizes=record.sizes,
        price=price,
    )
    cell = outlook.best(contenders(record))
    return cell, near_best(outlook, cell)


def stop_at(words: str) -> Callable[[str], None]:
    """A user who presses Ctrl-C when the race says it does this."""

    def progress(text: str) -> None:
        if words in text:
            raise KeyboardInterrupt

    return progress


def assert_sound(record: RaceRecord) -> None:
    """What holds for every race, however it ended."""
    assert {(c.global_batch, c.learning_rate) for c in contenders(record)} <= cells_run(record)
    adapter = TypeAdapter(RaceRecord)
    assert adapter.validate_json(adapter.dump_json(record)) == record
    assert [t.kind for t in record.trials].count("baseline") == 1
    for trial in record.trials:
        steps = [p.steps for p in trial.points]
        assert steps == sorted(set(steps))
        assert all(p.loss is None or math.isfinite(p.loss) for p in trial.points)
        if trial.state != "diverged":
            assert all(p.loss is not None for p in trial.points)
        if trial.state == "reached":
            assert trial.steps_to_target is not None
            assert 0 < trial.steps_to_target <= trial.steps
    assert sum(t.examples for t in record.trials if t.kind in {"branch", "run"}) < record.examples
    assert record.target_loss > 0


# ------------------------------------------------------------------------- planted, exact answers


@dataclass(frozen=True)
class Result:
    """A race with its exact score."""

    record: RaceRecord
    regret: float
    best_size: int
    near_best: tuple[int, int]
    examples: int
    looks: int


LAWS = [(3, True, 3e-3, 0.03), (4, False, 2e-4, 0.2), (6, False, 3e-3, 0.2)]


def plant_law(seed: int, *, normalised: bool) -> LawfulProblem:
    """A law from the prior under which batch 32 at learning rate 0.1 trains."""
    rng = np.random.default_rng(seed)
    prior = make_prior(reference_batch=32, learning_rate=0.1, normalised=normalised)
    laws = prior.draw(500, rng)
    laws[:, PARAMETERS.index("ln_start_penalty")] = 0.0
    spent = log_extra_steps(prior, laws, np.log([32.0]), np.log([0.1]), from_fresh=1.0)[:, 0]
    return LawfulProblem(prior, laws[spent < 1.0][:1], target=3 * 61**-0.5)


@cache
def law_race(case: int) -> Result:
    seed, normalised, alpha, first_lr = LAWS[case]
    problem, price = plant_law(seed, normalised=normalised), linear_price(alpha, 1e-5)
    race = make_race(
        problem, price, first_lr=first_lr, target_loss=problem.target, normalised=normalised
    )
    race.run()
    record = race.record(100)
    cell, near = choose(record, price)
    regret = problem.regret(price, cell.global_batch, cell.learning_rate)
    best = problem.best(price)[0]
    return Result(record, regret, best, near, problem.counter.examples, problem.counter.looks)


QUADRATICS = [(0.0, 0.03, 2e-4, 0.3), (0.3, 0.05, 3e-3, 2.0)]


@cache
def quadratic_race(case: int) -> Result:
    noise_variance, share, alpha, factor = QUADRATICS[case]
    problem = make_quadratic(share=share, noise_variance=noise_variance)
    price = linear_price(alpha, 1e-5)
    race = make_race(problem, price, first_lr=0.7 * factor, target_loss=problem.target)
    race.run()
    record = race.record(100)
    cell, near = choose(record, price)
    regret = problem.regret(price, cell.global_batch, cell.learning_rate)
    best = problem.best_size(price)
    return Result(record, regret, best, near, problem.counter.examples, problem.counter.looks)


def every_race() -> list[Result]:
    return [law_race(i) for i in range(len(LAWS))] + [
        quadratic_race(i) for i in range(len(QUADRATICS))
    ]


@pytest.mark.parametrize("case", range(len(LAWS)))
def test_on_a_planted_law_the_choice_is_near_the_best(case: int) -> None:
    """Exact regret in modelled cost, against all sizes and rates an eighth octave apart."""
    result = law_race(case)
    assert result.record.target_reached
    assert result.regret < 0.5


@pytest.mark.parametrize("case", range(len(QUADRATICS)))
def test_on_exact_expected_sgd_the_choice_is_near_the_best(case: int) -> None:
    """science.md 6.2: nothing about this problem is the race's own law."""
    result = quadratic_race(case)
    assert result.record.target_reached
    assert result.regret < 0.5


def test_over_all_planted_cases_the_regret_is_small() -> None:
    results = every_race()
    assert np.median([r.regret for r in results]) <= 0.25
    honest = [r.near_best[0] <= r.best_size <= r.near_best[1] for r in results]
    assert np.mean(honest) >= 0.8
    assert all(r.near_best[1] <= 8 * r.near_best[0] for r in results)


def test_every_example_and_every_evaluation_is_counted() -> None:
    for result in every_race():
        assert result.record.examples == result.examples
        assert result.record.evaluation_examples == 100 * result.looks


def test_the_cost_stays_near_its_share_and_every_record_is_sound() -> None:
    """In units of the baseline's run; a lucky baseline is allowed for, so the bound is loose."""
    for result in every_race():
        assert_sound(result.record)
        assert result.examples <= 2 * RaceSettings(max_baseline_examples=1).max_share * (
            result.record.baseline.examples
        )
    shares = [r.examples / r.record.baseline.examples for r in every_race()]
    assert np.median(shares) <= RaceSettings(max_baseline_examples=1).max_share


def test_probes_that_were_paid_for_leave_less_to_the_race() -> None:
    problem = plant_law(3, normalised=True)
    full = law_race(0).record
    settings = RaceSettings(
        max_baseline_examples=2_000_000, spent_examples=2 * full.baseline.examples
    )
    race = make_race(
        problem,
        linear_price(3e-3, 1e-5),
        first_lr=0.03,
        target_loss=problem.target,
        normalised=True,
        settings=settings,
    )
    race.run()
    record = race.record(1)
    assert record.baseline == full.baseline
    assert record.examples < full.examples
    assert_sound(record)


def test_few_examples_ask_for_small_batches_few_steps_for_large_ones() -> None:
    """The price decides: the same law, paid by the example, by the second and by the step."""
    problem, sizes = plant_law(6, normalised=False), []
    for price in (float, lambda _: 1.0):
        race = make_race(problem, price, first_lr=0.2, target_loss=problem.target)
        race.run()
        record = race.record(1)
        assert_sound(record)
        sizes.append(choose(record, price)[0].global_batch)
    by_second, _ = choose(law_race(2).record, linear_price(3e-3, 1e-5))
    assert sizes[0] <= by_second.global_batch <= sizes[1]
    assert sizes[0] < sizes[1]


# ------------------------------------------------------------------------- ladder and baseline


@pytest.mark.parametrize("factor", [1e-4, 0.03, 1.0, 30.0, 1e4])
def test_the_baseline_trains_well_wherever_the_ladder_starts(factor: float) -> None:
    problem = make_quadratic(share=0.03)
    best = problem.best_cost(32, lambda _: 1.0)
    race = make_race(
        problem,
        TIME,
        first_lr=0.7 * factor,
        target_loss=problem.target,
        progress=stop_at("branching"),
    )
    race.run()
    record = race.record(1)
    assert_sound(record)
    assert race.stopped_by == "interrupt"
    assert record.baseline.state == "reached"
    assert record.baseline.steps_to_target is not None
    assert record.baseline.steps_to_target < 3 * best


@dataclass
class Brittle:
    """A contestant that loses its footing above some learning rate, but only later in training."""

    inner: Quadratic
    steps: int = 0
    broken: bool = False

    def fork(self, global_batch: int, learning_rate: float) -> Brittle:
        return replace(self, inner=self.inner.fork(global_batch, learning_rate))

    def advance(self, num_steps: int) -> None:
        self.inner.advance(num_steps)
        self.steps += num_steps
        self.broken |= self.steps > 40 and self.inner.learning_rate > 0.2

    def look(self) -> Look:
        look = self.inner.look()
        return Look(math.inf, False) if self.broken else look


def test_a_baseline_that_diverges_late_goes_on_from_before_with_a_lower_rate() -> None:
    problem = make_quadratic(share=0.03)

    def fresh(global_batch: int, learning_rate: float, seed: int) -> Contestant:
        return Brittle(problem(global_batch, learning_rate, seed))

    race = make_race(
        fresh, TIME, first_lr=0.4, target_loss=problem.target, progress=stop_at("branching")
    )
    race.run()
    record = race.record(1)
    assert record.baseline.state == "reached"
    assert record.baseline.learning_rate <= 0.2
    assert record.baseline.points[0].progress / record.baseline.points[0].steps > 0.2
    # What was trained after the fall is forgotten: between looks the rate was one that was tried.
    steps = np.diff([p.steps for p in record.baseline.points])
    rates = np.diff([p.progress for p in record.baseline.points]) / steps
    octaves = np.log2(rates / record.baseline.learning_rate)
    np.testing.assert_allclose(octaves, np.round(octaves), atol=1e-6)
    assert_sound(record)


def test_a_baseline_that_always_diverges_is_given_up_in_words() -> None:
    problem = make_quadratic(share=0.03)

    @dataclass
    class Hopeless(Brittle):
        def advance(self, num_steps: int) -> None:
            super().advance(num_steps)
            self.broken |= self.steps > 40

    def fresh(global_batch: int, learning_rate: float, seed: int) -> Contestant:
        return Hopeless(problem(global_batch, learning_rate, seed))

    race = make_race(fresh, TIME, first_lr=0.4, target_loss=problem.target)
    race.run()
    assert race.stopped_by == "diverged"
    assert not race.has_ruler
    with pytest.raises(ValueError, match=r"ended before its baseline; there is nothing to record"):
        race.record(1)


def test_a_rate_that_stalls_on_its_noise_is_lowered() -> None:
    """With s² > 0 a constant rate has a floor ∝ η/B: the target lies below that of the ladder's."""
    problem = make_quadratic(share=0.002, noise_variance=2.0, smallest=0.2)
    race = make_race(
        problem, TIME, first_lr=0.4, target_loss=problem.target, progress=stop_at("branching")
    )
    race.run()
    record = race.record(1)
    first = record.baseline.points[0]
    assert record.baseline.state == "reached"
    assert record.baseline.learning_rate < first.progress / first.steps


# --------------------------------------------------------------------------------- the target


def test_without_a_target_the_baselines_last_loss_is_the_target() -> None:
    problem = make_quadratic(share=None)
    settings = RaceSettings(max_baseline_examples=32 * 200)
    race = make_race(problem, TIME, first_lr=0.5, settings=settings, progress=stop_at("branching"))
    race.run()
    record = race.record(1)
    baseline = record.baseline
    assert not record.target_reached
    assert baseline.state == "stopped"
    assert 200 * 32 * 0.8 <= baseline.examples <= 200 * 32 * 1.4
    losses = [p.loss for p in baseline.points if p.loss is not None]
    assert min(losses) <= record.target_loss <= 1.1 * losses[-3]


def test_a_target_out_of_reach_is_said_and_the_reached_loss_raced_for() -> None:
    problem = make_quadratic(share=0.0, noise_variance=1.0)
    settings = RaceSettings(max_baseline_examples=32 * 150)
    race = make_race(problem, TIME, first_lr=0.5, target_loss=problem.target, settings=settings)
    race.run()
    record = race.record(1)
    assert not record.target_reached
    assert problem.target is not None
    assert record.target_loss > problem.target
    assert_sound(record)
    runs = [t for t in record.trials if t.kind == "run"]
    assert runs
    for run in runs:
        if run.state == "reached":
            last = run.points[-1].loss
            assert last is not None
            assert last <= record.target_loss
    # The race is still worth having: its choice meets the loss about as soon as any could.
    reachable = QuadraticProblem(problem.problem, record.target_loss)
    cell, _ = choose(record, TIME)
    assert reachable.regret(TIME, cell.global_batch, cell.learning_rate) < 0.6


# -------------------------------------------------------------------------- ended from outside


def test_the_wall_time_limit_ends_it_soon_with_a_usable_record() -> None:
    """The clock is what was done so far: one second per 1000 examples."""
    stops: set[str] = set()
    for seconds in (3.0, 6.0):
        problem = make_quadratic(share=0.03)

        def clock(problem: QuadraticProblem = problem) -> float:
            return problem.counter.examples / 1000

        race = make_race(
            problem,
            TIME,
            first_lr=0.5,
            target_loss=problem.target,
            settings=RaceSettings(max_baseline_examples=2_000_000, seconds=seconds),
            clock=clock,
        )
        race.run()
        stops.add(race.stopped_by)
        assert clock() < seconds + 1.5
        if race.has_ruler:
            record = race.record(1)
            assert_sound(record)
            assert record.seconds == clock()
            choose(record, TIME)
    assert stops == {"time"}


@pytest.mark.parametrize("share", [0.1, 0.5, 1.1, 1.6, 2.4])
def test_ctrl_c_in_the_middle_of_an_update_leaves_what_is_known(share: float) -> None:
    """At several moments, from ladder to fresh runs; in units of the baseline's run."""
    problem = make_quadratic(share=0.03)
    limit = share * 32 * 90

    @dataclass
    class Interrupted(Quadratic):
        def advance(self, num_steps: int) -> None:
            super().advance(num_steps)
            if self.counter.examples > limit:
                raise KeyboardInterrupt

    def fresh(global_batch: int, learning_rate: float, seed: int) -> Contestant:
        return Interrupted(**vars(problem(global_batch, learning_rate, seed)))

    race = make_race(fresh, TIME, first_lr=0.5, target_loss=problem.target)
    race.run()
    assert race.stopped_by == "interrupt"
    if share < 0.9:
        assert not race.has_ruler
        with pytest.raises(ValueError, match="nothing to record"):
            race.record(1)
    if share > 2.2:
        assert race.has_ruler
    if race.has_ruler:
        record = race.record(1)
        assert_sound(record)
        assert record.stopped_by == "interrupt"
        assert record.baseline.state == "reached"
        cell, near = choose(record, TIME)
        assert near[0] <= cell.global_batch <= near[1]


# ------------------------------------------------------------------------------ repeatability


def test_the_same_race_twice_is_the_same_record() -> None:
    records: list[RaceRecord] = []
    for _ in range(2):
        race: Race = make_race(
            plant_law(0, normalised=False),
            TIME,
            first_lr=0.03,
            clock=lambda: 0.0,
            settings=RaceSettings(max_baseline_examples=10_000),
            progress=stop_at("fresh weights"),
        )
        race.run()
        records.append(race.record(1))
    assert records[0] == records[1]


def test_the_global_random_state_is_not_touched() -> None:
    np.random.seed(5)
    expected = np.random.rand()
    np.random.seed(5)
    race = make_race(
        make_quadratic(share=0.03), TIME, first_lr=0.5, progress=stop_at("branching"), sizes=SIZES
    )
    race.run()
    assert np.random.rand() == expected


def test_runs_that_are_compared_share_a_seed() -> None:
    for result in every_race():
        seeds: dict[str, set[int]] = {}
        for trial in result.record.trials:
            seeds.setdefault(trial.kind, set()).add(trial.seed)
        assert all(len(found) == 1 for found in seeds.values())
        assert seeds.get("branch", seeds["baseline"]) == seeds["baseline"] == seeds["ladder"]
