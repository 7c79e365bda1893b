"""What following the noise costs: a step that measures it now and then ÷ one that does not.

    python benchmarks/noise_cost.py [--workloads digits,source-lm] [--rounds 40]

The same training twice, 4 × 64 examples an update: once with a fixed batch, once with
`batch_policy='follow-noise'` held at 256, so that both do the same updates. Timed as in
overhead.py: one process, one thread, blocks in random order, ratios within a round. Beside the
ratio, the share: what of a block's time was spent in looking at gradients and in what follows from
them, which a busy machine blurs far less. Prints a table and writes results/noise_cost.md and
results/noise_cost.json.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

GLOBAL_BATCH, MICRO_BATCH = 256, 64
BAR = 1.02
"""Following the noise is to cost under 2 % of a step."""
ROWS = ("fixed", "again", "following")
BLOCK_SECONDS = 0.25
FRESH_EVERY = 8
RESULTS = Path(__file__).resolve().parent / "results"


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One workload.

    Attributes:
        workload: Its name.
        block_steps: Updates in a block: whole periods of the measurement.
        seconds: Per row, processor time of a step in each round.
        inside: Of `following`, the part of it in which noise was measured.
    """

    workload: str
    block_steps: int
    seconds: dict[str, list[float]]
    inside: list[float]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures, prints and writes.

    Args:
        arguments: Of the command line.

    Returns:
        0.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--workloads", default="digits,source-lm")
    parser.add_argument("--rounds", type=int, default=40, help="at least 6")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    import torch

    torch.set_num_threads(1)
    cells = [measure_cell(name, num_rounds=options.rounds) for name in options.workloads.split(",")]
    text = render(cells)
    print(text)
    write_results(cells, text, options.out)
    return 0


def measure_cell(name: str, *, num_rounds: int) -> Cell:
    """Times both trainings, and the first a second time.

    Args:
        name: Of a catalog's workload.
        num_rounds: Blocks per row.

    Returns:
        The times.
    """
    from rightbatch.training.window_noise import PAUSE

    advances = _make_advances(name)
    advances["fixed"](PAUSE)
    step_seconds = _time(advances["fixed"], PAUSE)
    steps = PAUSE * max(1, round(BLOCK_SECONDS / step_seconds / PAUSE))
    seconds: dict[str, list[float]] = {row: [] for row in ROWS}
    inside: list[float] = []
    shuffle = random.Random(0)
    for index in range(num_rounds):
        if index % FRESH_EVERY == 0:
            advances = _make_advances(name)
            for advance in advances.values():
                advance(PAUSE)
        gc.collect()
        for row in shuffle.sample(ROWS, len(ROWS)):
            with _time_inside() as spent:
                seconds[row].append(_time(advances[row], steps))
            if row == "following":
                inside.append(spent[0] / steps)
    return Cell(workload=name, block_steps=steps, seconds=seconds, inside=inside)


@contextmanager
def _time_inside() -> Iterator[list[float]]:
    """Adds up the time of what measures the noise; the clock's own calls count as part of it."""
    from rightbatch.training.window_noise import Draw, WindowNoise

    spent = [0.0]
    places = [(WindowNoise, "observer"), (WindowNoise, "add"), (Draw, "__call__")]
    kept = [(place, name, getattr(place, name)) for place, name in places]
    for place, name, function in kept:
        setattr(place, name, _timed(function, spent))
    try:
        yield spent
    finally:
        for place, name, function in kept:
            setattr(place, name, function)


def _timed(function: Callable[..., Any], spent: list[float]) -> Callable[..., Any]:
    def timed(*arguments: Any) -> Any:
        start = time.thread_time()
        result = function(*arguments)
        spent[0] += time.thread_time() - start
        return result

    return timed


