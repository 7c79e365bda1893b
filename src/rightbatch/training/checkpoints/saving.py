"""A run and its checkpoints: when they are written, what they say, and what may go on from them."""

from __future__ import annotations

import time
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic import TypeAdapter, ValidationError

from rightbatch.errors import CorruptStateError, UsageError
from rightbatch.recipe import Recipe
from rightbatch.training.checkpoints.checkpoint import (
    LoadedCheckpoint,
    list_checkpoints,
    load_checkpoint,
    save_checkpoint,
)
from rightbatch.training.checkpoints.state import (
    check_same_run,
    describe_run,
    restore_training,
    training_state,
)
from rightbatch.training.ranks.distributed import Ranks
from rightbatch.training.rates import Horizon

if TYPE_CHECKING:
    from rightbatch.training.loop import Training

SECONDS_BETWEEN = 60.0
"""Wall time after which a run is saved, unless told otherwise: what a power cut may cost."""
FOLDER = "checkpoints"
"""Where in a run directory the checkpoints are."""


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """What decides a run beside the workload: a resumed run must have the same.

    Attributes:
        workload: Its name.
        num_examples: Size of its training set; None of a stream.
        recipe: How it is trained.
        seed: Decides initial weights, data order and dropout.
        epochs: Length of the run in passes over the training set, or None; of a stream it may be
            given beside the other lengths, and is how often it is gone through.
        steps: Length of the run in updates, or None.
        examples: Length of the run over a stream in examples, or None.
        until_target: Whether it stops at the target.
        evaluate_every: Updates between evaluations; None: once an epoch.
        workers: Processes that fetch examples ahead.
        shuffle_buffer: Examples of a stream among which the next one is drawn.
    """

    workload: str
    num_examples: int | None
    recipe: Recipe
    seed: int
    epochs: float | None
    steps: int | None
    until_target: bool = False
    evaluate_every: int | None = None
    workers: int = 0
    examples: int | None = None
    shuffle_buffer: int = 0

    @property
    def horizon(self) -> Horizon | None:
        """The length of the run; None of one that ends where its stream does."""
        if self.num_examples is not None:
            examples = None if self.epochs is None else self.epochs * self.num_examples
            return Horizon(steps=self.steps, examples=examples)
        if self.steps is None and self.examples is None:
            return None
        return Horizon(steps=self.steps, examples=self.examples)


_SETTINGS = TypeAdapter(RunSettings)


@dataclass(frozen=True, kw_only=True)
class Environment:
    """What the bits of a run depend on beside its settings.

    Attributes:
        threads: CPU threads.
        device: Kind of device.
        replicas: Data-parallel workers.
        torch: Version of torch.
    """

    threads: int
    device: str
    replicas: int
    torch: str


def this_environment(device: str, replicas: int) -> Environment:
    """The environment of this process."""
    return Environment(
        threads=torch.get_num_threads(),
        device=torch.device(device).type,
        replicas=replicas,
        torch=str(torch.__version__),
    )


def read_settings(run_directory: str | Path) -> RunSettings:
    """The settings of a run that was saved.

    Args:
        run_directory: What was given to `train` as `run_directory`.

    Returns:
        Its settings.

    Raises:
        UsageError: If there is no checkpoint.
        CorruptStateError: If none can be used.
    """
    loaded = load_checkpoint(Path(run_directory) / FOLDER)
    if loaded is None:
        raise UsageError(
            f"{run_directory} holds no checkpoint to go on from. Name the directory of a run."
        )
    return _read_settings(loaded.state, loaded.path)


def _read_settings(state: Any, path: Path) -> RunSettings:
    try:
        return _SETTINGS.validate_python(state["settings"])
    except (ValidationError, KeyError, TypeError) as error:
        raise CorruptStateError(
            f"{path} is a checkpoint, but not of a run of `train`. Name the directory of a run."
        ) from error


def make_saver(
    run_directory: str | Path | None,
    settings: RunSettings,
    *,
    steps_between: int | None,
    resume: bool,
) -> Saver | None:
    """What keeps a run's checkpoints.

    Args:
        run_directory: Where; None: nowhere.
        settings: Of the run.
        steps_between: Updates after which it is saved, or None.
        resume: Whether it is to go on from there.

    Returns:
        The saver, or None.

    Raises:
        UsageError: If something needs a `run_directory` and there is none.
    """
    if run_directory is None:
        if resume or steps_between is not None:
            raise UsageError("resume and checkpoint_every need a run_directory. Name one.")
        return None
    return Saver(run_directory, settings, steps_between=steps_between)


