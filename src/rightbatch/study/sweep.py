"""`run_sweep`: the same study on noisier labels, or on fewer examples, and how the choice moves.

A sweep is several studies. They share batch sizes, learning rates, lengths and seeds, and for one
seed the initial weights; what differs is the training set: a share of its labels is wrong, or only
part of it is there. What is wrong at a small share is wrong at a larger one, and a smaller part
lies within a larger one, so that studies are compared seed by seed.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from rightbatch.errors import UsageError
from rightbatch.store import read_record, write_record
from rightbatch.study.database import StoredTrial, StudyDatabase
from rightbatch.study.design import FULL, BatchSizes, Budget, LearningRates, Unit, make_design
from rightbatch.study.size_costs import Goal
from rightbatch.study.study import DATABASE, DEFAULT_EPOCHS, STUDY_NAME, run_study
from rightbatch.study.sweep_findings import (
    Contrast,
    LevelTrials,
    SweepLevel,
    choose_goal,
    contrast_levels,
    describe_level,
)
from rightbatch.workload import Workload, accuracy, with_examples, with_label_noise

SWEEP_SCHEMA = "rightbatch.sweep/1"
SWEEP_FILE, DESIGN_FILE = "sweep.json", "sweep-design.json"
_DESIGN_SCHEMA = "rightbatch.sweep-design/1"
SweepKind = Literal["label_noise", "dataset_size"]


@dataclass(frozen=True, kw_only=True)
class SweepDesign:
    """What a sweep runs.

    Attributes:
        kind: What differs between its studies.
        levels: Shares of label noise, or numbers of examples, ascending.
        batch_sizes: As they were asked for: `full` and larger numbers depend on the examples.
        learning_rates: Likewise.
        seeds: Of every study.
        budget: How far every training goes.
        target: What counts as trained, or None.
        variant_seed: Decides which labels are wrong, or which examples are there.
        targets: Where in an example its targets are; None: where that is plain.
    """

    kind: SweepKind
    levels: tuple[float, ...]
    batch_sizes: str
    learning_rates: str
    seeds: tuple[int, ...]
    budget: Budget
    target: str | None
    variant_seed: int
    targets: str | int | None

    @property
    def easiest(self) -> int:
        """Index of the level that others are compared with: least noise, most examples."""
        return 0 if self.kind == "label_noise" else len(self.levels) - 1


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """A sweep and what it found.

    Attributes:
        workload: Name of what was varied.
        design: What was run.
        state: `stopped` where it was interrupted; it can be gone on with.
        goal: What the best sizes are best in, at every level.
        levels: Each variant with its study; those that were begun.
        contrasts: Whether small or large batches suffer more; none before all levels are complete.
        warnings: What a reader should know.
    """

    workload: str
    design: SweepDesign
    state: Literal["complete", "stopped"]
    goal: Goal
    levels: tuple[SweepLevel, ...]
    contrasts: tuple[Contrast, ...]
    warnings: tuple[str, ...]


def run_sweep(
    workload: Workload,
    *,
    label_noise: Sequence[float] | str | None = None,
    dataset_sizes: Sequence[int | str] | str | None = None,
    batch_sizes: BatchSizes = "auto",
    learning_rates: LearningRates = "auto",
    seeds: int | Sequence[int] = 3,
    epochs: float | None = None,
    steps: int | None = None,
    examples: int | None = None,
    seconds: float | None = None,
    target: str | None = None,
    targets: str | int | None = None,
    variant_seed: int = 0,
    run_directory: str | Path | None = None,
    storage: str | None = None,
    name: str | None = None,
    progress: Callable[..., None] | None = None,
    **options: Any,
) -> Sweep:
    """Runs the same study on variants of a workload, and says what moves.

    Args:
        workload: What to train; with validation data, which stay clean and whole.
        label_noise: Shares of wrong training labels, two or more, such as `[0, 0.1, 0.3]`.
        dataset_sizes: Or numbers of training examples, and `full`.
        batch_sizes: As for `run_study`; numbers beyond a part's examples are left out there.
        learning_rates: As for `run_study`; `auto` is tuned for every variant.
        seeds: How many, or which: of initial weights and data order.
        epochs: Passes of each training. Default, where no other length is given: 20.
        steps: Or updates.
        examples: Or training examples.
        seconds: Or seconds of the training loop.
        target: What counts as trained, on the clean validation data. Default: the workload's.
        targets: Where in an example the labels are, where that is not plain.
        variant_seed: Decides which labels are wrong, or which examples are there.
        run_directory: Where its files are kept: a folder for each study, and `sweep.json`.
        storage: URL of a database for all trainings.
        name: Of the sweep in it. Default: the workload's.
        progress: Told what is being done, and which share of the studies is done.
        **options: Others of `run_study`, such as `engine` and `threads`.

    Returns:
        The sweep. Where Ctrl-C ended it, what was known by then; called again with the same place
        and design it goes on.

    Raises:
        UsageError: If an argument is out of range, the place holds another sweep, or labels are to
            be wrong and there are no clean ones to judge by.

    Example:
        >>> from rightbatch import load_workload
        >>> sweep = run_sweep(
        ...     load_workload("max3"), label_noise=[0, 0.3], batch_sizes=[50, "full"],
        ...     learning_rates=[0.5, 1.0], seeds=2, epochs=3,
        ... )
        >>> [level.study.workload for level in sweep.levels]
        ['max3, 0 % label noise', 'max3, 30 % label noise']
    """
    kind, levels = _read_levels(label_noise, dataset_sizes, workload.num_examples)
    lengths = {"epochs": epochs, "steps": steps, "examples": examples, "seconds": seconds}
    if all(length is None for length in lengths.values()):
        lengths["epochs"] = DEFAULT_EPOCHS
    whole = make_design(
        workload.num_examples,
        batch_sizes=batch_sizes,
        learning_rates=learning_rates,
        seeds=seeds,
        target=target if target is not None else workload.target,
        **lengths,  # pyright: ignore[reportArgumentType] (each has its own type)
    )
    design = SweepDesign(
        kind=kind,
        levels=levels,
        batch_sizes=_as_text(batch_sizes),
        learning_rates=_as_text(learning_rates),
        seeds=whole.seeds,
        budget=whole.budget,
        target=whole.target,
        variant_seed=variant_seed,
        targets=targets,
    )
    _check_judge(workload, design)
    with ExitStack() as stack:
        if run_directory is None:
            # What the comparison reads again has to be kept somewhere until it is done.
            temporary = stack.enter_context(tempfile.TemporaryDirectory())
            folder = None if storage else Path(temporary)
        else:
            folder = Path(run_directory)
            _begin(folder, design)
        runner = _Runner(workload, design, folder, storage, name, progress, options)
        sweep = runner.run()
    if run_directory is not None:
        write_record(Path(run_directory) / SWEEP_FILE, sweep, schema=SWEEP_SCHEMA)
    return sweep


def read_sweep_design(run_directory: str | Path) -> SweepDesign | None:
    """The design of a sweep that was begun.

    Args:
        run_directory: Where its files are.

    Returns:
        The design, or None where there is no sweep.
    """
    path = Path(run_directory) / DESIGN_FILE
    return read_record(path, SweepDesign, schema=_DESIGN_SCHEMA) if path.exists() else None


class _Runner:
    """Runs the studies of a sweep, one after the other."""

    def __init__(
        self,
        workload: Workload,
        design: SweepDesign,
        folder: Path | None,
        storage: str | None,
        name: str | None,
        progress: Callable[..., None] | None,
        options: dict[str, Any],
    ) -> None:
        self._workload = workload
        self._design = design
        self._folder = folder
        self._storage = storage
        self._name = name or workload.name
        self._say = progress or (lambda *_: None)
        self._options = options

    def run(self) -> Sweep:
        """Runs what has not ended, and says what all of it shows."""
        found: list[LevelTrials] = []
        for index, level in enumerate(self._design.levels):
            found.append(self._run_level(index, level))
            if found[-1].study.state == "stopped":
                break
        design = self._design
        begun = len(found) == len(design.levels)
        complete = begun and found[-1].study.state == "complete"
        goal = choose_goal([level.study for level in found])
        return Sweep(
            workload=self._workload.name,
            design=design,
            state="complete" if complete else "stopped",
            goal=goal,
            levels=tuple(describe_level(x.level, x.study, goal) for x in found),
            contrasts=contrast_levels(
                found, design.easiest, accuracy=self._workload.metric is accuracy
            )
            if complete
            else (),
            warnings=tuple(_warnings(design, found, goal)),
        )

    def _run_level(self, index: int, level: float) -> LevelTrials:
        design = self._design
        variant = make_variant(self._workload, design, level)
        label = variant.name.removeprefix(f"{self._workload.name}, ")
        count = len(design.levels)

        def tell(message: str, share: float | None = None) -> None:
            self._say(f"{label}, {message}", None if share is None else (index + share) / count)

        folder = None if self._folder is None else self._folder / _folder_of(design, level)
        name = None if self._storage is None else f"{self._name}, {label}"
        study = run_study(
            variant,
            batch_sizes=_sizes_within(design.batch_sizes, variant.num_examples),
            learning_rates=design.learning_rates,
            seeds=design.seeds,
            target=design.target,
            run_directory=folder,
            storage=self._storage,
            name=name,
            progress=tell,
            **{design.budget.unit: design.budget.amount},
            **self._options,
        )
        place = self._storage or str((folder or Path()) / DATABASE)
        trials = _read_trials(place, name or STUDY_NAME)
        return LevelTrials(level=level, study=study, trials=trials)


def _read_trials(place: str, name: str) -> Sequence[StoredTrial]:
    """The trainings of a study with their evaluations, which its record leaves out."""
    database = StudyDatabase(place, name)
    try:
        database.open()
        return database.trials()
    finally:
        database.close()


def make_variant(workload: Workload, design: SweepDesign, level: float) -> Workload:
    """One variant of a sweep.

    Args:
        workload: What is varied.
        design: The sweep.
        level: Share of label noise, or number of examples.

    Returns:
        The variant.
    """
    if design.kind == "dataset_size":
        return with_examples(workload, int(level), seed=design.variant_seed)
    return with_label_noise(workload, level, seed=design.variant_seed, targets=design.targets)


def _folder_of(design: SweepDesign, level: float) -> str:
    return f"noise-{level:g}" if design.kind == "label_noise" else f"examples-{int(level)}"


def _begin(folder: Path, design: SweepDesign) -> None:
    """Writes the design down, or finds it there."""
    folder.mkdir(parents=True, exist_ok=True)
    there = read_sweep_design(folder)
    if there is None:
        write_record(folder / DESIGN_FILE, design, schema=_DESIGN_SCHEMA)
    elif there != design:
        raise UsageError(
            f"{str(folder)!r} holds another sweep: {there}, and now {design}. Give this one "
            "another folder."
        )


# ---- what was asked for ------------------------------------------------------------------------


def _read_levels(
    noise: Sequence[float] | str | None, sizes: Sequence[int | str] | str | None, N: int
) -> tuple[SweepKind, tuple[float, ...]]:
    if (noise is None) == (sizes is None):
        given = "neither label noise nor dataset sizes" if noise is None else "both"
        raise UsageError(
            f"A sweep goes over label noise or over dataset sizes, and was given {given}. Give one."
        )
    kind: SweepKind = "label_noise" if sizes is None else "dataset_size"
    asked = noise if sizes is None else sizes
    words = asked.split(",") if isinstance(asked, str) else [str(word) for word in asked or ()]
    read = _read_share if kind == "label_noise" else lambda word: _read_size(word, N)
    levels = tuple(sorted({read(word.strip()) for word in words}))
    if len(levels) < 2:
        what = "shares of label noise" if kind == "label_noise" else "dataset sizes"
        raise UsageError(f"A sweep needs two or more {what}, and was given {len(levels)}.")
    return kind, levels


def _read_share(word: str) -> float:
    try:
        share = float(word)
    except ValueError:
        share = math.nan
    if not (math.isfinite(share) and share >= 0):
        raise UsageError(f"A share of label noise is {word!r}. Give numbers such as 0,0.1,0.3.")
    return share


def _read_size(word: str, N: int) -> float:
    if word == FULL:
        return float(N)
    if not (word.isascii() and word.isdigit() and 1 <= int(word) <= N):
        raise UsageError(
            f"A dataset size is {word!r}. Give numbers from 1 to {N:,}, the size of the training "
            "set, and full."
        )
    return float(word)


def _as_text(asked: Iterable[object] | str) -> str:
    return asked if isinstance(asked, str) else ",".join(str(word) for word in asked)


def _sizes_within(asked: str, N: int) -> str:
    """The batch sizes asked for that a training set of N examples has room for."""
    words = [word.strip() for word in asked.split(",")]
    kept = [word for word in words if not (word.isdigit() and int(word) > N)]
    if not kept:
        raise UsageError(
            f"No batch size of {asked} fits in a training set of {N:,} examples. Add full, or "
            "drop that dataset size."
        )
    return ",".join(kept)


def _check_judge(workload: Workload, design: SweepDesign) -> None:
    """Noise must not be judged by noisy labels."""
    if design.kind != "label_noise":
        return
    if workload.val_data is None:
        raise UsageError(
            f"{workload.name!r} has no validation data: losses would be those of the wrong labels. "
            "Give it val_data, whose labels stay clean."
        )
    if design.target is not None and design.target.strip().startswith("train_loss"):
        raise UsageError(
            f"The target {design.target} would be judged by wrong labels. Give one on validation "
            "data, such as val_loss<=0.3."
        )


def _warnings(design: SweepDesign, found: Sequence[LevelTrials], goal: Goal) -> list[str]:
    said: list[str] = []
    complete = all(x.study.state == "complete" for x in found)
    if complete and design.target is not None and goal == "loss":
        said.append(
            f"At some level no size met {design.target} on every seed: the best sizes are those of "
            "the least loss at the end."
        )
    asked = [int(word) for word in design.batch_sizes.split(",") if word.strip().isdigit()]
    left_out = sorted({size for size in asked if size > min(x.study.num_examples for x in found)})
    if left_out:
        listed = ", ".join(f"{size:,}" for size in left_out)
        said.append(f"Batch {listed} is left out where there are fewer examples.")
    told: dict[str, list[str]] = {}
    for level in found:
        for warning in level.study.warnings:
            told.setdefault(warning, []).append(f"{level.level:g}")
    for warning, levels in told.items():
        where = "" if len(levels) == len(design.levels) else f" (at {', '.join(levels)})"
        said.append(warning + where)
    return said


def lengths_of(budget: Budget) -> dict[str, float | None]:
    """A budget as the four lengths that a study is asked for.

    Args:
        budget: The budget.

    Returns:
        All four, of which one is given.
    """
    return {unit: budget.amount if unit == budget.unit else None for unit in get_args(Unit)}
