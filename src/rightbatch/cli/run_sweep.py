"""`rightbatch study` over variants of a workload: `--label-noise`, `--dataset-sizes`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rightbatch.cli.opening import open_workload
from rightbatch.cli.output import Output
from rightbatch.cli.render_sweep import sweep_text
from rightbatch.errors import UsageError
from rightbatch.store import dump_record, make_run_directory
from rightbatch.study.sweep import SWEEP_SCHEMA, Sweep, SweepDesign, lengths_of, run_sweep


def run(
    output: Output,
    reference: str,
    *,
    folder: Path | None,
    keep: bool,
    begun: SweepDesign | None,
    threads: int | None,
    **options: Any,
) -> int:
    """Runs a sweep, or goes on with one, and prints what it found.

    Args:
        output: Where to print.
        reference: The workload.
        folder: Where its files are kept. Default: a new folder, if anything is kept.
        keep: Whether anything is kept.
        begun: The design of the sweep that is gone on with.
        threads: CPU threads, or None for torch's default.
        **options: Passed on to `rightbatch.run_sweep`.

    Returns:
        0, or 130 where it was interrupted.

    Raises:
        UsageError: If label noise and dataset sizes are asked for at once.
    """
    if options["label_noise"] is not None and options["dataset_sizes"] is not None:
        raise UsageError(
            "--label-noise and --dataset-sizes are two sweeps. Give one of them, then the other."
        )
    if begun is not None:
        options |= _as_begun(begun)
    with output.progress(f"Sweep of {reference}") as report:
        report(f"Checking {reference}")
        workload = open_workload(reference, "cpu", threads)
        if folder is None and keep:
            folder = make_run_directory("runs", f"sweep-{workload.name}")
        sweep = run_sweep(
            workload, run_directory=folder, threads=threads, progress=report, **options
        )
    output.result(lambda: _text(sweep, folder), lambda: _data(sweep, folder))
    return 130 if sweep.state == "stopped" else 0


def _as_begun(design: SweepDesign) -> dict[str, Any]:
    """The options that a sweep was begun with."""
    noise = design.kind == "label_noise"
    return {
        "label_noise": design.levels if noise else None,
        "dataset_sizes": None if noise else [int(level) for level in design.levels],
        "batch_sizes": design.batch_sizes,
        "learning_rates": design.learning_rates,
        "seeds": design.seeds,
        "target": design.target,
        "variant_seed": design.variant_seed,
        "targets": design.targets,
        **lengths_of(design.budget),
    }


def _text(sweep: Sweep, folder: Path | None) -> str:
    kept = "" if folder is None else f"\n\nKept in {folder}"
    return sweep_text(sweep) + kept


def _data(sweep: Sweep, folder: Path | None) -> dict[str, Any]:
    content = dump_record(sweep, schema=SWEEP_SCHEMA)
    return {**content, "run_directory": None if folder is None else str(folder)}
