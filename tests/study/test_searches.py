"""What every search has to keep, and what race and samplers make of trainings known exactly."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from rightbatch import Study, load_workload, run_study
from rightbatch.errors import MissingExtraError, UsageError
from rightbatch.laws.progress import spaced_steps
from rightbatch.study import runner
from rightbatch.study.claims import Claim, Claims, Result
from rightbatch.study.database import StoredTrial, StudyDatabase
from rightbatch.study.design import SearchName, StudyDesign, make_design
from rightbatch.study.executors import run_task
from rightbatch.study.group import SPACING
from rightbatch.study.judging import Setting
from rightbatch.study.objective import Objective
from rightbatch.study.over_sizes import choose_best, fit_sizes
from rightbatch.study.race_search import RaceSearch
from rightbatch.study.search import Search
from rightbatch.study.searches import make_search
from rightbatch.study.size_table import tables_of
from rightbatch.study.trials import Asked, EvaluationPoint, TrialKey
from rightbatch.workload.target import parse_target

N = 1024
SEARCHES: tuple[SearchName, ...] = ("grid", "race", "tpe", "gp", "random")
ASKED: dict[str, Any] = {"batch_sizes": [4, 16, 64, 256], "learning_rates": "0.01:2:9",
                         "seeds": 3, "epochs": 40, "target": "val_loss<=0.3"}  # fmt: skip


def design_of(search: SearchName, **changes: Any) -> StudyDesign:
    trials = None if search in ("grid", "race") else 14
    return make_design(N, **{**ASKED, "search": search, "trials": trials, **changes})


def setting_of(design: StudyDesign, *, timed: bool = True) -> Setting:
    return Setting(
        num_examples=N,
        target=None if design.target is None else parse_target(design.target),
        seconds_of=(lambda batch: 1e-3 * (1 + batch / 64)) if timed else None,
        has_validation=True,
    )


def make(design: StudyDesign, database: StudyDatabase, at_once: int = 1, **about: Any) -> Search:
    no_workload: Any = None  # rates are given: nothing is trained
    setting = setting_of(design, **about)
    return make_search(no_workload, design, database, setting, lambda _: None, at_once=at_once)


def loss_at(key: TrialKey, step: int) -> float:
    """Falls as e^(−ηt/τ(B)) to a noise floor; beyond the cliff there is none."""
    noise = np.random.default_rng((key.seed, key.batch_size, step)).normal()
    pace = key.learning_rate / (1 + key.learning_rate / 4)
    return (2 * math.exp(-pace * step / 8) + 2 * key.learning_rate / key.batch_size + 0.05) * (
        1 + 0.02 * noise
    )


def cliff(batch: int) -> float:
    return 0.2 + batch / 64


def trained(design: StudyDesign, setting: Setting, claim: Claim) -> Result:
    """A training of the law above, as far as it was asked for."""
    key = claim.key
    if key.learning_rate > cliff(key.batch_size):
        return Result(state="diverged")
    steps = max(1, round(claim.share * Objective(design, setting).updates[key.batch_size]))
    points = [
        EvaluationPoint(
            step=step, examples=step * key.batch_size, train_loss=None,
            val_loss=loss_at(key, step), val_metric=None,
        )
        for step in spaced_steps(SPACING, steps)
    ]  # fmt: skip
    return Result(state="complete", points=points)


def run_round(database: StudyDatabase, design: StudyDesign, *, timed: bool = True) -> None:
    claims, setting = Claims(database), setting_of(design, timed=timed)
    while taken := claims.take(64):
        claims.settle({claim: trained(design, setting, claim) for claim in taken})
    claims.close()


Made = Callable[[StudyDatabase], Search]


def run_all(
    place: str, design: StudyDesign, *, anew: bool, at_once: int = 1, timed: bool = True
) -> tuple[list[StoredTrial], list[list[Asked]]]:
    """Runs a study; `anew`: the process ends after each round, and another goes on."""
    asked: list[list[Asked]] = []

    def begin() -> tuple[StudyDatabase, Search]:
        opened = StudyDatabase(place, "study")
        opened.begin(design, {})
        return opened, make(design, opened, at_once, timed=timed)

    database, search = begin()
    for _ in range(200):
        new = list(search.ask(database.trials()))
        again = list(search.ask(database.trials()))
        assert again == new  # killed between asking and adding
        if not database.add(new):
            trials = database.trials()
            database.close()
            return trials, asked
        asked.append(new)
        assert not [*search.ask(database.trials())] or design.search == "grid"  # none has ended
        run_round(database, design, timed=timed)
        if anew:
            database.close()
            database, search = begin()
            at_once = 1  # goes on with as many as it began with
    raise AssertionError("it does not come to an end")


# -------------------------------------------------------------------------------- the contract


@pytest.mark.parametrize("target", [ASKED["target"], None], ids=["target", "loss"])
@pytest.mark.parametrize("search", SEARCHES)
def test_every_search_asks_for_the_same_and_comes_to_an_end(
    tmp_path: Path, search: SearchName, target: str | None
) -> None:
    if search in ("tpe", "gp", "random"):
        pytest.importorskip("optuna")
    changes: dict[str, Any] = {"trials": 12} if search == "gp" else {}
    design = design_of(search, target=target, **changes)
    whole, asked = run_all(str(tmp_path / "a.db"), design, anew=False, at_once=3)
    again, asked_again = run_all(str(tmp_path / "b.db"), design, anew=True, at_once=3)
    assert asked == asked_again
    assert whole == again
    assert {t.state for t in whole} <= {"complete", "diverged"}
    seeds = dict.fromkeys({(t.key.batch_size, t.key.learning_rate) for t in whole}, 0)
    for trial in whole:
        seeds[trial.key.batch_size, trial.key.learning_rate] += 1
    assert set(seeds.values()) == {3}
    low, high = 0.01, 2.0
    assert all(low <= rate <= high and size in ASKED["batch_sizes"] for size, rate in seeds)
    if design.trials is not None:
        assert len(seeds) == design.trials
        assert [len(round_) for round_ in asked[:3]] == [9, 9, 9]  # three pairs, three seeds


@pytest.mark.parametrize("search", ["race", "random"])
def test_a_whole_study_that_is_interrupted_again_and_again_ends_alike(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, search: SearchName
) -> None:
    if search == "random":
        pytest.importorskip("optuna")

    def study(folder: str) -> Study:
        return run_study(
            load_workload("max3"), batch_sizes=[50, "full"], learning_rates="0.05:5:5", seeds=2,
            epochs=12, target="val_loss<=0.6", search=search, engine="loop",
            trials=4 if search == "random" else None, run_directory=tmp_path / folder,
        )  # fmt: skip

    # What is spent on a rung rests on the measured step time, which is another each time.
    law = SimpleNamespace(seconds=lambda batch: 1e-4 * (1 + batch / 50))
    measured = SimpleNamespace(step_time=law)
    monkeypatch.setattr(runner, "measure_throughput", lambda *_, **__: measured)
    whole = study("whole")
    run_group, left = run_task.run_group, [3]

    def interrupted(*args: Any, **options: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return run_group(*args, **options)

    monkeypatch.setattr(run_task, "run_group", interrupted)
    again, times = study("again"), 1
    while again.state == "stopped":
        left[0], times = 3, times + 1
        again = study("again")
        assert times < 50
    assert times > 2
    assert again.trials == whole.trials and again.race == whole.race
    assert again.best == whole.best and again.cost.examples == whole.cost.examples


# -------------------------------------------------------------------------------------- the race


def best_of(trials: Sequence[StoredTrial], design: StudyDesign) -> tuple[int, float]:
    setting = setting_of(design)
    tables = [table for table in tables_of(trials, setting) if table.resolved]
    best = choose_best([table.finding() for table in tables], setting)
    assert best is not None
    return best.batch_size, best.learning_rate


def loss_at_end(batch: int, rate: float) -> float:
    steps = Objective(design_of("grid"), setting_of(design_of("grid"))).updates[batch]
    keys = [TrialKey(batch_size=batch, learning_rate=rate, seed=seed) for seed in range(3)]
    return float(np.mean([loss_at(key, steps) for key in keys]))


@pytest.mark.parametrize("target", [ASKED["target"], None], ids=["target", "loss"])
def test_a_race_finds_what_the_grid_finds_for_less(tmp_path: Path, target: str | None) -> None:
    grid, race = design_of("grid", target=target), design_of("race", target=target)
    all_, _ = run_all(str(tmp_path / "grid.db"), grid, anew=False)
    some, asked = run_all(str(tmp_path / "race.db"), race, anew=False)
    if target is not None:
        assert best_of(some, race) == best_of(all_, grid)
    assert loss_at_end(*best_of(some, race)) <= 1.05 * loss_at_end(*best_of(all_, grid))
    database = StudyDatabase(str(tmp_path / "race.db"), "study")
    database.begin(race, {})
    search = make(race, database)
    assert isinstance(search, RaceSearch)
    finding = search.finding(database.trials())
    assert finding is not None
    assert finding.rungs[0].cells == 36 and finding.rungs[-1].dropped == 0
    for rung, after in zip(finding.rungs, finding.rungs[1:], strict=False):
        assert after.cells == rung.cells - rung.dropped
        assert after.amount == pytest.approx(3 * rung.amount)
    # In what pairs are compared by: at equal epochs those that are left may take long ones.
    assert finding.seconds_of_grid is not None
    less = finding.examples_of_grid if target is None else finding.seconds_of_grid
    assert less < 0.35
    # The same from what was asked for, each training anew each time, but for those that diverged.
    setting = setting_of(race)
    objective = Objective(race, setting)
    ended = {t.key: t for t in some}

    def cost(one: Asked) -> float:
        if ended[one.key].state == "diverged":
            return objective.cost(one.key.batch_size, 1)
        steps = round(one.share * objective.updates[one.key.batch_size])
        return objective.cost(one.key.batch_size, steps)

    shares: dict[TrialKey, float] = {}
    spent = 0.0
    for one in (one for round_ in asked for one in round_):
        if one.share > shares.get(one.key, 0.0):
            spent += cost(one)
        shares[one.key] = max(one.share, shares.get(one.key, 0.0))
    whole = sum(cost(Asked(key=key)) for key in ended)
    assert finding.seconds_of_grid == pytest.approx(spent / whole, rel=1e-9)
    database.close()


def test_what_a_race_dropped_is_no_candidate_and_its_target_is_not_met(tmp_path: Path) -> None:
    design = design_of("race")
    trials, _ = run_all(str(tmp_path / "s.db"), design, anew=False)
    dropped = [t for t in trials if t.share < 1]
    assert dropped
    setting = setting_of(design)
    tables = [table for table in tables_of(trials, setting) if table.resolved]
    for table in tables:
        finding = table.finding()
        shares = {rate.learning_rate: rate.share for rate in finding.rates}
        assert finding.learning_rate.value is not None
        assert shares[finding.learning_rate.value] == 1.0
        assert all(
            end is None or shares[end] == 1.0
            for end in (finding.learning_rate.low, finding.learning_rate.high)
        )
        assert finding.stable_edge is None or shares[finding.stable_edge] == 1.0
    # One that was dropped looks better than any at its end: it still is no candidate.
    first = dropped[0]
    point = EvaluationPoint(step=1, examples=4, train_loss=None, val_loss=1e-9, val_metric=None)
    planted = [
        StoredTrial(key=t.key, state="complete", points=(point,), share=t.share)
        if (t.key.batch_size, t.key.learning_rate)
        == (first.key.batch_size, first.key.learning_rate)
        else t
        for t in trials
    ]
    assert best_of(planted, design) == best_of(trials, design)
    fits = fit_sizes(tables, [table.finding() for table in tables], setting)
    assert fits.rate_exponent.n <= sum(table.bracketed for table in tables)


def test_a_rate_that_was_dropped_bounds_nothing() -> None:
    def trials(rate: float, state: Any, loss: float, share: float = 1.0) -> list[StoredTrial]:
        return [
            StoredTrial(
                key=TrialKey(batch_size=8, learning_rate=rate, seed=seed), state=state, share=share,
                points=stored("complete", [1, loss + 0.01 * seed]).points,
            )
            for seed in range(3)
        ]  # fmt: skip

    design = design_of("race", target=None)
    cells = [
        *trials(0.1, "complete", 0.5), *trials(0.2, "complete", 0.4),
        *trials(0.4, "complete", 0.3, share=1 / 9), *trials(0.8, "diverged", 9.0, share=1 / 9),
    ]  # fmt: skip
    (table,) = tables_of(cells, setting_of(design))
    finding = table.finding()
    assert finding.learning_rate.value == 0.2
    # 0.4 was lower so early, but not seen to its end: it neither is the best nor bounds it.
    assert (finding.learning_rate.low, finding.learning_rate.high) == (0.1, None)
    assert finding.stable_edge == 0.2
    assert finding.at_edge is None and not table.bracketed
    assert [rate.share for rate in finding.rates] == [1, 1, 1 / 9, 1 / 9]


def test_a_race_without_step_times_counts_examples(tmp_path: Path) -> None:
    design = design_of("race")
    database = StudyDatabase(str(tmp_path / "s.db"), "study")
    database.begin(design, {})
    search = make(design, database, timed=False)
    shares = {one.key.batch_size: one.share for one in search.ask([])}
    assert len(set(shares.values())) == 1  # the same epochs are the same examples
    assert isinstance(search, RaceSearch) and search.finding([]) is None
    database.close()
    timed, _ = run_all(str(tmp_path / "t.db"), design, anew=False)
    assert len({t.share for t in timed if t.key.batch_size == 256}) <= 2


# ---------------------------------------------------------------------------------- the objective


def stored(state: Any, losses: Sequence[float], batch: int = 16) -> StoredTrial:
    points = tuple(
        EvaluationPoint(step=k, examples=k, train_loss=None, val_loss=x, val_metric=None)
        for k, x in enumerate(losses, start=1)
    )
    key = TrialKey(batch_size=batch, learning_rate=0.1, seed=0)
    return StoredTrial(key=key, state=state, points=points)


def test_met_is_better_than_missed_is_better_than_diverged() -> None:
    design = design_of("tpe")
    objective = Objective(design, setting_of(design))
    soon, late = stored("complete", [1, 0.1]), stored("complete", [1, 1, 1, 0.1])
    near, far = stored("complete", [1, 0.5]), stored("complete", [1, 50.0])
    scores = [objective.score(t) for t in (soon, late, near, far)]
    numbers = [x for x in scores if x is not None]
    assert len(numbers) == 4
    numbers.append(objective.beyond(max(numbers)))
    assert numbers == sorted(numbers) and all(map(math.isfinite, numbers))
    assert max(math.log(c) for c in objective.costs.values()) < numbers[2]
    assert objective.score(stored("diverged", [1, 0.1])) is None
    assert objective.score(stored("failed", [])) is None
    assert objective.score(stored("complete", [1, math.inf])) is None
    plain = design_of("tpe", target=None)
    objective = Objective(plain, setting_of(plain))
    assert objective.score(stored("complete", [9, 0.5])) == pytest.approx(math.log(0.5))
    assert objective.beyond(None) == 1.0 and objective.beyond(5.0) > 5.0


def test_a_failed_pair_is_told_as_failed_and_a_diverged_one_as_bad(tmp_path: Path) -> None:
    optuna = pytest.importorskip("optuna")
    design = design_of("tpe", seeds=1, trials=3)
    database = StudyDatabase(str(tmp_path / "s.db"), "study")
    database.begin(design, {})
    search: Any = make(design, database, 3)
    states = ["complete", "diverged", "failed"]
    trials = [
        StoredTrial(key=one.key, state=state, points=stored("complete", [1, 0.1]).points)  # pyright: ignore[reportArgumentType]
        for one, state in zip(search.ask([]), states, strict=True)
    ]
    pairs = [(t.key.batch_size, t.key.learning_rate) for t in trials]
    good, bad, none = search._told(optuna, pairs, {t.key: t for t in trials})
    assert good["value"] < bad["value"] < 100
    assert none == {"state": optuna.trial.TrialState.FAIL}
    assert search.ask(trials) == []
    database.close()


# ------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"search": "best"}, "The search is 'best'. Choose grid, race, tpe, gp, random"),
        ({"search": "race", "trials": 3}, "trials is 3, and the search 'race' decides itself"),
        ({"search": "tpe", "trials": 0}, "trials is 0. Ask for at least one pair"),
    ],
)
def test_what_cannot_be_searched_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        make_design(N, **{**ASKED, **changes})


def test_without_optuna_it_is_said_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    from rightbatch import export_to_optuna

    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'rightbatch\[optuna\]'"):
        run_study(load_workload("max3"), search="tpe")
    with pytest.raises(MissingExtraError, match="optuna is not installed"):
        export_to_optuna("here", "sqlite://")


def test_the_default_number_of_pairs_is_in_the_design() -> None:
    assert make_design(N, **ASKED, search="tpe").trials == 20
    assert make_design(N, **ASKED).trials is None