def _make_advances(name: str) -> dict[str, Callable[[int], None]]:
    from rightbatch import Recipe, catalog
    from rightbatch.training import Training

    fixed = Recipe(global_batch=GLOBAL_BATCH, micro_batch=MICRO_BATCH, learning_rate=1e-3)
    following: dict[str, Any] = {"batch_policy": "follow-noise", "largest_batch": GLOBAL_BATCH}
    recipes = {"fixed": fixed, "again": fixed, "following": fixed.replace(**following)}
    return {row: Training(catalog.get(name), recipes[row]).advance for row in ROWS}


def _time(advance: Callable[[int], None], num_steps: int) -> float:
    start = time.thread_time()
    advance(num_steps)
    return (time.thread_time() - start) / num_steps


def render(cells: Sequence[Cell]) -> str:
    """The table, in Markdown.

    Args:
        cells: What was measured.

    Returns:
        A heading, a line about it, and the table.
    """
    from overhead.ratios import estimate_median_ratio, judge

    lines = [
        "# What following the noise costs\n",
        "Written by `python benchmarks/noise_cost.py`. An update of 4 × 64 examples that follows",
        "the noise ÷ one at a fixed batch: processor time of the training thread, within a round;",
        "the median over rounds and its 95 % interval. *Fixed, again* is the same training a",
        "second time: how far from 1 it lies is what cannot be told apart. *Share*: of the time",
        "of an update, what was spent in measuring the noise and in what follows from it.\n",
        "| workload | row | µs/step | ratio | 95 % | bar | verdict |",
        "| --- | --- | ---: | ---: | ---: | ---: | --- |",
    ]
    for cell in cells:
        for row in ROWS:
            micro = 1e6 * statistics.median(cell.seconds[row])
            if row == "fixed":
                lines.append(f"| {cell.workload} | fixed | {micro:.0f} |  |  |  |  |")
                continue
            ratio = estimate_median_ratio(cell.seconds[row], cell.seconds["fixed"])
            bar = BAR if row == "following" else None
            if row == "following":
                share = estimate_median_ratio(cell.inside, cell.seconds[row])
                lines.append(
                    f"| {cell.workload} | share | {1e6 * statistics.median(cell.inside):.1f} | "
                    f"{share.value:.4f} | {share.low:.4f}–{share.high:.4f} | ≤ {BAR - 1:.2f} | "
                    f"{judge(share, BAR - 1)} |"
                )
            interval = "" if ratio.low is None else f"{ratio.low:.3f}–{ratio.high:.3f}"
            label = "fixed, again" if row == "again" else row
            shown = "" if bar is None else f"≤ {bar:.2f}"
            lines.append(
                f"| {cell.workload} | {label} | {micro:.0f} | {ratio.value:.3f} | {interval} | "
                f"{shown} | {judge(ratio, bar)} |"
            )
    rounds = "; ".join(
        f"{cell.workload}: {len(cell.seconds['fixed'])} rounds of blocks of {cell.block_steps} "
        "updates"
        for cell in cells
    )
    return "\n".join([*lines, "", f"{rounds}."])


def write_results(cells: Sequence[Cell], text: str, folder: Path) -> None:
    """Writes `noise_cost.md` and `noise_cost.json`.

    Args:
        cells: What was measured.
        text: The table.
        folder: Where to.
    """
    # Late: it imports jax, whose threads should not run beside a measurement.
    from regret.truth import describe_machine
    from rightbatch.store import write_atomically

    machine = asdict(describe_machine())
    versions = ", ".join(f"{n} {machine['versions'][n]}" for n in ("torch", "numpy"))
    about = (
        f"Measured on {machine['processor']}, {machine['cores']} cores, {machine['threads']} "
        f"thread; {machine['system']}; Python {machine['python']}, {versions}; {machine['date']}."
    )
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "noise_cost.md", f"{text}\n\n{about}\n".encode())
    record = {"machine": machine, "bar": BAR, "cells": [asdict(cell) for cell in cells]}
    write_atomically(folder / "noise_cost.json", (json.dumps(record, indent=1) + "\n").encode())


if __name__ == "__main__":
    sys.exit(main())
