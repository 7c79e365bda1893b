"""Learning rate × batch size: the loss of every pair, the stable edge and the best pair."""

from __future__ import annotations

from dataclasses import dataclass

from rightbatch.report.data.cells import RateCells, collect_cells
from rightbatch.report.data.table import Table, overlap, with_interval
from rightbatch.report.source import Source
from rightbatch.report.units import show_number


@dataclass(frozen=True, kw_only=True)
class RateBatchMap:
    """The map.

    Attributes:
        finding: What it shows here.
        note: How to read it.
        cells: Every pair that was trained.
        edges: Batch size and the highest rate there below which no training diverged.
        chosen: The pair of the answer, or None.
    """

    finding: str
    note: str
    cells: RateCells
    edges: tuple[tuple[int, float], ...]
    chosen: tuple[int, float] | None

    def table(self) -> Table:
        """The exact numbers."""
        header = ("batch", "learning rate", self.cells.loss_name, "trainings", "steps")
        rows = tuple(
            (
                f"{cell.batch_size:,}",
                show_number(cell.learning_rate),
                "none" if cell.loss.value is None else with_interval(cell.loss),
                cell.outcome(has_target=self.cells.has_target),
                f"{cell.steps:,}",
            )
            for cell in self.cells.cells
        )
        return Table(header=header, rows=rows)


def collect(source: Source) -> RateBatchMap | None:
    """The map of a study or of a plan's race.

    Args:
        source: What the report is made of.

    Returns:
        The map, or None where nothing was trained.
    """
    cells = collect_cells(source)
    if cells is None:
        return None
    edges = () if source.study is None else tuple(
        (f.batch_size, f.stable_edge) for f in source.study.sizes if f.stable_edge is not None
    )  # fmt: skip
    return RateBatchMap(
        finding=_finding(cells),
        note=_note(cells, has_edges=bool(edges), raced=source.study is None),
        cells=cells,
        edges=edges,
        chosen=source.chosen,
    )


def _finding(cells: RateCells) -> str:
    least = cells.least()
    if least is None:
        return "No training ended with a loss"
    text = (
        f"The {cells.loss_name} is least at batch {least.batch_size:,} with learning rate "
        f"{show_number(least.learning_rate)}"
    )
    alike = sum(
        cell is not least and cell.loss.low is not None and overlap(cell.loss, least.loss)
        for cell in cells.cells
    )
    if alike:
        pairs = "1 other pair" if alike == 1 else f"{alike} other pairs"
        text += f" ({pairs} cannot be told from it)"
    wild = [cell for cell in cells.cells if cell.diverged]
    if not wild:
        return f"{text}; no training diverged"
    first = min(wild, key=lambda cell: cell.learning_rate)
    return (
        f"{text}; trainings diverge from {show_number(first.learning_rate)} on, first at batch "
        f"{first.batch_size:,}"
    )


def _note(cells: RateCells, *, has_edges: bool, raced: bool) -> str:
    each = f"Each cell is the mean of {cells.seeds} trainings at the end of the budget"
    if raced:
        each = "Each cell is one run where it was stopped, so that losses of few steps are early"
    elif cells.seeds == 1:
        each = "Each cell is one training at the end of the budget"
    edge = "; the line is the highest rate at which none diverged" if has_edges else ""
    return f"{each}{edge}. What diverged, failed or missed the target is drawn as such."
