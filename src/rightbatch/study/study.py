"""`run_study`: trainings over batch sizes, learning rates and seeds, and what they say."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rightbatch.errors import ProbeError, RightbatchError, UsageError
from rightbatch.probes.throughput import measure_throughput
from rightbatch.store import write_record
from rightbatch.study.analysis import (
    Setting,
    SizeTable,
    choose_best,
    compare_sizes,
    fit_sizes,
    summarise_trial,
    tables_of,
)
from rightbatch.study.auto_rates import farther_rates, first_rates
from rightbatch.study.database import StudyDatabase
from rightbatch.study.design import BatchSizes, LearningRates, StudyDesign, make_design
from rightbatch.study.findings import Best, Comparison, Fits, SizeFinding
from rightbatch.study.group import Engine, cut_into_groups, run_group
from rightbatch.study.tidy import write_tidy
from rightbatch.study.trials import FINAL, StudyTrial, TrialKey
from rightbatch.workload import Workload
from rightbatch.workload.target import parse_target

SCHEMA = "rightbatch.study/1"
DATABASE = "study.db"
DEFAULT_EPOCHS = 20.0
_NAME = "study"
_TIMING_SECONDS = 2.0
_STEP_TIME, _ENGINE = "step time", "engine"
"""Kinds of events whose text is read again."""
Progress = Callable[..., None]


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
        trials: Every training, by batch size, learning rate and seed.
        sizes: What the trainings of each batch size say.
        fits: What holds over the sizes.
        comparisons: The sizes at equal epochs, steps, examples and modelled seconds.
        best: The pair to train with; None where no training ended with a loss.
        cost: What it took.
        warnings: What a reader should know.
    """

    workload: str
    num_examples: int
    metric: str | None
    design: StudyDesign
    state: Literal["complete", "stopped"]
    engines: tuple[str, ...]
    trials: tuple[StudyTrial, ...]
    sizes: tuple[SizeFinding, ...]
    fits: Fits
    comparisons: tuple[Comparison, ...]
    best: Best | None
    cost: StudyCost
    warnings: tuple[str, ...]

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
    engine: Engine = "auto",
    run_directory: str | Path | None = None,
    storage: str | None = None,
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
        engine: `compiled`, `loop`, or `auto`.
        run_directory: Where its files are kept: the database, `study.json`, and one row per
            training and per evaluation in `trials.csv` and `points.csv`. Default: nowhere.
        storage: URL of another database, such as `postgresql+psycopg://…`.
        progress: Told what is being done, and which share of the trainings is done.

    Returns:
        The study. Where Ctrl-C ended it, what was known by then.

    Raises:
        UsageError: If an argument is out of range, or the place holds another study.
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
        **lengths,  # pyright: ignore[reportArgumentType] (each has its own type)
    )
    folder = None if run_directory is None else Path(run_directory)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    place = storage or ("sqlite://" if folder is None else str(folder / DATABASE))
    database = StudyDatabase(place, _NAME if storage is None else f"{workload.name}")
    try:
        return _Runner(workload, design, database, folder, engine, progress).run()
    finally:
        database.close()


def read_design(run_directory: str | Path) -> StudyDesign:
    """The design of a study that was begun.

    Args:
        run_directory: Where its files are.

    Returns:
        The design.

    Raises:
        UsageError: If there is no study.
    """
    place = Path(run_directory) / DATABASE
    if not place.exists():
        raise UsageError(f"There is no study in {str(run_directory)!r}: it has no {DATABASE}.")
    database = StudyDatabase(str(place), _NAME)
    try:
        return database.open()[0]
    finally:
        database.close()


