"""From the trainings of a study to what they say, with intervals: pure, and the same each time."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rightbatch.laws.curve import crossing
from rightbatch.laws.estimate import Estimate, unresolved
from rightbatch.laws.hyperbola import StepsToTarget, fit_hyperbola
from rightbatch.laws.progress import steps_per_epoch
from rightbatch.laws.scaling import scale_learning_rate
from rightbatch.laws.seeds import (
    best_of_rates,
    draw_best_rates,
    exponent_over_sizes,
    geometric_mean_over_seeds,
    mean_over_seeds,
    rate_interval,
)
from rightbatch.study.database import StoredTrial
from rightbatch.study.design import Unit
from rightbatch.study.findings import (
    RULES,
    Best,
    Comparison,
    Edge,
    EqualCost,
    Fits,
    RateFinding,
    RateRule,
    Rule,
    SizeFinding,
)
from rightbatch.study.trials import EvaluationPoint, StudyTrial
from rightbatch.workload.target import Target

SecondsOf = Callable[[int], float]
"""Seconds of one update at a batch size."""
_LEAST_SIZES = 3
_TIE = 1e-6
_ENDED = ("complete", "diverged")


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What the numbers of a study are about.

    Attributes:
        num_examples: N.
        target: What counts as trained, or None.
        seconds_of: The measured step time, or None.
        has_validation: Whether losses are compared on validation data.
        smallest: Examples that the model needs in one pass.
        metric_is_share: Whether the metric lies between 0 and 1.
    """

    num_examples: int
    target: Target | None
    seconds_of: SecondsOf | None
    has_validation: bool
    smallest: int = 1
    metric_is_share: bool = False

    def metric(self, values: Sequence[float | None]) -> Estimate:
        """The mean of the metric over seeds, within its range."""
        mean = mean_over_seeds(values)
        if not self.metric_is_share or mean.low is None or mean.high is None:
            return mean
        return dataclasses.replace(mean, low=max(0.0, mean.low), high=min(1.0, mean.high))

    def loss(self, point: EvaluationPoint) -> float | None:
        """The loss that is compared."""
        return point.val_loss if self.has_validation else point.train_loss


def summarise_trial(trial: StoredTrial, setting: Setting) -> StudyTrial:
    """A training in one row.

    Args:
        trial: The training.
        setting: What it is about.

    Returns:
        Its row; what a training that diverged last measured is left out.
    """
    key, points = trial.key, trial.points
    last = points[-1] if points else None
    shown = last if trial.state != "diverged" else None
    steps = last.step if last else 0
    seconds = None if setting.seconds_of is None else steps * setting.seconds_of(key.batch_size)
    return StudyTrial(
        batch_size=key.batch_size,
        learning_rate=key.learning_rate,
        seed=key.seed,
        state=trial.state,
        steps=steps,
        examples=last.examples if last else 0,
        seconds=seconds,
        train_loss=shown.train_loss if shown else None,
        val_loss=shown.val_loss if shown else None,
        val_metric=shown.val_metric if shown else None,
        # One that met the target and then left the numbers is no recipe.
        steps_to_target=steps_to_target(points, setting.target) if shown else None,
        note=trial.note,
    )


def steps_to_target(points: Sequence[EvaluationPoint], target: Target | None) -> float | None:
    """Where a training first met the target, interpolated between its evaluations.

    Args:
        points: Its evaluations.
        target: The target, or None.

    Returns:
        Updates, or None where it was not met.
    """
    if target is None:
        return None
    before: tuple[float, float] | None = None
    for point in points:
        value = _quantity(point, target)
        if value is None:
            continue
        if target.reached(value):
            here = (float(point.step), value)
            return here[0] if before is None else crossing(before, here, target.value)
        before = (float(point.step), value)
    return None


def _quantity(point: EvaluationPoint, target: Target) -> float | None:
    if target.quantity == "train_loss":
        return point.train_loss
    return point.val_loss if target.quantity == "val_loss" else point.val_metric


# ---- one size ----------------------------------------------------------------------------------


