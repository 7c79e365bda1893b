"""Steps against examples to the target: what a larger batch buys, and what it pays."""

from __future__ import annotations

from dataclasses import dataclass

from rightbatch.report.data import cost_to_target
from rightbatch.report.data.cost_to_target import SizeCost
from rightbatch.report.data.table import Table, sizes_in_words, with_interval
from rightbatch.report.source import Source


@dataclass(frozen=True, kw_only=True)
class Pareto:
    """The front.

    Attributes:
        finding: What it shows here.
        note: How to read it.
        sizes: Sizes at which every training met the target.
        front: Those that no other beats both in steps and in examples.
        chosen: Batch size of the answer, or None.
    """

    finding: str
    note: str
    sizes: tuple[SizeCost, ...]
    front: tuple[int, ...]
    chosen: int | None

    def table(self) -> Table:
        """The exact numbers."""
        rows = tuple(
            (
                f"{size.batch_size:,}",
                with_interval(size.steps),
                with_interval(size.examples),
                "yes" if size.batch_size in self.front else "no",
            )
            for size in self.sizes
        )
        return Table(header=("batch", "steps", "examples", "on the front"), rows=rows)


def collect(source: Source) -> Pareto | None:
    """The front of a study with a target.

    Args:
        source: What the report is made of.

    Returns:
        The front, or None where fewer than two sizes met the target.
    """
    cost = cost_to_target.collect(source)
    if cost is None or source.study is None:
        return None
    met = tuple(s for s in cost.sizes if s.steps.resolved and s.examples.resolved)
    if len(met) < 2:
        return None
    front = source.study.fits.pareto
    missed = [s.batch_size for s in cost.sizes if s not in met]
    note = "Down is fewer updates, left is less computing; the line joins the front."
    if missed:
        note += (
            " Not on the picture, since trainings missed the target: batch "
            f"{sizes_in_words(missed)}."
        )
    return Pareto(
        finding=_finding(met, front), note=note, sizes=met, front=front, chosen=cost.chosen
    )


def _finding(sizes: tuple[SizeCost, ...], front: tuple[int, ...]) -> str:
    beaten = [size.batch_size for size in sizes if size.batch_size not in front]
    if len(front) == 1:
        return f"Batch {front[0]:,} needs the fewest steps and the fewest examples"
    text = f"Fewer steps cost more examples: batch {sizes_in_words(front)} trade one for the other"
    return f"{text}; batch {sizes_in_words(beaten)} loses in both" if beaten else text
