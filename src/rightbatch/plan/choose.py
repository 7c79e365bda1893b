"""From evidence to a plan: pure, so that a plan can be replayed from its file, bit for bit."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rightbatch.laws.curve import compare_steps
from rightbatch.laws.estimate import Estimate
from rightbatch.laws.scaling import carry_rate
from rightbatch.laws.split import Split, split_batch
from rightbatch.plan.predict import (
    expected_critical_batch,
    predict_batch,
    predict_rate,
)
from rightbatch.plan.price import make_price, max_micro_batch, open_sizes, step_seconds
from rightbatch.plan.reasons import (
    batch_reason,
    general_warnings,
    other_reasons,
    probed_batch_reason,
    race_warnings,
    ramp_reason,
    rate_reason,
)
from rightbatch.plan.records import (
    Cost,
    Evidence,
    NearBest,
    Plan,
    Prediction,
    Reason,
    UsedEffort,
)
from rightbatch.recipe import Recipe
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


@dataclass(frozen=True)
class _Choice:
    cell: Cell
    near_best: NearBest
    prediction: Prediction | None
    batch_reason: Reason
    lr_reason: Reason
    warnings: tuple[str, ...]
    one_training: float | None = None


def choose(workload: str, evidence: Evidence, *, seconds: float) -> Plan:
    """Makes the plan that follows from the evidence.

    Args:
        workload: Name of the workload.
        evidence: What was measured.
        seconds: Wall time that measuring took.

    Returns:
        The plan. The same evidence gives the same plan.
    """
    race = evidence.race
    choice = _choose_by_race(evidence, race) if race else _choose_by_probes(evidence)
    effort: UsedEffort = "race" if race else "probe"
    setting = evidence.setting
    split = split_for(evidence, choice.cell.global_batch)
    recipe = Recipe(
        global_batch=split.global_batch,
        micro_batch=split.micro_batch,
        accumulation=split.accumulation,
        replicas=split.replicas,
        learning_rate=choice.cell.learning_rate,
    )
    examples = count_examples(evidence)
    return Plan(
        workload=workload,
        goal=setting.goal,
        effort=effort,
        recipe=recipe,
        near_best=NearBest(
            # Replicas that do not divide the size move the batch; it is as good still.
            low=min(choice.near_best.low, split.global_batch),
            high=max(choice.near_best.high, split.global_batch),
        ),
        prediction=choice.prediction,
        reasons=(choice.batch_reason, choice.lr_reason, *other_reasons(evidence, recipe, split)),
        evidence=evidence,
        cost=Cost(
            examples=examples,
            seconds=seconds,
            full_trainings=examples / choice.one_training if choice.one_training else None,
        ),
        warnings=(*choice.warnings, *general_warnings(evidence)),
    )


def split_for(evidence: Evidence, size: int) -> Split:
    """How a size that was found is trained with the memory and the replicas there are."""
    return split_batch(size, min(max_micro_batch(evidence), size), evidence.setting.replicas)


def count_examples(evidence: Evidence) -> int:
    """Training examples that the probes and the race processed."""
    memory = evidence.memory
    in_memory = sum(t.num_examples for t in memory.trials) if memory else 0
    return (
        in_memory
        + evidence.throughput.cost_examples
        + evidence.noise_scale.cost_examples
        + evidence.learning_rate.cost_examples
        + (evidence.race.examples if evidence.race else 0)
    )


# ---- by race -----------------------------------------------------------------------------------


def _choose_by_race(evidence: Evidence, race: RaceRecord) -> _Choice:
    setting = evidence.setting
    price = make_price(
        setting.goal, evidence.throughput, max_micro_batch(evidence), setting.replicas
    )
    outlook = conclude(race, price, seed=setting.seed)
    trial = race.trials[choose_trial(outlook, trial_curves(race), race.leader)]
    low, high = near_best(outlook, trial.global_batch)
    default = _default_steps(race, outlook)
    return _Choice(
        cell=Cell(global_batch=trial.global_batch, learning_rate=trial.learning_rate),
        near_best=NearBest(low=low, high=high),
        prediction=_predict(evidence, race, outlook, trial),
        batch_reason=Reason(
            field="global_batch",
            because=batch_reason(setting.goal, race, outlook, trial),
            source="race",
        ),
        lr_reason=Reason(
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


# ---- by probes ---------------------------------------------------------------------------------


def _choose_by_probes(evidence: Evidence) -> _Choice:
    setting = evidence.setting
    critical = expected_critical_batch(evidence.noise_scale, averaging=setting.averaging)
    batch = predict_batch(
        evidence.throughput,
        critical,
        goal=setting.goal,
        num_examples=setting.num_examples,
        replicas=setting.replicas,
    )
    sizes = open_sizes(setting.num_examples, setting.replicas)
    low = min(sizes, key=lambda size: abs(math.log(size / (batch / 2.8))))
    high = min(sizes, key=lambda size: abs(math.log(size / min(2.8 * batch, low * 8))))
    ramp = evidence.learning_rate
    rate = predict_rate(ramp, averaging=setting.averaging, normalised=setting.normalised)
    carried = ""
    if ramp.global_batch != batch:
        rate = carry_rate(
            rate,
            at=ramp.global_batch,
            to=batch,
            critical_batch=critical,
            normalised=setting.normalised,
        )
        carried = f", carried from batch {ramp.global_batch} by the saturating law"
    return _Choice(
        cell=Cell(global_batch=batch, learning_rate=rate),
        near_best=NearBest(low=low, high=max(high, low)),
        prediction=None,
        batch_reason=Reason(
            field="global_batch",
            because=probed_batch_reason(evidence, critical),
            source="noise and throughput probes",
        ),
        lr_reason=Reason(
            field="learning_rate",
            because=f"{ramp_reason(evidence)}{carried}.",
            source="learning-rate probe",
        ),
        warnings=(
            "No training was run: batch and learning rate follow from probes and laws, and can "
            "be several times off. effort='race' checks them.",
        ),
    )
