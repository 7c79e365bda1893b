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
    Goal,
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
        reasons=(choice.batch_reason, choice.lr_reason, *_other_reasons(evidence, recipe, split)),
        evidence=evidence,
        cost=Cost(
            examples=examples,
            seconds=seconds,
            full_trainings=examples / choice.one_training if choice.one_training else None,
        ),
        warnings=(*choice.warnings, *_general_warnings(evidence)),
    )


def split_for(evidence: Evidence, size: int) -> Split:
    """How a size that was found is trained with the memory and the replicas there are."""
    return split_batch(size, min(max_micro_batch(evidence), size), evidence.setting.replicas)


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
            field="global_batch",
            because=_batch_reason(setting.goal, race, outlook, trial),
            source="race",
        ),
        lr_reason=Reason(
            field="learning_rate", because=_rate_reason(evidence, race, trial), source="race"
        ),
        warnings=tuple(_race_warnings(evidence, race, trial)),
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


_COST_OF = {"time": "time", "quality": "time", "examples": "examples", "steps": "steps"}
_CHEAPER = 0.97
"""A size is only called cheaper if it is expected to cost less than this share."""


def _batch_reason(goal: Goal, race: RaceRecord, outlook: Outlook, trial: TrialRecord) -> str:
    cost, batch = _COST_OF[goal], trial.global_batch
    critical = outlook.critical_batch
    law = (
        f"{_number(critical.median)} "
        f"({_number(critical.quantile(0.025))} to {_number(critical.quantile(0.975))})"
    )
    if len(outlook.sizes) == 1:
        return "No other size was open to choice."
    # Where two sizes lie within a few percent, the safer learning rate may have decided.
    shares = {size: math.exp(outlook.expected(size)) for size in outlook.sizes}
    tried = {batch, outlook.leader, *(s.measured.global_batch for s in outlook.seen)}
    cheaper = {size for size in shares if shares[size] < _CHEAPER * shares[batch]}
    unseen = min(cheaper - tried, key=lambda size: shares[size], default=None)
    instead = (
        ""
        if unseen is None
        else f" Then batch {unseen:,} may take {_number(shares[unseen] / shares[batch])}× the "
        f"{cost}, but it was not run far enough to be chosen."
    )
    if not outlook.seen:
        least = "" if instead else f", and then no size takes less {cost}"
        return (
            "No other size was run far enough to compare. By the noise probe and what is usual for "
            f"the optimizer, the critical batch is about {law}{least}.{instead}"
        )
    ratios = _list(
        [
            f"batch {s.measured.global_batch:,} took {_number(math.exp(s.measured.log_ratio))}×"
            for s in outlook.seen
        ]
    )
    among = " of the sizes that were run" if instead or cheaper else ""
    return (
        f"Least {cost} predicted{among}. To the same loss {ratios} the steps of batch "
        f"{outlook.leader:,}; so the critical batch is about {law}.{instead}"
    )


_TOLD_HALF_OCTAVES = (2, 1, -1, -2)


def _rate_reason(evidence: Evidence, race: RaceRecord, trial: TrialRecord) -> str:
    batch = trial.global_batch
    at_batch = [t for t in race.trials if t.global_batch == batch]
    elsewhere = [t for t in race.trials if t.global_batch != batch]
    if len(at_batch) == 1:
        return _carried_reason(race, trial, elsewhere)
    own = trial_curve(trial)
    parts: list[str] = []
    best, safer = True, False
    for half_octaves in _TOLD_HALF_OCTAVES:
        rate = 2.0 ** (half_octaves / 2) * trial.learning_rate
        other = next((t for t in at_batch if math.isclose(t.learning_rate, rate)), None)
        if other is None:
            continue
        if other.state == "diverged":
            parts.append(f"{rate:.3g} diverged")
            continue
        ratio = compare_steps(own, trial_curve(other)).log_ratio
        if not math.isfinite(ratio):
            continue
        early = ", early on" if other.steps < trial.steps / 2 else ""
        parts.append(f"{rate:.3g} took {_number(math.exp(ratio))}×{early}")
        best = best and ratio >= 0
        safer = safer or (ratio < 0 and half_octaves > 0)
    found = f"{'Best of' if best else 'Chosen among'} {len(at_batch)} tried at batch {batch:,}."
    told = f" Steps to the same loss, against its own: {'; '.join(parts)}." if parts else ""
    safe = (
        " A higher one that is ahead by little is passed over: it is closer to divergence."
        if safer
        else ""
    )
    edge = evidence.learning_rate.edge.value
    ramp = (
        ""
        if edge is None
        else f" The range test at batch {evidence.learning_rate.global_batch:,} exploded near "
        f"{edge:.2g}."
    )
    return f"{found}{told}{safe}{ramp}"


