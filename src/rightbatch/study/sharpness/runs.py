"""Runs the trainings of a comparison and measures them on their way."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from rightbatch.errors import ProbeError
from rightbatch.isolate import preserved_state
from rightbatch.probes.sharpness import measure_sharpness_at
from rightbatch.recipe import Recipe
from rightbatch.study.sharpness.course import Arm, Course
from rightbatch.study.sharpness.records import SharpnessOfRun
from rightbatch.training import Training
from rightbatch.training.evaluate import evaluate
from rightbatch.workload import Workload

Progress = Callable[..., None]
_EPSILON = 1e-3


def run_course(
    workload: Workload,
    course: Course,
    seeds: Sequence[int],
    device: str,
    max_examples: int | None,
    tell: Progress,
) -> tuple[list[SharpnessOfRun], int, int]:
    """Runs every training once and measures it on its way.

    Args:
        workload: What to train.
        course: Which trainings, and where they are measured.
        seeds: Of each.
        device: Where.
        max_examples: Most training examples of each measurement.
        tell: Told the cost first, then what is being done and which share is done.

    Returns:
        What was measured; the examples that it all took; how many trainings there were.
    """
    arms = course.arms()
    stops = sum(len(arm.stops) for arm in arms) * len(seeds)
    examples = sum(arm.stops[-1] * arm.batch_size for arm in arms) * len(seeds)
    tell(
        f"cost: {len(arms) * len(seeds)} trainings, {examples:,} examples; {stops} measurements",
        0.0,
    )
    runs, cost = list[SharpnessOfRun](), 0
    for arm in arms:
        for seed in seeds:

            def report(step: int, batch: int = arm.batch_size, seed: int = seed) -> None:
                share = len(runs) / stops
                tell(f"batch {batch:,}, seed {seed}: sharpness after {step:,} updates", share)

            own, taken = _run_one(workload, arm, seed, device, max_examples, report)
            runs.extend(own)
            cost += taken
    tell("sharpness", 1.0)
    return runs, cost, len(arms) * len(seeds)


def _run_one(
    workload: Workload,
    arm: Arm,
    seed: int,
    device: str,
    max_examples: int | None,
    report: Callable[[int], None],
) -> tuple[list[SharpnessOfRun], int]:
    recipe = Recipe(global_batch=arm.batch_size, learning_rate=arm.learning_rate)
    training = Training(workload, recipe, seed=seed, device=device)
    start = _weights(training)
    found, cost = list[SharpnessOfRun](), 0
    try:
        for stop in arm.stops:
            training.advance(stop - training.steps)
            report(stop)
            run, taken = _measure(training, start, stop, max_examples)
            found.append(run)
            cost += taken
    finally:
        training.close()
    return found, cost + training.examples


def _weights(training: Training) -> Tensor:
    parts = [p.detach().reshape(-1).double() for p in training.model.parameters()]
    return torch.cat(parts)


def _measure(
    training: Training, start: Tensor, stop: int, max_examples: int | None
) -> tuple[SharpnessOfRun, int]:
    workload, recipe = training.workload, training.recipe
    nothing = SharpnessOfRun(
        batch_size=recipe.global_batch,
        learning_rate=recipe.learning_rate,
        seed=training.seed,
        steps=stop,
        diverged=True,
    )
    if not training.is_sound():
        return nothing, 0
    try:
        point = measure_sharpness_at(
            training, max_examples=max_examples, epsilons=(_EPSILON,), seed=0
        )
    except ProbeError:  # finite weights whose loss is none
        return nothing, 0
    with preserved_state(training.model):
        device, model = training.device, training.model
        train = evaluate(workload, model, workload.train_examples, device=device)
        val = workload.val_examples
        val_loss = None if val is None else evaluate(workload, model, val, device=device).loss
    run = SharpnessOfRun(
        batch_size=recipe.global_batch,
        learning_rate=recipe.learning_rate,
        seed=training.seed,
        steps=stop,
        diverged=False,
        largest_eigenvalue=point.largest_eigenvalue.value,
        trace=point.trace.value,
        phi=point.phi("all").value,
        phi_random=point.phi("random").value,
        sam_rise=point.sam_rise.value,
        gradient_norm=point.gradient_norm,
        train_loss=train.loss,
        val_loss=val_loss,
        distance=float((_weights(training) - start).norm()),
    )
    return run, point.cost_examples
