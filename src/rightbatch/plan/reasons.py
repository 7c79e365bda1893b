"""Why a plan is what it is, in words with the numbers behind them, and what to know before use."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rightbatch.laws.curve import compare_steps
from rightbatch.laws.split import Split
from rightbatch.plan.price import max_micro_batch
from rightbatch.plan.records import (
    Evidence,
    Goal,
    Reason,
)
from rightbatch.recipe import Recipe
from rightbatch.study.conclude import (
    Outlook,
    trial_curve,
)
from rightbatch.study.records import RaceRecord, TrialRecord

_COST_OF = {"time": "time", "quality": "time", "examples": "examples", "steps": "steps"}

_CHEAPER = 0.97
"""A size is only called cheaper if it is expected to cost less than this share."""


def batch_reason(goal: Goal, race: RaceRecord, outlook: Outlook, trial: TrialRecord) -> str:
    """Why this batch: the steps of other sizes to the same loss, and the critical batch."""
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


def rate_reason(evidence: Evidence, race: RaceRecord, trial: TrialRecord) -> str:
    """Why this learning rate: how those next to it did at the same batch."""
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


_FEWEST_STEPS = 25
"""Runs shorter than this are a matter of luck."""

_ENDED_EARLY = {"time": "the time budget was used up", "interrupt": "interrupted"}


def race_warnings(evidence: Evidence, race: RaceRecord, trial: TrialRecord) -> list[str]:
    """What the race did not see, or not well enough."""
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


def probed_batch_reason(evidence: Evidence, critical: float) -> str:
    """Why this batch, where nothing was trained."""
    points = [p.value for p in evidence.noise_scale.trajectory if p.value is not None]
    noise = f"a noise scale B_simple of {_number(points[-1])} and " if points else ""
    knee = evidence.throughput.step_time.law.knee.value
    limit = "" if knee is None else f"; the step time has its knee at {_number(knee)}"
    return (
        f"Cheapest by the laws for a critical batch of about {_number(critical)}, which {noise}"
        f"what is usual for the optimizer suggest{'' if points else 's'}{limit}."
    )


def ramp_reason(evidence: Evidence) -> str:
    """Where the learning rate comes from, where nothing was trained; without a full stop."""
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


def other_reasons(evidence: Evidence, recipe: Recipe, split: Split) -> list[Reason]:
    """Why the rest of the recipe is what it is."""
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
    trained = "study" if evidence.study else "race" if evidence.race else "default"
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
            because="No warm-up was tested."
            if trained == "default"
            else "The learning rate was found without warm-up, from fresh weights.",
            source=trained,
        ),
        Reason(
            field="precision",
            because=f"Everything was measured in {recipe.precision}.",
            source="default",
        ),
    ]


def general_warnings(evidence: Evidence) -> list[str]:
    """What holds for any plan."""
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
