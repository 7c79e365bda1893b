"""The table: one row per method, one per workload, and what the grids look like."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rightbatch.store import write_atomically

from .grid import Grid
from .peers import ROWS
from .score import NEVER, Scores, load_scores, regret_of
from .truth import RESULTS, Truth, load_truth

TABLE = RESULTS.parent / "regret.md"
HELD_OUT = "held-out-"
"""Names of workloads that are not in the catalog begin with this."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """One choice of one method on one workload, ready to be counted.

    Attributes:
        workload: Its name.
        row: The method.
        regret: Mean over fresh seeds; `NEVER` or more where it never arrives.
        low: Lower end of its interval.
        high: Upper end.
        reached: Share of fresh seeds on which it arrived.
        share_of_grid: Its cost in examples ÷ the grid's.
        full_trainings: Its cost ÷ one run of the baseline.
        covers: Whether its near-best interval holds the grid's best batch; None without one.
        span: Upper end ÷ lower end of that interval; None without one.
        text: The choice in words.
    """

    workload: str
    row: str
    regret: float
    low: float
    high: float
    reached: float
    share_of_grid: float
    full_trainings: float
    covers: bool | None
    span: float | None
    text: str


def collect(truth: Truth, scores: Scores) -> list[Result]:
    """The results of a workload.

    Args:
        truth: Its grid.
        scores: Its scores.

    Returns:
        One per choice.
    """
    baseline = truth.baseline()
    training = baseline[1] if baseline else math.nan
    results: list[Result] = []
    for scored in scores.scored:
        choice, regret = scored.choice, regret_of(scored, scores)
        low, high = choice.near_low, choice.near_high
        interval = None if low is None or high is None else (low, high)
        recipe = choice.recipe
        results.append(
            Result(
                workload=truth.workload,
                row=choice.row,
                regret=NEVER if regret is None else regret.mean,
                low=NEVER if regret is None else regret.low,
                high=math.inf if regret is None else regret.high,
                reached=0.0 if regret is None else regret.reached,
                share_of_grid=choice.examples / truth.cost_examples,
                full_trainings=choice.examples / training,
                covers=interval and interval[0] <= scores.best_batch <= interval[1],
                span=interval and interval[1] / interval[0],
                text="no answer"
                if recipe is None
                else f"{recipe.global_batch}, {recipe.learning_rate:.2g}",
            )
        )
    return results


# ---- text ----------------------------------------------------------------------------------------


def percent(regret: float, reached: float = 1.0) -> str:
    """A regret as text.

    Args:
        regret: As a share.
        reached: Share of runs that arrived.

    Returns:
        Such as `12 %`, `≥ 300 %` where some runs did not arrive, `never` where none did.

    Example:
        >>> percent(0.123), percent(3.0, 0.5), percent(7.0, 0.0)
        ('12 %', '≥ 300 %', 'never')
    """
    if reached == 0:
        return "never"
    return f"{'≥ ' if reached < 1 else ''}{100 * regret:.0f} %"


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, its first column to the left and the others to the right.

    Args:
        head: Titles.
        rows: Cells.

    Returns:
        The table.
    """
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def summary(results: Sequence[Result]) -> str:
    """One row per method: median and worst over all choices on all workloads.

    Args:
        results: Of any number of workloads.

    Returns:
        A Markdown table.
    """
    head = [
        "method", "choices", "median regret", "worst", "never arrives", "full trainings, median",
        "worst", "share of grid, median", "best size in near_best", "span, median", "span, worst",
    ]  # fmt: skip
    rows: list[list[str]] = []
    for row in ROWS:
        mine = [result for result in results if result.row == row]
        if not mine:
            continue
        regrets = [min(result.regret, NEVER) for result in mine]
        near = [r for r in mine if r.covers is not None and r.span is not None]
        spans = [r.span for r in near if r.span is not None]
        rows.append(
            [
                row,
                str(len(mine)),
                _capped(statistics.median(regrets)),
                _capped(max(regrets)),
                str(sum(result.reached == 0 for result in mine)),
                f"{statistics.median(r.full_trainings for r in mine):.1f}",
                f"{max(r.full_trainings for r in mine):.1f}",
                f"{100 * statistics.median(r.share_of_grid for r in mine):.2f} %",
                f"{sum(bool(r.covers) for r in near)} of {len(near)}" if near else "",
                f"{statistics.median(spans):.1f}×" if spans else "",
                f"{max(spans):.1f}×" if spans else "",
            ]
        )
    return markdown(head, rows)


def _capped(regret: float) -> str:
    return f"≥ {100 * NEVER:.0f} %" if regret >= NEVER else f"{100 * regret:.0f} %"


