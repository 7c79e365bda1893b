"""Batch and learning rate by a study: every size at every rate, with seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from rightbatch.laws.estimate import Estimate, unresolved
from rightbatch.plan.choice import Choice
from rightbatch.plan.price import make_price, max_micro_batch, step_seconds
from rightbatch.plan.records import Evidence, Goal, NearBest, Prediction, Reason
from rightbatch.study.design import Unit
from rightbatch.study.findings import Comparison, SizeFinding
from rightbatch.study.race import UNIT_BATCH
from rightbatch.study.records import Cell
from rightbatch.study.study import Study

_NEAR = 1.05
_MOST_SPAN = 8.0
_EQUAL: dict[Goal, Unit] = {
    "time": "seconds", "quality": "seconds", "examples": "examples", "steps": "steps",
}  # fmt: skip
_UNIT_WORDS = {"time": "modelled seconds", "quality": "modelled seconds"}


@dataclass(frozen=True, kw_only=True)
class _Judged:
    """A size at its best rate, and what the goal wants least of."""

    batch_size: int
    learning_rate: float
    cost: Estimate


def choose_by_study(evidence: Evidence, study: Study) -> Choice:
    """What a study says: least cost to the target, or the least loss at equal cost.

    Args:
        evidence: What was measured.
        study: The study.

    Returns:
        The choice.
    """
    setting = evidence.setting
    met = _costs_to_target(evidence, study)
    judged = met or _losses_at_equal_cost(setting.goal, study) or _last_losses(study)
    best = min(judged, key=lambda size: size.cost.value or math.inf)
    low, high = _near_best(judged, best)
    finding = _finding(study, best.batch_size)
    default = _finding(study, UNIT_BATCH) if met else None
    steps = None if default is None else default.steps_to_target.value
    return Choice(
        cell=Cell(global_batch=best.batch_size, learning_rate=best.learning_rate),
        near_best=NearBest(low=low, high=high),
        prediction=_predict(evidence, finding, default) if met and finding else None,
        batch_reason=Reason(
            field="global_batch",
            because=_batch_reason(setting.goal, study, judged, best, met=bool(met)),
            source="study",
        ),
        rate_reason=Reason(
            field="learning_rate", because=_rate_reason(finding, best), source="study"
        ),
        warnings=(*_warnings(evidence, study, met=bool(met)), *study.warnings),
        one_training=None if steps is None else steps * UNIT_BATCH,
    )


def _finding(study: Study, batch_size: int) -> SizeFinding | None:
    return next((f for f in study.sizes if f.batch_size == batch_size), None)


def _costs_to_target(evidence: Evidence, study: Study) -> list[_Judged]:
    """Sizes at which every seed met the target."""
    setting = evidence.setting
    price = make_price(
        setting.goal, evidence.throughput, max_micro_batch(evidence), setting.replicas
    )
    return [
        _Judged(
            batch_size=f.batch_size,
            learning_rate=f.learning_rate.value,
            cost=_times(f.steps_to_target, price(f.batch_size)),
        )
        for f in study.sizes
        if f.learning_rate.value is not None and f.steps_to_target.value is not None
    ]


def _losses_at_equal_cost(goal: Goal, study: Study) -> list[_Judged]:
    comparison = _comparison(goal, study)
    if comparison is None:
        return []
    return [
        _Judged(batch_size=s.batch_size, learning_rate=s.learning_rate, cost=s.loss)
        for s in comparison.sizes
        if s.loss.value is not None
    ]


def _comparison(goal: Goal, study: Study) -> Comparison | None:
    return next((c for c in study.comparisons if c.unit == _EQUAL[goal]), None)


def _last_losses(study: Study) -> list[_Judged]:
    """Where a single size was run, or no common cost was reached."""
    assert study.best is not None  # a study without any loss is no evidence
    best = study.best
    finding = _finding(study, best.batch_size)
    loss = unresolved(0) if finding is None else finding.val_loss
    return [_Judged(batch_size=best.batch_size, learning_rate=best.learning_rate, cost=loss)]


def _near_best(judged: Sequence[_Judged], best: _Judged) -> tuple[int, int]:
    """Sizes around the best one that may cost at most 5 % more than it, at most 8 × apart."""
    goal = _NEAR * (best.cost.value or 0.0)
    there = {size.batch_size: size for size in judged}
    sizes = sorted(there)
    low = high = sizes.index(best.batch_size)

    def close(index: int) -> bool:
        cost = there[sizes[index]].cost
        span = max(sizes[index], sizes[high]) / min(sizes[index], sizes[low])
        return (cost.low or 0.0) <= goal and span <= _MOST_SPAN

    while low > 0 and close(low - 1):
        low -= 1
    while high + 1 < len(sizes) and close(high + 1):
        high += 1
    return sizes[low], sizes[high]


def _predict(evidence: Evidence, finding: SizeFinding, default: SizeFinding | None) -> Prediction:
    largest, replicas = max_micro_batch(evidence), evidence.setting.replicas

    def seconds(of: SizeFinding) -> Estimate:
        each = step_seconds(evidence.throughput, of.batch_size, largest, replicas)
        return _times(of.steps_to_target, each)

    speedup = None
    if default is not None and default.batch_size != finding.batch_size:
        speedup = _ratio(seconds(default), seconds(finding))
    return Prediction(
        steps=finding.steps_to_target,
        seconds=seconds(finding),
        examples=finding.examples_to_target,
        speedup=speedup,
    )


def _times(estimate: Estimate, factor: float) -> Estimate:
    value, low, high = (
        None if x is None else x * factor for x in (estimate.value, estimate.low, estimate.high)
    )
    return Estimate(value=value, low=low, high=high, n=estimate.n, method=estimate.method)


def _ratio(above: Estimate, below: Estimate) -> Estimate | None:
    """A quotient of two geometric means over seeds, their log errors taken as independent."""
    if above.value is None or below.value is None:
        return None
    middle, wide = math.log(above.value / below.value), 0.0
    for part in (above, below):
        if part.value is None or part.low is None or part.high is None:
            return None
        wide = math.hypot(wide, 0.5 * math.log(part.high / part.low))
    return Estimate(
        value=math.exp(middle),
        low=math.exp(middle - wide),
        high=math.exp(middle + wide),
        n=min(above.n, below.n),
        method="quotient of geometric means over seeds",
    )


# ---- in words ----------------------------------------------------------------------------------


def _batch_reason(
    goal: Goal, study: Study, judged: Sequence[_Judged], best: _Judged, *, met: bool
) -> str:
    others = [
        f"batch {size.batch_size:,} {_number(size.cost.value / best.cost.value)}×"
        for size in judged
        if size is not best and size.cost.value and best.cost.value
    ]
    compared = f": {'; '.join(others)}" if others else ""
    seeds = len(study.design.seeds)
    if met:
        what = _UNIT_WORDS.get(goal, goal)
        return (
            f"Fewest {what} to {study.design.target}, each size at its own best learning rate, "
            f"{seeds} seeds{compared}."
        )
    comparison = _comparison(goal, study)
    if comparison is None:
        return "The only size that was compared."
    return f"Least loss after equal {comparison.unit}, {seeds} seeds{compared}."


def _rate_reason(finding: SizeFinding | None, best: _Judged) -> str:
    if finding is None:
        return "The best at this batch."
    own = finding.learning_rate
    interval = (
        ""
        if own.low is None or own.high is None
        else f"; the best one lies within {own.low:.3g} to {own.high:.3g}"
    )
    edge = (
        ""
        if finding.stable_edge is None
        else f". Above {finding.stable_edge:.3g} trainings diverged"
    )
    return f"Best of {len(finding.rates)} tried at batch {best.batch_size:,}{interval}{edge}."


def _warnings(evidence: Evidence, study: Study, *, met: bool) -> list[str]:
    setting, found = evidence.setting, list[str]()
    if met:
        return found
    if setting.goal == "quality":
        found.append("Planned for the best loss at equal modelled seconds.")
    elif setting.target is None:
        found.append(
            "No target was given: sizes are compared by their loss at equal cost. Pass "
            "target='val_loss<=…' to plan for the loss that you want."
        )
    else:
        found.append(
            f"The target {setting.target} was met by all seeds at no batch size; sizes are "
            f"compared by their loss at equal cost, after {study.design.budget.amount:g} "
            f"{study.design.budget.unit} at most. Give a larger budget, or check the target."
        )
    return found


def _number(value: float) -> str:
    return f"{value:.2g}" if value < 100 else f"{value:,.0f}"
