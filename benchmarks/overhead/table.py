"""What was measured, as lines: printed, and written to `results/overhead.md` and `.json`."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rightbatch.laws.estimate import Estimate
from rightbatch.store import write_atomically

from .measure import AGAIN, HAND, Block, Cell
from .ratios import bar_of, estimate_median_ratio, judge

SCHEMA = "rightbatch.overhead/1"
RESULTS = Path(__file__).resolve().parent.parent / "results"
HEADER = ("workload", "batch", "row", "µs/step", "ratio", "95 %", "wall", "bar", "")
LABELS = {
    AGAIN: "hand-written, again",
    "watching": "ours, watching",
    "lightning": "Lightning",
    "keras": "Keras on torch",
}


@dataclass(frozen=True, kw_only=True)
class Line:
    """One line of the table.

    Attributes:
        workload: Its name.
        batch: Examples per update, in words.
        row: Whose loop, in words.
        microseconds: Median processor time of a step, or None.
        ratio: To the hand-written loop (`watching ÷ ours`: to ours), of processor times.
        wall_ratio: The same of times on the wall.
        bar: What the ratio should not exceed, or None.
        verdict: `met`, `missed`, `open` or nothing.
        skipped: Why there are no numbers; empty where there are.
    """

    workload: str
    batch: str
    row: str
    microseconds: float | None = None
    ratio: Estimate | None = None
    wall_ratio: Estimate | None = None
    bar: float | None = None
    verdict: str = ""
    skipped: str = ""


def make_lines(cells: Sequence[Cell]) -> list[Line]:
    """The lines of all cells.

    Args:
        cells: What was measured.

    Returns:
        Lines, in the order of the cells.
    """
    return [line for cell in cells for line in _lines_of(cell)]


def _lines_of(cell: Cell) -> list[Line]:
    lines = [_line(cell, name, name, HAND) for name in cell.blocks]
    if "ours" in cell.blocks and "watching" in cell.blocks:
        lines.append(_line(cell, "watching ÷ ours", "watching", "ours"))
    batch = _batch_text(cell)
    lines += [
        Line(workload=cell.workload, batch=batch, row=LABELS.get(row, row), skipped=reason)
        for row, reason in cell.skipped.items()
    ]
    return lines


def _line(cell: Cell, row: str, top: str, bottom: str) -> Line:
    above, below = cell.blocks[top], cell.blocks[bottom]
    ratio = estimate_median_ratio(_thread(above), _thread(below))
    wall = estimate_median_ratio(
        [block.wall_seconds for block in above], [block.wall_seconds for block in below]
    )
    bar = bar_of(row, cell.global_batch)
    return Line(
        workload=cell.workload,
        batch=_batch_text(cell),
        row=LABELS.get(row, row),
        microseconds=1e6 * statistics.median(_thread(above)),
        ratio=None if top == bottom else ratio,
        wall_ratio=None if top == bottom else wall,
        bar=bar,
        verdict=judge(ratio, bar),
    )


def _thread(blocks: Sequence[Block]) -> list[float]:
    return [block.thread_seconds for block in blocks]


def _batch_text(cell: Cell) -> str:
    if cell.global_batch == cell.asked_batch:
        return str(cell.global_batch)
    return f"{cell.global_batch} (all; {cell.asked_batch} asked)"


def render_terminal(lines: Sequence[Line]) -> str:
    """The lines as an aligned table.

    Args:
        lines: At least one.

    Returns:
        Text; numbers to the right, reasons of skipped rows at the end of their lines.
    """
    table = [HEADER, *(_texts(line) for line in lines)]
    widths = [max(len(row[i]) for row in table) for i in range(len(HEADER))]
    rendered: list[str] = []
    for row, skipped in zip(table, ["", *(line.skipped for line in lines)], strict=True):
        fields = [
            text.ljust(width) if i in (0, 2, 8) else text.rjust(width)
            for i, (text, width) in enumerate(zip(row, widths, strict=True))
        ]
        if skipped:
            fields = [*fields[:3], f"skipped: {skipped}"]
        rendered.append("  ".join(fields).rstrip())
    return "\n".join(rendered)


def _texts(line: Line) -> tuple[str, ...]:
    def number(estimate: Estimate | None) -> str:
        return "" if estimate is None or estimate.value is None else f"{estimate.value:.3f}"

    interval = ""
    if line.ratio is not None and line.ratio.low is not None and line.ratio.high is not None:
        interval = f"{line.ratio.low:.3f}–{line.ratio.high:.3f}"
    return (
        line.workload,
        line.batch,
        line.row,
        "" if line.microseconds is None else f"{line.microseconds:.0f}",
        number(line.ratio),
        interval,
        number(line.wall_ratio),
        "" if line.bar is None else f"≤ {line.bar:.2f}",
        line.verdict,
    )


def render_markdown(lines: Sequence[Line], cells: Sequence[Cell], machine: dict[str, Any]) -> str:
    """The page: what the figures are, the table, what was left out, the machine.

    Args:
        lines: Of the table.
        cells: What they were made from.
        machine: Plain data of the machine's description.

    Returns:
        Markdown.
    """
    head = [*HEADER[:-1], "verdict"]
    parts = [
        "# What a training step costs beyond a hand-written loop\n",
        "Written by `python benchmarks/overhead.py`; [README.md](../README.md) says how it is\n"
        "measured. Ratio: processor time of a step ÷ that of the hand-written loop in the same\n"
        "round (`watching ÷ ours`: ÷ that of ours), the median over rounds and its 95 % interval;\n"
        "wall: the same by the clock on the wall. *Hand-written, again* is the same loop a second\n"
        "time: how far from 1 it lies is what cannot be told apart.\n",
        f"| {' | '.join(head)} |\n| --- | ---: | --- | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    table = [f"| {' | '.join(_texts(line))} |" for line in lines if not line.skipped]
    reasons = {f"- {line.workload}, {line.row}: {line.skipped}." for line in lines if line.skipped}
    versions = ", ".join(f"{name} {text}" for name, text in machine["versions"].items())
    blocks = "; ".join(
        f"{cell.workload} at {cell.global_batch}: {len(cell.blocks[HAND])} rounds of blocks of "
        f"{cell.block_steps} steps"
        for cell in cells
    )
    about = (
        f"{machine['processor']}, {machine['cores']} cores, {machine['threads']} thread; "
        f"{machine['system']}; Python {machine['python']}, {versions}; {machine['date']}."
    )
    left_out = ["", "## Left out", "", *sorted(reasons)] if reasons else []
    closing = ["", "## Measured on", "", about, "", f"{blocks}.", _outside_text(cells)]
    return "\n".join([*parts, *table, *left_out, *closing]) + "\n"


def share_outside_thread(blocks: Sequence[Block]) -> float:
    """Share of the processor time that other threads took: what the ratios would not see."""
    return statistics.median(1 - b.thread_seconds / b.process_seconds for b in blocks)


def _outside_text(cells: Sequence[Cell]) -> str:
    most, row = max(
        (share_outside_thread(blocks), row) for cell in cells for row, blocks in cell.blocks.items()
    )
    return (
        f"Processor time outside the training thread: at most {100 * most:.1f} % "
        f"({LABELS.get(row, row)})."
    )


def write_results(cells: Sequence[Cell], machine: dict[str, Any], folder: Path = RESULTS) -> Path:
    """Writes `overhead.md` and `overhead.json`.

    Args:
        cells: What was measured.
        machine: Plain data of the machine's description.
        folder: Where to.

    Returns:
        The page.
    """
    lines = make_lines(cells)
    folder.mkdir(parents=True, exist_ok=True)
    record = {
        "schema": SCHEMA,
        "machine": machine,
        "clock": "processor time of the training thread",
        "lines": [asdict(line) for line in lines],
    }
    cell_texts = [json.dumps(_plain(cell), ensure_ascii=False) for cell in cells]
    head = json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False).removesuffix("\n}")
    text = head + ',\n "cells": [\n  ' + ",\n  ".join(cell_texts) + "\n ]\n}\n"
    write_atomically(folder / "overhead.json", text.encode())
    page = folder / "overhead.md"
    write_atomically(page, render_markdown(lines, cells, machine).encode())
    return page


def _plain(cell: Cell) -> dict[str, Any]:
    """The cell with its times as columns, rounded to a nanosecond."""
    columns = ("thread_seconds", "process_seconds", "wall_seconds")
    return {
        **asdict(cell),
        "blocks": {
            row: {name: [round(getattr(b, name), 9) for b in blocks] for name in columns}
            for row, blocks in cell.blocks.items()
        },
    }
