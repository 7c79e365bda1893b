"""What holds over the batch sizes of a study: critical batch, rate rules, the best pair."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rightbatch.laws.estimate import unresolved
from rightbatch.laws.hyperbola import StepsToTarget, fit_hyperbola
from rightbatch.laws.scaling import scale_learning_rate
from rightbatch.laws.seeds import (
    exponent_over_sizes,
)
from rightbatch.study.findings import (
    RULES,
    Best,
    Fits,
    RateRule,
    Rule,
    SizeFinding,
)
from rightbatch.study.judging import Setting
from rightbatch.study.size_table import SizeTable

_LEAST_SIZES = 3


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
    inside = [table for table in alike if table.bracketed]
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
            f"have it between rates run to their end; {_LEAST_SIZES} are needed."
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
