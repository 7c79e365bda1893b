"""Seconds of a step and throughput against the micro-batch: α, β and the knee."""

from __future__ import annotations

from dataclasses import dataclass

from rightbatch.laws.power_of_two import PowerOfTwo
from rightbatch.laws.timing import SizeTime, StepTimeLaw
from rightbatch.report.data.table import Table
from rightbatch.report.source import Source
from rightbatch.report.units import show_interval, show_number, show_seconds

_CURVE_POINTS = 60


@dataclass(frozen=True, kw_only=True)
class StepTimes:
    """The figure.

    Attributes:
        finding: What it shows here.
        note: How to read it.
        sizes: Each timed size.
        law: t(B) = max(floor, α + βB).
        line: Micro-batch and seconds by the law.
        powers_of_two: Whether a power of two is faster here.
        chosen: Micro-batch of the answer.
    """

    finding: str
    note: str
    sizes: tuple[SizeTime, ...]
    law: StepTimeLaw
    line: tuple[tuple[float, float], ...]
    powers_of_two: tuple[PowerOfTwo, ...]
    chosen: int

    def table(self) -> Table:
        """The exact numbers."""
        rows = tuple(
            (
                f"{size.micro_batch:,}",
                show_seconds(size.seconds),
                f"{show_seconds(size.low)}–{show_seconds(size.high)}",
                show_number(round(size.micro_batch / size.seconds)),
                str(size.n),
            )
            for size in self.sizes
        )
        header = ("micro-batch", "step", "95 % interval", "examples per second", "rounds")
        return Table(header=header, rows=rows)


def collect(source: Source) -> StepTimes | None:
    """The figure of a plan.

    Args:
        source: What the report is made of.

    Returns:
        The figure, or None without a plan.
    """
    if source.plan is None:
        return None
    record = source.plan.evidence.throughput
    sizes = tuple(sorted(record.sizes, key=lambda size: size.micro_batch))
    if not sizes:
        return None
    low, high = sizes[0].micro_batch, sizes[-1].micro_batch
    batches = [low * (high / low) ** (i / _CURVE_POINTS) for i in range(_CURVE_POINTS + 1)]
    return StepTimes(
        finding=_finding(record.law, high),
        note=_note(record.law, record.powers_of_two),
        sizes=sizes,
        law=record.law,
        line=tuple((B, record.law.predict(B)) for B in batches),
        powers_of_two=record.powers_of_two,
        chosen=source.plan.recipe.micro_batch,
    )


def _finding(law: StepTimeLaw, largest: int) -> str:
    knee = law.knee.value
    if knee is None:
        return f"A step takes as long with {largest:,} examples as with fewer: they are free"
    return (
        f"Throughput is half its greatest at {show_number(round(knee, 1))} examples "
        f"({show_interval(law.knee)}); much beyond, a larger micro-batch is not faster"
    )


def _note(law: StepTimeLaw, powers: tuple[PowerOfTwo, ...]) -> str:
    parts = [
        f"A step costs α = {show_seconds(law.alpha_seconds.value)} whatever its size and "
        f"β = {show_seconds(law.beta_seconds.value)} per example."
    ]
    if law.note:
        parts.append(f"{law.note.rstrip('.')}.")
    return " ".join([*parts, *(power.sentence for power in powers)])