def details(truth: Truth, scores: Scores, results: Sequence[Result]) -> str:
    """Every choice on one workload.

    Args:
        truth: Its grid.
        scores: Its scores.
        results: Its results.

    Returns:
        Markdown.
    """
    arrived = [value for value in scores.best_seconds if value is not None]
    sentence = (
        f"N = {truth.num_examples}, target `{truth.target}`. Best of the grid: batch "
        f"{scores.best_batch}, learning rate {scores.best_rate:g}; on fresh seeds "
        f"{statistics.fmean(arrived):.3g} modelled seconds"
    )
    if len(arrived) < len(scores.best_seconds):
        sentence += f" (on {len(arrived)} of {len(scores.best_seconds)} seeds)"
    order = list(ROWS)
    lines = [
        [
            result.row,
            result.text,
            percent(result.regret, result.reached),
            "" if result.reached == 0 else f"{percent(result.low)} to {percent(result.high)}",
            f"{100 * result.reached:.0f} %",
            f"{result.full_trainings:.2f}",
            f"{100 * result.share_of_grid:.2f} %",
            "" if result.covers is None else ("yes" if result.covers else "no"),
            "" if result.span is None else f"{result.span:.1f}×",
        ]
        for result in sorted(results, key=lambda r: order.index(r.row))
    ]
    head = [
        "method", "batch, learning rate", "regret", "95 % interval", "arrived", "full trainings",
        "share of grid", "best size in near_best", "span",
    ]  # fmt: skip
    return f"### {truth.workload}\n\n{sentence}.\n\n{markdown(head, lines)}\n\n{shape(truth)}"


def shape(truth: Truth) -> str:
    """The grid's best at each batch, and how exhaustive the grid was.

    Args:
        truth: The grid.

    Returns:
        Markdown.
    """
    grid = truth.grid()
    batches = sorted({cell.global_batch for cell in truth.cells})
    head = ["batch", *map(str, batches)]
    rows = [
        ["seconds ÷ best", *(_relative(grid, batch) for batch in batches)],
        ["learning rate", *(_rate(grid, batch) for batch in batches)],
        ["rates tried", *(str(len({c.log2_lr for c in grid.at(b)})) for b in batches)],
    ]
    counts = {state: sum(c.state == state for c in truth.cells) for state in _STATES}
    words = ", ".join(f"{count} {state}" for state, count in counts.items())
    settings = truth.settings
    text = (
        f"Grid: {len(truth.cells)} runs ({words}), {truth.cost_examples:.3g} examples, cut at "
        f"{settings.cut:g} × the best."
    )
    if settings.screen is not None:
        text += (
            f" Thrifty: {settings.screen} seed everywhere, {len(settings.seeds)} within "
            f"{settings.contenders:g} × the best."
        )
    return "\n".join([markdown(head, rows), "", " ".join([text, *truth.notes])])


_STATES = ("reached", "censored", "diverged")


def _relative(grid: Grid, batch: int) -> str:
    place = grid.best(batch)
    if place is None:
        return f"> {grid.settings.cut:g}"
    cells = grid.at(*place)
    return f"{grid.score(cells, [cell.seed for cell in cells]) / grid.best_seconds:.2f}"


def _rate(grid: Grid, batch: int) -> str:
    place = grid.best(batch)
    return "" if place is None else f"{2.0 ** place[1]:.2g}"


INTRODUCTION = """# Regret against an exhaustive grid

Written by `python benchmarks/regret.py table`; [README.md](../README.md) says how it is measured.
Regret is modelled seconds to the target ÷ those of the grid's best − 1, on fresh seeds. A full
training is one run of the baseline (batch 32 at its best learning rate) to the target. Where not
every run arrived, a regret is a lower bound (≥); runs are given up at 8 × the best.
"""


def write_table(path: Path = TABLE, say: Callable[[str], None] = lambda _: None) -> Path:
    """Writes the table of everything that was scored.

    Args:
        path: The file.
        say: Told which workloads have no scores yet.

    Returns:
        The file.
    """
    catalog: list[Result] = []
    held_out: list[Result] = []
    sections: list[str] = []
    for file in sorted(RESULTS.glob("*.json")):
        if file.name.endswith(".scores.json"):
            continue
        truth = load_truth(file.stem)
        scores = None if truth is None else load_scores(truth.workload)
        if truth is None or scores is None:
            say(f"{file.stem} has a grid and no scores yet.")
            continue
        results = collect(truth, scores)
        (held_out if truth.workload.startswith(HELD_OUT) else catalog).extend(results)
        sections.append(details(truth, scores, results))
    parts = [INTRODUCTION]
    for title, results in (("Catalog", catalog), ("Held-out workloads", held_out)):
        if results:
            parts.append(f"## {title}\n\n{summary(results)}\n")
    parts += ["## Every choice\n", "\n\n".join(sections)]
    write_atomically(path, ("\n".join(parts) + "\n").encode())
    return path
