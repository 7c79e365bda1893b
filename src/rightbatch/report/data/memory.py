"""Where the memory goes, by micro-batch, and what fits."""

from __future__ import annotations

from dataclasses import dataclass

from rightbatch.probes.memory_record import MemoryRecord, MemoryTrial
from rightbatch.report.data.table import Table
from rightbatch.report.source import Source
from rightbatch.report.units import show_bytes


@dataclass(frozen=True, kw_only=True)
class MemoryPart:
    """One use of memory.

    Attributes:
        name: What it is.
        fixed_bytes: What it takes at any size.
        bytes_per_example: What each example adds.
    """

    name: str
    fixed_bytes: float
    bytes_per_example: float

    def at(self, micro_batch: float) -> float:
        """Bytes at one size."""
        return self.fixed_bytes + self.bytes_per_example * micro_batch


@dataclass(frozen=True, kw_only=True)
class Memory:
    """The figure.

    Attributes:
        finding: What it shows here.
        note: How to read it.
        baseline_bytes: Program and data, before anything is built.
        parts: What training adds to them, from the bottom up.
        trials: Sizes that were run.
        limit_bytes: The most there is.
        ceiling: The largest micro-batch that was run within it.
        chosen: Micro-batch of the answer.
    """

    finding: str
    note: str
    baseline_bytes: int
    parts: tuple[MemoryPart, ...]
    trials: tuple[MemoryTrial, ...]
    limit_bytes: int
    ceiling: int
    chosen: int

    def table(self) -> Table:
        """The exact numbers."""
        rows = tuple(
            (
                f"{trial.micro_batch:,}",
                trial.verdict,
                "" if trial.peak_bytes is None else show_bytes(trial.peak_bytes),
                *(show_bytes(part.at(trial.micro_batch)) for part in self.parts),
            )
            for trial in self.trials
        )
        names = tuple(part.name for part in self.parts)
        return Table(header=("micro-batch", "verdict", "peak", *names), rows=rows)


def collect(source: Source) -> Memory | None:
    """The figure of a plan that measured memory.

    Args:
        source: What the report is made of.

    Returns:
        The figure, or None.
    """
    record = None if source.plan is None else source.plan.evidence.memory
    if record is None or source.plan is None:
        return None
    found = record.parts
    parts = (
        MemoryPart(name="parameters", fixed_bytes=found.parameters_bytes, bytes_per_example=0),
        MemoryPart(name="gradients", fixed_bytes=found.gradients_bytes, bytes_per_example=0),
        MemoryPart(name="optimizer", fixed_bytes=found.optimizer_bytes, bytes_per_example=0),
        MemoryPart(
            name="activations",
            fixed_bytes=0,
            bytes_per_example=found.activation_bytes_per_example or 0.0,
        ),
    )
    return Memory(
        finding=_finding(record),
        note=_note(record, parts),
        baseline_bytes=found.baseline_bytes,
        parts=parts,
        trials=tuple(sorted(record.trials, key=lambda trial: trial.micro_batch)),
        limit_bytes=record.limit_bytes,
        ceiling=record.ceiling.micro_batch,
        chosen=source.plan.recipe.micro_batch,
    )


def _finding(record: MemoryRecord) -> str:
    ceiling = record.ceiling
    spare = f"with {show_bytes(ceiling.headroom_bytes)} to spare"
    if ceiling.smallest_failed is not None:
        return (
            f"At most {ceiling.micro_batch:,} examples fit at once, {spare}; "
            f"{ceiling.smallest_failed:,} do not"
        )
    return f"{ceiling.micro_batch:,} examples at once fit, {spare}; more was not tried"


def _note(record: MemoryRecord, parts: tuple[MemoryPart, ...]) -> str:
    most = max(parts, key=lambda part: part.at(record.ceiling.micro_batch))
    source = "as given" if record.limit_source == "given" else "what the machine had free"
    return (
        "Shown is what training adds to program and data "
        f"({show_bytes(record.parts.baseline_bytes)}). At the ceiling {most.name} take the most, "
        f"{show_bytes(most.at(record.ceiling.micro_batch))}. The limit is "
        f"{show_bytes(record.limit_bytes)}, {source}. Bars are the parts, strokes the measured "
        "peaks; what is between them is temporary."
    )
