"""The plan as text: what to do, why, what it should take, what was run, what it cost."""

from __future__ import annotations

from rightbatch.cli.table import make_table, make_wrapped_table, wrap
from rightbatch.cli.units import show_interval, show_number, show_seconds
from rightbatch.laws.estimate import Estimate
from rightbatch.plan.choose import split_for
from rightbatch.plan.price import max_micro_batch, step_seconds
from rightbatch.plan.records import Plan
from rightbatch.study.race import UNIT_BATCH
from rightbatch.study.records import RaceRecord, TrialRecord
from rightbatch.study.study import Study

_LABELS = {
    "global_batch": "batch size",
    "learning_rate": "learning rate",
    "micro_batch": "micro-batch",
    "warmup_steps": "warm-up steps",
}
"""Fields of the recipe whose names people write otherwise."""
_LEAST_SHOWN = 0.2
"""Runs with fewer steps than this share of the leader's are told in a sentence."""


def plan_text(plan: Plan) -> str:
    """The answer in a sentence, then why, then what it should take, then the evidence.

    Args:
        plan: The plan.

    Returns:
        Lines of at most 80 columns.
    """
    race, study = plan.evidence.race, plan.evidence.study
    parts = [wrap(answer(plan)), _reasons(plan)]
    if plan.prediction is not None:
        parts.append(_prediction(plan))
    if race is not None:
        parts.append(_runs(plan, race))
    if study is not None:
        parts.append(_sizes(study))
    if plan.warnings:
        parts.append("\n".join(wrap(f"Note: {warning}") for warning in plan.warnings))
    parts.append(_cost(plan))
    return "\n\n".join(parts)


def answer(plan: Plan) -> str:
    """The plan in a sentence or two: what to do, what it gains, what that rests on.

    Args:
        plan: The plan.

    Returns:
        One paragraph, not wrapped.
    """
    recipe = plan.recipe
    rate = show_number(_round(recipe.learning_rate))
    todo = f"Train with batch {recipe.global_batch:,} at learning rate {rate}"
    return f"{todo}{_gain(plan)}; {_near_best(plan)}. {_rests_on(plan)}"


def _gain(plan: Plan) -> str:
    if plan.evidence.race is None and plan.evidence.study is None:
        return ", as far as probes tell"
    batch = UNIT_BATCH
    advantage = advantage_of(plan)
    if advantage is None or advantage.value is None:
        return ", the usual default batch" if plan.recipe.global_batch == batch else ""
    number = f"{_about(advantage.value)} ({_interval(advantage)})"
    goal = f"to {_target_text(plan)}"
    what = {
        "examples": f"{number} times fewer examples {goal} than",
        "steps": f"{number} times fewer steps {goal} than",
    }.get(plan.goal, f"{number} times as fast {goal} as")
    verb = "take" if plan.goal in {"examples", "steps"} else "be"
    how = "found" if plan.evidence.study else "predicted"
    text = f": {how} to {verb} {what} batch {batch} at its best learning rate"
    # As shown: an interval that is printed as 1 to 2 has 1 in it.
    low, high = _round(advantage.low, 2) or 0.0, _round(advantage.high, 2)
    unsure = low <= 1.0 and (high is None or high >= 1.0)
    return f"{text}, a difference within the doubt" if unsure else text


def advantage_of(plan: Plan) -> Estimate | None:
    """How many times less the recipe needs than batch 32, in the unit of the plan's goal.

    Args:
        plan: The plan.

    Returns:
        The ratio with its interval; None where it is not known, or the recipe's batch is 32.
    """
    prediction = plan.prediction
    if prediction is None or prediction.speedup is None:
        return None
    factor = _per_step(plan, plan.recipe.global_batch) / _per_step(plan, UNIT_BATCH)
    # The speed-up is one of steps times this ratio of seconds; take it out, put the goal's in.
    if plan.goal == "steps":
        return _times(prediction.speedup, factor)
    if plan.goal == "examples":
        share = UNIT_BATCH / plan.recipe.global_batch
        return _times(prediction.speedup, factor * share)
    return prediction.speedup


def _per_step(plan: Plan, batch: int) -> float:
    evidence = plan.evidence
    return step_seconds(
        evidence.throughput, batch, max_micro_batch(evidence), evidence.setting.replicas
    )


def _times(estimate: Estimate, factor: float) -> Estimate:
    value, low, high = (
        None if x is None else x * factor for x in (estimate.value, estimate.low, estimate.high)
    )
    return Estimate(value=value, low=low, high=high, n=estimate.n, method=estimate.method)


def _target_text(plan: Plan) -> str:
    target, race = plan.evidence.setting.target, plan.evidence.race
    if target is not None and (race is None or race.target_reached):
        return target
    return "" if race is None else f"a loss of {race.target_loss:.3g}"


def _near_best(plan: Plan) -> str:
    low, high = plan.near_best.low, plan.near_best.high
    if low == high:
        return "no other batch is predicted to be as good"
    return f"the best batch is probably within {low:,} to {high:,}"


def _rests_on(plan: Plan) -> str:
    race = plan.evidence.race
    probes = "three probes" if plan.evidence.memory is None else "four probes"
    if plan.evidence.study is not None:
        study = plan.evidence.study
        return (
            f"It rests on {probes} and a study of {len(study.trials)} trainings at "
            f"{len(study.design.batch_sizes)} batch sizes."
        )
    if race is None:
        return f"It rests on {probes}; nothing was trained."
    sizes = sorted({t.global_batch for t in race.trials})
    where = f"batch {sizes[0]:,}" if len(sizes) == 1 else f"{len(sizes)} batch sizes"
    runs = "1 run" if len(race.trials) == 1 else f"{len(race.trials)} runs"
    arrived = sum(t.state == "reached" for t in race.trials)
    ended = f", {arrived or 'none'} of them to the target"
    return (
        f"It rests on {probes} and {runs} at {where}"
        f"{ended if plan.evidence.setting.target is not None else ''}."
    )


