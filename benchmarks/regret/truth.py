"""The truth: a workload's grid, measured once, cached, and continued where it stopped."""

from __future__ import annotations

import json
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter

import rightbatch
from rightbatch.errors import UsageError
from rightbatch.laws.progress import examples_after
from rightbatch.laws.timing import StepTime
from rightbatch.recipe import Recipe
from rightbatch.store import safe_name, write_atomically
from rightbatch.training import Training
from rightbatch.workload import Workload

from .grid import Cell, Grid, Settings, batches_outward, explore
from .running import run_cells

SCHEMA = "rightbatch.grid-truth/1"
RESULTS = Path(__file__).resolve().parent.parent / "results" / "regret"
SCOUT = tuple(range(-14, 5, 2))
"""log2 learning rates tried first at batch 32: 6·10⁻⁵ … 16."""
MOST_EPOCHS = 60
"""A run is hopeless after so many epochs as long as nothing has arrived."""
TIMING_SECONDS = 12.0


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Where and with what it was measured."""

    processor: str
    cores: int
    threads: int
    system: str
    python: str
    versions: dict[str, str]
    date: str


@dataclass(frozen=True, kw_only=True)
class Truth:
    """The grid of one workload.

    Attributes:
        workload: Its name.
        num_examples: N.
        target: What counts as trained.
        fingerprint: Losses of a few steps, to see that a cached grid is still of this workload.
        machine: Where it was measured.
        clock: What step times were read from.
        step_time: Seconds of a step; one law for all rows.
        settings: How exhaustive the grid is.
        notes: What was left out.
        wall_seconds: Time that the runs of the cells took.
        cells: All runs.
    """

    workload: str
    num_examples: int
    target: str
    fingerprint: tuple[float, ...]
    machine: Machine
    clock: str
    step_time: StepTime
    settings: Settings
    notes: tuple[str, ...]
    wall_seconds: float
    cells: tuple[Cell, ...]

    def grid(self) -> Grid:
        """The cells and what they say."""
        return Grid(self.step_time.seconds, self.settings, self.cells)

    @property
    def cost_examples(self) -> float:
        """Examples that the whole grid processed."""
        return sum(
            examples_after(cell.steps_run, cell.global_batch, self.num_examples)
            for cell in self.cells
        )

    def baseline(self) -> tuple[int, float] | None:
        """log2 learning rate of the best at batch 32, and the examples it takes to the target."""
        grid = self.grid()
        place = grid.best(min(32, self.num_examples))
        if place is None:
            return None
        steps = [c.steps_to_target for c in grid.at(*place) if c.steps_to_target is not None]
        return place[1], examples_after(statistics.fmean(steps), place[0], self.num_examples)


class CpuClock:
    """Processor time of this process: what a step takes on a machine that does nothing else."""

    def now(self) -> float:
        """Seconds of processor time."""
        return time.process_time()


def describe_machine() -> Machine:
    """Describes this machine and what is installed on it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return Machine(
        processor=names[0] if names else platform.processor(),
        cores=os.cpu_count() or 1,
        threads=torch.get_num_threads(),
        system=f"{platform.system()} {platform.machine()}",
        python=platform.python_version(),
        versions={name: version(name) for name in ("torch", "jax", "numpy", "scikit-learn")},
        date=datetime.now(UTC).strftime("%Y-%m-%d"),
    )


def take_fingerprint(workload: Workload) -> tuple[float, ...]:
    """Losses before and after three steps: they change with data, model, loss and optimizer."""
    recipe = Recipe(global_batch=min(32, workload.num_examples), learning_rate=0.01)
    training = Training(workload, recipe, seed=0)
    training.advance(1)
    first = training.evaluate()
    training.advance(2)
    second = training.evaluate()
    found = (first.train_loss, first.val_loss, second.train_loss, second.val_loss)
    return tuple(value for value in found if value is not None)


def truth_path(name: str) -> Path:
    """Where the truth of a workload is kept."""
    return RESULTS / f"{safe_name(name)}.json"


def write_rows(path: Path, content: dict[str, Any], rows: str) -> None:
    """Writes JSON with one line per entry of the list `rows`: short, and readable as a diff.

    Args:
        path: The file.
        content: Plain data.
        rows: Key of the long list.
    """
    head = json.dumps({**content, rows: []}, indent=1, allow_nan=False)
    lines = ",\n".join(f"  {json.dumps(row, allow_nan=False)}" for row in content[rows])
    text = head.replace(f'"{rows}": []', f'"{rows}": [\n{lines}\n ]') if lines else head
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, (text + "\n").encode())


def save_truth(truth: Truth) -> None:
    """Writes the truth of a workload."""
    content = {"schema": SCHEMA, **TypeAdapter(Truth).dump_python(truth, mode="json")}
    for cell in content["cells"]:
        if cell["steps_to_target"] is not None:
            cell["steps_to_target"] = round(cell["steps_to_target"], 3)
    write_rows(truth_path(truth.workload), content, "cells")


