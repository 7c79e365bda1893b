"""The grid: which cells are run, in what order, and what they say. Pure: runs nothing itself.

Learning rates are powers of two. Batches are visited from 32 outwards, so that a good cell is
known early and the cut takes effect: a run that has taken `cut` times the modelled seconds of the
best cell is hopeless and is recorded as censored. At each batch the rates form a window that is
widened until its best lies inside, not at an edge.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .running import Arrival, State

CENTRE = 32


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One run of the grid.

    Attributes:
        global_batch: Examples per update.
        log2_lr: The learning rate is 2 to this power.
        seed: Of initial weights and data order.
        state: How it ended.
        steps_to_target: Interpolated, or None.
        steps_run: Updates done when that was known.
    """

    global_batch: int
    log2_lr: int
    seed: int
    state: State
    steps_to_target: float | None
    steps_run: int


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How exhaustive the grid is.

    Attributes:
        seeds: Of every cell.
        first_batch: The smallest batch.
        below: Rates in the first window below the expected best.
        above: Rates above it.
        margin: Rates that must lie between the best and either end of the window.
        cut: A run is hopeless at this many times the best cell's seconds.
        screen: Seeds that every cell is run with; only contenders get all. None: every cell all.
        contenders: With `screen`: within this factor of the best is a contender.
        prune: Whether batches beyond one of which nothing arrived are left out.
    """

    seeds: tuple[int, ...] = (0, 1, 2, 3, 4, 5)
    first_batch: int = 1
    below: int = 4
    above: int = 3
    margin: int = 2
    cut: float = 8.0
    screen: int | None = None
    contenders: float = 1.5
    prune: bool = False

    @classmethod
    def thrifty(cls, *, seeds: tuple[int, ...], first_batch: int) -> Settings:
        """For models that are dear to run: one seed everywhere, all seeds only near the best."""
        return cls(
            seeds=seeds,
            first_batch=first_batch,
            below=2,
            above=1,
            margin=1,
            cut=4.0,
            screen=1,
            prune=True,
        )


def batches_outward(num_examples: int, first: int) -> list[int]:
    """Powers of two and N itself, nearest to 32 first.

    Args:
        num_examples: N.
        first: The smallest.

    Returns:
        Batches.

    Example:
        >>> batches_outward(100, 8)
        [32, 64, 16, 100, 8]
    """
    sizes = {first, num_examples}
    while (doubled := 2 * max(sizes - {num_examples}, default=first)) < num_examples:
        sizes.add(doubled)
    centre = math.log2(min(CENTRE, num_examples))
    return sorted(sizes, key=lambda size: (abs(math.log2(size) - centre), -size))


class Grid:
    """The cells run so far, and what they say.

    Args:
        step_seconds: Modelled seconds of a step, given the batch.
        settings: How exhaustive.
        cells: What was run before.
    """

    def __init__(
        self,
        step_seconds: Callable[[int], float],
        settings: Settings,
        cells: Sequence[Cell] = (),
    ) -> None:
        self.step_seconds = step_seconds
        self.settings = settings
        self.cells = list(cells)

    def seconds(self, cell: Cell) -> float:
        """Modelled seconds to target; a lower bound where censored, infinite where diverged."""
        if cell.state == "diverged":
            return math.inf
        steps = cell.steps_run if cell.steps_to_target is None else cell.steps_to_target
        return steps * self.step_seconds(cell.global_batch)

    def at(self, global_batch: int, log2_lr: int | None = None) -> list[Cell]:
        """The cells at a batch (and a learning rate)."""
        return [
            cell
            for cell in self.cells
            if cell.global_batch == global_batch and log2_lr in (None, cell.log2_lr)
        ]

    def score(self, cells: Sequence[Cell], seeds: Sequence[int]) -> float:
        """Mean seconds over seeds; infinite unless more than half arrived.

        The mean is what a user pays: a place that is fast on most seeds and hopeless on one is
        worse than a steady one.
        """
        chosen = [cell for cell in cells if cell.seed in seeds]
        arrived = sum(cell.state == "reached" for cell in chosen)
        if 2 * arrived <= len(chosen) or not chosen:
            return math.inf
        return statistics.fmean(self.seconds(cell) for cell in chosen)

    def best(
        self, global_batch: int | None = None, *, seeds: Sequence[int] | None = None
    ) -> tuple[int, int] | None:
        """The batch and log2 learning rate of least score.

        Args:
            global_batch: Only at this batch.
            seeds: Judged on these, all of which must have been run. Default: on what there is.

        Returns:
            The cell, or None if nothing arrived.
        """
        places = {(cell.global_batch, cell.log2_lr) for cell in self.cells}
        scores: dict[tuple[int, int], float] = {}
        for batch, log2_lr in places:
            cells = self.at(batch, log2_lr)
            wanted = [cell.seed for cell in cells] if seeds is None else seeds
            complete = set(wanted) <= {cell.seed for cell in cells}
            if complete and global_batch in (None, batch):
                scores[batch, log2_lr] = self.score(cells, wanted)
        if not scores or math.isinf(min(scores.values())):
            return None
        return min(scores, key=lambda place: (scores[place], place))

    @property
    def best_seconds(self) -> float:
        """Seconds of the best cell on what there is; infinite if nothing arrived."""
        place = self.best()
        if place is None:
            return math.inf
        cells = self.at(*place)
        return self.score(cells, [cell.seed for cell in cells])

    def choose(self) -> tuple[int, int] | None:
        """The grid's best cell, among those that were run with all seeds."""
        return self.best(seeds=self.settings.seeds)

    # ---- what to run next ----------------------------------------------------------------------

    def missing(
        self, global_batch: int, expected: int, seeds: Sequence[int]
    ) -> list[tuple[int, int]]:
        """Cells (log2 lr, seed) still to run at a batch; empty when the best is bracketed.

        Args:
            global_batch: The batch.
            expected: Where the best log2 lr should be.
            seeds: To run each with.

        Returns:
            Pairs.
        """
        done = {(cell.log2_lr, cell.seed) for cell in self.at(global_batch)}
        rates = self._window(global_batch, expected, seeds)
        if all((rate, seed) in done for rate in rates for seed in seeds):
            best, margin = self.best(global_batch), self.settings.margin
            if best is not None:
                low, high = best[1] - margin, best[1] + margin
                rates = set(range(min(low, *rates), max(high, *rates) + 1))
        pairs = [(rate, seed) for rate in sorted(rates) for seed in seeds]
        return [pair for pair in pairs if pair not in done]

    def _window(self, global_batch: int, expected: int, seeds: Sequence[int]) -> set[int]:
        """The rates of a batch: those that were run, if they are enough, else around the best."""
        have: dict[int, set[int]] = {}
        for cell in self.at(global_batch):
            have.setdefault(cell.log2_lr, set()).add(cell.seed)
        complete = sorted(rate for rate, ran in have.items() if ran >= set(seeds))
        runs: list[list[int]] = []
        for rate in complete:
            if runs and runs[-1][-1] == rate - 1:
                runs[-1].append(rate)
            else:
                runs.append([rate])
        longest = max(runs, key=len, default=[])
        plan = self.settings
        if len(longest) > plan.below + plan.above:
            return set(longest)
        return set(range(expected - plan.below, expected + plan.above + 1))

    def expected_log2_lr(self, global_batch: int) -> int | None:
        """The best log2 lr of the nearest batch at which anything arrived; rises with the batch."""
        arrived = {
            batch: place[1]
            for batch in {cell.global_batch for cell in self.cells}
            if (place := self.best(batch)) is not None
        }
        if not arrived:
            return None
        distance = {batch: math.log2(global_batch / batch) for batch in arrived}
        near = min(arrived, key=lambda batch: (abs(distance[batch]), batch))
        return arrived[near] + round(0.75 * distance[near])

    def is_pruned(self, global_batch: int) -> bool:
        """Whether nothing arrived at a batch between this one and the centre."""
        if not self.settings.prune:
            return False
        between = {
            cell.global_batch
            for cell in self.cells
            if (cell.global_batch - global_batch) * (cell.global_batch - CENTRE) < 0
        }
        return any(self.best(batch) is None for batch in between)

    def contenders(self) -> dict[int, list[tuple[int, int]]]:
        """Missing (log2 lr, seed) pairs of the cells near the best, by batch."""
        limit = self.settings.contenders * self.best_seconds
        found: dict[int, list[tuple[int, int]]] = {}
        for batch, log2_lr in sorted({(cell.global_batch, cell.log2_lr) for cell in self.cells}):
            cells = self.at(batch, log2_lr)
            have = {cell.seed for cell in cells}
            if self.score(cells, list(have)) <= limit:
                pairs = [(log2_lr, seed) for seed in self.settings.seeds if seed not in have]
                if pairs:
                    found.setdefault(batch, []).extend(pairs)
        return found

    def make_limit(
        self, global_batch: int, pairs: Sequence[tuple[int, int]], most_steps: int
    ) -> Callable[[Sequence[Arrival | None]], int]:
        """Says after how many steps a run at this batch is hopeless, as its row arrives.

        Args:
            global_batch: The batch that is about to run.
            pairs: (log2 lr, seed) of each run.
            most_steps: The limit as long as nothing has arrived.

        Returns:
            Steps, given what is known of each run.
        """
        known = self.best_seconds
        step_seconds = self.step_seconds(global_batch)

        def limit(arrivals: Sequence[Arrival | None]) -> int:
            best = known
            for rate in {rate for rate, _ in pairs}:
                row = [a for (r, _), a in zip(pairs, arrivals, strict=True) if r == rate]
                steps = [a.steps_to_target for a in row if a and a.steps_to_target is not None]
                # Once over half of the seeds are in, the slowest of these bounds the median.
                if 2 * len(steps) > len(row):
                    best = min(best, max(steps) * step_seconds)
            if math.isinf(best):
                return most_steps
            return max(1, math.ceil(self.settings.cut * best / step_seconds))

        return limit


