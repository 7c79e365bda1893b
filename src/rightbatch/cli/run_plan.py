"""`rightbatch plan`."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import rightbatch
from rightbatch.cli.opening import open_workload
from rightbatch.cli.output import Output
from rightbatch.cli.units import parse_bytes
from rightbatch.store import dump_record, read_record, write_record

SCHEMA = "rightbatch.plan/1"


def run(
    output: Output,
    reference: str,
    *,
    out: Path | None,
    memory: str | None,
    device: str,
    **options: Any,
) -> int:
    """Plans, writes the evidence file where one is wanted, and prints the plan.

    Args:
        output: Where to print.
        reference: The workload.
        out: The evidence file, or None.
        memory: The memory limit as it was typed, or None.
        device: Where to measure.
        **options: Passed on to `rightbatch.make_plan`.

    Returns:
        0.
    """
    memory_limit = None if memory is None else parse_bytes(memory)
    make_plan: Any = getattr(rightbatch, "make_plan")  # noqa: B009 (resolved when it is called)
    with output.progress(f"Planning {reference}") as report:
        report(f"Checking {reference}")
        workload = open_workload(reference, device)
        plan = make_plan(
            workload, memory_limit=memory_limit, device=device, progress=report, **options
        )
    # Before anything is printed: a plan that could not be kept must not look kept.
    if out is not None:
        write_record(out, plan, schema=SCHEMA)
    _print(output, plan)
    return 0


def replay(output: Output, path: Path) -> int:
    """Recomputes a plan from the evidence in its file, without running a model.

    Args:
        output: Where to print.
        path: The evidence file.

    Returns:
        0.
    """
    module: Any = importlib.import_module("rightbatch.plan")
    recorded = read_record(path, module.Plan, schema=SCHEMA)
    _print(output, module.replay_plan(recorded))
    return 0


def _print(output: Output, plan: Any) -> None:
    render: Any = importlib.import_module("rightbatch.plan.render")
    output.result(lambda: render.plan_text(plan), lambda: dump_record(plan, schema=SCHEMA))
