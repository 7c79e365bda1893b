"""The search for a learning rate where the best one and the cliff are planted."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from tests.study.fakes import PlantedProblem

from rightbatch.study.conclude import own_share
from rightbatch.study.rate_search import Track, search_rate
from rightbatch.study.records import Cell
from rightbatch.study.runs import Contestant, Look, Purse, Run

BATCH = 32
SPEND = 2.2
Maker = Callable[[float], Contestant]


class Searched:
    """A search at batch 32, half octaves counted from `first_lr`."""

    def __init__(self, make: Maker, first_lr: float, *, most_steps: int = 20_000) -> None:
        self.first_lr = first_lr
        self.purse = Purse(None)
        self.runs: dict[int, Run] = {}
        self._make, self._most_steps = make, most_steps

    def rate(self, half_octave: int) -> float:
        return self.first_lr * 2.0 ** (half_octave / 2)

    def run_at(self, half_octave: int) -> Run:
        if half_octave not in self.runs:
            rate = self.rate(half_octave)
            self.runs[half_octave] = Run(
                cell=Cell(global_batch=BATCH, learning_rate=rate),
                seed=0,
                contestant=self._make(rate),
                purse=self.purse,
                most_steps=self._most_steps,
            )
        return self.runs[half_octave]

    def search(
        self,
        target: float | None,
        start: int = 0,
        *,
        until: float = 1.0,
        spend: float = SPEND,
        carried: bool = False,
    ) -> int:
        def share(run: Run) -> float:
            return own_share(run.curve, arrived=run.finished, target_loss=target)

        track = Track(self.run_at, BATCH)
        return search_rate(track, start, spend=spend, share=share, until=until, carried=carried)


def planted(problem: PlantedProblem, octaves: float = 0.0) -> Searched:
    """A search that starts this far from the best learning rate."""
    first = problem.best_rate(BATCH) * 2.0**octaves
    return Searched(lambda rate: problem(BATCH, rate, 0), first)


# --------------------------------------------------------------------------------- what it finds


@pytest.mark.parametrize("octaves", [-4.0, -2.3, -1.0, 0.0, 0.2, 1.0, 2.3, 4.0])
@pytest.mark.parametrize("power", [0.25, 1.0])
@pytest.mark.parametrize("noise", [0.0, 0.005])
def test_it_finds_the_planted_rate_within_half_an_octave(
    octaves: float, power: float, noise: float
) -> None:
    target = 3 * 201**-power
    problem = PlantedProblem(target=target, power=power, noise=noise)
    search = planted(problem, octaves)
    found = search.search(target)
    best = problem.best_rate(BATCH)
    assert abs(math.log2(search.rate(found) / best)) <= 0.51
    assert problem.steps(BATCH, search.rate(found)) <= 1.35 * problem.steps(BATCH, best)
    assert search.run_at(found).state == "reached"


@pytest.mark.parametrize("octaves", [-4.0, 0.0, 4.0])
def test_it_finds_it_too_where_no_loss_tells_how_far_it_is(octaves: float) -> None:
    """A target on a metric: the share is 0 until the run arrives."""
    problem = PlantedProblem(target=3 * 201**-0.5)
    search = planted(problem, octaves)
    found = search.search(None)
    assert abs(math.log2(search.rate(found) / problem.best_rate(BATCH))) <= 0.51
    assert search.run_at(found).state == "reached"


@pytest.mark.parametrize("octaves", [1.0, 2.5, 6.0])
def test_it_leaves_rates_that_diverge(octaves: float) -> None:
    problem = PlantedProblem()
    search = planted(problem, octaves)
    assert search.rate(0) > problem.cliff(BATCH)
    found = search.search(problem.target)
    assert search.rate(found) < problem.cliff(BATCH)
    assert search.run_at(0).dead
    assert search.run_at(0).steps == 1


def test_a_leader_that_diverges_late_is_left_too() -> None:
    """Above 0.3 it all ends at step 50, and nothing shows it before."""
    problem = PlantedProblem(target=3 * 201**-0.5)

    class Brittle:
        def __init__(self, rate: float) -> None:
            self.inner, self.brittle = problem(BATCH, rate, 0), rate > 0.2

        def advance(self, num_steps: int) -> None:
            self.inner.advance(num_steps)

        def look(self) -> Look:
            late = self.brittle and self.inner.steps >= 50
            return Look(math.inf, False) if late else self.inner.look()

    search = Searched(Brittle, problem.best_rate(BATCH))
    assert search.rate(0) > 0.2
    found = search.search(problem.target)
    assert search.run_at(0).dead
    assert 0.1 < search.rate(found) <= 0.2
    assert search.run_at(found).state == "reached"


# -------------------------------------------------------------------------------- what it spends


@pytest.mark.parametrize("octaves", [-4.0, -2.0, 0.0, 2.0, 4.0])
def test_it_spends_little_more_than_its_allowance_of_leaders_runs(octaves: float) -> None:
    problem = PlantedProblem(target=3 * 401**-0.5)
    search = planted(problem, octaves)
    found = search.search(problem.target)
    assert search.purse.examples <= 1.15 * SPEND * search.run_at(found).examples


def test_a_smaller_allowance_is_kept_to() -> None:
    problem = PlantedProblem(target=3 * 401**-0.5)
    spent: list[int] = []
    for spend in (1.0, 1.4, 1.8, 2.2):
        search = planted(problem)
        found = search.search(problem.target, spend=spend)
        assert search.run_at(found).state == "reached"
        spent.append(search.purse.examples)
    assert spent == sorted(spent)
    assert spent[0] < spent[-1]


def test_it_ends_early_where_it_was_asked_to() -> None:
    problem = PlantedProblem(target=3 * 401**-0.5)
    search = planted(problem, 1.2)
    found = search.search(problem.target, until=0.5)
    leader, exact = search.run_at(found), problem.steps(BATCH, search.rate(found))
    assert leader.state == "stopped"
    assert 0.4 * exact < leader.steps < 0.75 * exact


def test_a_search_goes_on_from_where_another_ended() -> None:
    problem = PlantedProblem(target=3 * 401**-0.5)
    search = planted(problem, -1.2)
    half = search.search(problem.target, until=0.5)
    assert search.run_at(half).state == "stopped"
    before = {place: run.steps for place, run in search.runs.items()}
    found = search.search(problem.target, half)
    assert search.run_at(found).state == "reached"
    assert abs(found - half) <= 1
    assert all(search.runs[place].steps >= steps for place, steps in before.items())


# -------------------------------------------------------------------------------- bad luck


def test_where_everything_diverges_it_ends_soon() -> None:
    search = Searched(lambda rate: PlantedProblem()(BATCH, 1e30, 0), 1.0)
    found = search.search(0.1)
    assert search.run_at(found).dead
    assert len(search.runs) < 40
    assert search.purse.examples == len(search.runs) * BATCH


def test_where_no_rate_makes_any_progress_it_ends_at_the_most_steps() -> None:
    class Flat:
        def advance(self, num_steps: int) -> None: ...

        def look(self) -> Look:
            return Look(2.0, False)

    search = Searched(lambda _: Flat(), 0.1, most_steps=300)
    found = search.search(0.1)
    assert search.run_at(found).finished
    assert search.purse.examples < 8 * 300 * BATCH


@pytest.mark.parametrize("seed", range(12))
def test_whatever_the_losses_it_ends_and_within_its_cost(seed: int) -> None:
    """Losses that are drawn at random: no leader is ever right, and it must not go in circles."""

    class Random:
        def __init__(self, rate: float) -> None:
            self.steps, self.seed = 0, (seed, round(1000 * math.log2(rate) + 100_000))

        def advance(self, num_steps: int) -> None:
            self.steps += num_steps

        def look(self) -> Look:
            drawn = np.random.default_rng((*self.seed, self.steps)).normal()
            return Look(math.exp(0.3 * float(drawn)) if drawn < 2.5 else math.inf, False)

    search = Searched(Random, 0.1, most_steps=200)
    found = search.search(None)
    assert search.run_at(found).finished or search.run_at(found).dead
    assert all(run.steps <= 200 for run in search.runs.values())


def test_the_same_search_twice_does_the_same() -> None:
    problem = PlantedProblem(noise=0.01)
    one, again = planted(problem, 2.0), planted(problem, 2.0)
    assert one.search(problem.target) == again.search(problem.target)
    assert {k: run.points for k, run in one.runs.items()} == {
        k: run.points for k, run in again.runs.items()
    }


class Curve:
    """A contestant whose loss is a given function of its steps."""

    def __init__(self, loss: Callable[[int], float]) -> None:
        self._loss, self._steps = loss, 0

    def advance(self, num_steps: int) -> None:
        self._steps += num_steps

    def look(self) -> Look:
        return Look(loss=self._loss(self._steps), reached=self._loss(self._steps) <= 0.05)


def test_a_new_leader_that_falls_behind_does_not_catch_up_first() -> None:
    """Half an octave below, a run that is ahead for some steps and then stalls."""

    def make(rate: float) -> Contestant:
        half_octave = round(2 * math.log2(rate))
        if half_octave == 0:
            return Curve(lambda n: min(1.0, 17 / n))
        if half_octave == -1:
            return Curve(lambda n: 1.0 if n < 36 else 0.9 * 17 / min(n, 95))
        return Curve(lambda n: 5.0 if n > 1 else 6.0)

    search = Searched(make, 1.0)
    assert search.search(0.05) == 0
    assert search.run_at(0).state == "reached" and search.run_at(0).steps > 300
    assert 93 < search.run_at(-1).steps < 200, "the old leader had done 215 when it was passed"


def test_a_rate_that_was_carried_here_is_not_looked_for_octaves_away() -> None:
    """The loss that does not fall yet tells a first search to look far, and a later one nothing."""

    def make(rate: float) -> Contestant:
        progress = rate if rate < 1.01 else 0.0
        return Curve(lambda n: min(1.0, 40 / max(n * progress, 1.0)))

    tried: dict[bool, set[int]] = {}
    for carried in (False, True):
        search = Searched(make, 1.0)
        search.search(0.05, carried=carried)
        tried[carried] = {half_octave for half_octave, run in search.runs.items() if run.steps}
    assert min(tried[False]) <= -8 and max(tried[False]) >= 4
    assert tried[True] <= {-2, -1, 0, 1, 2}
