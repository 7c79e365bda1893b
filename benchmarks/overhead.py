"""Overhead: what a step of our training loop costs beyond a hand-written PyTorch loop.

    python benchmarks/overhead.py [--workloads digits,source-lm] [--batch-sizes 1,32,256]
        [--rounds 20] [--rows ours,watching,lightning,keras,skorch]

Prints a table and writes results/overhead.md and results/overhead.json. README.md in this folder
says how it is done.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

# Before torch and Keras are imported: one thread, and Keras on the same arithmetic as the others.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["KERAS_BACKEND"] = "torch"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures, prints and writes.

    Args:
        arguments: Of the command line.

    Returns:
        0, or the exit code of what went wrong.
    """
    options = _parse(arguments)
    import torch

    from rightbatch.errors import RightbatchError

    torch.set_num_threads(1)
    try:
        _measure(options)
    except RightbatchError as error:
        _say(str(error))
        return error.exit_code
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--workloads", type=_names, default=["digits", "source-lm"])
    parser.add_argument("--batch-sizes", type=_sizes, default=[1, 32, 256])
    parser.add_argument("--rounds", type=_size, default=20, help="blocks per row; default: 20")
    parser.add_argument("--rows", type=_names, help="with commas; default: all")
    parser.add_argument("--out", type=Path, help="folder of the two files; default: results")
    return parser.parse_args(arguments)


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _sizes(text: str) -> list[int]:
    return [_size(name) for name in _names(text)]


def _size(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not at least 1")
    return number


def _measure(options: argparse.Namespace) -> None:
    from overhead.measure import ROWS, check_rows, measure_cell
    from overhead.table import RESULTS, make_lines, render_terminal, write_results
    from rightbatch import catalog

    rows = options.rows or ROWS
    check_rows(rows, options.workloads)
    cells = []
    for name in options.workloads:
        workload = catalog.get(name)
        for asked in options.batch_sizes:
            _say(f"{name} at batch {asked}: {options.rounds} rounds")
            cells.append(measure_cell(workload, asked, rows=rows, num_rounds=options.rounds))
    print(render_terminal(make_lines(cells)))
    page = write_results(cells, _describe_machine(), options.out or RESULTS)
    _say(f"Wrote {page} and {page.with_suffix('.json').name}")


def _describe_machine() -> dict[str, Any]:
    # Late: it imports jax, whose threads should not run beside a measurement.
    from regret.truth import describe_machine

    machine = asdict(describe_machine())
    versions = {name: machine["versions"][name] for name in ("torch", "numpy")}
    for name in ("lightning", "keras", "skorch"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return {**machine, "versions": versions}


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
