"""From evidence to a plan: pure, so that a plan can be replayed from its file, bit for bit."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rightbatch.laws.curve import compare_steps
from rightbatch.laws.estimate import Estimate
from rightbatch.laws.split import Split, split_batch
from rightbatch.plan.predict import (
    carry_rate,
    expected_critical_batch,
    predict_batch,
    predict_rate,
)
from rightbatch.plan.price import make_price, max_micro_batch, open_sizes, step_seconds
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
from rightbatch.study.records import Cell, RaceRecord, TrialRecord

BASELINE_BATCH = 32


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
    split = split_batch(
        choice.cell.global_batch,
        min(max_micro_batch(evidence), choice.cell.global_batch),
        setting.replicas,
    )
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
        near_best=choice.near_best,
        prediction=choice.prediction,
        reasons=(choice.batch_reason, choice.lr_reason, *_other_reasons(evidence, recipe, split)),
        evidence=evidence,
        cost=Cost(
            examples=examples,
            seconds=seconds,
            full_trainings=examples / choice.one_training if choice.one_training else None,
        ),
        warnings=(*choice.warnings, *_general_warnings(evidence)),
    )


def count_examples(evidence: Evidence) -> int:
    """Training examples that the probes and the race processed."""
    memory = evidence.memory
    in_memory = sum(t.micro_batch * t.num_steps for t in memory.trials) if memory else 0
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
            field="global_batch", because=_batch_reason(race, outlook, trial), source="race"
        ),
        lr_reason=Reason(
            field="learning_rate", because=_rate_reason(evidence, race, trial), source="race"
        ),
        warnings=tuple(_race_warnings(evidence, race, trial)),
        one_training=None if default is None else default * BASELINE_BATCH,
    )


def _leader_steps(race: RaceRecord) -> float:
    """Steps of the leader to the target, or those it did."""
    leader = race.trials[race.leader]
    return float(leader.steps_to_target or leader.steps)


def _default_steps(race: RaceRecord, outlook: Outlook) -> float | None:
    """Predicted steps of the usual default, batch 32 at its best learning rate."""
    if BASELINE_BATCH not in outlook.sizes:
        return None
    return _leader_steps(race) * outlook.step_ratio(BASELINE_BATCH)


def _batch_reason(race: RaceRecord, outlook: Outlook, trial: TrialRecord) -> str:
    critical = outlook.critical_batch
    law = (
        f"critical batch about {critical.median:.2g} "
        f"({critical.quantile(0.025):.2g} to {critical.quantile(0.975):.2g})"
    )
    if not outlook.seen:
        return f"Expected to be cheapest, with a usual {law}; no other size was run far enough."
    ratios = [
        f"batch {s.measured.global_batch} took {math.exp(s.measured.log_ratio):.2g} ×"
        for s in outlook.seen
    ]
    best = "Least predicted cost"
    if trial.global_batch == outlook.leader and len(outlook.sizes) > 1:
        best = "No other size is expected to be cheaper"
    return (
        f"{best}: to the same loss, against the steps of batch {outlook.leader}, "
        f"{', '.join(ratios)}; {law}."
    )


_TOLD_HALF_OCTAVES = (2, 1, -1, -2)


def _rate_reason(evidence: Evidence, race: RaceRecord, trial: TrialRecord) -> str:
    at_batch = [t for t in race.trials if t.global_batch == trial.global_batch]
    if len(at_batch) == 1 and len(race.trials) > 1:
        leader = race.trials[race.leader]
        return (
            f"Carried from {leader.learning_rate:.3g}, the best at batch {leader.global_batch}, by "
            f"the {'square root of the ' if race.normalised else ''}saturating law; no other was "
            "tried here."
        )
    own = trial_curve(trial)
    parts: list[str] = []
    for half_octaves in _TOLD_HALF_OCTAVES:
        factor = 2.0 ** (half_octaves / 2)
        rate = factor * trial.learning_rate
        other = next((t for t in at_batch if math.isclose(t.learning_rate, rate)), None)
        if other is None:
            continue
        ratio = compare_steps(own, trial_curve(other)).log_ratio
        if other.state == "diverged":
            parts.append(f"{factor:.2g} × it diverged")
        elif math.isfinite(ratio):
            parts.append(f"{factor:.2g} × it took {math.exp(ratio):.2g} × the steps")
    edge = evidence.learning_rate.edge.value
    if edge is not None:
        batch = evidence.learning_rate.global_batch
        parts.append(f"at batch {batch} a ramp exploded near {edge:.2g}")
    told = f": to the same loss, {'; '.join(parts)}" if parts else ""
    tried = f"Ahead of the {len(at_batch) - 1} others tried" if len(at_batch) > 1 else "As started"
    return f"{tried} at this batch{told}."


def _predict(
    evidence: Evidence, race: RaceRecord, outlook: Outlook, trial: TrialRecord
) -> Prediction:
    setting = evidence.setting
    largest = max_micro_batch(evidence)

    def seconds(batch: int) -> float:
        return step_seconds(evidence.throughput, batch, largest, setting.replicas)

    size = trial.global_batch
    ratio = outlook.log_steps[:, outlook.sizes.index(size)]
    log_steps = math.log(_leader_steps(race)) + ratio
    if trial.steps_to_target is not None:
        log_steps = np.full(len(ratio), math.log(trial.steps_to_target))
    n = len(race.trials)
    default = BASELINE_BATCH if BASELINE_BATCH in outlook.sizes and size != BASELINE_BATCH else None
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


def _race_warnings(evidence: Evidence, race: RaceRecord, trial: TrialRecord) -> list[str]:
    setting = evidence.setting
    leader = race.trials[race.leader]
    came = f"batch {leader.global_batch} in {leader.examples:,} examples"
    early = race.stopped_by in {"time", "interrupt"}
    found: list[str] = []
    if setting.target is None:
        found.append(
            f"No target was given. The loss counts as trained at {race.target_loss:.4g}, which "
            f"{came} reached. Pass target='val_loss<=…' to plan for the loss that you want."
        )
    elif not race.target_reached:
        found.append(
            f"The target {setting.target} was not reached by {came}; the plan is made for the "
            f"loss it did reach, {race.target_loss:.4g}. Give a larger budget, or check the target."
        )
    elif trial.state != "reached":
        found.append(
            f"The run with batch {trial.global_batch} was stopped by the budget before it met the "
            "target; that it will is predicted, not seen."
        )
    if early:
        found.append(f"The race was ended early ({race.stopped_by}); this is its best so far.")
    return found


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
    rate = predict_rate(ramp, averaging=setting.averaging)
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
            because=_probed_batch_reason(evidence, critical),
            source="noise and throughput probes",
        ),
        lr_reason=Reason(
            field="learning_rate",
            because=f"{_ramp_reason(evidence)}{carried}.",
            source="learning-rate probe",
        ),
        warnings=(
            "No training was run: batch and learning rate follow from probes and laws, and can "
            "be several times off. effort='race' checks them.",
        ),
    )


def _probed_batch_reason(evidence: Evidence, critical: float) -> str:
    points = [p.value for p in evidence.noise_scale.trajectory if p.value is not None]
    noise = f"a noise scale B_simple of {points[-1]:.3g} and " if points else ""
    knee = evidence.throughput.step_time.law.knee.value
    limit = "" if knee is None else f"; the step time has its knee at {knee:.3g}"
    return (
        f"Cheapest by the laws for a critical batch of about {critical:.2g}, which {noise}what is "
        f"usual for the optimizer suggest{'' if points else 's'}{limit}."
    )


def _ramp_reason(evidence: Evidence) -> str:
    ramp = evidence.learning_rate
    lowest = ramp.minimum_div_10.value
    if lowest is not None:
        return (
            f"A ramp at batch {ramp.global_batch} had its least loss at {10 * lowest:.2g}; "
            "training stands a share of that"
        )
    if ramp.edge.value is not None:
        return (
            f"A share of {ramp.edge.value:.2g}, where a ramp at batch {ramp.global_batch} exploded"
        )
    return f"A ramp at batch {ramp.global_batch} told nothing; this is a usual learning rate"


# ---- the rest of the recipe --------------------------------------------------------------------


def _other_reasons(evidence: Evidence, recipe: Recipe, split: Split) -> list[Reason]:
    ceiling = max_micro_batch(evidence)
    memory = evidence.memory
    if memory is None:
        why, source = "Memory was not measured; one micro-batch is the whole batch.", "default"
    else:
        free = memory.ceiling.headroom_bytes / 2**20
        most = "All" if ceiling >= evidence.setting.num_examples else f"{ceiling:,}"
        more = "" if memory.ceiling.smallest_failed else "; more was not tried"
        why = f"{most} examples at once were run with {free:,.0f} MiB to spare{more}."
        source = "memory probe"
    deviation = "" if split.exact else f" {split}"
    return [
        Reason(field="micro_batch", because=why + deviation, source=source),
        Reason(
            field="accumulation",
            because=f"{recipe.micro_batch} × {recipe.accumulation} × {recipe.replicas} = "
            f"{recipe.global_batch}.",
            source="arithmetic",
        ),
        Reason(field="replicas", because="As asked for.", source="argument"),
        Reason(
            field="warmup_steps",
            because="The learning rate was found without warm-up, from fresh weights."
            if evidence.race is not None
            else "No warm-up was tested.",
            source="race" if evidence.race is not None else "default",
        ),
        Reason(
            field="precision",
            because=f"Everything was measured in {recipe.precision}.",
            source="default",
        ),
    ]


def _general_warnings(evidence: Evidence) -> list[str]:
    found: list[str] = []
    if evidence.setting.num_examples_is_cut:
        found.append(
            f"The data are a stream; its first {evidence.setting.num_examples:,} examples stand "
            "for all of it."
        )
    if evidence.environment.clock == "processor":
        found.append(
            "The machine was busy with other programs; step times are processor time, what a step "
            "takes when it is idle. Plan again on an idle machine to be sure."
        )
    if not evidence.noise_scale.noise_scale.resolved:
        found.append("The noise scale at the start is not resolved: too noisy to tell.")
    return found


def interval_text(estimate: Estimate) -> str:
    """An estimate as `2.1 (1.5 to 2.9)`."""
    return _interval(estimate)


def _interval(estimate: Estimate) -> str:
    if estimate.value is None:
        return "unresolved"
    ends = [f"{end:.2g}" if end is not None else "?" for end in (estimate.low, estimate.high)]
    return f"{estimate.value:.2g} ({ends[0]} to {ends[1]})"
