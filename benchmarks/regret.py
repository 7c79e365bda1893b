"""Regret: what a choice of batch and learning rate costs against the best of an exhaustive grid.

    python benchmarks/regret.py truth [WORKLOAD …]     measure the grids (resumable)
    python benchmarks/regret.py score [WORKLOAD …]     let everyone choose, and run their choices
    python benchmarks/regret.py table                  write results/regret.md
    python benchmarks/regret.py                        all three, for the catalog

README.md in this folder says how it is done and what was left out.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any

# Before torch and jax are imported: one thread, so that runs are the same wherever they are made.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("JAX_PLATFORMS", "cpu")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one of the three commands.

    Args:
        arguments: Of the command line.

    Returns:
        0, or the exit code of what went wrong.
    """
    options = _parse(arguments)
    _use_one_core()
    import torch

    from rightbatch.errors import RightbatchError

    torch.set_num_threads(1)
    try:
        options.run(options)
    except RightbatchError as error:
        _say(str(error))
        return error.exit_code
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.set_defaults(run=_everything)
    commands = parser.add_subparsers()
    truth = commands.add_parser("truth", help="measure the grids")
    truth.set_defaults(run=_truth)
    truth.add_argument("--thrifty", action="store_true", help="the shorter grid, for dear models")
    truth.add_argument("--first-batch", type=int, help="the smallest of the grid; default: 1")
    truth.add_argument("--num-seeds", type=int, help="seeds of the grid; default: 6")
    score = commands.add_parser("score", help="choose and run the choices")
    score.set_defaults(run=_score)
    score.add_argument("--rows", action="append", help="a row, or several with commas; repeatable")
    score.add_argument("--seeds", type=int, default=2, help="times that a method chooses")
    score.add_argument("--fresh", type=int, default=6, help="fresh seeds that a choice is run on")
    score.add_argument("--again", action="store_true", help="forget what these rows chose before")
    commands.add_parser("table", help="write the table").set_defaults(run=_table)
    for command in (truth, score):
        command.add_argument("workloads", nargs="*", help="names, or path/to/file.py:name")
    return parser.parse_args(arguments)


def _use_one_core() -> None:
    """XLA takes every core it sees; the rest of the machine may be measuring something."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})


def _workloads(names: Sequence[str]) -> list[Any]:
    from rightbatch import catalog

    return [catalog.load_workload(name) for name in names or catalog.names()]


def _truth(options: argparse.Namespace) -> None:
    from regret.grid import Settings
    from regret.truth import measure_truth

    settings = None  # as before, where there is a grid already
    if options.thrifty or options.first_batch or options.num_seeds:
        make = Settings.thrifty if options.thrifty else Settings
        seeds = tuple(range(options.num_seeds or 6))
        settings = make(seeds=seeds, first_batch=options.first_batch or 1)
    for workload in _workloads(options.workloads):
        measure_truth(workload, settings, _say)


def _score(options: argparse.Namespace) -> None:
    from regret.peers import ROWS
    from regret.score import score_workload

    rows = None
    if options.rows is not None:
        # Some names have a comma themselves.
        rows = [r for text in options.rows for r in ([text] if text in ROWS else text.split(","))]
    for workload in _workloads(options.workloads):
        score_workload(
            workload,
            rows=rows,
            method_seeds=range(options.seeds),
            num_fresh=options.fresh,
            again=options.again,
            say=_say,
        )


def _table(options: argparse.Namespace) -> None:
    from regret.table import write_table

    _say(f"Wrote {write_table(say=_say)}")


def _everything(options: argparse.Namespace) -> None:
    for command in ("truth", "score", "table"):
        later = _parse([command])
        later.run(later)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
