"""Why this batch: what each size is expected to cost, and what each measurement did to that."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from rightbatch.laws.estimate import Estimate
from rightbatch.plan.price import make_price, max_micro_batch
from rightbatch.plan.records import Evidence, Plan
from rightbatch.report.data.table import Table, sizes_in_words, with_interval
from rightbatch.report.source import Source
from rightbatch.report.units import show_number
from rightbatch.study.conclude import conclude
from rightbatch.study.findings import SizeFinding
from rightbatch.study.records import RaceRecord
from rightbatch.study.study import Study

AS_GOOD = 1.05
"""Within 5 % of the least cost is as good."""
_UNITS = {"time": "seconds", "quality": "seconds", "examples": "examples", "steps": "steps"}


@dataclass(frozen=True, kw_only=True)
class SizeWhy:
    """What one size costs.

    Attributes:
        batch_size: Examples per update.
        cost: Times the cost of the chosen size; without a value where the target was missed.
        steps: Times its steps.
        basis: Whether it was trained to the target, compared on the way, or only predicted.
    """

    batch_size: int
    cost: Estimate
    steps: Estimate
    basis: Literal["trained", "compared", "predicted", "missed the target"]


@dataclass(frozen=True, kw_only=True)
class Why:
    """The figure.

    Attributes:
        finding: What it shows here.
        note: How to read it.
        unit: What is to be least.
        sizes: By batch size.
        near_best: The smallest and largest size that are as good, or None.
        chosen: Batch size of the answer.
    """

    finding: str
    note: str
    unit: str
    sizes: tuple[SizeWhy, ...]
    near_best: tuple[int, int] | None
    chosen: int

    def table(self) -> Table:
        """The exact numbers."""
        rows = tuple(
            (f"{s.batch_size:,}", with_interval(s.cost), with_interval(s.steps), s.basis)
            for s in self.sizes
        )
        header = ("batch", f"{self.unit} × those of {self.chosen:,}", "steps ×", "basis")
        return Table(header=header, rows=rows)


def collect(source: Source) -> Why | None:
    """The figure of a plan that raced, or of a study with an answer.

    Args:
        source: What the report is made of.

    Returns:
        The figure, or None where no sizes were compared.
    """
    if source.study is not None:
        return _of_study(source.study, source)
    race = None if source.plan is None else source.plan.evidence.race
    if race is None or source.plan is None or not race.trials:
        return None
    return _of_race(source.plan, source.plan.evidence, race)


def _of_race(plan: Plan, evidence: Evidence, race: RaceRecord) -> Why | None:
    setting = evidence.setting
    largest = max_micro_batch(evidence)
    price = make_price(setting.goal, evidence.throughput, largest, setting.replicas)
    outlook = conclude(race, price, seed=setting.seed)
    chosen = plan.recipe.global_batch
    if chosen not in outlook.sizes or len(outlook.sizes) < 2:
        return None
    column = outlook.sizes.index(chosen)
    arrived = {t.global_batch for t in race.trials if t.state == "reached"}

    def size(index: int, batch: int) -> SizeWhy:
        basis = "compared" if outlook.was_seen(batch) or batch == outlook.leader else "predicted"
        return SizeWhy(
            batch_size=batch,
            cost=_quantiles(outlook.log_cost[:, index] - outlook.log_cost[:, column]),
            steps=_quantiles(outlook.log_steps[:, index] - outlook.log_steps[:, column]),
            basis="trained" if batch in arrived else basis,
        )

    near = (plan.near_best.low, plan.near_best.high)
    unit = _UNITS[setting.goal]
    return Why(
        finding=_span(unit, chosen, near),
        note=(
            f"Of each size, the {unit} to the target against those of batch {chosen:,}: what the "
            "runs showed of the steps, times the measured cost of a step. Sizes that were not run "
            "are predicted, with wider intervals, and are never chosen. The best probably lies in "
            "the band."
        ),
        unit=unit,
        sizes=tuple(size(i, batch) for i, batch in enumerate(outlook.sizes)),
        near_best=near,
        chosen=chosen,
    )


def _quantiles(logs: np.ndarray) -> Estimate:
    low, middle, high = (float(np.exp(q)) for q in np.quantile(logs, (0.025, 0.5, 0.975)))
    return Estimate(value=middle, low=low, high=high, n=len(logs), method="posterior draws")


def _span(unit: str, chosen: int, near: tuple[int, int]) -> str:
    if near[0] == near[1]:
        return f"Batch {chosen:,} needs the fewest {unit}: no other is predicted to be as good"
    return (
        f"Batch {chosen:,} needs the fewest {unit}; the best is probably within "
        f"{near[0]:,} to {near[1]:,}"
    )


def _of_study(study: Study, source: Source) -> Why | None:
    if source.chosen is None or study.design.target is None:
        return None
    goal = "time" if source.plan is None else source.plan.goal
    unit = _UNITS[goal]
    if unit == "seconds" and all(f.seconds_to_target.value is None for f in study.sizes):
        unit = "examples"
    by_size = {finding.batch_size: finding for finding in study.sizes}
    mine = by_size.get(source.chosen[0])
    if mine is None or _cost(mine, unit).value is None:
        return None
    sizes = tuple(_against(finding, mine, unit) for finding in study.sizes)
    alike = [s.batch_size for s in sizes if s.cost.low is not None and s.cost.low <= AS_GOOD]
    others = [size for size in alike if size != mine.batch_size]
    tail = (
        f"batch {sizes_in_words(others)} cannot be told from it"
        if others
        else "no other size comes near"
    )
    least = min((s.cost.value for s in sizes if s.cost.value is not None), default=1.0)
    head = (
        f"Batch {mine.batch_size:,} needs the fewest {unit}"
        if least >= 1.0
        else f"Batch {mine.batch_size:,} needs {show_number(1 / least)} × the fewest {unit}"
    )
    return Why(
        finding=f"{head}; {tail}",
        note=(
            f"Of each size at its best learning rate, the {unit} to {study.design.target} against "
            f"those of batch {mine.batch_size:,}; the intervals are those of both sizes together."
        ),
        unit=unit,
        sizes=sizes,
        near_best=None,
        chosen=mine.batch_size,
    )


def _cost(finding: SizeFinding, unit: str) -> Estimate:
    return {
        "seconds": finding.seconds_to_target,
        "examples": finding.examples_to_target,
        "steps": finding.steps_to_target,
    }[unit]


def _against(finding: SizeFinding, mine: SizeFinding, unit: str) -> SizeWhy:
    same = finding.batch_size == mine.batch_size
    return SizeWhy(
        batch_size=finding.batch_size,
        cost=_ratio(_cost(finding, unit), _cost(mine, unit), same=same),
        steps=_ratio(finding.steps_to_target, mine.steps_to_target, same=same),
        basis="trained" if finding.steps_to_target.resolved else "missed the target",
    )


def _ratio(one: Estimate, other: Estimate, *, same: bool) -> Estimate:
    """The ratio of two independent log-normal estimates; of a size to itself, exactly 1."""
    if same:
        return Estimate(value=1.0, low=1.0, high=1.0, n=one.n, method="by definition")
    assert other.value is not None
    n, method = min(one.n, other.n), "ratio of geometric means"
    if one.value is None:
        low = None if one.low is None else one.low / other.value
        return Estimate(value=None, low=low, n=one.n, method="lower bound: the target was missed")
    ratio = one.value / other.value
    if None in (one.low, one.high, other.low, other.high):
        return Estimate(value=ratio, n=n, method=method)
    spread = math.hypot(_half(one), _half(other))
    return Estimate(
        value=ratio,
        low=ratio * math.exp(-spread),
        high=ratio * math.exp(spread),
        n=n,
        method=method,
    )


def _half(estimate: Estimate) -> float:
    """Half the width of an interval in logarithms."""
    if not estimate.low or estimate.high is None:
        return 0.0
    return math.log(estimate.high / estimate.low) / 2
