"""Batch and learning rate by a race of a few trainings."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from rightbatch.laws.curve import compare_steps
from rightbatch.laws.estimate import Estimate
from rightbatch.plan.choice import Choice
from rightbatch.plan.price import make_price, max_micro_batch, step_seconds
from rightbatch.plan.reasons import batch_reason, race_warnings, rate_reason
from rightbatch.plan.records import Evidence, NearBest, Prediction, Reason
from rightbatch.study.conclude import (
    Outlook,
    choose_trial,
    conclude,
    near_best,
    trial_curve,
    trial_curves,
)
from rightbatch.study.race import UNIT_BATCH
from rightbatch.study.records import Cell, RaceRecord, TrialRecord


def choose_by_race(evidence: Evidence, race: RaceRecord) -> Choice:
    """What the race of a few trainings says.

    Args:
        evidence: What was measured.
        race: The race.

    Returns:
        The choice.
    """
    setting = evidence.setting
    price = make_price(
        setting.goal, evidence.throughput, max_micro_batch(evidence), setting.replicas
    )
    outlook = conclude(race, price, seed=setting.seed)
    trial = race.trials[choose_trial(outlook, trial_curves(race), race.leader)]
    low, high = near_best(outlook, trial.global_batch)
    default = _default_steps(race, outlook)
    return Choice(
        cell=Cell(global_batch=trial.global_batch, learning_rate=trial.learning_rate),
        near_best=NearBest(low=low, high=high),
        prediction=_predict(evidence, race, outlook, trial),
        batch_reason=Reason(
            field="global_batch",
            because=batch_reason(setting.goal, race, outlook, trial),
            source="race",
        ),
        rate_reason=Reason(
            field="learning_rate", because=rate_reason(evidence, race, trial), source="race"
        ),
        warnings=tuple(race_warnings(evidence, race, trial)),
        one_training=None if default is None else default * UNIT_BATCH,
    )


def _leader_steps(race: RaceRecord) -> float:
    """Steps of the leader to the target, or those it did."""
    leader = race.trials[race.leader]
    return float(leader.steps_to_target or leader.steps)


def _default_steps(race: RaceRecord, outlook: Outlook) -> float | None:
    """Predicted steps of the usual default, batch 32 at its best learning rate."""
    if UNIT_BATCH not in outlook.sizes:
        return None
    return _leader_steps(race) * outlook.step_ratio(UNIT_BATCH)


def _predict(
    evidence: Evidence, race: RaceRecord, outlook: Outlook, trial: TrialRecord
) -> Prediction:
    setting = evidence.setting
    largest = max_micro_batch(evidence)

    def seconds(batch: int) -> float:
        return step_seconds(evidence.throughput, batch, largest, setting.replicas)

    size = trial.global_batch
    ratio = outlook.log_steps[:, outlook.sizes.index(size)] + _behind(race, outlook, trial)
    log_steps = math.log(_leader_steps(race)) + ratio
    if trial.steps_to_target is not None:
        log_steps = np.full(len(ratio), math.log(trial.steps_to_target))
    n = len(race.trials)
    default = UNIT_BATCH if UNIT_BATCH in outlook.sizes and size != UNIT_BATCH else None
    speedup = None
    if default is not None:
        against = outlook.log_steps[:, outlook.sizes.index(default)] - ratio
        speedup = _estimate(against + math.log(seconds(default) / seconds(size)), 1.0, n)
    return Prediction(
        steps=_estimate(log_steps, 1.0, n),
        seconds=_estimate(log_steps, seconds(size), n),
        examples=_estimate(log_steps, float(size), n),
        speedup=speedup,
    )


def _behind(race: RaceRecord, outlook: Outlook, trial: TrialRecord) -> float:
    """How many times the steps of the run that stands for its size a run takes, as ln."""
    best = race.leader
    if trial.global_batch != outlook.leader:
        at = (s.trial for s in outlook.seen if s.measured.global_batch == trial.global_batch)
        best = next(at)
    if race.trials[best] == trial:
        return 0.0
    ratio = compare_steps(trial_curve(race.trials[best]), trial_curve(trial)).log_ratio
    return ratio if math.isfinite(ratio) else 0.0


_SEED_SPREAD = 0.15
"""Standard deviation of ln time to target between seeds, met on image and text workloads."""


def _estimate(logs: Sequence[float] | np.ndarray, unit: float, n: int) -> Estimate:
    """Median and 95 % interval of exp(logs) × unit, the spread between seeds added."""
    middle = float(np.median(logs))
    spread = math.hypot(float(np.std(logs)), _SEED_SPREAD)
    return Estimate(
        value=math.exp(middle) * unit,
        low=math.exp(middle - 1.96 * spread) * unit,
        high=math.exp(middle + 1.96 * spread) * unit,
        n=n,
        method="posterior of the critical batch, and the usual spread between seeds",
    )