class SizeTable:
    """The trainings of one batch size, as a table of rates and seeds.

    Args:
        trials: Those that ended; all of one batch size.
        setting: What they are about.

    Attributes:
        batch_size: Examples per update.
        rates: Learning rates, ascending.
        met: Whether any training met the target: rates are then compared by the steps to it.
        resolved: Whether any training ended with what they are compared by.
        best: Index of the best of them; 0 where nothing is resolved.
        drawn: The best of bootstrap samples of the seeds.
    """

    def __init__(self, trials: Sequence[StoredTrial], setting: Setting) -> None:
        self._setting = setting
        self.batch_size = trials[0].key.batch_size
        self.rates = tuple(sorted({trial.key.learning_rate for trial in trials}))
        self._seeds = tuple(sorted({trial.key.seed for trial in trials}))
        self._by_key = {(t.key.learning_rate, t.key.seed): t for t in trials}
        self._rows = {key: summarise_trial(trial, setting) for key, trial in self._by_key.items()}
        self.met = any(row.steps_to_target is not None for row in self._rows.values())
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
            if row is None or row.state != "complete":
                return math.nan
            if self.met:
                loss = self._last_loss(rate, seed)
                # Where steps are equal, as at a target met at once, the loss decides.
                tie = _TIE * math.tanh(0.0 if loss is None else loss)
                steps = row.steps_to_target
                return math.nan if steps is None else math.log(steps) + tie
            loss = self._last_loss(rate, seed)
            return math.nan if loss is None else loss

        return np.array([[score(rate, seed) for seed in self._seeds] for rate in self.rates])

    def _last_loss(self, rate: float, seed: int) -> float | None:
        trial = self._by_key[rate, seed]
        ended = trial.state == "complete" and trial.points
        return self._setting.loss(trial.points[-1]) if ended else None

    def finding(self) -> SizeFinding:
        """What the trainings of this size say."""
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
            learning_rate=rate_interval(self.rates, self.best, self.drawn, len(self._seeds)),
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
            reached=sum(steps is not None for steps in met),
            trials=len(rows),
            steps_to_target=to_target,
            examples_to_target=geometric_mean_over_seeds(met, per_step)
            if has_target
            else to_target,
            seconds_to_target=unresolved(len(rows), "step time not measured")
            if seconds is None or not has_target
            else geometric_mean_over_seeds(met, seconds),
            rates=tuple(self._rate_finding(rate) for rate in self.rates),
        )

    @property
    def at_edge(self) -> Edge | None:
        """Where the best rate is the lowest or the highest that was tried."""
        if self.best == 0:
            return "lowest"
        return "highest" if self.best == len(self.rates) - 1 else None

    def _rate_finding(self, rate: float) -> RateFinding:
        rows = self.rows_at(rate)
        met = [row.steps_to_target for row in rows if row.steps_to_target is not None]
        losses = [self._last_loss(rate, row.seed) for row in rows]
        return RateFinding(
            learning_rate=rate,
            trials=len(rows),
            diverged=sum(row.state == "diverged" for row in rows),
            reached=len(met),
            loss=mean_over_seeds(losses),
            steps_to_target=geometric_mean_over_seeds(met)
            if met
            else unresolved(len(rows), "not met"),
        )

    def _stable_edge(self) -> float | None:
        wild = [any(r.state == "diverged" for r in self.rows_at(rate)) for rate in self.rates]
        if not any(wild) or all(wild):
            return None
        first = wild.index(True)
        return self.rates[first - 1] if first else None


def tables_of(trials: Sequence[StoredTrial], setting: Setting) -> list[SizeTable]:
    """One table per batch size with a training that ended, ascending."""
    ended = [trial for trial in trials if trial.state in _ENDED]
    sizes = sorted({trial.key.batch_size for trial in ended})
    return [SizeTable([t for t in ended if t.key.batch_size == size], setting) for size in sizes]


# ---- all sizes ---------------------------------------------------------------------------------


