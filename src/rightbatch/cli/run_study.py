"""`rightbatch study`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

from rightbatch.cli import run_carry_over, run_sweep
from rightbatch.cli.opening import open_workload
from rightbatch.cli.output import Output
from rightbatch.cli.render_study import study_text
from rightbatch.cli.run_plan import SCHEMA as PLAN_SCHEMA
from rightbatch.errors import UsageError
from rightbatch.plan.records import Plan
from rightbatch.store import dump_record, make_run_directory, read_record
from rightbatch.study.design import StudyDesign, Unit, sizes_around
from rightbatch.study.export_optuna import check_optuna_place, export_to_optuna
from rightbatch.study.study import SCHEMA, Storage, Study, read_design, run_study
from rightbatch.study.sweep import read_sweep_design


def run(
    output: Output,
    reference: str,
    *,
    run: Path | None,
    resume: Path | None,
    keep: bool,
    export_optuna: str | None = None,
    threads: int | None = None,
    label_noise: str | None = None,
    dataset_sizes: str | None = None,
    carries_over_to: str | None = None,
    **options: Any,
) -> int:
    """Runs a study, or goes on with one, and prints what it found.

    Args:
        output: Where to print.
        reference: The workload.
        run: Where its files are kept.
        resume: Or the folder of a study to go on with.
        keep: Whether anything is kept.
        export_optuna: Where it is written as a study of Optuna too, once it is complete.
        threads: CPU threads, or None for torch's default.
        label_noise: Shares of wrong labels, a study of each.
        dataset_sizes: Or parts of the training set.
        carries_over_to: Or another workload, to which the choice is carried.
        **options: Passed on to `rightbatch.run_study`.

    Returns:
        0, or 130 where it was interrupted.

    Raises:
        UsageError: If options contradict each other.
    """
    if not keep and (run or resume or options["storage"]):
        raise UsageError("--no-run keeps nothing. Drop it, or --run, --resume and --storage.")
    if resume is not None and (run or options["storage"]):
        raise UsageError("--resume already says where the study is. Drop --run and --storage.")
    if options["batch_sizes"].endswith(".json"):
        options["batch_sizes"] = _sizes_of_plan(Path(options["batch_sizes"]))
    place = {"folder": resume or run, "keep": keep, "threads": threads}
    begun = None if resume is None else read_sweep_design(resume)
    swept = {"label_noise": label_noise, "dataset_sizes": dataset_sizes}
    asked = [name for name, value in swept.items() if value is not None]
    if carries_over_to is not None:
        if asked or resume is not None:
            other = "--resume" if resume is not None else _option(asked[0])
            raise UsageError(
                f"--carries-over-to compares two plain studies. Drop {other}; the same command "
                "with --run FOLDER goes on where it stopped."
            )
        both = (reference, carries_over_to)
        return run_carry_over.run(output, both, **place, **options)
    if resume is not None:
        design = None if begun is not None else read_design(resume)
        _refuse_design({**options, **swept})
        options |= {} if design is None else _as_begun(*design)
    if begun is not None or asked:
        return run_sweep.run(output, reference, begun=begun, **place, **swept, **options)
    with output.progress(f"Study of {reference}") as report:
        report(f"Checking {reference}")
        workload = open_workload(reference, "cpu", threads)
        exported = options["name"] or workload.name
        if export_optuna is not None:
            check_optuna_place(export_optuna, exported)
        folder = resume or run
        if folder is None and keep:
            folder = make_run_directory("runs", f"study-{workload.name}")
        study = run_study(
            workload, run_directory=folder, threads=threads, progress=report, **options
        )
    output.result(lambda: _text(study, folder), lambda: _data(study, folder))
    if export_optuna is not None and study.state == "complete":
        export_to_optuna(folder or study, export_optuna, name=exported)
    return 130 if study.state == "stopped" else 0


_DEFAULTS = {
    "batch_sizes": "auto", "learning_rates": "auto", "seeds": 3, "watch": "first", "search": "grid",
}  # fmt: skip


def _sizes_of_plan(path: Path) -> tuple[int, ...]:
    """Batch sizes around those that a plan calls as good as the best."""
    plan = read_record(path, Plan, schema=PLAN_SCHEMA)
    near, N = plan.near_best, plan.evidence.setting.num_examples
    return sizes_around(near.low, near.high, N)


def _refuse_design(options: dict[str, Any]) -> None:
    """What is gone on with has the design that it was begun with."""
    asked = ("batch_sizes", "learning_rates", "seeds", "target", "watch", "search", "trials")
    asked = (*asked, "label_noise", "dataset_sizes", *get_args(Unit))
    given = [name for name in asked if options[name] != _DEFAULTS.get(name)]
    if given:
        names = ", ".join(_option(name) for name in given)
        raise UsageError(f"--resume goes on with the design that was begun. Drop {names}.")


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _as_begun(design: StudyDesign, storage: Storage | None) -> dict[str, Any]:
    """The options that a study was begun with."""
    lengths: dict[str, Any] = dict.fromkeys(get_args(Unit))
    lengths[design.budget.unit] = design.budget.amount
    place = {"storage": storage.url, "name": storage.name} if storage else {}
    return {
        **place,
        "batch_sizes": design.batch_sizes,
        "learning_rates": design.learning_rates or "auto",
        "seeds": design.seeds,
        "target": design.target,
        "search": design.search,
        "trials": design.trials,
        "watch": design.watch,
        **lengths,
    }


def _text(study: Study, folder: Path | None) -> str:
    kept = "" if folder is None else f"\n\nKept in {folder}"
    return study_text(study) + kept


def _data(study: Study, folder: Path | None) -> dict[str, Any]:
    content = dump_record(study, schema=SCHEMA)
    return {**content, "run_directory": None if folder is None else str(folder)}
