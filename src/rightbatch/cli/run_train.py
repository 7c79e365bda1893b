"""`rightbatch train`."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from rightbatch.cli.opening import open_workload
from rightbatch.cli.output import Output
from rightbatch.cli.table import make_table, wrap
from rightbatch.cli.train_progress import TrainProgress
from rightbatch.cli.units import show_number, show_seconds
from rightbatch.errors import DivergedError, UsageError
from rightbatch.recipe import Recipe
from rightbatch.store import dump_record, hash_tensors, read_part
from rightbatch.training import Run, train
from rightbatch.workload import Workload


class RecipeChoice(NamedTuple):
    """How the recipe was given: a plan, or batch size and learning rate."""

    plan: Path | None
    batch_size: str | None
    learning_rate: float | None


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
    diverged: bool
    parameters_sha256: str


def run(
    output: Output,
    reference: str,
    *,
    recipe: RecipeChoice,
    threads: int | None = None,
    **options: Any,
) -> int:
    """Trains, prints what came of it, and returns the exit code.

    Args:
        output: Where to print.
        reference: The workload.
        recipe: How the recipe was given.
        threads: CPU threads, or None for torch's default.
        **options: Passed on to `rightbatch.train`.

    Returns:
        0, or 4 if the training diverged.
    """
    _check_choice(recipe)
    with output.progress(f"Loading {reference}") as report:
        report(f"Checking {reference}")
        workload = open_workload(reference, options["device"], threads)
        chosen = _choose_recipe(recipe, workload)
        report(
            f"Training {workload.name}: batch {chosen.global_batch}, {options['epochs']:g} epochs"
        )
        progress = TrainProgress(report, may_stop_early=options["until_target"])
        start = time.perf_counter()
        finished = train(workload, chosen, callbacks=[progress], **options)
        seconds = time.perf_counter() - start
    result = _result(workload, finished, options["seed"], seconds)
    output.result(
        lambda: _as_text(result, workload), lambda: dump_record(result, schema="rightbatch.train/1")
    )
    return DivergedError.exit_code if finished.diverged else 0


def _check_choice(choice: RecipeChoice) -> None:
    """Exactly one way of giving the recipe was used."""
    by_hand = (choice.batch_size is not None, choice.learning_rate is not None)
    if choice.plan is not None and any(by_hand):
        raise UsageError("--plan already says batch size and learning rate. Drop those options.")
    if choice.plan is None and not all(by_hand):
        raise UsageError(
            "The recipe is not complete. Give --plan plan.json, or both --batch-size and "
            "--learning-rate."
        )


def _choose_recipe(choice: RecipeChoice, workload: Workload) -> Recipe:
    if choice.plan is not None:
        return read_part(choice.plan, "recipe", Recipe, schema="rightbatch.plan/1")
    assert choice.batch_size is not None  # by _check_choice
    assert choice.learning_rate is not None
    batch = _read_batch(choice.batch_size, workload.num_examples)
    return Recipe(global_batch=batch, learning_rate=choice.learning_rate)


def _read_batch(text: str, num_examples: int) -> int:
    if text == "full":
        return num_examples
    if not text.isascii() or not text.isdigit() or not 1 <= int(text) <= num_examples:
        raise UsageError(
            f"--batch-size is {text!r}. Give a number from 1 to {num_examples}, the size of the "
            "training set, or full."
        )
    return int(text)


def _result(workload: Workload, finished: Run, seed: int, seconds: float) -> TrainResult:
    return TrainResult(
        workload=workload.name,
        recipe=finished.recipe,
        seed=seed,
        steps=finished.steps,
        epochs=finished.epochs,
        examples=finished.examples,
        seconds=seconds,
        train_loss=_finite(finished.train_loss),
        val_loss=_finite(finished.val_loss),
        val_metric=_finite(finished.val_metric),
        target=workload.target,
        reached_target=finished.reached_target,
        steps_to_target=finished.steps_to_target,
        diverged=finished.diverged,
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
    header, *body = rows
    return f"{wrap(_in_a_sentence(result))}\n\n{make_table(header, body, left=2)}"


def _in_a_sentence(result: TrainResult) -> str:
    how = f"{result.workload} with batch {result.recipe.global_batch:,}"
    if result.diverged:
        return (
            f"Training {how} diverged after {result.steps:,} steps: the loss left the numbers. "
            f"Lower the learning rate, {show_number(result.recipe.learning_rate)}."
        )
    took = (
        f"Trained {how} for {show_number(result.epochs)} epochs in {show_seconds(result.seconds)}"
    )
    if result.target is None:
        return f"{took}."
    if result.reached_target:
        return f"{took}; the target {result.target} was met at step {result.steps_to_target:,}."
    return f"{took}; the target {result.target} was not met."