def fit_sizes(
    tables: Sequence[SizeTable], findings: Sequence[SizeFinding], setting: Setting
) -> Fits:
    """What holds over the sizes, each at its best learning rate.

    Args:
        tables: Of each size.
        findings: Of each size.
        setting: What they are about.

    Returns:
        The fits; what cannot be told is said in the notes.
    """
    notes: list[str] = []
    nothing = unresolved(0, "no target")
    critical, min_steps, min_examples = nothing, nothing, nothing
    if setting.target is None:
        notes.append("Without a target there are no steps to it, and no critical batch.")
    else:
        try:
            fit = fit_hyperbola(_steps_of_all(tables))
        except ValueError as error:
            critical = unresolved(len(tables), "not resolved")
            notes.append(f"The critical batch is not resolved. {error}")
        else:
            critical, min_steps, min_examples = (
                fit.critical_batch, fit.min_steps, fit.min_examples,
            )  # fmt: skip
            notes += fit.warnings
    # A rate that is best by another measure than the others' is no point of the same line.
    alike = [t for t in tables if t.met] if any(t.met for t in tables) else tables
    inside = [table for table in alike if table.at_edge is None]
    inside_sizes = {table.batch_size for table in inside}
    exponent = unresolved(len(inside), "fewer than three sizes with a best rate inside the grid")
    if len(inside) >= _LEAST_SIZES:
        exponent = exponent_over_sizes(
            [t.batch_size for t in inside],
            [t.rates for t in inside],
            [t.drawn for t in inside],
            [t.best for t in inside],
        )
    else:
        notes.append(
            f"How the best learning rate follows the batch is not resolved: {len(inside)} sizes "
            f"have it inside the rates tried; {_LEAST_SIZES} are needed."
        )
    return Fits(
        critical_batch=critical,
        min_steps=min_steps,
        min_examples=min_examples,
        rate_exponent=exponent,
        rate_rules=_follow_rules([f for f in findings if f.batch_size in inside_sizes]),
        pareto=_pareto(findings),
        notes=tuple(notes),
    )


def _steps_of_all(tables: Sequence[SizeTable]) -> list[StepsToTarget]:
    """Every seed at its size's best rate; a missed target took more than all its steps."""
    found: list[StepsToTarget] = []
    for table in tables:
        for row in table.rows_at(table.rates[table.best]):
            missed = row.steps_to_target is None
            steps = row.steps if row.steps_to_target is None else row.steps_to_target
            if steps > 0:
                found.append(
                    StepsToTarget(global_batch=table.batch_size, steps=steps, missed=missed)
                )
    return found


def _follow_rules(findings: Sequence[SizeFinding]) -> tuple[RateRule, ...]:
    """How far each rule holds, from the smallest size whose best rate is known on both sides."""
    known = [f for f in findings if f.learning_rate.low and f.learning_rate.high]
    return tuple(_follow(rule, known) for rule in RULES) if len(known) > 1 else ()


def _follow(rule: Rule, findings: Sequence[SizeFinding]) -> RateRule:
    """Carries the first size's rate along, with its interval, as far as the best ones agree."""
    first, holds_to = findings[0], findings[0].batch_size
    for finding in findings[1:]:
        if not _agrees(rule, first, finding):
            return RateRule(
                rule=rule,
                begins_at=first.batch_size,
                holds_to=holds_to,
                breaks_at=finding.batch_size,
            )
        holds_to = finding.batch_size
    return RateRule(rule=rule, begins_at=first.batch_size, holds_to=holds_to, breaks_at=None)


def _agrees(rule: Rule, first: SizeFinding, other: SizeFinding) -> bool:
    def carried(rate: float | None, otherwise: float) -> float:
        if rate is None:
            return otherwise
        return scale_learning_rate(rate, first.batch_size, other.batch_size, rule=rule)

    low = carried(first.learning_rate.low, 0.0)
    high = carried(first.learning_rate.high, math.inf)
    own = other.learning_rate
    return low <= (own.high or math.inf) and high >= (own.low or 0.0)


def _pareto(findings: Sequence[SizeFinding]) -> tuple[int, ...]:
    costs = {
        f.batch_size: (f.steps_to_target.value, f.examples_to_target.value)
        for f in findings
        if f.steps_to_target.value is not None and f.examples_to_target.value is not None
    }
    return tuple(
        size
        for size, (steps, examples) in costs.items()
        if not any(
            s <= steps and e <= examples and (s, e) != (steps, examples) for s, e in costs.values()
        )
    )


