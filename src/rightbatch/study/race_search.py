"""A race over the grid: every pair for a part of its way, the better ones farther.

This is another race than the planner's (`study.race`). That one bets on a few runs of one seed,
one of which leads, and asks how many trainings' cost are worth what they tell; this one looks at
every pair of a design, with all its seeds, and its decisions (`laws.halving`) rest on nothing but
the ranks of the pairs. What the two share is how a loss at a step is smoothed
(`laws.curve.LossCurve.log_loss_at`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence

import numpy as np

from rightbatch.laws.halving import REDUCTION, Arm, make_rungs, promote, rank
from rightbatch.laws.progress import examples_after
from rightbatch.study.auto_rates import farther_rates, settle_first_rates
from rightbatch.study.database import StoredTrial, StudyDatabase
from rightbatch.study.design import StudyDesign
from rightbatch.study.findings import RaceFinding, RaceRung
from rightbatch.study.judging import Setting
from rightbatch.study.objective import Objective
from rightbatch.study.size_table import SizeTable
from rightbatch.study.trials import FINAL, Asked, TrialKey
from rightbatch.workload import Workload


class RaceSearch:
    """Successive halving.

    On a rung all pairs cost the same. Where the study has a target that is the same modelled
    seconds (examples, without a step time), which is what pairs are compared by in the end: a
    batch size whose trainings are cheap has come to their end while another has done a ninth.
    Without a target the study asks for the least loss after what the design gives each training,
    so each goes the same share of that: the same epochs, or whatever the design counts in.

    Who goes on is kept in the database, so that it is decided once.

    Args:
        workload: What to train.
        design: Of the study.
        database: Keeps what was decided, and what range tests say.
        setting: What trainings are judged by, step times included.
        say: Told what is being done.
    """

    def __init__(
        self,
        workload: Workload,
        design: StudyDesign,
        database: StudyDatabase,
        setting: Setting,
        say: Callable[[str], None],
    ) -> None:
        self._workload, self._design, self._database = workload, design, database
        self._setting, self._say = setting, say
        self._objective = Objective(design, setting)

    def ask(self, trials: Sequence[StoredTrial]) -> Sequence[Asked]:
        """The pairs of the next rung; after the last, rates beyond an edge that is best."""
        if any(trial.state not in FINAL for trial in trials):
            return []  # another process has asked meanwhile
        arms = self._all_arms()
        shares = self._shares(arms)
        there = {trial.key: trial for trial in trials}
        for number, rung in enumerate(shares):
            if number:
                found = self._database.fact(_name_of(number))
                before = shares[number - 1]
                arms = self._settle(number, arms, there, before) if found is None else _read(found)
            asked = self._cells(arms, rung)
            if any(self._is_ahead_of(one, there) for one in asked):
                return asked
        return self._beyond_the_edge(arms, trials)

    def _all_arms(self) -> list[Arm]:
        rates = self._design.learning_rates
        if rates is not None:
            rates_of: Mapping[int, Sequence[float]] = dict.fromkeys(self._design.batch_sizes, rates)
        else:
            rates_of = settle_first_rates(self._workload, self._design, self._database, self._say)
        return [
            Arm(batch_size=size, learning_rate=rate)
            for size, rates in rates_of.items()
            for rate in rates
        ]

    def _shares(self, arms: Sequence[Arm]) -> list[dict[int, float]]:
        return make_rungs(self._objective.updates, self._objective.costs, len(arms))

    def _settle(
        self,
        number: int,
        arms: Sequence[Arm],
        there: Mapping[TrialKey, StoredTrial],
        shares: Mapping[int, float],
    ) -> list[Arm]:
        chosen = [arms[i] for i in promote(self._scores(arms, there), arms, shares)]
        plain = [[arm.batch_size, arm.learning_rate] for arm in chosen]
        return _read(self._database.settle_fact(_name_of(number), plain))

    def _scores(
        self, arms: Sequence[Arm], there: Mapping[TrialKey, StoredTrial]
    ) -> list[list[float]]:
        def score(key: TrialKey) -> float:
            found = self._objective.score(there[key])
            return math.nan if found is None else found

        return [[score(key) for key in self._keys(arm)] for arm in arms]

    def _keys(self, arm: Arm) -> list[TrialKey]:
        return [
            TrialKey(batch_size=arm.batch_size, learning_rate=arm.learning_rate, seed=seed)
            for seed in self._design.seeds
        ]

    def _cells(self, arms: Sequence[Arm], rung: Mapping[int, float]) -> list[Asked]:
        return [
            Asked(key=key, share=rung[arm.batch_size]) for arm in arms for key in self._keys(arm)
        ]

    def _is_ahead_of(self, asked: Asked, there: Mapping[TrialKey, StoredTrial]) -> bool:
        trial = there.get(asked.key)
        return trial is None or trial.share < asked.share

    def _beyond_the_edge(
        self, arms: Sequence[Arm], trials: Sequence[StoredTrial]
    ) -> Sequence[Asked]:
        """Of a design that finds its rates: farther ones, where the best of all is at the edge."""
        ended = [trial for trial in trials if trial.share == 1.0]
        keys = {(t.key.batch_size, t.key.learning_rate): t for t in ended}
        whole = [Arm(batch_size=size, learning_rate=rate) for size, rate in keys]
        there = {trial.key: trial for trial in ended}
        order = rank(self._scores(whole, there)) if whole else []
        if self._design.learning_rates is not None or not order:
            return []
        size = whole[order[0]].batch_size
        table = SizeTable([t for t in trials if t.key.batch_size == size], self._setting)
        rates = farther_rates(table) if table.at_edge else ()
        farther = [Arm(batch_size=size, learning_rate=rate) for rate in rates]
        return self._cells(farther, {size: 1.0})

    def finding(self, trials: Sequence[StoredTrial]) -> RaceFinding | None:
        """What the race dropped and what it cost, as far as it came.

        Args:
            trials: All of the study.

        Returns:
            The record; None before it began.
        """
        if not trials:
            return None
        rungs, reached = self._rungs_so_far()
        seconds_of, N = self._setting.seconds_of, self._setting.num_examples
        spent, whole = np.zeros(2), np.zeros(2)  # examples, modelled seconds
        repeated = 0.0
        for trial in trials:
            B = trial.key.batch_size
            arm = Arm(batch_size=B, learning_rate=trial.key.learning_rate)
            seconds = 0.0 if seconds_of is None else seconds_of(B)
            updates = [*self._runs(trial, reached.get(arm, {1.0})), self._updates(trial, 1.0)]
            costs = [
                np.array([examples_after(n, B, N, self._setting.smallest), n * seconds])
                for n in updates
            ]
            whole += costs.pop()
            spent += sum(costs, np.zeros(2))
            repeated += sum(float(examples) for examples, _ in costs[:-1])
        return RaceFinding(
            rungs=tuple(rungs),
            examples_of_grid=float(spent[0] / whole[0]),
            seconds_of_grid=None if seconds_of is None else float(spent[1] / whole[1]),
            repeated_examples=round(repeated),
        )

    def _rungs_so_far(self) -> tuple[list[RaceRung], dict[Arm, set[float]]]:
        """The rungs that ended, and how far each pair was asked to go, once for each run."""
        arms = self._all_arms()
        shares = self._shares(arms)
        reached = {arm: {shares[0][arm.batch_size]} for arm in arms}
        rungs: list[RaceRung] = []
        for number in range(1, len(shares)):
            found = self._database.fact(_name_of(number))
            if found is None:
                return rungs, reached
            on = _read(found)
            rungs.append(self._rung(len(shares) - number, len(arms), len(on)))
            for arm in on:
                reached[arm].add(shares[number][arm.batch_size])
            arms = on
        return [*rungs, self._rung(0, len(arms), len(arms))], reached

    def _runs(self, trial: StoredTrial, shares: Collection[float]) -> list[int]:
        """Updates of each run that came to its end: to go farther, a training is begun anew."""
        ended = trial.state in FINAL
        return [
            self._updates(trial, share)
            for share in sorted(shares)
            if share < trial.share or (share == trial.share and ended)
        ]

    def _rung(self, before_last: int, cells: int, on: int) -> RaceRung:
        amount = max(self._objective.costs.values()) / REDUCTION**before_last
        return RaceRung(amount=amount, unit=self._objective.unit, cells=cells, dropped=cells - on)

    def _updates(self, trial: StoredTrial, share: float) -> int:
        """Of a run that far; one that diverged went no farther on any run."""
        steps = max(1, round(share * self._objective.updates[trial.key.batch_size]))
        if trial.state == "diverged":
            return min(steps, trial.points[-1].step if trial.points else 1)
        return steps


def _name_of(rung: int) -> str:
    return f"race rung {rung}"


def _read(plain: Sequence[Sequence[float]]) -> list[Arm]:
    return [Arm(batch_size=int(size), learning_rate=float(rate)) for size, rate in plain]