def _reasons(plan: Plan) -> str:
    recipe = plan.recipe
    rows = [
        (
            _LABELS.get(reason.field, reason.field),
            _value(getattr(recipe, reason.field, "")),
            f"{reason.because} [{reason.source}]",
        )
        for reason in plan.reasons
    ]
    return make_wrapped_table(("field", "value", "because"), rows)


def _value(value: float | str) -> str:
    if isinstance(value, str):
        return value
    return show_number(value if isinstance(value, int) else _round(value))


def _prediction(plan: Plan) -> str:
    prediction = plan.prediction
    assert prediction is not None
    goal = f" to {_target_text(plan)}"
    rows = [
        ("steps", _about(prediction.steps.value), _interval(prediction.steps)),
        ("examples", _about(prediction.examples.value), _interval(prediction.examples)),
        ("modelled time", *_seconds_interval(prediction.seconds)),
    ]
    return make_table((f"it should take{goal}", "about", "95 % interval"), rows)


def _round(value: float | None, digits: int = 3) -> float | None:
    return None if value is None else float(f"{value:.{digits}g}")


def _about(value: float | None) -> str:
    """Two significant digits: what is predicted is not known to more."""
    return show_number(_round(value, 2))


def _interval(estimate: Estimate) -> str:
    rounded = Estimate(
        value=_round(estimate.value, 2),
        low=_round(estimate.low, 2),
        high=_round(estimate.high, 2),
        n=estimate.n,
    )
    return show_interval(rounded)


def _seconds_interval(estimate: Estimate) -> tuple[str, str]:
    value, low, high = (
        show_seconds(_round(x, 2)) for x in (estimate.value, estimate.low, estimate.high)
    )
    return value, f"{low}–{high}"


def _runs(plan: Plan, race: RaceRecord) -> str:
    leader = race.trials[race.leader]

    def is_recipe(trial: TrialRecord) -> bool:
        recipe = plan.recipe
        batch = split_for(plan.evidence, trial.global_batch).global_batch
        return (batch, trial.learning_rate) == (recipe.global_batch, recipe.learning_rate)

    def is_short(trial: TrialRecord) -> bool:
        return trial.steps < _LEAST_SHOWN * leader.steps and not is_recipe(trial)

    rows = [
        (
            f"{'the recipe: ' if is_recipe(trial) else ''}{_ending(trial)}",
            f"{trial.global_batch:,}",
            show_number(_round(trial.learning_rate)),
            f"{trial.steps:,}",
            show_number(_round(_best_loss(trial))),
        )
        for trial in sorted(race.trials, key=lambda t: (t.global_batch, t.learning_rate))
        if not is_short(trial)
    ]
    header = ("run", "batch", "learning rate", "steps", "best loss")
    given_up = wrap(_given_up([t for t in race.trials if is_short(t)]))
    return f"{make_table(header, rows)}\n{given_up}".rstrip()


def _sizes(study: Study) -> str:
    rows = [
        (
            f"{size.batch_size:,}",
            show_number(_round(size.learning_rate.value)),
            _about(size.steps_to_target.value),
            _interval(size.steps_to_target) if size.steps_to_target.resolved else "",
            f"{size.reached} of {size.trials}",
            show_number(_round(size.val_loss.value or size.train_loss.value)),
        )
        for size in study.sizes
    ]
    header = ("batch", "learning rate", "steps to target", "interval", "reached", "last loss")
    return make_table(header, rows)


def _given_up(short: list[TrialRecord]) -> str:
    """The runs that the table leaves out."""
    if not short:
        return ""
    rates = [t.learning_rate for t in short]
    low, high = (show_number(_round(rate)) for rate in (min(rates), max(rates)))
    if len(short) == 1:
        diverged = " when it diverged" if short[0].state == "diverged" else ""
        return f"1 more, with learning rate {low}, was given up early{diverged}."
    dead = sum(t.state == "diverged" for t in short)
    diverged = f", {dead} of them diverged" if dead else ""
    return f"{len(short)} more, with learning rates {low} to {high}, were given up early{diverged}."


def _best_loss(trial: TrialRecord) -> float | None:
    return min((p.loss for p in trial.points if p.loss is not None), default=None)


def _ending(trial: TrialRecord) -> str:
    if trial.state == "diverged":
        return "diverged"
    if trial.steps_to_target is not None:
        return "met the target"
    return "stopped"


def _cost(plan: Plan) -> str:
    cost, evidence = plan.cost, plan.evidence
    environment = evidence.environment
    compared = (
        ""
        if cost.full_trainings is None
        else (
            f", as many examples as {_about(cost.full_trainings)} full trainings with "
            f"batch {UNIT_BATCH} are predicted to take"
        )
    )
    threads = "1 thread" if environment.num_threads == 1 else f"{environment.num_threads} threads"
    return wrap(
        f"Finding it cost {cost.examples:,} examples and {show_seconds(cost.seconds)}{compared}. "
        f"Measured on {evidence.setting.device} with {threads}, torch {environment.torch}, seed "
        f"{evidence.setting.seed}; another machine or thread count may need another plan."
    )