def _carried_reason(race: RaceRecord, trial: TrialRecord, elsewhere: Sequence[TrialRecord]) -> str:
    """Of the only learning rate that was tried at a size."""
    if not elsewhere:
        return "The only one that was tried, by the range test."
    leader = race.trials[race.leader]
    source = f"{leader.learning_rate:.3g}, the best at batch {leader.global_batch:,}"
    if leader.global_batch == trial.global_batch:
        # It leads since a moment ago; the run that led before it went the furthest elsewhere.
        before = max(elsewhere, key=lambda t: t.examples)
        source = f"{before.learning_rate:.3g} at batch {before.global_batch:,}"
    law = "square root of the saturating law" if race.normalised else "saturating law"
    return (
        f"Carried from {source}, by the {law}. No other was tried at batch {trial.global_batch:,}."
    )


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


_FEWEST_STEPS = 25
"""Runs shorter than this are a matter of luck."""
_ENDED_EARLY = {"time": "the time budget was used up", "interrupt": "interrupted"}


def _race_warnings(evidence: Evidence, race: RaceRecord, trial: TrialRecord) -> list[str]:
    setting = evidence.setting
    leader = race.trials[race.leader]
    came = f"batch {leader.global_batch} in {leader.examples:,} examples"
    found: list[str] = []
    if setting.goal == "quality":
        found.append(
            f"Planned for the best loss: {came} reached {race.target_loss:.4g}, and the recipe is "
            "what is expected to get there at least cost."
        )
    elif setting.target is None:
        found.append(
            f"No target was given. The loss counts as trained at {race.target_loss:.4g}, which "
            f"{came} reached. Pass target='val_loss<=…', or 'train_loss<=…' without validation "
            "data, to plan for the loss that you want."
        )
    elif not race.target_reached:
        found.append(
            f"The target {setting.target} was not reached by {came}; the plan is made for the "
            f"loss it did reach, {race.target_loss:.4g}. Give a larger budget, or check the target."
        )
    elif trial.state != "reached":
        found.append(
            "The recipe's own run was stopped before it met the target, to save cost. That it will "
            "meet it is predicted, not seen."
        )
    if leader.state == "reached" and leader.steps < _FEWEST_STEPS:
        found.append(
            f"The target is met within {leader.steps} step{'s' if leader.steps > 1 else ''}: too "
            "few to compare runs by; much of it is the luck of a seed. A harder target would tell "
            "more."
        )
    early = _ENDED_EARLY.get(race.stopped_by)
    if early is not None:
        found.append(f"The race was ended early ({early}); this is its best so far.")
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
    noise = f"a noise scale B_simple of {_number(points[-1])} and " if points else ""
    knee = evidence.throughput.step_time.law.knee.value
    limit = "" if knee is None else f"; the step time has its knee at {_number(knee)}"
    return (
        f"Cheapest by the laws for a critical batch of about {_number(critical)}, which {noise}"
        f"what is usual for the optimizer suggest{'' if points else 's'}{limit}."
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
        spare = f"{free / 2**10:,.0f} GiB" if free >= 10 * 2**10 else f"{free:,.0f} MiB"
        most = "All" if ceiling >= evidence.setting.num_examples else f"{ceiling:,}"
        more = "" if memory.ceiling.smallest_failed else "; more was not tried"
        why = f"{most} examples at once were run with {spare} to spare{more}."
        source = "memory probe"
    deviation = "" if split.exact else f" {split}"
    return [
        Reason(field="micro_batch", because=why + deviation, source=source),
        Reason(
            field="accumulation",
            because="Micro-batch × accumulation × replicas is the batch size: "
            f"{recipe.micro_batch:,} × {recipe.accumulation:,} × {recipe.replicas} = "
            f"{recipe.global_batch:,}.",
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


def _number(value: float) -> str:
    """Two significant digits, in full."""
    rounded = float(f"{value:.2g}")
    return f"{rounded:,.0f}" if rounded >= 100 else f"{rounded:.2g}"


def _list(parts: Sequence[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)