class Saver:
    """Writes a run's checkpoints and finds them again.

    Args:
        run_directory: Where; made when the first checkpoint is written.
        settings: Of the run.
        steps_between: Updates after which it is saved, or None.
        seconds_between: Wall time after which it is saved.

    Attributes:
        latest: The newest checkpoint of the run, or None.
    """

    def __init__(
        self,
        run_directory: str | Path,
        settings: RunSettings,
        *,
        steps_between: int | None,
        seconds_between: float = SECONDS_BETWEEN,
    ) -> None:
        self.folder = Path(run_directory) / FOLDER
        self.settings = settings
        self.latest: Path | None = None
        self._steps_between = steps_between
        self._seconds_between = seconds_between
        self._saved_at = time.perf_counter()
        self._saved_steps = -1
        self._saved_place: tuple[int, bool] | None = None

    def refuse_another_run(self) -> None:
        """A new run must not mix its checkpoints with another's.

        Raises:
            UsageError: If there are some.
        """
        found = list_checkpoints(self.folder)
        if found:
            raise UsageError(
                f"{self.folder} already holds checkpoints, up to {found[0].name}. Go on from them "
                "with resume=True (--resume), or name another run directory."
            )

    def next_step(self, steps: int) -> float:
        """The step at which the run is to be saved next."""
        between = self._steps_between
        return float("inf") if between is None else (steps // between + 1) * between

    @property
    def deadline(self) -> float:
        """The time (of `time.perf_counter`) at which it is to be saved next."""
        return self._saved_at + self._seconds_between

    def due(self, training: Training) -> bool:
        """Whether it is time to save; of several ranks, they save together."""
        between, steps, replica = self._steps_between, training.steps, training.replica
        regular = between is not None and steps % between == 0 and steps != self._saved_steps
        late = time.perf_counter() >= self.deadline if replica is None else replica.paused
        return regular or late

    def save(self, training: Training, course: dict[str, Any]) -> None:
        """Writes a checkpoint, unless this very step was saved, or is not worth going on from.

        Args:
            training: The run.
            course: What is known beside its own state: evaluations so far.
        """
        place = _place_of(training)
        if place == self._saved_place or not training.is_sound():
            return
        state = {
            "settings": _SETTINGS.dump_python(self.settings, mode="json"),
            "environment": asdict(_environment_of(training)),
            "course": course,
            "run": describe_run(training),
            "training": training_state(training),
        }
        if training.ranks is None:
            self.latest = save_checkpoint(self.folder, state, steps=training.steps)
        else:
            self.latest = self._save_for_all(training.ranks, state, training.steps)
        self._saved_steps, self._saved_place = training.steps, place
        self._saved_at = time.perf_counter()

    def _save_for_all(self, ranks: Ranks, state: dict[str, Any], steps: int) -> Path:
        path = save_checkpoint(self.folder, state, steps=steps) if ranks.rank == 0 else None
        # The others wait here until it is written.
        return ranks.object_of_first(path)

    def restore(self, training: Training) -> dict[str, Any] | None:
        """Puts a fresh training where the newest checkpoint is.

        Args:
            training: Made with the settings of the run.

        Returns:
            What `save` was given as `course`; None without a checkpoint: the run begins.

        Raises:
            UsageError: If the checkpoint is of a run with other settings, or of another model.
            CorruptStateError: If none can be used.
        """
        loaded = self._load(training.ranks)
        if loaded is None:
            return None
        for reason in loaded.skipped:
            warnings.warn(f"{reason} Going on from {loaded.path.name}.", stacklevel=3)
        self._check_settings(_read_settings(loaded.state, loaded.path), loaded.path)
        check_same_run(loaded.state["run"], training, loaded.path)
        _warn_of_changes(Environment(**loaded.state["environment"]), _environment_of(training))
        restore_training(training, loaded.state["training"])
        self.latest, self._saved_steps = loaded.path, loaded.steps
        self._saved_place = _place_of(training)
        return loaded.state["course"]

    def _load(self, ranks: Ranks | None) -> LoadedCheckpoint | None:
        """The newest checkpoint; rank 0 reads it for all, who may not see the same disk."""
        if ranks is None:
            return load_checkpoint(self.folder)
        return ranks.object_of_first(load_checkpoint(self.folder) if ranks.rank == 0 else None)

    def _check_settings(self, saved: RunSettings, path: Path) -> None:
        ours, theirs = asdict(self.settings), asdict(saved)
        # How examples are fetched does not change them.
        for settings in (ours, theirs):
            settings.pop("workers")
            settings.pop("recipe")  # the state of the training says more of it
        differing = [name for name in ours if ours[name] != theirs[name]]
        if differing:
            raise UsageError(
                f"{path} is of a run with other settings ({', '.join(differing)} differ). Resume "
                "with those it was begun with, or name another run directory."
            )


def _place_of(training: Training) -> tuple[int, bool]:
    """Updates done, and whether the end of a pass over a stream was seen after the last."""
    return training.steps, training.feed is not None and training.feed.between_passes


def _environment_of(training: Training) -> Environment:
    return this_environment(training.device, training.recipe.replicas)


def _warn_of_changes(saved: Environment, now: Environment) -> None:
    before, after = asdict(saved), asdict(now)
    changed = [
        f"{name} {before[name]} → {after[name]}" for name in before if before[name] != after[name]
    ]
    if changed:
        warnings.warn(
            f"Resumed under other conditions ({', '.join(changed)}): the run goes on, but not bit "
            "for bit as it would have.",
            stacklevel=4,
        )
