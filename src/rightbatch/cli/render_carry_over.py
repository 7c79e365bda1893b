"""Whether a choice carries over, as text."""

from __future__ import annotations

from rightbatch.cli.table import make_table, wrap
from rightbatch.laws.estimate import Estimate
from rightbatch.report.units import show_interval, show_number, show_seconds
from rightbatch.study.carry_over import CarryOver, GoalCarried
from rightbatch.study.size_costs import Goal

_UNITS: dict[Goal, str] = {
    "seconds": "seconds to the target",
    "examples": "examples to the target",
    "steps": "steps to the target",
    "loss": "loss at the end",
}


def carry_over_text(carried: CarryOver) -> str:
    """What carrying the choice costs, the order of the sizes under each goal, and each size.

    Args:
        carried: The comparison.

    Returns:
        Lines of at most 80 columns.
    """
    parts = [wrap(carry_over_answer(carried)), _goals(carried)]
    if carried.goals:
        parts.append(_sizes(carried.goals[0]))
    parts += [wrap(f"Note: {warning}") for warning in carried.warnings]
    return "\n\n".join(parts)


def carry_over_answer(carried: CarryOver) -> str:
    """What the larger model pays for the small one's choice.

    Args:
        carried: The comparison.

    Returns:
        One paragraph, not wrapped.
    """
    if not carried.goals:
        return "Neither study tells what is best: no goal is resolved."
    first = carried.goals[0]
    if first.small_best.value is None:
        return f"No batch size arrived on {carried.small}: there is no choice to carry over."
    size, rate = f"{int(first.small_best.value):,}", show_number(first.learning_rate)
    return (
        f"Batch {size} at learning rate {rate}, the best on {carried.small} in "
        f"{_UNITS[first.goal]}, {_costs(first.goal, first.regret)} on {carried.large}; with the "
        f"rate retuned there, it {_costs(first.goal, first.regret_retuned)}. The orders of the "
        f"batch sizes agree to τ = {_tau(first.agreement)} (1 the same, 0 unrelated, −1 reversed)."
    )


def _costs(goal: Goal, regret: Estimate) -> str:
    if regret.value is None:
        if regret.low is None:
            return f"is not resolved ({regret.method})"
        return f"did not arrive on every seed: at least {_amount(goal, regret.low)} more than best"
    if regret.value == 0.0 and not regret.high:
        return "is the best"
    interval = "" if regret.low is None else f" ({_interval(goal, regret)})"
    if regret.low == 0.0:
        return f"is not told apart from the best: {_amount(goal, regret.value)} more{interval}"
    return f"costs {_amount(goal, regret.value)} more than the best{interval}"


def _amount(goal: Goal, value: float | None) -> str:
    if value is None:
        return "?"
    return show_number(value) if goal == "loss" else f"{100 * value:,.0f} %"


def _interval(goal: Goal, regret: Estimate) -> str:
    if regret.low is None and regret.high is None:
        return "no interval" if regret.resolved else "unresolved"
    if regret.high is None:
        return f"at least {_amount(goal, regret.low)}"
    low, high = (_amount(goal, end) for end in (regret.low, regret.high))
    return f"{low.removesuffix(' %')}–{high}"


def _tau(agreement: Estimate) -> str:
    if agreement.value is None:
        return "?"
    if agreement.low is None or agreement.high is None:
        return f"{agreement.value:.2g}"
    return f"{agreement.value:.2g}, {agreement.low:.2g} to {agreement.high:.2g}"


def _goals(carried: CarryOver) -> str:
    header = ("goal", "agreement τ", "best: small", "larger", "regret", "rate retuned", "blind")
    rows = [
        (
            found.goal,
            _tau(found.agreement),
            _size(found.small_best),
            _size(found.large_best),
            _short(found.goal, found.regret),
            _short(found.goal, found.regret_retuned),
            _short(found.goal, found.regret_blind),
        )
        for found in carried.goals
    ]
    return (
        "Under each goal; blind is the mean over the sizes, each at its best rate\n"
        f"{make_table(header, rows)}"
    )


def _short(goal: Goal, regret: Estimate) -> str:
    if regret.value is None:
        return "?" if regret.low is None else f"> {_amount(goal, regret.low)}"
    return _amount(goal, regret.value)


def _size(best: Estimate) -> str:
    return "?" if best.value is None else f"{int(best.value):,}"


def _sizes(found: GoalCarried) -> str:
    header = ("batch", "small", "larger", "regret", "interval")
    rows = [
        (
            f"{size.batch_size:,}",
            _cost(found.goal, size.small),
            _cost(found.goal, size.large),
            _short(found.goal, size.regret),
            _interval(found.goal, size.regret),
        )
        for size in found.sizes
    ]
    return (
        f"Each batch size at its best learning rate, in {_UNITS[found.goal]}\n"
        f"{make_table(header, rows, left=0)}"
    )


def _cost(goal: Goal, cost: Estimate) -> str:
    if cost.value is None:
        if cost.low is None:
            return "not all"
        low = show_seconds(cost.low) if goal == "seconds" else show_interval(cost)
        return f"> {low}" if goal == "seconds" else low
    if goal == "seconds":
        return show_seconds(cost.value)
    return show_number(cost.value if goal == "loss" else round(cost.value))
