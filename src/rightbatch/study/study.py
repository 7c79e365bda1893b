"""`run_study`: trainings over batch sizes, learning rates and seeds, and what they say."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rightbatch.errors import ProbeError, UsageError
from rightbatch.store import read_record, write_record
from rightbatch.study.contrasts import common_epochs, contrast_sizes
from rightbatch.study.database import StoredTrial, StudyDatabase
from rightbatch.study.design import (
    SAMPLERS,
    BatchSizes,
    LearningRates,
    SearchName,
    StudyDesign,
    make_design,
)
from rightbatch.study.equal_costs import compare_sizes
from rightbatch.study.executors import ExecutorName
from rightbatch.study.findings import Best, Comparison, Contrast, Fits, RaceFinding, SizeFinding
from rightbatch.study.gradients import StudyGradients, study_gradients
from rightbatch.study.group import Engine
from rightbatch.study.judging import summarise_trial
from rightbatch.study.over_sizes import choose_best, fit_sizes
from rightbatch.study.runner import Progress, StudyRunner, metric_name
from rightbatch.study.sampler_search import load_optuna
from rightbatch.study.size_table import SizeTable, tables_of
from rightbatch.study.tidy import write_tidy
from rightbatch.study.trials import FINAL, StudyTrial
from rightbatch.workload import Workload

SCHEMA = "rightbatch.study/1"
RECORD = "study.json"
DATABASE, STORAGE = "study.db", "storage.json"
STORAGE_SCHEMA = "rightbatch.storage/1"
DEFAULT_EPOCHS = 20.0
STUDY_NAME = "study"
"""Of the study in a run directory's own database."""


@dataclass(frozen=True, kw_only=True)
class StudyCost:
    """What a study took.

    Attributes:
        examples: Training examples processed, in all trainings.
        seconds: Wall time of this call.
    """

    examples: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Study:
    """A study and what it found.

    Attributes:
        workload: Name of what was trained.
        num_examples: N.
        metric: Name of the metric, or None.
        design: What was run.
        state: `stopped` where it was interrupted; it can be gone on with.
        engines: What ran the trainings, and why.
        watching: Name of the weight whose path was followed.
        trials: Every training, by batch size, learning rate and seed.
        sizes: What the trainings of each batch size say.
        fits: What holds over the sizes.
        comparisons: The sizes at equal epochs, steps, examples and modelled seconds.
        contrasts: How rough paths are, how far from the initial weights they end, and the gap
            between validation and training loss: the smallest batch against the largest.
        best: The pair to train with; None where no training ended with a loss.
        gradients: How batches' gradients scatter around the full one.
        cost: What it took.
        warnings: What a reader should know.
        race: What a race dropped and what it cost; None for any other search.
    """

    workload: str
    num_examples: int
    metric: str | None
    design: StudyDesign
    state: Literal["complete", "stopped"]
    engines: tuple[str, ...]
    watching: str
    trials: tuple[StudyTrial, ...]
    sizes: tuple[SizeFinding, ...]
    fits: Fits
    comparisons: tuple[Comparison, ...]
    contrasts: tuple[Contrast, ...]
    best: Best | None
    gradients: StudyGradients
    cost: StudyCost
    warnings: tuple[str, ...]
    race: RaceFinding | None = None

    def trials_at(self, batch_size: int, learning_rate: float | None = None) -> list[StudyTrial]:
        """The trainings of one size, or of one size and learning rate.

        Args:
            batch_size: Examples per update.
            learning_rate: Or None for all.

        Returns:
            Their rows.
        """
        return [
            trial
            for trial in self.trials
            if trial.batch_size == batch_size
            and (learning_rate is None or trial.learning_rate == learning_rate)
        ]