def compare_sizes(tables: Sequence[SizeTable], setting: Setting) -> tuple[Comparison, ...]:
    """All sizes at equal epochs, steps, examples and modelled seconds.

    Args:
        tables: Of each size.
        setting: What they are about.

    Returns:
        One comparison for each that can be made, as far as all sizes came.
    """
    found: list[Comparison] = []
    units: list[Unit] = ["epochs", "steps", "examples", "seconds"]
    for unit in units:
        if unit == "seconds" and setting.seconds_of is None:
            continue
        reached = [_farthest(table, unit, setting) for table in tables]
        if len(reached) < 2 or min(reached) <= 0:
            continue
        amount = min(reached)
        sizes = [_at(table, unit, amount, setting) for table in tables]
        there = tuple(size for size in sizes if size is not None)
        if len(there) > 1:
            found.append(Comparison(unit=unit, amount=amount, sizes=there))
    return tuple(found)


def progress_of(point: EvaluationPoint, batch_size: int, unit: Unit, setting: Setting) -> float:
    """How far an evaluation is, in a unit.

    Args:
        point: The evaluation.
        batch_size: Of its training.
        unit: Epochs, steps, examples, or modelled seconds.
        setting: Gives N and the step time.

    Returns:
        The progress.
    """
    if unit == "steps":
        return float(point.step)
    if unit == "seconds":
        assert setting.seconds_of is not None  # asked before
        return point.step * setting.seconds_of(batch_size)
    return point.examples / (setting.num_examples if unit == "epochs" else 1)


def _farthest(table: SizeTable, unit: Unit, setting: Setting) -> float:
    points = [t.points[-1] for rate in table.rates for t in table.trials_at(rate) if t.points]
    return max((progress_of(p, table.batch_size, unit, setting) for p in points), default=0.0)


def _at(table: SizeTable, unit: Unit, amount: float, setting: Setting) -> EqualCost | None:
    """The best rate of a size at a cost, by the loss there."""

    def values(rate: float, of: _Quantity) -> list[float | None]:
        return [_value_at(t, unit, amount, setting, of) for t in table.trials_at(rate)]

    losses = [values(rate, setting.loss) for rate in table.rates]
    if all(loss is None for row in losses for loss in row):
        return None
    scores = np.full((len(losses), max(len(row) for row in losses)), np.nan)
    for i, row in enumerate(losses):
        scores[i, : len(row)] = [np.nan if loss is None else loss for loss in row]
    best = best_of_rates(scores)
    rate = table.rates[best]
    return EqualCost(
        batch_size=table.batch_size,
        learning_rate=rate,
        loss=mean_over_seeds(losses[best]),
        metric=setting.metric(values(rate, lambda point: point.val_metric)),
    )


_Quantity = Callable[[EvaluationPoint], float | None]


def _value_at(
    trial: StoredTrial, unit: Unit, amount: float, setting: Setting, of: _Quantity
) -> float | None:
    """A quantity of a training at a cost, interpolated between the evaluations around it."""
    if trial.state != "complete":
        return None
    size = trial.key.batch_size
    curve = [(progress_of(p, size, unit, setting), of(p)) for p in trial.points]
    known = [(x, y) for x, y in curve if y is not None]
    slack = 1e-9 * amount
    if not known or known[0][0] > amount + slack or known[-1][0] < amount - slack:
        return None
    x, y = zip(*known, strict=True)
    return float(np.interp(math.log(amount), np.log(x), y))


def choose_best(findings: Sequence[SizeFinding], setting: Setting) -> Best | None:
    """The pair to train with, and what it is best in.

    Args:
        findings: Of each size.
        setting: What they are about.

    Returns:
        The pair; None where no training ended with a loss.
    """
    there = [f for f in findings if f.learning_rate.value is not None]
    if setting.target is not None:
        costs = {
            "modelled seconds": [f.seconds_to_target.value for f in there],
            "examples": [f.examples_to_target.value for f in there],
        }
        for what, values in costs.items():
            met = [(value, f) for value, f in zip(values, there, strict=True) if value is not None]
            if met:
                _, least = min(met, key=lambda pair: pair[0])
                return _best(least, f"fewest {what} to {setting.target}")
    name = "validation" if setting.has_validation else "training"
    losses = [(f.val_loss if setting.has_validation else f.train_loss, f) for f in there]
    known = [(loss.value, f) for loss, f in losses if loss.value is not None]
    if not known:
        return None
    _, least = min(known, key=lambda pair: pair[0])
    return _best(least, f"least {name} loss at the end")


def _best(finding: SizeFinding, because: str) -> Best:
    rate = finding.learning_rate.value
    assert rate is not None
    return Best(batch_size=finding.batch_size, learning_rate=rate, because=because)
