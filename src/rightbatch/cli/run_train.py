"""`rightbatch train`."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
from pydantic import TypeAdapter, ValidationError

from rightbatch.cli.opening import open_workload
from rightbatch.cli.output import Output
from rightbatch.cli.table import make_table, wrap
from rightbatch.cli.train_progress import TrainProgress
from rightbatch.errors import DivergedError, UsageError
from rightbatch.recipe import Recipe
from rightbatch.report.units import show_number, show_seconds
from rightbatch.store import (
    dump_record,
    hash_tensors,
    make_run_directory,
    read_part,
    write_atomically,
    write_record,
)
from rightbatch.training import Callback, Run, train
from rightbatch.training.checkpoints.saving import read_settings
from rightbatch.training.loop import Training
from rightbatch.training.ranks.distributed import count_processes, is_first_process
from rightbatch.training.run import Outcome
from rightbatch.workload import Workload

SCHEMA = "rightbatch.train/1"


class RecipeChoice(NamedTuple):
    """How the recipe was given: a plan, or batch size and learning rate; and further fields."""

    plan: Path | None
    batch_size: str | None
    learning_rate: float | None
    fields: tuple[str, ...] = ()


class RunChoice(NamedTuple):
    """Where the run is kept: a folder to begin in or to resume from, or nowhere."""

    begin: Path | None
    resume: Path | None
    keep: bool


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """What `train --json` prints; a loss that is no number is None."""

    workload: str
    recipe: Recipe
    seed: int
    steps: int
    epochs: float
    examples: int
    seconds: float
    train_loss: float | None
    val_loss: float | None
    val_metric: float | None
    target: str | None
    reached_target: bool | None
    steps_to_target: int | None
    state: Outcome
    diverged: bool
    run_directory: str | None
    checkpoint: str | None
    parameters_sha256: str


def run(
    output: Output,
    reference: str,
    *,
    recipe: RecipeChoice,
    place: RunChoice,
    threads: int | None = None,
    **options: Any,
) -> int:
    """Trains, prints what came of it, and returns the exit code.

    Args:
        output: Where to print.
        reference: The workload.
        recipe: How the recipe was given.
        place: Where the run is kept.
        threads: CPU threads, or None for torch's default.
        **options: Passed on to `rightbatch.train`.

    Returns:
        0, or 4 if the training diverged, or 130 if it was interrupted.

    Raises:
        KeyboardInterrupt: If it was interrupted before there was anything to tell.
    """
    _check_choices(recipe, place, options)
    ending = _Ending()
    with output.progress(f"Loading {reference}") as report:
        report(f"Checking {reference}")
        workload = open_workload(reference, options["device"], threads)
        settings = _settings(recipe, place, workload, options)
        folder = _run_directory(place, workload)
        report(f"Training {workload.name}: batch {settings['recipe'].global_batch}")
        try:
            finished = train(
                workload,
                **settings,
                callbacks=[ending, TrainProgress(report, may_stop_early=settings["until_target"])],
                run_directory=folder,
                resume=place.resume is not None,
            )
        except KeyboardInterrupt:
            finished = ending.run
            if finished is None:  # not even the first update: there is nothing to tell
                raise
    code = {"complete": 0, "diverged": DivergedError.exit_code, "stopped": 130}[finished.state]
    if not is_first_process():  # rank 0 speaks for all
        return code
    result = _result(workload, finished, settings["seed"], folder)
    if folder is not None:
        _keep(folder, finished, result)
    output.result(lambda: _as_text(result, workload), lambda: dump_record(result, schema=SCHEMA))
    return code


class _Ending(Callback):
    """Keeps the run that a signal ended."""

    run: Run | None = None

    def on_end(self, training: Training, run: Run) -> None:
        """After the last update."""
        self.run = run


def _check_choices(choice: RecipeChoice, place: RunChoice, options: dict[str, Any]) -> None:
    """Exactly one way of giving the recipe, and the length of the run, was used."""
    by_hand = (choice.batch_size is not None, choice.learning_rate is not None)
    if options["epochs"] is not None and options["steps"] is not None:
        raise UsageError("--epochs and --steps both say how long to train. Drop one.")
    if not place.keep and (place.begin or place.resume or options["checkpoint_every"]):
        raise UsageError("--no-run keeps nothing, so there is nothing to save or resume. Drop it.")
    if place.resume is not None:
        if choice.plan is not None or any(by_hand) or choice.fields or place.begin is not None:
            raise UsageError(
                "--resume goes on with the recipe that the run was begun with. Drop --run, "
                "--plan, --batch-size, --learning-rate and --set."
            )
        return
    if choice.plan is not None and any(by_hand):
        raise UsageError("--plan already says batch size and learning rate. Drop those options.")
    if choice.plan is None and not all(by_hand):
        raise UsageError(
            "The recipe is not complete. Give --plan plan.json, or both --batch-size and "
            "--learning-rate."
        )


def _settings(
    choice: RecipeChoice, place: RunChoice, workload: Workload, options: dict[str, Any]
) -> dict[str, Any]:
    """What `train` is called with; of a resumed run, what it was begun with."""
    if place.resume is None:
        length = {} if options["steps"] is not None or options["epochs"] is not None else _LENGTH
        return {**options, **length, "recipe": _choose_recipe(choice, workload)}
    saved = read_settings(place.resume)
    if (saved.epochs is None) == (saved.steps is None):
        raise UsageError(
            f"The run in {place.resume} was begun by train_stream, with lengths that `train` does "
            "not have. Resume it by train_stream(..., resume=True)."
        )
    begun = {name: getattr(saved, name) for name in _OF_THE_RUN}
    return {**options, **begun}


_LENGTH = {"epochs": 10.0}
_OF_THE_RUN = ("recipe", "seed", "epochs", "steps", "until_target", "evaluate_every")


def _choose_recipe(choice: RecipeChoice, workload: Workload) -> Recipe:
    if choice.plan is not None:
        recipe = read_part(choice.plan, "recipe", Recipe, schema="rightbatch.plan/1")
    else:
        assert choice.batch_size is not None  # by _check_choices
        assert choice.learning_rate is not None
        batch = _read_batch(choice.batch_size, workload.num_examples)
        recipe = Recipe(
            global_batch=batch, replicas=count_processes(), learning_rate=choice.learning_rate
        )
    return _with_fields(recipe, choice.fields) if choice.fields else recipe


def _with_fields(recipe: Recipe, assignments: tuple[str, ...]) -> Recipe:
    """The recipe with fields given as `name=value`; values are JSON, or plain words."""
    changes: dict[str, Any] = {}
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        if not equals or name not in Recipe.__dataclass_fields__:
            known = ", ".join(Recipe.__dataclass_fields__)
            raise UsageError(f"--set {assignment!r} names no field of the recipe. Use: {known}.")
        try:
            changes[name] = json.loads(text)
        except ValueError:
            changes[name] = text
    whole = dump_record(recipe.replace(**_split_of(changes)), schema="rightbatch.recipe/1")
    whole.pop("schema")
    try:
        return TypeAdapter(Recipe).validate_python({**whole, **changes})
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the recipe"
        raise UsageError(f"--set: {where}: {first['msg']}.") from error


def _split_of(changes: dict[str, Any]) -> dict[str, Any]:
    """Those that change how the batch is split, which the rest of the split must follow."""
    names = ("global_batch", "micro_batch", "accumulation", "replicas", "replica_batches")
    return {name: changes[name] for name in names if isinstance(changes.get(name), int)}


def _run_directory(place: RunChoice, workload: Workload) -> Path | None:
    """Where the run is kept, or None."""
    if place.resume is not None:
        return place.resume
    if not place.keep:
        return None
    if not is_first_process():  # others keep nothing
        return place.begin or Path("runs")
    return place.begin or make_run_directory("runs", workload.name)


def _keep(folder: Path, finished: Run, result: TrainResult) -> None:
    """Beside the checkpoints: what came of the run, and its weights by themselves."""
    folder.mkdir(parents=True, exist_ok=True)
    write_record(folder / "run.json", result, schema=SCHEMA)
    if finished.state != "complete":
        return
    state = {name: t.contiguous() for name, t in finished.model.state_dict().items()}
    write_atomically(folder / "model.safetensors", safetensors.torch.save(state))


def _read_batch(text: str, num_examples: int) -> int:
    if text == "full":
        return num_examples
    if not text.isascii() or not text.isdigit() or not 1 <= int(text) <= num_examples:
        raise UsageError(
            f"--batch-size is {text!r}. Give a number from 1 to {num_examples}, the size of the "
            "training set, or full."
        )
    return int(text)


def _result(workload: Workload, finished: Run, seed: int, folder: Path | None) -> TrainResult:
    return TrainResult(
        workload=workload.name,
        recipe=finished.recipe,
        seed=seed,
        steps=finished.steps,
        epochs=finished.epochs,
        examples=finished.examples,
        seconds=finished.seconds,
        train_loss=_finite(finished.train_loss),
        val_loss=_finite(finished.val_loss),
        val_metric=_finite(finished.val_metric),
        target=workload.target,
        reached_target=finished.reached_target,
        steps_to_target=finished.steps_to_target,
        state=finished.state,
        diverged=finished.diverged,
        run_directory=None if folder is None else str(folder),
        checkpoint=None if finished.checkpoint is None else str(finished.checkpoint),
        parameters_sha256=hash_tensors(finished.model.state_dict().items()),
    )


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _as_text(result: TrainResult, workload: Workload) -> str:
    rows = [
        ("batch size", show_number(result.recipe.global_batch)),
        ("learning rate", show_number(result.recipe.learning_rate)),
        ("steps", show_number(result.steps)),
        ("epochs", show_number(result.epochs)),
        ("examples", show_number(result.examples)),
        ("seconds", show_seconds(result.seconds)),
        ("train_loss", show_number(result.train_loss)),
    ]
    if result.val_loss is not None:
        rows.append(("val_loss", show_number(result.val_loss)))
    if result.val_metric is not None:
        rows.append((workload.metric_name, show_number(result.val_metric)))
    rows.append(("parameters_sha256", result.parameters_sha256[:16]))
    if result.run_directory is not None:
        rows.append(("kept in", result.run_directory))
    header, *body = rows
    return f"{wrap(_in_a_sentence(result))}\n\n{make_table(header, body, left=2)}"


def _in_a_sentence(result: TrainResult) -> str:
    how = f"{result.workload} with batch {result.recipe.global_batch:,}"
    if result.diverged:
        return (
            f"Training {how} diverged after {result.steps:,} steps: the loss left the numbers. "
            f"Lower the learning rate, {show_number(result.recipe.learning_rate)}."
            f"{_last_good(result)}"
        )
    if result.state == "stopped":
        return f"Training {how} was stopped after {result.steps:,} steps.{_how_to_go_on(result)}"
    took = (
        f"Trained {how} for {show_number(result.epochs)} epochs in {show_seconds(result.seconds)}"
    )
    if result.target is None:
        return f"{took}."
    if result.reached_target:
        return f"{took}; the target {result.target} was met at step {result.steps_to_target:,}."
    return f"{took}; the target {result.target} was not met."


def _last_good(result: TrainResult) -> str:
    return "" if result.checkpoint is None else f" The last good checkpoint is {result.checkpoint}."


def _how_to_go_on(result: TrainResult) -> str:
    if result.checkpoint is None:
        return " Nothing was kept."
    command = f"rightbatch train {result.workload} --resume {result.run_directory}"
    return f" Go on with: {command}"
