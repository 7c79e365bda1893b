"""Generalisation gap: validation loss − training loss at the end, by batch size."""

from __future__ import annotations

from dataclasses import dataclass

from rightbatch.laws.estimate import Estimate
from rightbatch.report.data.table import Table, overlap, with_interval
from rightbatch.report.source import Source
from rightbatch.report.units import show_number


@dataclass(frozen=True, kw_only=True)
class SizeGap:
    """One batch size at its best learning rate.

    Attributes:
        batch_size: Examples per update.
        train_loss: At the end.
        val_loss: At the end.
        gap: Their difference, seed by seed.
    """

    batch_size: int
    train_loss: Estimate
    val_loss: Estimate
    gap: Estimate


@dataclass(frozen=True, kw_only=True)
class Gap:
    """The figure.

    Attributes:
        finding: What it shows here.
        note: How to read it.
        sizes: By batch size.
        chosen: Batch size of the answer, or None.
    """

    finding: str
    note: str
    sizes: tuple[SizeGap, ...]
    chosen: int | None

    def table(self) -> Table:
        """The exact numbers."""
        rows = tuple(
            (
                f"{size.batch_size:,}",
                with_interval(size.train_loss),
                with_interval(size.val_loss),
                with_interval(size.gap),
            )
            for size in self.sizes
        )
        return Table(header=("batch", "training loss", "validation loss", "gap"), rows=rows)


def collect(source: Source) -> Gap | None:
    """The gap of a study with validation data.

    Args:
        source: What the report is made of.

    Returns:
        The figure, or None where fewer than two sizes have a gap.
    """
    if source.study is None:
        return None
    sizes = tuple(
        SizeGap(
            batch_size=finding.batch_size,
            train_loss=finding.train_loss,
            val_loss=finding.val_loss,
            gap=finding.gap,
        )
        for finding in source.study.sizes
        if finding.gap.resolved
    )
    if len(sizes) < 2:
        return None
    return Gap(
        finding=_finding(sizes),
        note=(
            "Each size at its best learning rate when the budget was spent, with 95 % intervals "
            "over seeds. A size that has not learnt yet has no gap either: see the losses."
        ),
        sizes=sizes,
        chosen=None if source.chosen is None else source.chosen[0],
    )


def _finding(sizes: tuple[SizeGap, ...]) -> str:
    first, last = sizes[0], sizes[-1]
    ends = (
        f"{show_number(first.gap.value)} at batch {first.batch_size:,} and "
        f"{show_number(last.gap.value)} at {last.batch_size:,}"
    )
    if len([s for s in sizes if s.gap.low is not None]) < 2:
        return f"The generalisation gap is {ends}; one seed cannot tell whether that is chance"
    pairs = [(a, b) for a in sizes for b in sizes if a.batch_size < b.batch_size]
    apart = [(a, b) for a, b in pairs if not overlap(a.gap, b.gap)]
    if not apart:
        return f"No difference in the generalisation gap is resolved: it is {ends}"
    a, b = max(apart, key=lambda pair: abs((pair[0].gap.value or 0) - (pair[1].gap.value or 0)))
    more, less = (a, b) if (a.gap.value or 0) > (b.gap.value or 0) else (b, a)
    return (
        f"The generalisation gap is larger at batch {more.batch_size:,} "
        f"({show_number(more.gap.value)}) than at {less.batch_size:,} "
        f"({show_number(less.gap.value)})"
    )
