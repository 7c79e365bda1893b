"""The trainings of one batch size as a table of rates and seeds, and what it says."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from rightbatch.laws.estimate import Estimate, unresolved
from rightbatch.laws.noise_floor import NoiseFloor, estimate_noise_floor
from rightbatch.laws.progress import steps_per_epoch
from rightbatch.laws.seeds import (
    best_of_rates,
    draw_best_rates,
    geometric_mean_over_seeds,
    mean_over_seeds,
    rate_interval,
)
from rightbatch.study.database import StoredTrial
from rightbatch.study.findings import (
    Edge,
    RateFinding,
    SizeFinding,
)
from rightbatch.study.judging import Setting, summarise_trial
from rightbatch.study.trials import EvaluationPoint, StudyTrial

_TIE = 1e-6
_ENDED = ("complete", "diverged")


class SizeTable:
    """The trainings of one batch size, as a table of rates and seeds.

    Args:
        trials: Those that ended; all of one batch size.
        setting: What they are about.

    Attributes:
        batch_size: Examples per update.
        rates: Learning rates, ascending.
        seeds: Ascending.
        whole: Indices of those whose trainings were all asked to go the whole way: only these are
            compared. A race leaves some out.
        met: Whether any training met the target: rates are then compared by the steps to it.
        resolved: Whether any training ended with what they are compared by.
        best: Index of the best of them; 0 where nothing is resolved.
        drawn: The best of bootstrap samples of the seeds.
    """

    def __init__(self, trials: Sequence[StoredTrial], setting: Setting) -> None:
        self._setting = setting
        self.batch_size = trials[0].key.batch_size
        self.rates = tuple(sorted({trial.key.learning_rate for trial in trials}))
        self.seeds = tuple(sorted({trial.key.seed for trial in trials}))
        self._by_key = {(t.key.learning_rate, t.key.seed): t for t in trials}
        self._rows = {key: summarise_trial(trial, setting) for key, trial in self._by_key.items()}
        self.whole = tuple(
            i
            for i, rate in enumerate(self.rates)
            if all(row.share == 1.0 for row in self.rows_at(rate))
        )
        rows = [row for i in self.whole for row in self.rows_at(self.rates[i])]
        self.met = any(row.steps_to_target is not None for row in rows)
        scores = self._scores()
        self.resolved = bool(np.isfinite(scores).any())
        self.best = best_of_rates(scores)
        self.drawn: NDArray[np.intp] = draw_best_rates(scores)

    def trials_at(self, rate: float) -> list[StoredTrial]:
        """The trainings at a rate, by seed."""
        return [t for (own, _), t in sorted(self._by_key.items()) if own == rate]

    def rows_at(self, rate: float) -> list[StudyTrial]:
        """Their rows."""
        return [row for (own, _), row in sorted(self._rows.items()) if own == rate]

    def _scores(self) -> NDArray[np.float64]:
        """Ln steps to the target where anything met it, else the last loss; NaN without."""

        def score(rate: float, seed: int) -> float:
            row = self._rows.get((rate, seed))
            if row is None or row.state != "complete" or row.share < 1.0:
                return math.nan
            if self.met:
                loss = self.last_loss(rate, seed)
                # Where steps are equal, as at a target met at once, the loss decides.
                tie = _TIE * math.tanh(0.0 if loss is None else loss)
                steps = row.steps_to_target
                return math.nan if steps is None else math.log(steps) + tie
            loss = self.last_loss(rate, seed)
            return math.nan if loss is None else loss

        return np.array([[score(rate, seed) for seed in self.seeds] for rate in self.rates])

    def last_loss(self, rate: float, seed: int) -> float | None:
        """The loss with which a training ended; None where it did not end with one."""
        return self.value_at(rate, seed, None, self._setting.loss)

    def finding(self, epochs: float | None = None) -> SizeFinding:
        """What the trainings of this size say.

        Args:
            epochs: After how many the roughness of paths is compared. Default: at the end.

        Returns:
            The finding.
        """
        rate, setting = self.rates[self.best], self._setting
        rows = self.rows_at(rate)
        ended = [row for row in rows if row.state == "complete"]
        met = [row.steps_to_target for row in rows]
        B, N = self.batch_size, setting.num_examples
        per_step = N / steps_per_epoch(B, N, setting.smallest)
        seconds = None if setting.seconds_of is None else setting.seconds_of(B)
        has_target = setting.target is not None
        none = unresolved(0, "no target")
        to_target = geometric_mean_over_seeds(met) if has_target else none
        return SizeFinding(
            batch_size=B,
            learning_rate=self._rate_interval(),
            at_edge=self.at_edge,
            stable_edge=self._stable_edge(),
            steps=max((row.steps for row in rows), default=0),
            train_loss=mean_over_seeds([row.train_loss for row in ended]),
            val_loss=mean_over_seeds([row.val_loss for row in ended]),
            val_metric=setting.metric([row.val_metric for row in ended]),
            gap=mean_over_seeds(
                [
                    None
                    if row.val_loss is None or row.train_loss is None
                    else row.val_loss - row.train_loss
                    for row in ended
                ]
            ),
            distance=mean_over_seeds([row.distance for row in ended]),
            relative_distance=mean_over_seeds([row.relative_distance for row in ended]),
            roughness=self._roughness(rate, epochs),
            dead=sum(row.dead for row in ended),
            noise_floor=self._noise_floor(rate),
            reached=sum(steps is not None for steps in met),
            trials=len(rows),
            steps_to_target=to_target,
            examples_to_target=geometric_mean_over_seeds(met, per_step)
            if has_target
            else to_target,
            seconds_to_target=unresolved(len(rows), "step time not measured")
            if seconds is None or not has_target
            else geometric_mean_over_seeds(met, seconds),
            rates=tuple(self._rate_finding(rate, epochs) for rate in self.rates),
        )

    def _rate_interval(self) -> Estimate:
        """Between rates that went the whole way: of those a race dropped less is known."""
        places = np.searchsorted(self.whole, self.drawn)
        rates = [self.rates[i] for i in self.whole]
        best = self.whole.index(self.best)
        return rate_interval(rates, best, places, len(self.seeds))

    @property
    def bracketed(self) -> bool:
        """Whether the rates on both sides of the best one went the whole way."""
        return {self.best - 1, self.best + 1} <= set(self.whole)

    @property
    def at_edge(self) -> Edge | None:
        """Where the best rate is the lowest or the highest that was tried."""
        if self.best == 0:
            return "lowest"
        return "highest" if self.best == len(self.rates) - 1 else None

    def value_at(
        self,
        rate: float,
        seed: int,
        epochs: float | None,
        of: Callable[[EvaluationPoint], float | None],
    ) -> float | None:
        """A quantity of a training that ended well, at its last evaluation within some epochs.

        Args:
            rate: Its learning rate.
            seed: Its seed.
            epochs: How many, or None for all.
            of: The quantity.

        Returns:
            Its value; None where there is none.
        """
        trial = self._by_key.get((rate, seed))
        if trial is None or trial.state != "complete":
            return None
        most = math.inf if epochs is None else epochs * self._setting.num_examples * (1 + 1e-9)
        within = [point for point in trial.points if point.examples <= most]
        return of(within[-1]) if within else None

    def _roughness(self, rate: float, epochs: float | None) -> Estimate:
        found = [self.value_at(rate, s, epochs, lambda point: point.roughness) for s in self.seeds]
        # In logarithms: it is a ratio of at least 1, and few seeds spread far.
        mean = geometric_mean_over_seeds([value for value in found if value is not None])
        return mean if mean.low is None else dataclasses.replace(mean, low=max(1.0, mean.low))

    def _noise_floor(self, rate: float) -> NoiseFloor:
        curves: list[tuple[list[int], list[float]]] = []
        for trial in self.trials_at(rate):
            known = [(p.step, self._setting.loss(p)) for p in trial.points]
            pairs = [(step, loss) for step, loss in known if loss is not None]
            if trial.state == "complete" and pairs:
                curves.append(([step for step, _ in pairs], [loss for _, loss in pairs]))
        return estimate_noise_floor(curves)

    def _rate_finding(self, rate: float, epochs: float | None) -> RateFinding:
        rows = self.rows_at(rate)
        met = [row.steps_to_target for row in rows if row.steps_to_target is not None]
        losses = [self.last_loss(rate, row.seed) for row in rows]
        return RateFinding(
            learning_rate=rate,
            trials=len(rows),
            diverged=sum(row.state == "diverged" for row in rows),
            reached=len(met),
            loss=mean_over_seeds(losses),
            steps_to_target=geometric_mean_over_seeds(met)
            if met
            else unresolved(len(rows), "not met"),
            distance=mean_over_seeds([row.distance for row in rows]),
            roughness=self._roughness(rate, epochs),
            noise_floor=self._noise_floor(rate),
            share=min((row.share for row in rows), default=1.0),
        )

    def _stable_edge(self) -> float | None:
        wild = [any(r.state == "diverged" for r in self.rows_at(rate)) for rate in self.rates]
        if not any(wild) or all(wild):
            return None
        # In a part of the way a rate has not shown that it is stable.
        below = [i for i in self.whole if i < wild.index(True)]
        return self.rates[below[-1]] if below else None


def tables_of(trials: Sequence[StoredTrial], setting: Setting) -> list[SizeTable]:
    """One table per batch size with a training that ended, ascending."""
    ended = [trial for trial in trials if trial.state in _ENDED]
    sizes = sorted({trial.key.batch_size for trial in ended})
    return [SizeTable([t for t in ended if t.key.batch_size == size], setting) for size in sizes]