def run_study(
    workload: Workload,
    *,
    batch_sizes: BatchSizes = "auto",
    learning_rates: LearningRates = "auto",
    seeds: int | Sequence[int] = 3,
    epochs: float | None = None,
    steps: int | None = None,
    examples: int | None = None,
    seconds: float | None = None,
    target: str | None = None,
    search: SearchName = "grid",
    trials: int | None = None,
    watch: str = "first",
    engine: Engine = "auto",
    executor: ExecutorName = "local",
    workers: int = 1,
    run_directory: str | Path | None = None,
    storage: str | None = None,
    name: str | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Study:
    """Trains at every batch size, learning rate and seed, and says what that shows.

    For one seed, trainings begin with the same weights and see the data in the same order, at
    every batch size and learning rate. Called again with the same place and design, it goes on
    where it stopped and repeats nothing that had ended.

    Args:
        workload: What to train.
        batch_sizes: Numbers and `full`, `powers` or `auto`: a list, or a text with commas.
        learning_rates: Numbers; a logarithmic grid `first:last:count`; or `auto`: for each size
            octaves around what its range test says, and farther where the best is at the edge.
        seeds: How many, or which.
        epochs: Passes of each training. Default, where no other length is given: 20.
        steps: Or updates.
        examples: Or training examples.
        seconds: Or seconds that the training loop would take, by the measured step time.
        target: What counts as trained, such as `val_loss<=0.15`. Default: the workload's.
        search: Which pairs of batch size and learning rate are run: all (`grid`); all for a part
            of their way and the better ones farther (`race`); or those that a sampler of Optuna
            asks for: `tpe`, `gp` or `random`.
        trials: How many pairs a sampler asks for. Default: 20.
        watch: The weight whose path is followed, such as `0.weight[3,1]`. Default: the first
            weight of the first layer.
        engine: `compiled`, `vmapped`, `loop`, or `auto`.
        executor: Where trainings run: `local`, or `ray`: on the Ray cluster that this process is
            connected to or finds, otherwise on one that it starts here.
        workers: Processes of this machine that run trainings side by side; with 1 this one does.
            One that dies is replaced, and what it ran is run again.
        run_directory: Where its files are kept: the database, `study.json`, and one row per
            training and per evaluation in `trials.csv` and `points.csv`. Default: nowhere.
        storage: URL of another database, such as `postgresql+psycopg://user@host/name`. Called
            with the same arguments on several machines, they share the trainings.
        name: Of the study in that database. Default: the workload's.
        threads: Of the compiled and the vmapped engine, in each worker. Default: all cores,
            divided by workers.
        progress: Told what is being done, and which share of the trainings is done.

    Returns:
        The study. Where Ctrl-C ended it, what was known by then.

    Raises:
        UsageError: If an argument is out of range, or the place holds another study.
        MissingExtraError: If a sampler is asked for and Optuna is not installed.
        ProbeError: If every training failed.

    Example:
        >>> from rightbatch import load_workload, run_study
        >>> study = run_study(
        ...     load_workload("max3"), batch_sizes=["full", 50], learning_rates=[0.1, 1.0],
        ...     seeds=2, epochs=4,
        ... )
        >>> len(study.trials), study.best.batch_size
        (8, 50)
    """
    lengths = {"epochs": epochs, "steps": steps, "examples": examples, "seconds": seconds}
    if all(length is None for length in lengths.values()):
        lengths["epochs"] = DEFAULT_EPOCHS
    design = make_design(
        workload.num_examples,
        batch_sizes=batch_sizes,
        learning_rates=learning_rates,
        seeds=seeds,
        target=target if target is not None else workload.target,
        search=search,
        trials=trials,
        watch=watch,
        **lengths,  # pyright: ignore[reportArgumentType] (each has its own type)
    )
    if design.search in SAMPLERS:
        load_optuna()
    begun = time.perf_counter()
    folder = None if run_directory is None else Path(run_directory)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    place = storage or ("sqlite://" if folder is None else str(folder / DATABASE))
    database = StudyDatabase(place, name or (STUDY_NAME if storage is None else workload.name))
    try:
        runner = StudyRunner(
            workload,
            design,
            database,
            engine=engine,
            executor=executor,
            workers=workers,
            threads=threads,
            progress=progress or (lambda *_: None),
        )
        again = database.begin(design, runner.task())
        if folder is not None and storage is not None:
            elsewhere = Storage(url=database.shown, name=database.name)
            write_record(folder / STORAGE, elsewhere, schema=STORAGE_SCHEMA)
        database.tell("resumed" if again else "begun", workload.name)
        state: Literal["complete", "stopped"] = "complete"
        try:
            runner.run()
        except KeyboardInterrupt:
            state = "stopped"
        seconds_taken = time.perf_counter() - begun
        study = _conclude(workload, database, runner, design, state, seconds_taken)
        if state == "complete":
            study = _with_gradients(study, workload, database, runner, begun)
        if folder is not None:
            write_record(folder / RECORD, study, schema=SCHEMA)
            write_tidy(folder, study.trials, database.trials(), workload.num_examples)
        ended = sum(trial.state in FINAL for trial in study.trials)
        database.tell(study.state, f"{ended} trainings have ended")
    finally:
        database.close()
    if study.trials and all(trial.state == "failed" for trial in study.trials):
        raise ProbeError(f"Every training failed. The first: {study.trials[0].note}")
    return study


def _with_gradients(
    study: Study, workload: Workload, database: StudyDatabase, runner: StudyRunner, begun: float
) -> Study:
    """The study with the picture of its gradients; stopped, where that was interrupted."""
    runner.tell("gradients: error and direction against batch size")
    try:
        found = study_gradients(workload, database, study.design, runner.setting, study.best)
    except KeyboardInterrupt:
        return dataclasses.replace(study, state="stopped")
    cost = dataclasses.replace(study.cost, seconds=time.perf_counter() - begun)
    return dataclasses.replace(study, gradients=found, cost=cost)


@dataclass(frozen=True, kw_only=True)
class Storage:
    """Where the trainings of a study are, when not in its folder.

    Attributes:
        url: Of the database, without a password.
        name: Of the study in it.
    """

    url: str
    name: str


def read_design(run_directory: str | Path) -> tuple[StudyDesign, Storage | None]:
    """The design of a study that was begun, and where its trainings are.

    Args:
        run_directory: Where its files are.

    Returns:
        The design, and the other storage where it has one.

    Raises:
        UsageError: If there is no study.
    """
    database, storage = _open_kept(Path(run_directory))
    try:
        return database.open()[0], storage
    finally:
        database.close()


def read_trials(run_directory: str | Path) -> list[StoredTrial]:
    """The trainings of a study that was begun, with their evaluations.

    Args:
        run_directory: Where its files are.

    Returns:
        Them, in the order in which they were asked for.

    Raises:
        UsageError: If there is no study.
    """
    database, _ = _open_kept(Path(run_directory))
    try:
        database.open()
        return database.trials()
    finally:
        database.close()


def _open_kept(folder: Path) -> tuple[StudyDatabase, Storage | None]:
    storage = None
    if (folder / STORAGE).exists():
        storage = read_record(folder / STORAGE, Storage, schema=STORAGE_SCHEMA)
    elif not (folder / DATABASE).exists():
        raise UsageError(f"There is no study in {str(folder)!r}: it has no {DATABASE}.")
    url, name = (storage.url, storage.name) if storage else (str(folder / DATABASE), STUDY_NAME)
    return StudyDatabase(url, name), storage


def _conclude(
    workload: Workload,
    database: StudyDatabase,
    runner: StudyRunner,
    design: StudyDesign,
    state: Literal["complete", "stopped"],
    seconds: float,
) -> Study:
    """What the trainings in the database say."""
    stored, setting = database.trials(), runner.setting
    stored.sort(key=lambda t: (t.key.batch_size, t.key.learning_rate, t.key.seed))
    tables = [table for table in tables_of(stored, setting) if table.resolved]
    epochs = common_epochs(tables, setting)
    sizes = tuple(table.finding(epochs) for table in tables)
    trials = tuple(summarise_trial(trial, setting) for trial in stored)
    race = runner.race()
    examples = sum(trial.examples for trial in trials) + (race.repeated_examples if race else 0)
    return Study(
        workload=workload.name,
        num_examples=workload.num_examples,
        metric=metric_name(workload),
        design=design,
        state=state,
        engines=runner.engines,
        watching=runner.watching,
        trials=trials,
        sizes=sizes,
        fits=fit_sizes(tables, sizes, setting),
        comparisons=compare_sizes(tables, setting),
        contrasts=contrast_sizes(tables, setting),
        best=choose_best(sizes, setting),
        gradients=StudyGradients(record=None, skipped="the study was stopped before"),
        cost=StudyCost(examples=examples, seconds=seconds),
        warnings=tuple(_warnings(design, state, trials, tables, sizes)),
        race=race,
    )


def _warnings(
    design: StudyDesign,
    state: Literal["complete", "stopped"],
    trials: Sequence[StudyTrial],
    tables: Sequence[SizeTable],
    sizes: Sequence[SizeFinding],
) -> list[str]:
    """What a reader should know, the worst first."""
    found: list[str] = []
    failed = [trial for trial in trials if trial.state == "failed"]
    if failed:
        first = failed[0]
        many = f"{len(failed)} trainings" if len(failed) > 1 else "1 training"
        found.append(f"{many} failed; at batch {first.batch_size:,}: {first.note}.")
    missing = [B for B in design.batch_sizes if B not in {t.batch_size for t in tables}]
    whole = {t.batch_size for t in trials if t.share == 1.0}
    lost = [B for B in missing if B in whole]
    if lost:
        found.append(f"No training ended with a loss at batch {_listed(lost)}.")
    never = [B for B in missing if B not in whole]
    if never and state == "complete":
        why = (
            "The race dropped all rates of"
            if design.search == "race"
            else f"The sampler ({design.search}) did not ask for"
        )
        found.append(f"{why} batch {_listed(never)}: nothing is said of them.")
    met_at_once = [f.batch_size for f in sizes if (f.steps_to_target.value or 9.0) <= 1.0]
    if met_at_once:
        found.append(
            f"The target {design.target} was met at the first evaluation at batch "
            f"{_listed(met_at_once)}: it tells nothing there. Ask for more."
        )
    count = len(design.seeds)
    if count < 3:
        found.append(
            f"{count} seed{'s' * (count > 1)}: too few to tell chance from a difference. Use 5."
        )
    for edge in ("lowest", "highest"):
        at = [t.batch_size for t in tables if t.at_edge == edge and len(t.rates) > 1]
        if at:
            found.append(
                f"At batch {_listed(at)} the best learning rate is the {edge} that was tried; the "
                "best of all may lie beyond."
            )
    return found


def _listed(sizes: Sequence[int]) -> str:
    return ", ".join(f"{size:,}" for size in sizes)
