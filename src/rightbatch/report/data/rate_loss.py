"""The loss against the learning rate, one curve per batch size."""

from __future__ import annotations

from dataclasses import dataclass

from rightbatch.report.data.cells import RateCell, RateCells, collect_cells
from rightbatch.report.data.table import Table, overlap, with_interval
from rightbatch.report.source import Source
from rightbatch.report.units import show_number


@dataclass(frozen=True, kw_only=True)
class RateLoss:
    """The curves.

    Attributes:
        finding: What they show here.
        note: How to read them.
        cells: Every pair that was trained.
        chosen: The pair of the answer, or None.
    """

    finding: str
    note: str
    cells: RateCells
    chosen: tuple[int, float] | None

    def table(self) -> Table:
        """The exact numbers: of each size, the rate of least loss and the rates beside it."""
        header = ("batch", "rate of least loss", self.cells.loss_name, "rates tried", "diverged")
        best = [(size, self.cells.least(size)) for size in self.cells.sizes]
        rows = tuple(
            (
                f"{size:,}",
                "none" if cell is None else show_number(cell.learning_rate),
                "none" if cell is None else with_interval(cell.loss),
                str(len(self.cells.at(size))),
                str(sum(c.diverged > 0 for c in self.cells.at(size))),
            )
            for size, cell in best
        )
        return Table(header=header, rows=rows)


def collect(source: Source) -> RateLoss | None:
    """The curves of a study or of a plan's race.

    Args:
        source: What the report is made of.

    Returns:
        The curves, or None where no size was trained at two learning rates.
    """
    cells = collect_cells(source)
    if cells is None or all(len(cells.at(size)) < 2 for size in cells.sizes):
        return None
    bands = (
        "Bands are 95 % intervals over seeds. "
        if cells.seeds > 1
        else "Runs end at different steps; what was stopped early still has a high loss. "
        if source.study is None
        else ""
    )
    return RateLoss(
        finding=_finding(cells),
        note=f"{bands}A cross at the upper edge is a rate at which a training diverged or failed.",
        cells=cells,
        chosen=source.chosen,
    )


def _finding(cells: RateCells) -> str:
    # A size with a single rate says nothing of the best one.
    sizes = [size for size in cells.sizes if len(cells.at(size)) > 1]
    least = [cell for size in sizes if (cell := cells.least(size)) is not None]
    if not least:
        return "No training ended with a loss"
    first, last = least[0], least[-1]
    if first is last:
        return _width(cells, first)
    low, high = show_number(first.learning_rate), show_number(last.learning_rate)
    where = f"batch {first.batch_size:,}", f"batch {last.batch_size:,}"
    if low == high:
        return f"{where[0].capitalize()} and {where[1]} do best at the same learning rate, {low}"
    return f"{where[0].capitalize()} does best at learning rate {low}, {where[1]} at {high}"


def _width(cells: RateCells, best: RateCell) -> str:
    """How far the rate may be off without a difference that seeds resolve."""
    alike = [c.learning_rate for c in cells.at(best.batch_size)
             if c.loss.low is not None and overlap(c.loss, best.loss)]  # fmt: skip
    text = f"Batch {best.batch_size:,} does best at learning rate {show_number(best.learning_rate)}"
    if len(alike) < 2:
        return text
    return f"{text}; {show_number(min(alike))} to {show_number(max(alike))} cannot be told from it"