RunRow = Callable[[int, Sequence[tuple[int, int]]], None]
"""Runs (log2 lr, seed) pairs at a batch and adds their cells to the grid."""


def explore(grid: Grid, batches: Sequence[int], run_row: RunRow, scout: Sequence[int]) -> list[str]:
    """Runs the whole grid, or what is missing of it.

    Args:
        grid: Holds what was run before; `run_row` adds to it.
        batches: In the order in which they are visited.
        run_row: Runs cells.
        scout: log2 learning rates tried with one seed at the first batch, to find the window.

    Returns:
        What was left out, in sentences.
    """
    plan, notes = grid.settings, list[str]()
    screen = plan.seeds[: plan.screen]
    if grid.best(batches[0]) is None:
        done = {(cell.log2_lr, cell.seed) for cell in grid.at(batches[0])}
        run_row(batches[0], [(r, plan.seeds[0]) for r in scout if (r, plan.seeds[0]) not in done])
    for batch in batches:
        expected = grid.expected_log2_lr(batch)
        if expected is None:
            return [f"Nothing reached the target at batch {batches[0]}; the grid was given up."]
        if grid.is_pruned(batch) and not grid.at(batch):
            notes.append(f"Batch {batch} was not run: nothing arrived at a batch nearer to 32.")
            continue
        while pairs := grid.missing(batch, expected, screen):
            run_row(batch, pairs)
    while plan.screen is not None and (rows := grid.contenders()):
        for batch, pairs in rows.items():
            run_row(batch, pairs)
    return notes
