"""Rounds: every implementation once in each, in random order, all in one process."""

from __future__ import annotations

import gc
import math
import random
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from rightbatch.errors import UsageError
from rightbatch.workload import Workload

from .frameworks import MakeFit, make_keras, make_lightning, make_skorch
from .rows import Advance, SkippedRowError, make_hand_written, make_ours, make_watching

HAND, AGAIN = "hand-written", "again"
LOOPS: dict[str, Callable[[Workload, int], Advance]] = {
    HAND: make_hand_written,
    AGAIN: make_hand_written,
    "ours": make_ours,
    "watching": make_watching,
}
FRAMEWORKS: dict[str, Callable[[Workload, int], MakeFit]] = {
    "lightning": make_lightning,
    "keras": make_keras,
    "skorch": make_skorch,
}
ROWS = ("ours", "watching", *FRAMEWORKS)
"""What can be asked for; hand-written, and hand-written again, are always there."""
BLOCK_SECONDS = 0.15
PIECES = 4
"""Parts of a block of the loops, so that those that are compared closely also run close by."""
FRESH_EVERY = 5
"""Rounds after which the models are built anew: where one lies in memory has a cost of its own."""
WORKLOADS = ("digits", "source-lm")


@dataclass(frozen=True, kw_only=True)
class Block:
    """What one block of one row took, per step.

    Attributes:
        thread_seconds: Processor time of the thread that trains: what the ratios use.
        process_seconds: Processor time of all threads; more than that if work was handed on.
        wall_seconds: By the clock on the wall.
    """

    thread_seconds: float
    process_seconds: float
    wall_seconds: float


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One workload at one batch.

    Attributes:
        workload: Its name.
        asked_batch: As asked for.
        global_batch: The same, or all N examples where there are fewer.
        block_steps: Updates in a block.
        blocks: Per row, one block per round.
        skipped: Per row that cannot run, why.
    """

    workload: str
    asked_batch: int
    global_batch: int
    block_steps: int
    blocks: dict[str, list[Block]]
    skipped: dict[str, str]


def check_rows(rows: Sequence[str], workloads: Sequence[str]) -> None:
    """Refuses names that do not exist.

    Args:
        rows: Names of rows.
        workloads: Names of workloads.

    Raises:
        UsageError: With the names that exist.
    """
    for asked, known, kind in ((rows, ROWS, "row"), (workloads, WORKLOADS, "workload")):
        wrong = [name for name in asked if name not in known]
        if wrong:
            raise UsageError(
                f"There is no {kind} {wrong[0]!r} here. There are: {', '.join(known)}."
            )


def choose_block(step_seconds: float, steps_per_epoch: int) -> int:
    """Updates of a block: about `BLOCK_SECONDS`, and whole epochs where it is longer than one.

    Args:
        step_seconds: Of a hand-written step.
        steps_per_epoch: Updates of an epoch.

    Returns:
        The updates.

    Example:
        >>> choose_block(0.001, 6), choose_block(0.001, 1438)
        (150, 150)
        >>> choose_block(0.001, 45)
        135
    """
    return _whole_epochs(max(8, round(BLOCK_SECONDS / step_seconds)), steps_per_epoch)


def _whole_epochs(num_steps: int, steps_per_epoch: int) -> int:
    """Rounded down to whole epochs, where there is at least one."""
    return num_steps - num_steps % steps_per_epoch if num_steps > steps_per_epoch else num_steps


def choose_short_fit(block_steps: int, steps_per_epoch: int) -> int:
    """Updates of the shorter of two fits, whose difference is a block.

    Args:
        block_steps: Updates of a block.
        steps_per_epoch: Updates of an epoch.

    Returns:
        An epoch, where blocks are whole epochs; else few, so that the longer fits into one.
    """
    if block_steps >= steps_per_epoch:
        return steps_per_epoch
    return max(1, min(block_steps // 8, steps_per_epoch - block_steps))


def measure_cell(
    workload: Workload, asked_batch: int, *, rows: Sequence[str], num_rounds: int
) -> Cell:
    """Times all rows on one workload at one batch.

    Args:
        workload: One of `WORKLOADS`.
        asked_batch: Examples per update; at most N are used.
        rows: Some of `ROWS`.
        num_rounds: Blocks per row.

    Returns:
        The times.
    """
    global_batch = min(asked_batch, workload.num_examples)
    per_epoch = math.ceil(workload.num_examples / global_batch)
    scout = make_hand_written(workload, global_batch)
    scout(3)
    step_seconds = statistics.median(_time(lambda: scout(3)).thread_seconds / 3 for _ in range(9))
    block_steps = choose_block(step_seconds, per_epoch)
    runners, skipped = _make_runners(workload, global_batch, rows, block_steps, per_epoch)
    blocks: dict[str, list[Block]] = {name: [] for name in runners}
    shuffle = random.Random(0)
    for index in range(num_rounds):
        if index and index % FRESH_EVERY == 0:
            runners, _ = _make_runners(
                workload, global_batch, list(runners), block_steps, per_epoch
            )
        # What the setting up left behind is collected on nobody's time.
        gc.collect()
        for name, block in _run_round(runners, shuffle).items():
            blocks[name].append(block)
    return Cell(
        workload=workload.name,
        asked_batch=asked_batch,
        global_batch=global_batch,
        block_steps=block_steps,
        blocks=blocks,
        skipped=skipped,
    )


def _run_round(runners: dict[str, Callable[[], Block]], shuffle: random.Random) -> dict[str, Block]:
    """One block of each: the loops in pieces, a fit between them at one place each."""
    loops, fits = [n for n in runners if n in LOOPS], [n for n in runners if n not in LOOPS]
    turns = [shuffle.sample(loops, len(loops)) for _ in range(PIECES)]
    for name in fits:
        turns.insert(shuffle.randrange(len(turns) + 1), [name])
    pieces: dict[str, list[Block]] = {name: [] for name in runners}
    for name in (name for turn in turns for name in turn):
        pieces[name].append(runners[name]())
    return {name: _mean(blocks) for name, blocks in pieces.items()}


def _make_runners(
    workload: Workload, global_batch: int, rows: Sequence[str], block_steps: int, per_epoch: int
) -> tuple[dict[str, Callable[[], Block]], dict[str, str]]:
    """Per row, what times one block; and per row that cannot run, why."""
    runners: dict[str, Callable[[], Block]] = {}
    skipped: dict[str, str] = {}
    for name in dict.fromkeys((HAND, AGAIN, *rows)):
        try:
            if name in LOOPS:
                advance = LOOPS[name](workload, global_batch)
                piece = max(1, block_steps // PIECES)
                advance(max(8, piece))
                runners[name] = _loop_runner(advance, piece)
            else:
                prepare = FRAMEWORKS[name](workload, global_batch)
                # As long as a piece of the loops: these take several times as long.
                fit_steps = _whole_epochs(max(1, block_steps // PIECES), per_epoch)
                short = choose_short_fit(fit_steps, per_epoch)
                _quietly(prepare(short))
                runners[name] = _fit_runner(prepare, fit_steps, short)
        except SkippedRowError as reason:
            skipped[name] = str(reason)
    return runners, skipped


def _loop_runner(advance: Advance, num_steps: int) -> Callable[[], Block]:
    return lambda: _per_step(_time(lambda: advance(num_steps)), None, num_steps)


def _fit_runner(prepare: MakeFit, num_steps: int, short: int) -> Callable[[], Block]:
    def run() -> Block:
        few, many = _prepare(prepare, short), _prepare(prepare, short + num_steps)
        return _per_step(_time(many), _time(few), num_steps)

    return run


def _prepare(prepare: MakeFit, num_steps: int) -> Callable[[], None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit = prepare(num_steps)
    return lambda: _quietly(fit)


def _quietly(fit: Callable[[], Any]) -> None:
    """Fits without the advice these libraries print, most of it about data loaders."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit()


def _time(work: Callable[[], None]) -> Block:
    wall, process, thread = time.perf_counter(), time.process_time(), time.thread_time()
    work()
    return Block(
        thread_seconds=time.thread_time() - thread,
        process_seconds=time.process_time() - process,
        wall_seconds=time.perf_counter() - wall,
    )


def _mean(blocks: Sequence[Block]) -> Block:
    return Block(
        thread_seconds=statistics.fmean(block.thread_seconds for block in blocks),
        process_seconds=statistics.fmean(block.process_seconds for block in blocks),
        wall_seconds=statistics.fmean(block.wall_seconds for block in blocks),
    )


def _per_step(block: Block, taken_out: Block | None, num_steps: int) -> Block:
    zero = Block(thread_seconds=0.0, process_seconds=0.0, wall_seconds=0.0)
    out = taken_out or zero
    return Block(
        thread_seconds=(block.thread_seconds - out.thread_seconds) / num_steps,
        process_seconds=(block.process_seconds - out.process_seconds) / num_steps,
        wall_seconds=(block.wall_seconds - out.wall_seconds) / num_steps,
    )
