"""`rightbatch study SMALL --carries-over-to LARGE`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rightbatch.cli.opening import open_workload
from rightbatch.cli.output import Output
from rightbatch.cli.render_carry_over import carry_over_text
from rightbatch.errors import UsageError
from rightbatch.store import dump_record, make_run_directory, read_record, write_record
from rightbatch.study.carry_over import CARRY_OVER_SCHEMA, CarryOver, compare_choices
from rightbatch.study.study import SCHEMA, Study, run_study

_RECORD = "study.json"
_FILE = "carry-over.json"
_ROLES = ("small", "large")


def run(
    output: Output,
    references: tuple[str, str],
    *,
    folder: Path | None,
    keep: bool,
    threads: int | None,
    **options: Any,
) -> int:
    """Studies two models alike, or reads two finished studies, and compares their choices.

    Args:
        output: Where to print.
        references: The small and the larger workload; or two run directories.
        folder: Where the files are kept. Default: a new folder, if anything is kept.
        keep: Whether anything is kept.
        threads: CPU threads, or None for torch's default.
        **options: Passed on to `rightbatch.run_study`, for both.

    Returns:
        0, or 130 where a study was interrupted.

    Raises:
        UsageError: If one is a run directory and the other is not.
    """
    there = [(Path(reference) / _RECORD).is_file() for reference in references]
    if all(there):
        small, large = (_read(reference) for reference in references)
        folder = None
    elif any(there):
        one, other = references if there[0] else references[::-1]
        raise UsageError(
            f"{one!r} is a finished study, and {other!r} is not. Give two run directories, or two "
            "workloads."
        )
    else:
        found = _study_both(output, references, folder, keep, threads, options)
        if isinstance(found, int):
            return found
        small, large, folder = found
    carried = compare_choices(small, large)
    if folder is not None:
        write_record(folder / _FILE, carried, schema=CARRY_OVER_SCHEMA)
    output.result(lambda: _text(carried, folder), lambda: _data(carried, folder))
    return 0


def _read(reference: str) -> Study:
    return read_record(Path(reference) / _RECORD, Study, schema=SCHEMA)


def _study_both(
    output: Output,
    references: tuple[str, str],
    folder: Path | None,
    keep: bool,
    threads: int | None,
    options: dict[str, Any],
) -> tuple[Study, Study, Path | None] | int:
    studies: list[Study] = []
    with output.progress("Studies of two models") as report:
        workloads = [open_workload(reference, "cpu", threads) for reference in references]
        if folder is None and keep:
            folder = make_run_directory("runs", f"carry-over-{workloads[0].name}")
        name = options.pop("name")
        for i, (role, workload) in enumerate(zip(_ROLES, workloads, strict=True)):

            def tell(
                message: str, share: float | None = None, i: int = i, role: str = role
            ) -> None:
                report(f"{role} model, {message}", None if share is None else (i + share) / 2)

            study = run_study(
                workload,
                run_directory=None if folder is None else folder / role,
                name=f"{name or workload.name}, {role} model" if options["storage"] else None,
                threads=threads,
                progress=tell,
                **options,
            )
            if study.state == "stopped":
                # Nothing is compared by halves; the same command goes on with it.
                return 130
            studies.append(study)
    return studies[0], studies[1], folder


def _text(carried: CarryOver, folder: Path | None) -> str:
    kept = "" if folder is None else f"\n\nKept in {folder}"
    return carry_over_text(carried) + kept


def _data(carried: CarryOver, folder: Path | None) -> dict[str, Any]:
    content = dump_record(carried, schema=CARRY_OVER_SCHEMA)
    return {**content, "run_directory": None if folder is None else str(folder)}
