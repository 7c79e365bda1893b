"""The gradient noise scale while training."""

from __future__ import annotations

from dataclasses import dataclass

from rightbatch.laws.estimate import Estimate
from rightbatch.report.data.table import Table, overlap, with_interval
from rightbatch.report.source import Source
from rightbatch.report.units import show_number


@dataclass(frozen=True, kw_only=True)
class Noise:
    """The figure.

    Attributes:
        finding: What it shows here.
        note: How to read it.
        points: Updates done, and the noise scale there.
        chosen: Batch size of the answer.
    """

    finding: str
    note: str
    points: tuple[tuple[int, Estimate], ...]
    chosen: int

    def table(self) -> Table:
        """The exact numbers."""
        rows = tuple(
            (f"{step:,}", with_interval(scale), f"{scale.n:,}", scale.method)
            for step, scale in self.points
        )
        return Table(header=("steps", "noise scale", "examples used", "method"), rows=rows)


def collect(source: Source) -> Noise | None:
    """The figure of a plan.

    Args:
        source: What the report is made of.

    Returns:
        The figure, or None without a plan.
    """
    if source.plan is None:
        return None
    record = source.plan.evidence.noise_scale
    points = tuple((point.step, point.noise_scale) for point in record.trajectory)
    if not points:
        return None
    return Noise(
        finding=_finding(points),
        note=(
            "B_simple = tr Σ/|G|², in examples: below it, examples of a batch mostly add to the "
            f"signal; far above, they repeat each other. Warm training at batch "
            f"{record.global_batch:,}, 95 % intervals."
        ),
        points=points,
        chosen=source.plan.recipe.global_batch,
    )


def _finding(points: tuple[tuple[int, Estimate], ...]) -> str:
    known = [(step, scale) for step, scale in points if scale.resolved]
    if not known:
        return "The noise scale is not resolved: the mean gradient cannot be told from 0"
    (first, start), (last, end) = known[0], known[-1]
    at_first = f"{show_number(start.value)} examples after {first:,} steps"
    if len(known) == 1:
        return f"The noise scale is {at_first}"
    to = f"{show_number(end.value)} after {last:,}"
    if overlap(start, end):
        return f"No growth of the noise scale is resolved: {at_first}, {to}"
    verb = "grows" if (end.value or 0) > (start.value or 0) else "falls"
    return f"The noise scale {verb} from {at_first} to {to}"