def load_truth(name: str) -> Truth | None:
    """The cached truth of a workload, or None.

    Raises:
        UsageError: If the file is of another schema.
    """
    path = truth_path(name)
    if not path.exists():
        return None
    content = json.loads(path.read_text())
    if content.pop("schema", None) != SCHEMA:
        raise UsageError(f"{path.name} is not of schema {SCHEMA}. Delete it and measure again.")
    return TypeAdapter(Truth).validate_python(content)


def measure_truth(
    workload: Workload, settings: Settings | None, say: Callable[[str], None]
) -> Truth:
    """Measures a workload's grid, or what is missing of the cached one.

    Args:
        workload: With a target.
        settings: How exhaustive. None: as the cached grid, or fully.
        say: Told what was run.

    Returns:
        The truth; it is also on disk, and was after every batch.

    Raises:
        UsageError: If the cached grid is of another workload or target.
    """
    cached = load_truth(workload.name)
    settings = settings or (cached.settings if cached else Settings())
    truth = replace(cached or _start(workload, settings), settings=settings)
    save_truth(truth)
    check_truth(truth, workload)
    grid = truth.grid()

    def run_row(batch: int, pairs: Sequence[tuple[int, int]]) -> None:
        nonlocal truth
        began = time.perf_counter()
        new = _run_row(workload, grid, batch, pairs)
        grid.cells.extend(new)
        spent = time.perf_counter() - began
        wall = truth.wall_seconds + spent
        truth = replace(truth, cells=tuple(grid.cells), wall_seconds=round(wall, 1))
        save_truth(truth)
        say(f"{workload.name}: {_row_text(grid, batch, new)}, {spent:.0f} s")

    batches = batches_outward(workload.num_examples, settings.first_batch)
    notes = explore(grid, batches, run_row, SCOUT)
    smallest = min(cell.global_batch for cell in grid.cells)
    if smallest > 1:
        notes.append(f"Batches below {smallest} were not run.")
    truth = replace(truth, notes=tuple(notes))
    save_truth(truth)
    return truth


def check_truth(truth: Truth, workload: Workload) -> None:
    """Refuses a cached grid that is of another workload.

    Raises:
        UsageError: If target, size or losses differ.
    """
    now = take_fingerprint(workload)
    same = len(now) == len(truth.fingerprint) and all(
        abs(a - b) <= 1e-3 * abs(b) + 1e-6 for a, b in zip(now, truth.fingerprint, strict=True)
    )
    if not same or truth.target != workload.target or truth.num_examples != workload.num_examples:
        raise UsageError(
            f"{truth_path(truth.workload).name} was measured on another {truth.workload!r} (target "
            f"{truth.target}, {truth.num_examples} examples, losses {truth.fingerprint}; now "
            f"{workload.target}, {workload.num_examples}, {now}). Delete it to measure again."
        )


def _start(workload: Workload, settings: Settings) -> Truth:
    if workload.target is None:
        raise UsageError(f"Workload {workload.name!r} has no target; regret needs one.")
    timing = rightbatch.measure_throughput(
        workload, clock=CpuClock(), budget_seconds=TIMING_SECONDS
    )
    return Truth(
        workload=workload.name,
        num_examples=workload.num_examples,
        target=workload.target,
        fingerprint=take_fingerprint(workload),
        machine=describe_machine(),
        clock="processor time of the torch loop",
        step_time=timing.step_time,
        settings=settings,
        notes=(),
        wall_seconds=0.0,
        cells=(),
    )


def _run_row(
    workload: Workload, grid: Grid, batch: int, pairs: Sequence[tuple[int, int]]
) -> list[Cell]:
    most = MOST_EPOCHS * math.ceil(workload.num_examples / batch)
    arrivals = run_cells(
        workload,
        batch,
        [2.0**rate for rate, _ in pairs],
        [seed for _, seed in pairs],
        grid.make_limit(batch, pairs, most),
    )
    return [
        Cell(global_batch=batch, log2_lr=rate, seed=seed, **asdict(arrival))
        for (rate, seed), arrival in zip(pairs, arrivals, strict=True)
    ]


def _row_text(grid: Grid, batch: int, new: Sequence[Cell]) -> str:
    place = grid.best(batch)
    counts = ", ".join(
        f"{sum(cell.state == state for cell in new)} {state}"
        for state in ("reached", "censored", "diverged")
    )
    if place is None:
        return f"batch {batch}: {counts}"
    cells = grid.at(*place)
    seconds = grid.score(cells, [cell.seed for cell in cells])
    return (
        f"batch {batch}: {counts}; best lr {2.0 ** place[1]:g}, {seconds:.3g} s, "
        f"{seconds / grid.best_seconds:.2f} of the best so far"
    )
