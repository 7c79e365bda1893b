"""`rightbatch plan`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rightbatch.cli.opening import open_workload
from rightbatch.cli.output import Output
from rightbatch.cli.render_plan import plan_text
from rightbatch.errors import UsageError
from rightbatch.plan import Plan, make_plan, replay_plan
from rightbatch.store import dump_record, read_record, write_record

SCHEMA = "rightbatch.plan/1"


def run(
    output: Output,
    reference: str,
    *,
    out: Path | None,
    device: str,
    threads: int | None = None,
    **options: Any,
) -> int:
    """Plans, writes the evidence file where one is wanted, and prints the plan.

    Args:
        output: Where to print.
        reference: The workload.
        out: The evidence file, or None.
        device: Where to measure.
        threads: CPU threads, or None for torch's default.
        **options: Passed on to `rightbatch.make_plan`.

    Returns:
        0, or 130 where the plan is what was known when it was interrupted.

    Raises:
        UsageError: If the evidence file has no folder to go to; told before anything is measured.
    """
    if out is not None and not out.parent.is_dir():
        raise UsageError(f"There is no folder {str(out.parent)!r} for {out.name!r}. Make it first.")
    with output.progress(f"Planning {reference}") as report:
        report(f"Checking {reference}")
        workload = open_workload(reference, device, threads)
        plan = make_plan(workload, device=device, progress=report, **options)
    # First of all the answer: should the disk refuse it, it is not lost as well.
    _print(output, plan)
    if out is not None:
        write_record(out, plan, schema=SCHEMA)
    race = plan.evidence.race
    return 130 if race is not None and race.stopped_by == "interrupt" else 0


def replay(output: Output, path: Path) -> int:
    """Recomputes a plan from the evidence in its file, without running a model.

    Args:
        output: Where to print.
        path: The evidence file.

    Returns:
        0.
    """
    _print(output, replay_plan(read_record(path, Plan, schema=SCHEMA)))
    return 0


def _print(output: Output, plan: Plan) -> None:
    output.result(lambda: plan_text(plan), lambda: dump_record(plan, schema=SCHEMA))