class _Runner:
    def __init__(
        self,
        workload: Workload,
        design: StudyDesign,
        database: StudyDatabase,
        folder: Path | None,
        engine: Engine,
        progress: Progress | None,
    ) -> None:
        self._workload = workload
        self._design = design
        self._database = database
        self._folder = folder
        self._engine: Engine = engine
        self._say: Progress = progress or (lambda *_: None)
        self._begun = time.perf_counter()
        target = None if design.target is None else parse_target(design.target)
        self._check_target(target)
        self._setting = Setting(
            num_examples=workload.num_examples,
            target=target,
            seconds_of=None,
            has_validation=workload.val_examples is not None,
        )

    def _check_target(self, target: Any) -> None:
        if target is None or target.quantity == "train_loss":
            return
        own = f"val_{self._metric}" if self._metric else None
        there = self._workload.val_examples is not None
        if not there or target.quantity not in ("val_loss", own):
            raise UsageError(
                f"The target {target} needs {target.quantity}, which this workload does not "
                "evaluate. Use train_loss"
                + (f", val_loss{f' or {own}' if own else ''}." if there else ".")
            )

    @property
    def _metric(self) -> str | None:
        return self._workload.metric_name if self._workload.metric is not None else None

    def run(self) -> Study:
        workload, database = self._workload, self._database
        task = {
            "workload": workload.name,
            "num_examples": workload.num_examples,
            "num_weights": sum(p.numel() for p in workload.build_model(0).parameters()),
        }
        again = database.begin(self._design, task)
        database.tell("resumed" if again else "begun", workload.name)
        state: Literal["complete", "stopped"] = "complete"
        try:
            self._measure_step_time()
            self._run_rounds(task["num_weights"])
        except KeyboardInterrupt:
            state = "stopped"
            self._stop()
        study = self._conclude(state)
        self._keep(study)
        database.tell(state, f"{sum(t.state in FINAL for t in study.trials)} trainings ended")
        if study.trials and all(trial.state == "failed" for trial in study.trials):
            raise ProbeError(f"Every training failed. The first: {study.trials[0].note}")
        return study

    def _measure_step_time(self) -> None:
        """The step time of every size; of a study that is gone on with, the one it began with."""
        known = [text for _, kind, text in self._database.events() if kind == _STEP_TIME]
        if known:
            times = {int(size): seconds for size, seconds in json.loads(known[-1]).items()}
        else:
            self._say("step time: how long an update takes at each batch size")
            sizes = self._design.batch_sizes
            record = measure_throughput(
                self._workload,
                micro_batches=sizes,
                budget_seconds=_TIMING_SECONDS,
                powers_of_two=False,
            )
            times = {size: record.step_time.seconds(size) for size in sizes}
            self._database.tell(_STEP_TIME, json.dumps(times))
        self._setting = dataclasses.replace(self._setting, seconds_of=times.__getitem__)

    # ---- rounds --------------------------------------------------------------------------------

    def _run_rounds(self, num_weights: int) -> None:
        """Runs what the design asks for, and what its rates at the edge ask for after that."""
        asked = self._first_keys()
        while asked:
            self._database.add(asked)
            waiting = [t.key for t in self._database.trials() if t.state not in FINAL]
            for group in cut_into_groups(waiting, num_weights):
                self._run_group(group)
            asked = self._farther_keys()

    def _keys(self, batch_size: int, rates: Sequence[float]) -> list[TrialKey]:
        return [
            TrialKey(batch_size=batch_size, learning_rate=rate, seed=seed)
            for rate in rates
            for seed in self._design.seeds
        ]

    def _first_keys(self) -> list[TrialKey]:
        keys: list[TrialKey] = []
        for size in self._design.batch_sizes:
            rates = self._design.learning_rates
            if rates is None:
                self._say(f"learning rate: range test at batch {size:,}")
                rates = first_rates(self._workload, size)
            keys += self._keys(size, rates)
        return keys

    def _farther_keys(self) -> list[TrialKey]:
        if self._design.learning_rates is not None:
            return []
        tables = tables_of(self._database.trials(), self._setting)
        return [
            key for table in tables for key in self._keys(table.batch_size, farther_rates(table))
        ]

    def _run_group(self, keys: Sequence[TrialKey]) -> None:
        size, database = keys[0].batch_size, self._database
        trials = database.trials()
        ended = sum(trial.state in FINAL for trial in trials)
        seconds_of = self._setting.seconds_of
        step_seconds = None if seconds_of is None else seconds_of(size)
        steps = self._design.budget.steps(size, self._workload.num_examples, step_seconds)

        def tell(share: float) -> None:
            done = (ended + share * len(keys)) / len(trials)
            self._say(f"batch {size:,}: {len(keys)} trainings of {steps:,} updates", done)

        tell(0.0)
        database.set_state(keys, "running")
        try:
            finished, ran_by = run_group(
                self._workload,
                keys,
                steps,
                engine=self._engine,
                step_seconds=step_seconds,
                progress=tell,
            )
        except RightbatchError:
            database.set_state(keys, "waiting")
            raise
        except Exception as error:  # of one size: the others may still run
            database.set_state(keys, "failed", f"{type(error).__name__}: {error}"[:500])
            return
        if ran_by not in self._engines():
            database.tell(_ENGINE, ran_by)
        database.write(
            [(f.key, "diverged" if f.diverged else "complete", f.points, "") for f in finished]
        )

    def _engines(self) -> list[str]:
        return [text for _, kind, text in self._database.events() if kind == _ENGINE]

    def _stop(self) -> None:
        left = [t.key for t in self._database.trials() if t.state not in FINAL]
        self._database.set_state(left, "stopped")

    # ---- what came of it -----------------------------------------------------------------------

    def _conclude(self, state: Literal["complete", "stopped"]) -> Study:
        stored, setting = self._database.trials(), self._setting
        stored.sort(key=lambda t: (t.key.batch_size, t.key.learning_rate, t.key.seed))
        tables = [table for table in tables_of(stored, setting) if table.resolved]
        sizes = tuple(table.finding() for table in tables)
        trials = tuple(summarise_trial(trial, setting) for trial in stored)
        return Study(
            workload=self._workload.name,
            num_examples=self._workload.num_examples,
            metric=self._metric,
            design=self._design,
            state=state,
            engines=tuple(self._engines()),
            trials=trials,
            sizes=sizes,
            fits=fit_sizes(tables, sizes, setting),
            comparisons=compare_sizes(tables, setting),
            best=choose_best(sizes, setting),
            cost=StudyCost(
                examples=sum(trial.examples for trial in trials),
                seconds=time.perf_counter() - self._begun,
            ),
            warnings=tuple(_warnings(self._design, trials, tables)),
        )

    def _keep(self, study: Study) -> None:
        if self._folder is not None:
            write_record(self._folder / "study.json", study, schema=SCHEMA)
            stored = self._database.trials()
            write_tidy(self._folder, study.trials, stored, self._workload.num_examples)


def _warnings(
    design: StudyDesign, trials: Sequence[StudyTrial], tables: Sequence[SizeTable]
) -> list[str]:
    found: list[str] = []
    count = len(design.seeds)
    if count < 3:
        found.append(
            f"{count} seed{'s' * (count > 1)}: too few to tell chance from a difference. Use 5."
        )
    found += [
        f"Batch {table.batch_size:,}: the best learning rate, {table.rates[table.best]:.3g}, is "
        f"the {table.at_edge} that was tried; the best of all may lie beyond."
        for table in tables
        if table.at_edge is not None and len(table.rates) > 1
    ]
    missing = [B for B in design.batch_sizes if B not in {t.batch_size for t in tables}]
    if missing:
        names = ", ".join(f"{size:,}" for size in missing)
        found.append(f"No training ended with a loss at batch {names}.")
    failed = [trial for trial in trials if trial.state == "failed"]
    if failed:
        first = failed[0]
        found.append(
            f"{len(failed)} trainings failed; at batch {first.batch_size:,}: {first.note}."
        )
    return found
