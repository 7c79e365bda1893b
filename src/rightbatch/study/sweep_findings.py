"""What a sweep over variants of one workload says: how the choice moves, and who suffers more."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from rightbatch.laws.estimate import Estimate, unresolved
from rightbatch.laws.ranks import best_rate_of, estimate_best_size
from rightbatch.laws.seeds import (
    best_of_rates,
    geometric_mean_over_seeds,
    mean_over_seeds,
)
from rightbatch.study.database import StoredTrial
from rightbatch.study.design import Unit
from rightbatch.study.equal_costs import Quantity, farthest, value_at
from rightbatch.study.judging import Setting
from rightbatch.study.size_costs import Goal, size_costs
from rightbatch.study.size_table import SizeTable, tables_of
from rightbatch.study.study import Study

Measure = Literal["loss", "accuracy"]
Verdict = Literal["small", "large", "not told apart"]
_UNITS: tuple[Unit, ...] = ("epochs", "steps")


@dataclass(frozen=True, kw_only=True)
class SweepLevel:
    """One variant of the workload and its study.

    Attributes:
        level: Share of label noise, or examples of the training set.
        best_batch: The best batch size, and from which to which it may lie.
        learning_rate: The best at that size under the sweep's goal.
        critical_batch: Where steps to the target are twice the fewest.
        loss: At that size and rate, at the end: on validation data, where there are any.
        metric: Likewise.
        seconds_to_target: Likewise, modelled.
        study: All that was run.
    """

    level: float
    best_batch: Estimate
    learning_rate: Estimate
    critical_batch: Estimate
    loss: Estimate
    metric: Estimate
    seconds_to_target: Estimate
    study: Study


@dataclass(frozen=True, kw_only=True)
class Harm:
    """What one batch size loses from the easiest variant to a harder one.

    Attributes:
        batch_size: Examples per update.
        before: Loss or accuracy on the easiest variant, its learning rate tuned there.
        after: On the harder one, tuned there.
        harm: How much worse: the rise of the loss or the fall of the accuracy, paired over seeds.
    """

    batch_size: int
    before: Estimate
    after: Estimate
    harm: Estimate


@dataclass(frozen=True, kw_only=True)
class Contrast:
    """Whether a small or a large batch suffers more, at one cost.

    Attributes:
        level: The harder variant.
        against: The easiest one: the least noise, or the most examples.
        measure: Loss, or accuracy where that is the workload's metric.
        unit: What all trainings had the same of.
        amount: How much of it.
        harms: Every size that all variants have, ascending.
        difference: Harm of the smallest size − harm of the largest, paired over seeds.
        verdict: `small` or `large` where the interval of the difference excludes 0.
    """

    level: float
    against: float
    measure: Measure
    unit: Unit
    amount: float
    harms: tuple[Harm, ...]
    difference: Estimate
    verdict: Verdict


@dataclass(frozen=True, kw_only=True, eq=False)
class LevelTrials:
    """A variant with all its trainings.

    Attributes:
        level: Which.
        study: Its study.
        trials: With their evaluations.
    """

    level: float
    study: Study
    trials: Sequence[StoredTrial]

    @property
    def setting(self) -> Setting:
        """What its numbers are about."""
        return Setting(
            num_examples=self.study.num_examples,
            target=None,
            seconds_of=None,
            has_validation=any(trial.val_loss is not None for trial in self.study.trials),
        )


def choose_goal(studies: Sequence[Study]) -> Goal:
    """The first goal under which every variant has a best size.

    Args:
        studies: Of the variants.

    Returns:
        Modelled seconds, or examples to the target; the loss at the end where some variant never
        meets the target.
    """
    goals: tuple[Goal, ...] = ("seconds", "examples")
    for goal in goals:
        if all(_best(study, goal).resolved for study in studies):
            return goal
    return "loss"


def describe_level(level: float, study: Study, goal: Goal) -> SweepLevel:
    """What a variant's study says of its best size.

    Args:
        level: Which variant.
        study: Its study.
        goal: What the best size is best in.

    Returns:
        The level.
    """
    best = _best(study, goal)
    critical = study.fits.critical_batch
    table = next((t for t in size_costs(study, goal) if t.batch_size == best.value), None)
    index = None if table is None else best_rate_of(table.scores)
    if table is None or index is None:
        nothing = unresolved(best.n, best.method)
        return SweepLevel(
            level=level, best_batch=best, learning_rate=nothing, critical_batch=critical,
            loss=nothing, metric=nothing, seconds_to_target=nothing, study=study,
        )  # fmt: skip
    trials = study.trials_at(table.batch_size, table.rates[index])
    ended = [trial for trial in trials if trial.state == "complete"]
    judged_by_val = any(trial.val_loss is not None for trial in ended)
    met = [
        None
        if trial.steps_to_target is None or trial.seconds is None
        else trial.steps_to_target * trial.seconds / trial.steps
        for trial in trials
    ]
    return SweepLevel(
        level=level,
        best_batch=best,
        learning_rate=_rate(study, table.batch_size, table.rates[index]),
        critical_batch=critical,
        loss=mean_over_seeds([t.val_loss if judged_by_val else t.train_loss for t in ended]),
        metric=mean_over_seeds([trial.val_metric for trial in ended]),
        seconds_to_target=geometric_mean_over_seeds(met),
        study=study,
    )


def _rate(study: Study, size: int, rate: float) -> Estimate:
    """A learning rate; with the interval that the study found, where that is the one it found."""
    for found in study.sizes:
        if found.batch_size == size and found.learning_rate.value == rate:
            return found.learning_rate
    return Estimate(value=rate, n=len(study.design.seeds), method="least loss at the end")


def _best(study: Study, goal: Goal) -> Estimate:
    tables = size_costs(study, goal)
    if not tables:
        return unresolved(0, "nothing was run")
    return estimate_best_size([t.batch_size for t in tables], [t.scores for t in tables])


def contrast_levels(
    levels: Sequence[LevelTrials], easiest: int, *, accuracy: bool
) -> tuple[Contrast, ...]:
    """Whether small or large batches suffer more, at equal epochs and at equal steps.

    The learning rate of every size is tuned at every variant and cost: it is the one whose mean
    loss over the seeds is least there. For one seed all variants share initial weights, so that
    harms are paired.

    Args:
        levels: The variants.
        easiest: Index of the one that the others are compared with.
        accuracy: Whether the metric is an accuracy, which is then compared too.

    Returns:
        For each harder variant, cost and measure.
    """
    tables = [{t.batch_size: t for t in tables_of(x.trials, x.setting)} for x in levels]
    common = sorted(set.intersection(*(set(own) for own in tables))) if tables else []
    if len(common) < 2:
        return ()
    found: list[Contrast] = []
    measures: tuple[Measure, ...] = ("loss", "accuracy") if accuracy else ("loss",)
    for unit in _UNITS:
        amount = min(
            farthest(own[size], unit, level.setting)
            for own, level in zip(tables, levels, strict=True)
            for size in common
        )
        if amount <= 0:
            continue
        for measure in measures:
            values = [
                [_tuned(own[size], unit, amount, level.setting, measure) for size in common]
                for own, level in zip(tables, levels, strict=True)
            ]
            found += [
                _contrast(
                    (level.level, levels[easiest].level),
                    measure,
                    (unit, amount),
                    common,
                    (values[easiest], values[i]),
                )
                for i, level in enumerate(levels)
                if i != easiest
            ]
    return tuple(found)


_BySeed = dict[int, float]


def _tuned(
    table: SizeTable, unit: Unit, amount: float, setting: Setting, measure: Measure
) -> _BySeed:
    """Loss or accuracy of each seed at a cost, at the rate whose loss is least there."""

    def at(rate: float, of: Quantity) -> dict[int, float | None]:
        return {t.key.seed: value_at(t, unit, amount, setting, of) for t in table.trials_at(rate)}

    losses = [at(rate, setting.loss) for rate in table.rates]
    seeds = sorted({seed for own in losses for seed in own})
    scores = [
        [np.nan if (loss := own.get(seed)) is None else loss for seed in seeds] for own in losses
    ]
    best = best_of_rates(scores)
    chosen = losses[best]
    if measure == "accuracy":
        chosen = at(table.rates[best], lambda point: point.val_metric)
    return {seed: value for seed, value in chosen.items() if value is not None}


def _contrast(
    levels: tuple[float, float],
    measure: Measure,
    cost: tuple[Unit, float],
    sizes: Sequence[int],
    values: tuple[Sequence[_BySeed], Sequence[_BySeed]],
) -> Contrast:
    sign = 1.0 if measure == "loss" else -1.0
    before, after = values
    harms = [
        {seed: sign * (b[seed] - a[seed]) for seed in a if seed in b}
        for a, b in zip(before, after, strict=True)
    ]
    small, large = harms[0], harms[-1]
    difference = mean_over_seeds(
        [small[seed] - large[seed] for seed in small if seed in large], "paired over seeds"
    )
    return Contrast(
        level=levels[0],
        against=levels[1],
        measure=measure,
        unit=cost[0],
        amount=cost[1],
        harms=tuple(
            Harm(
                batch_size=size,
                before=mean_over_seeds(list(a.values())),
                after=mean_over_seeds(list(b.values())),
                harm=mean_over_seeds(list(harm.values()), "paired over seeds"),
            )
            for size, a, b, harm in zip(sizes, before, after, harms, strict=True)
        ),
        difference=difference,
        verdict=_judge(difference),
    )


def _judge(difference: Estimate) -> Verdict:
    if difference.low is not None and difference.low > 0:
        return "small"
    if difference.high is not None and difference.high < 0:
        return "large"
    return "not told apart"
