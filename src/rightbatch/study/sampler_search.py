"""Pairs that a sampler of Optuna asks for, one round after the other.

The sampler is asked and told (`Study.ask`, `Study.add_trial`) and runs nothing itself. Each round
it is made anew: told all that came of the rounds before, in order, and seeded with their number.
What it then asks for is kept in the database. So a study that is gone on with asks for the same,
and needs nothing of the sampler's own state.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from rightbatch.errors import MissingExtraError
from rightbatch.study.auto_rates import settle_first_rates
from rightbatch.study.database import StoredTrial, StudyDatabase
from rightbatch.study.design import StudyDesign
from rightbatch.study.judging import Setting
from rightbatch.study.objective import Objective
from rightbatch.study.trials import FINAL, Asked, TrialKey
from rightbatch.workload import Workload

if TYPE_CHECKING:
    import optuna

Pair = tuple[int, float]
_BATCH, _RATE = "log2_batch_size", "log2_learning_rate"
_DIGITS = 4
"""Of a learning rate that is run: more are noise to a reader."""


class SamplerSearch:
    """Asks a sampler for pairs of log2 batch size and log2 learning rate, until there are enough.

    A batch size is the one of the design that is nearest to what was asked for, and learning rates
    lie between the lowest and the highest of the design, or of all range tests. All seeds of a pair
    are run; their mean is told, by the study's objective. Trainings that missed the target, and
    those that diverged, are told as numbers worse than all others; a pair of which a training
    failed is told as failed.

    Args:
        workload: What to train.
        design: Of the study.
        database: Keeps what was asked for, and what range tests say.
        setting: What trainings are judged by.
        say: Told what is being done.
        at_once: Pairs of one round: as many as are run side by side. Kept in the database too: a
            study that is gone on with elsewhere asks for as many as it began with.
    """

    def __init__(
        self,
        workload: Workload,
        design: StudyDesign,
        database: StudyDatabase,
        setting: Setting,
        say: Callable[[str], None],
        *,
        at_once: int,
    ) -> None:
        load_optuna()
        self._workload, self._design, self._database = workload, design, database
        self._say, self._objective = say, Objective(design, setting)
        self._at_once = int(database.settle_fact("pairs at once", at_once))

    def ask(self, trials: Sequence[StoredTrial]) -> Sequence[Asked]:
        """The pairs of the next round."""
        if any(trial.state not in FINAL for trial in trials):
            return []  # another process has asked meanwhile
        assert self._design.trials is not None  # every design with a sampler has them
        there, pairs = {trial.key: trial for trial in trials}, list[Pair]()
        while len(pairs) < self._design.trials:
            name = f"pairs after {len(pairs)}"
            found = self._database.fact(name)
            if found is None:
                found = self._database.settle_fact(name, self._suggest(pairs, there))
            new = [(int(size), float(rate)) for size, rate in found]
            asked = [Asked(key=key) for pair in new for key in self._keys(pair)]
            if any(one.key not in there for one in asked):
                return asked
            pairs += new
        return []

    def _keys(self, pair: Pair) -> list[TrialKey]:
        size, rate = pair
        return [
            TrialKey(batch_size=size, learning_rate=rate, seed=seed) for seed in self._design.seeds
        ]

    def _suggest(
        self, pairs: Sequence[Pair], there: Mapping[TrialKey, StoredTrial]
    ) -> list[list[float]]:
        """Asks a sampler that was told all pairs before."""
        assert self._design.trials is not None
        optuna = load_optuna()
        space = self._space(optuna)
        with quiet(optuna):
            study = optuna.create_study(sampler=self._make_sampler(optuna, len(pairs)))
            study.add_trials(
                [
                    optuna.create_trial(params=_params(pair, space), distributions=space, **told)
                    for pair, told in zip(pairs, self._told(optuna, pairs, there), strict=True)
                ]
            )
            count = min(self._at_once, self._design.trials - len(pairs))
            asked = [study.ask(space).params for _ in range(count)]
        return [[self._nearest(one[_BATCH]), _rounded(2.0 ** one[_RATE])] for one in asked]

    def _make_sampler(self, optuna: Any, told: int) -> optuna.samplers.BaseSampler:
        seed = int(np.random.SeedSequence((0, told)).generate_state(1)[0])
        if self._design.search == "tpe":
            # Pairs of one round are taken for bad ones, so that they keep apart.
            return optuna.samplers.TPESampler(seed=seed, constant_liar=True)
        if self._design.search == "gp":
            return optuna.samplers.GPSampler(seed=seed)
        return optuna.samplers.RandomSampler(seed=seed)

    def _space(self, optuna: Any) -> dict[str, optuna.distributions.FloatDistribution]:
        sizes = [math.log2(size) for size in self._design.batch_sizes]
        # Half a gap beyond both ends, so that the first and the last size are as likely as others.
        low = sizes[0] - (sizes[1] - sizes[0]) / 2 if len(sizes) > 1 else sizes[0]
        high = sizes[-1] + (sizes[-1] - sizes[-2]) / 2 if len(sizes) > 1 else sizes[0]
        rates = self._design.learning_rates
        if rates is None:
            first = settle_first_rates(self._workload, self._design, self._database, self._say)
            rates = [rate for own in first.values() for rate in own]
        distribution = optuna.distributions.FloatDistribution
        return {
            _BATCH: distribution(low, high),
            _RATE: distribution(math.log2(min(rates)), math.log2(max(rates))),
        }

    def _nearest(self, log_size: float) -> int:
        return min(self._design.batch_sizes, key=lambda size: abs(math.log2(size) - log_size))

    def _told(
        self, optuna: Any, pairs: Sequence[Pair], there: Mapping[TrialKey, StoredTrial]
    ) -> list[dict[str, Any]]:
        """What came of pairs, as the sampler is told."""
        trials = [[there[key] for key in self._keys(pair)] for pair in pairs]
        scores = [[self._objective.score(trial) for trial in own] for own in trials]
        worst = max((s for own in scores for s in own if s is not None), default=None)
        beyond = self._objective.beyond(worst)
        told: list[dict[str, Any]] = []
        for own, found in zip(trials, scores, strict=True):
            if any(trial.state == "failed" for trial in own):
                told.append({"state": optuna.trial.TrialState.FAIL})
            else:
                told.append({"value": sum(beyond if s is None else s for s in found) / len(found)})
        return told


def load_optuna() -> Any:
    """Optuna itself.

    Returns:
        The module.

    Raises:
        MissingExtraError: If it is not installed.
    """
    try:
        import optuna
    except ImportError as error:
        raise MissingExtraError("optuna", "optuna") from error
    return optuna


@contextmanager
def quiet(optuna: Any) -> Iterator[None]:
    """Has Optuna leave out its line for every study that is made, and its advice.

    Args:
        optuna: The module.

    Yields:
        Nothing.
    """
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(before)


def _params(pair: Pair, space: Mapping[str, Any]) -> dict[str, float]:
    rate = space[_RATE]
    # One that was rounded may lie a little beyond the end.
    log_rate = min(max(math.log2(pair[1]), rate.low), rate.high)
    return {_BATCH: math.log2(pair[0]), _RATE: log_rate}


def _rounded(rate: float) -> float:
    return float(f"{rate:.{_DIGITS}g}")
