"""The plan as text: what to do, why, what it should take, what was run, what it cost."""

from __future__ import annotations

from rightbatch.cli.table import make_table, make_wrapped_table, wrap
from rightbatch.laws.estimate import Estimate
from rightbatch.plan.choose import split_for
from rightbatch.plan.records import Plan
from rightbatch.report.answer_plan import (
    about,
    about_interval,
    answer,
    cost_text,
    reason_rows,
    rounded,
    target_text,
)
from rightbatch.report.units import show_number, show_seconds
from rightbatch.study.records import RaceRecord, TrialRecord
from rightbatch.study.study import Study

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
    parts.append(wrap(cost_text(plan)))
    return "\n\n".join(parts)


def _reasons(plan: Plan) -> str:
    rows = [(name, value, f"{why} [{source}]") for name, value, why, source in reason_rows(plan)]
    return make_wrapped_table(("field", "value", "because"), rows)


def _prediction(plan: Plan) -> str:
    prediction = plan.prediction
    assert prediction is not None
    goal = f" to {target_text(plan)}"
    rows = [
        ("steps", about(prediction.steps.value), about_interval(prediction.steps)),
        ("examples", about(prediction.examples.value), about_interval(prediction.examples)),
        ("modelled time", *_seconds_interval(prediction.seconds)),
    ]
    return make_table((f"it should take{goal}", "about", "95 % interval"), rows)


def _seconds_interval(estimate: Estimate) -> tuple[str, str]:
    value, low, high = (
        show_seconds(rounded(x, 2)) for x in (estimate.value, estimate.low, estimate.high)
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
            show_number(rounded(trial.learning_rate)),
            f"{trial.steps:,}",
            show_number(rounded(_best_loss(trial))),
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
            show_number(rounded(size.learning_rate.value)),
            about(size.steps_to_target.value),
            about_interval(size.steps_to_target) if size.steps_to_target.resolved else "",
            f"{size.reached} of {size.trials}",
            show_number(rounded(size.val_loss.value or size.train_loss.value)),
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
    low, high = (show_number(rounded(rate)) for rate in (min(rates), max(rates)))
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
