"""What a plan answers, in a sentence or two: the same in the terminal and in the report."""

from __future__ import annotations

from rightbatch.laws.estimate import Estimate
from rightbatch.plan.price import max_micro_batch, step_seconds
from rightbatch.plan.records import Plan
from rightbatch.report.units import show_interval, show_number, show_seconds
from rightbatch.study.race import UNIT_BATCH

_LABELS = {
    "global_batch": "batch size",
    "learning_rate": "learning rate",
    "micro_batch": "micro-batch",
    "warmup_steps": "warm-up steps",
}
"""Fields of the recipe whose names people write otherwise."""


def answer(plan: Plan) -> str:
    """The plan in a sentence or two: what to do, what it gains, what that rests on.

    Args:
        plan: The plan.

    Returns:
        One paragraph, not wrapped.
    """
    return f"{headline(plan)} {rests_on(plan)}"


def headline(plan: Plan) -> str:
    """What to do, what it gains, and what is as good, in a sentence."""
    recipe = plan.recipe
    rate = show_number(rounded(recipe.learning_rate))
    todo = f"Train with batch {recipe.global_batch:,} at learning rate {rate}"
    return f"{todo}{_gain(plan)}; {_near_best(plan)}."


def _gain(plan: Plan) -> str:
    if plan.evidence.race is None and plan.evidence.study is None:
        return ", as far as probes tell"
    batch = UNIT_BATCH
    advantage = advantage_of(plan)
    if advantage is None or advantage.value is None:
        return ", the usual default batch" if plan.recipe.global_batch == batch else ""
    number = f"{about(advantage.value)} ({about_interval(advantage)})"
    goal = f"to {target_text(plan)}"
    what = {
        "examples": f"{number} times fewer examples {goal} than",
        "steps": f"{number} times fewer steps {goal} than",
    }.get(plan.goal, f"{number} times as fast {goal} as")
    verb = "take" if plan.goal in {"examples", "steps"} else "be"
    how = "found" if plan.evidence.study else "predicted"
    text = f": {how} to {verb} {what} batch {batch} at its best learning rate"
    # As shown: an interval that is printed as 1 to 2 has 1 in it.
    low, high = rounded(advantage.low, 2) or 0.0, rounded(advantage.high, 2)
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


def target_text(plan: Plan) -> str:
    """The loss or metric that counts as trained, in words; empty where nothing was trained."""
    target, race = plan.evidence.setting.target, plan.evidence.race
    if target is not None and (race is None or race.target_reached):
        return target
    return "" if race is None else f"a loss of {race.target_loss:.3g}"


def _near_best(plan: Plan) -> str:
    low, high = plan.near_best.low, plan.near_best.high
    if low == high:
        return "no other batch is predicted to be as good"
    return f"the best batch is probably within {low:,} to {high:,}"


def rests_on(plan: Plan) -> str:
    """What was measured and run for the plan, in a sentence."""
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


def rounded(value: float | None, digits: int = 3) -> float | None:
    """A number with so many significant digits; None stays None."""
    return None if value is None else float(f"{value:.{digits}g}")


def about(value: float | None) -> str:
    """Two significant digits: what is predicted is not known to more."""
    return show_number(rounded(value, 2))


def about_interval(estimate: Estimate) -> str:
    """The interval of what is predicted, to two significant digits."""
    low, high = rounded(estimate.low, 2), rounded(estimate.high, 2)
    value = rounded(estimate.value, 2)
    return show_interval(Estimate(value=value, low=low, high=high, n=estimate.n))


def reason_rows(plan: Plan) -> list[tuple[str, str, str, str]]:
    """Why each field of the recipe is what it is.

    Args:
        plan: The plan.

    Returns:
        Field, value, reason and what that rests on.
    """
    return [
        (
            _LABELS.get(reason.field, reason.field),
            _value(getattr(plan.recipe, reason.field, "")),
            reason.because,
            reason.source,
        )
        for reason in plan.reasons
    ]


def _value(value: float | str) -> str:
    if isinstance(value, str):
        return value
    return show_number(value if isinstance(value, int) else rounded(value))


def cost_text(plan: Plan) -> str:
    """What finding the plan cost, and where it was measured.

    Args:
        plan: The plan.

    Returns:
        Two sentences.
    """
    cost, evidence = plan.cost, plan.evidence
    environment = evidence.environment
    compared = (
        ""
        if cost.full_trainings is None
        else (
            f", as many examples as {about(cost.full_trainings)} full trainings with "
            f"batch {UNIT_BATCH} are predicted to take"
        )
    )
    threads = "1 thread" if environment.num_threads == 1 else f"{environment.num_threads} threads"
    return (
        f"Finding it cost {cost.examples:,} examples and {show_seconds(cost.seconds)}{compared}. "
        f"Measured on {evidence.setting.device} with {threads}, torch {environment.torch}, seed "
        f"{evidence.setting.seed}; another machine or thread count may need another plan."
    )
