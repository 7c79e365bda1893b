"""The learning-rate rules against the best rate that was measured at each batch size."""

from __future__ import annotations

from dataclasses import dataclass

from rightbatch.laws.estimate import Estimate
from rightbatch.laws.scaling import scale_learning_rate
from rightbatch.report.answer_study import which_rule
from rightbatch.report.data.table import Table, with_interval
from rightbatch.report.source import Source
from rightbatch.report.units import show_interval, show_number
from rightbatch.study.findings import RULES, RateRule, Rule

RULE_NAMES: dict[Rule, str] = {"linear": "linear", "sqrt": "square root"}


@dataclass(frozen=True, kw_only=True)
class BestRate:
    """The best rate of one size.

    Attributes:
        batch_size: Examples per update.
        learning_rate: The best of those tried, and where the best of all lies.
        at_edge: Whether it is the lowest or highest that was tried: the best may lie beyond.
    """

    batch_size: int
    learning_rate: Estimate
    at_edge: bool


@dataclass(frozen=True, kw_only=True)
class RuleLine:
    """A rule, carried on from the smallest size.

    Attributes:
        rule: Which.
        rates: Batch size and learning rate.
        kept: How far it holds, where that was found.
    """

    rule: Rule
    rates: tuple[tuple[int, float], ...]
    kept: RateRule | None


@dataclass(frozen=True, kw_only=True)
class RateRules:
    """The figure.

    Attributes:
        finding: What it shows here.
        note: How to read it.
        sizes: By batch size.
        lines: The rules.
        chosen: The pair of the answer, or None.
    """

    finding: str
    note: str
    sizes: tuple[BestRate, ...]
    lines: tuple[RuleLine, ...]
    chosen: tuple[int, float] | None

    def table(self) -> Table:
        """The exact numbers."""
        by_rule = [dict(line.rates) for line in self.lines]
        header = ("batch", "best rate", *(RULE_NAMES[line.rule] for line in self.lines))
        rows = tuple(
            (
                f"{size.batch_size:,}",
                with_interval(size.learning_rate) + (", at the edge" if size.at_edge else ""),
                *(show_number(rates.get(size.batch_size)) for rates in by_rule),
            )
            for size in self.sizes
        )
        return Table(header=header, rows=rows)


def collect(source: Source) -> RateRules | None:
    """The figure of a study of at least two sizes.

    Args:
        source: What the report is made of.

    Returns:
        The figure, or None.
    """
    study = source.study
    sizes = () if study is None else tuple(
        BestRate(
            batch_size=f.batch_size, learning_rate=f.learning_rate, at_edge=f.at_edge is not None
        )
        for f in study.sizes
        if f.learning_rate.resolved and len(f.rates) > 1
    )  # fmt: skip
    if study is None or len(sizes) < 2:
        return None
    kept: dict[Rule, RateRule] = {rule.rule: rule for rule in study.fits.rate_rules}
    return RateRules(
        finding=_finding(sizes, study.fits.rate_exponent, kept),
        note=_note(sizes, kept),
        sizes=sizes,
        lines=tuple(_line(rule, sizes, kept.get(rule)) for rule in RULES),
        chosen=source.chosen,
    )


def _line(rule: Rule, sizes: tuple[BestRate, ...], kept: RateRule | None) -> RuleLine:
    begins = sizes[0] if kept is None else _at(sizes, kept.begins_at)
    rate = begins.learning_rate.value
    assert rate is not None  # sizes without one were left out
    after = [s.batch_size for s in sizes if s.batch_size >= begins.batch_size]
    rates = [(B, scale_learning_rate(rate, begins.batch_size, B, rule=rule)) for B in after]
    return RuleLine(rule=rule, rates=tuple(rates), kept=kept)


def _at(sizes: tuple[BestRate, ...], batch_size: int) -> BestRate:
    return next((size for size in sizes if size.batch_size == batch_size), sizes[0])


def _finding(sizes: tuple[BestRate, ...], exponent: Estimate, kept: dict[Rule, RateRule]) -> str:
    breaks = [
        f"{RULE_NAMES[name]} scaling fails at {rule.breaks_at:,}"
        for name, rule in kept.items()
        if rule.breaks_at is not None
    ]
    if exponent.value is not None:
        power = f"{show_number(exponent.value)} ({show_interval(exponent)})"
        return (
            f"The best learning rate grows as the batch to the power {power}: "
            f"{which_rule(exponent)}"
        )
    if breaks:
        return breaks[0].capitalize()
    first, last = sizes[0], sizes[-1]
    return (
        f"The best learning rate goes from {show_number(first.learning_rate.value)} at batch "
        f"{first.batch_size:,} to {show_number(last.learning_rate.value)} at {last.batch_size:,}"
    )


def _note(sizes: tuple[BestRate, ...], kept: dict[Rule, RateRule]) -> str:
    parts = [
        f"{RULE_NAMES[name].capitalize()} scaling holds to {rule.holds_to:,}"
        + (f" and fails at {rule.breaks_at:,}." if rule.breaks_at else ".")
        for name, rule in kept.items()
    ]
    if any(size.at_edge for size in sizes):
        parts.append("Open points lie at the edge of what was tried: the best may lie beyond.")
    return " ".join(["The bars are where the best rate lies, over seeds.", *parts])
