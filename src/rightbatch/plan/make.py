"""Measuring what a plan needs, within a budget, and keeping the best answer so far."""

from __future__ import annotations

import math
import os
import platform
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib import metadata

import numpy as np
import torch

from rightbatch.device.clock import ThreadClock, is_busy
from rightbatch.device.memory import parse_bytes
from rightbatch.errors import UsageError
from rightbatch.isolate import preserved_state
from rightbatch.laws.split import split_batch
from rightbatch.plan.choose import choose, count_examples
from rightbatch.plan.predict import expected_critical_batch, predict_batch, starting_rate
from rightbatch.plan.price import make_price, max_micro_batch, open_sizes, step_seconds
from rightbatch.plan.records import Effort, Environment, Evidence, Goal, Plan, Setting
from rightbatch.plan.study_around import (
    EPOCHS_WITHOUT_TARGET,
    MOST_EPOCHS,
    NO_STUDY,
    study_if_wanted,
)
from rightbatch.probes.learning_rate import find_learning_rate
from rightbatch.probes.memory import measure_memory
from rightbatch.probes.noise import measure_noise_scale
from rightbatch.probes.throughput import measure_throughput
from rightbatch.recipe import Recipe
from rightbatch.study.contestant import TrainingContestant, looked_at
from rightbatch.study.race import UNIT_BATCH, Race, RaceSettings
from rightbatch.study.records import RaceRecord
from rightbatch.training import Training
from rightbatch.workload import Workload, check_workload

Progress = Callable[..., None]
DEFAULT_BUDGET = "2min"
_WANTED_MICRO_BATCH = {"cpu": 512, "gpu": 4096}
"""Micro-batches beyond this are not tried: throughput has stopped growing, and larger global
batches accumulate. `measure_memory` finds the true ceiling."""
_TIMED_SIZES = (1, 8, 32, 128)
_MOST_TIMED = {True: 5000, False: 3000}
"""Timed examples cost as much as trained ones: about this many have to do for the law, where the
probes are all there is and where a race follows."""
_FEWEST_EPOCHS = 2.0
"""A race whose runs could not do this many epochs within the budget is not begun."""
_RUNS_PAID_FOR = 5
"""A race takes about as long as this many of its runs."""
_DURATION = re.compile(r"\s*(?P<number>\d+(?:\.\d+)?)\s*(?P<unit>s|sec|min|m|h)?\s*")
_UNITS = {None: 1.0, "s": 1.0, "sec": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0}


def make_plan(
    workload: Workload,
    *,
    goal: Goal = "time",
    effort: Effort = "auto",
    budget: str | float | None = None,
    target: str | None = None,
    memory_limit: int | str | None = None,
    replicas: int = 1,
    device: str = "cpu",
    seed: int = 0,
    progress: Progress | None = None,
) -> Plan:
    """Finds the batch size, the learning rate and what hangs on them, and says why.

    Args:
        workload: What to train.
        goal: `time`: least modelled seconds to the target; `examples`: least compute; `steps`:
            fewest updates; `quality`: the best loss within a fixed cost, whatever the target says.
        effort: `probe`: measure, run no training. `race`: a few runs' cost. `study`: every size
            near the one that probes suggest, at several learning rates and seeds. `auto`: the
            most of these whose predicted cost fits the budget.
        budget: Wall time, such as `"2min"` or seconds. Default: two minutes for `auto`; none
            otherwise.
        target: What counts as trained. Default: the workload's, else what the best run reaches.
        memory_limit: Bytes, or text such as `"8GiB"`. Default: what is free.
        replicas: Data-parallel workers that will train.
        device: Where to measure.
        seed: Of everything random.
        progress: Called with what is being done, in words.

    Returns:
        The plan.

    Raises:
        UsageError: If an argument is wrong.
        WorkloadError: If the workload cannot be trained.
        NoBatchFitsError: If not even one example fits in memory.
    """
    started = time.monotonic()
    say = progress or (lambda *_: None)
    _check_choice("goal", goal, ("time", "examples", "steps", "quality"))
    _check_choice("effort", effort, ("auto", "probe", "race", "study"))
    if seed < 0:
        raise UsageError(f"seed is {seed}; it cannot be negative.")
    if replicas < 1:
        raise UsageError(f"replicas is {replicas}; it must be at least 1.")
    if target is not None:
        workload = replace(workload, target=target)
    if goal == "quality":
        # What costs least to the loss that a fixed cost reaches, reaches the lowest loss with it.
        workload = replace(workload, target=None)
    if budget is None and effort == "auto":
        budget = DEFAULT_BUDGET
    seconds = None if budget is None else parse_seconds(budget)
    check_workload(workload, device=device)
    if replicas > workload.num_examples:
        raise UsageError(
            f"replicas is {replicas}, and there are only {workload.num_examples:,} examples. "
            "Every worker needs one at each step; use fewer."
        )
    evidence = _probe(
        workload, _Asked(goal, effort, seconds, replicas, device, seed), memory_limit, say
    )
    with preserved_state():
        study, why_not = study_if_wanted(workload, evidence, started, say)
        race, notes = (None, ()) if study else _race_if_wanted(workload, evidence, started, say)
    notes = (*notes, *why_not)
    evidence = replace(evidence, race=race, study=study)
    plan = choose(workload.name, evidence, seconds=time.monotonic() - started)
    return replace(plan, warnings=(*plan.warnings, *notes))


def probe(
    workload: Workload,
    *,
    device: str = "cpu",
    memory_limit: int | str | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Evidence:
    """Measures memory, step time, noise scale and learning rate; trains nothing.

    Args:
        workload: What to train.
        device: Where to measure.
        memory_limit: Bytes, or text such as `"8GiB"`. Default: what is free.
        seed: Of everything random.
        progress: Called with what is being done, in words.

    Returns:
        The evidence, without a race.
    """
    check_workload(workload, device=device)
    asked = _Asked("time", "probe", None, 1, device, seed)
    return _probe(workload, asked, memory_limit, progress or (lambda *_: None))


def replay_plan(plan: Plan) -> Plan:
    """Recomputes a plan from its own evidence, without running a model.

    Args:
        plan: A plan, usually read from its file.

    Returns:
        The plan that follows from the evidence; the same, bit for bit, unless rightbatch changed.
    """
    again = choose(plan.workload, plan.evidence, seconds=plan.cost.seconds)
    notes = [w for w in plan.warnings if w.startswith((_NOT_RACED, NO_STUDY))]
    return replace(again, warnings=(*again.warnings, *notes))


def parse_seconds(budget: str | float) -> float:
    """Reads a duration such as `"30s"`, `"2min"`, `"1h"` or a number of seconds.

    Args:
        budget: The duration.

    Returns:
        Seconds.

    Raises:
        UsageError: If it cannot be read or is not positive.

    Example:
        >>> parse_seconds("2min")
        120.0
    """
    if isinstance(budget, str):
        match = _DURATION.fullmatch(budget)
        value = float(match["number"]) * _UNITS[match["unit"]] if match else 0.0
    else:
        value = float(budget)
    if not (math.isfinite(value) and value > 0):
        raise UsageError(
            f"The budget {budget!r} is no duration. Write it like '30s', '2min' or '1h'."
        )
    return value


@dataclass(frozen=True)
class _Asked:
    """The arguments that travel together."""

    goal: Goal
    effort: Effort
    seconds: float | None
    replicas: int
    device: str
    seed: int


def _probe(
    workload: Workload, asked: _Asked, memory_limit: int | str | None, say: Progress
) -> Evidence:
    device, seed = asked.device, asked.seed
    environment = describe_environment(device)
    with preserved_state():
        optimizer = workload.make_optimizer(workload.build_model(seed, device).parameters(), 1.0)
    say("memory: how many examples fit at once")
    limit = parse_bytes(memory_limit) if isinstance(memory_limit, str) else memory_limit
    wanted = min(_WANTED_MICRO_BATCH["cpu" if device == "cpu" else "gpu"], workload.num_examples)
    memory = measure_memory(workload, device=device, memory_limit=limit, max_micro_batch=wanted)
    ceiling = memory.ceiling.micro_batch
    # A race measures what these predict; with one to follow they need not be as sure.
    thorough = asked.effort == "probe"
    say("throughput: seconds per step at each size")
    throughput = measure_throughput(
        workload,
        device=device,
        micro_batches=[size for size in _TIMED_SIZES if size <= ceiling],
        max_examples=_MOST_TIMED[thorough],
        powers_of_two=False,
        clock=ThreadClock() if environment.clock == "processor" else None,
        seed=seed,
    )
    say("noise: how much examples disagree on the gradient")
    noise = measure_noise_scale(
        workload,
        device=device,
        seed=seed,
        max_examples=2048 if thorough else 128,
        trajectory_steps=(0, 4, 16, 64) if thorough else (0, 16),
        micro_batch=min(ceiling, UNIT_BATCH),
    )
    say("learning rate: range test")
    plain = isinstance(optimizer, torch.optim.SGD)
    averaging = not plain or any(group["momentum"] > 0 for group in optimizer.param_groups)
    # The answer holds for the batch of the ramp, so that is the batch to be recommended.
    batch = predict_batch(
        throughput,
        expected_critical_batch(noise, averaging=averaging),
        goal=asked.goal,
        num_examples=workload.num_examples,
        replicas=asked.replicas,
    )
    learning_rate = find_learning_rate(
        workload,
        global_batch=batch if thorough else min(UNIT_BATCH, workload.num_examples),
        max_micro_batch=ceiling,
        seeds=3 if thorough else 1,
        num_steps=240 if thorough else 48,
        lr_min=1e-5,
        device=device,
        seed=seed,
    )
    return Evidence(
        setting=Setting(
            goal=asked.goal,
            effort=asked.effort,
            budget_seconds=asked.seconds,
            target=workload.target,
            num_examples=workload.num_examples,
            num_examples_is_cut=workload.train_examples.truncated,
            replicas=asked.replicas,
            optimizer=type(optimizer).__name__,
            # Momentum averages updates and leaves them unbiased; all others rescale them.
            normalised=not plain,
            averaging=averaging,
            device=device,
            seed=seed,
        ),
        environment=environment,
        memory=memory,
        throughput=throughput,
        noise_scale=noise,
        learning_rate=learning_rate,
        race=None,
    )


_NOT_RACED = "No race was run"


def _race_if_wanted(
    workload: Workload, evidence: Evidence, started: float, say: Progress
) -> tuple[RaceRecord | None, tuple[str, ...]]:
    """The race, unless probes were asked for or the budget is too small for one."""
    setting = evidence.setting
    if setting.effort in ("probe", "study"):
        return None, ()
    sizes = open_sizes(setting.num_examples, setting.replicas)
    batch = min(sizes, key=lambda size: abs(size - UNIT_BATCH))
    ceiling = max_micro_batch(evidence)
    epoch_seconds = step_seconds(evidence.throughput, batch, ceiling) * setting.num_examples / batch
    left = None
    most_epochs = float(MOST_EPOCHS)
    if setting.budget_seconds is not None:
        left = max(0.0, setting.budget_seconds - (time.monotonic() - started))
        most_epochs = min(most_epochs, left / _RUNS_PAID_FOR / epoch_seconds)
    if setting.effort == "auto" and most_epochs < _FEWEST_EPOCHS:
        wanted = _RUNS_PAID_FOR * _FEWEST_EPOCHS * epoch_seconds
        needed = (wanted + time.monotonic() - started) / 60
        return None, (
            f"{_NOT_RACED}: it would need about {math.ceil(needed)} minutes or more. A larger "
            "budget, or effort='race', can change batch size and learning rate.",
        )
    if setting.target is None:
        most_epochs = min(most_epochs, EPOCHS_WITHOUT_TARGET)
    race = run_race(workload, evidence, sizes, epochs=most_epochs, seconds=left, say=say)
    if race is None:
        return None, (
            f"{_NOT_RACED} far enough to tell: it was ended early, or the loss left the numbers at "
            "every learning rate.",
        )
    return race, ()


def run_race(
    workload: Workload,
    evidence: Evidence,
    sizes: Sequence[int],
    *,
    epochs: float,
    seconds: float | None = None,
    say: Progress | None = None,
) -> RaceRecord | None:
    """Runs a race among some batch sizes.

    Args:
        workload: What to train.
        evidence: What the probes measured.
        sizes: Batch sizes open to choice, ascending; a single one asks for its learning rate.
        epochs: One run goes no further.
        seconds: Wall time, or None.
        say: Called with what is being done, in words.

    Returns:
        Its record, or None where nothing can be recommended.
    """
    setting, target = evidence.setting, workload.parsed_target
    ceiling = max_micro_batch(evidence)

    def fresh(global_batch: int, learning_rate: float, seed: int) -> TrainingContestant:
        split = split_batch(global_batch, min(ceiling, global_batch), 1)
        recipe = Recipe(
            global_batch=split.global_batch,
            micro_batch=split.micro_batch,
            learning_rate=learning_rate,
        )
        training = Training(workload, recipe, seed=seed, device=setting.device)
        return TrainingContestant(training, target)

    race = Race(
        fresh,
        sizes=sizes,
        price=make_price(setting.goal, evidence.throughput, ceiling, setting.replicas),
        first_lr=starting_rate(evidence),
        normalised=setting.normalised,
        averaging=setting.averaging,
        usual_batch=expected_critical_batch(evidence.noise_scale, averaging=setting.averaging),
        settings=RaceSettings(
            most_examples=max(64 * min(sizes), int(epochs * setting.num_examples)),
            spent_examples=count_examples(evidence),
            seconds=seconds,
        ),
        has_target=target is not None,
        target_loss=target.value if target and target.quantity.endswith("_loss") else None,
        seed=setting.seed,
        progress=say,
    )
    race.run()
    if not race.has_answer:
        return None
    return race.record(looked_at(workload, target).num_examples)


def describe_environment(device: str) -> Environment:
    """The versions, the machine, the thread count and the clock that measurements are made with.

    Args:
        device: Where measurements are made; an accelerator is not shared like processors are.

    Returns:
        The description.
    """
    return Environment(
        rightbatch=metadata.version("rightbatch"),
        python=platform.python_version(),
        torch=torch.__version__,
        numpy=np.__version__,
        platform=platform.platform(),
        processor=platform.processor() or platform.machine(),
        num_cpus=os.cpu_count() or 1,
        num_threads=torch.get_num_threads(),
        clock="processor" if device == "cpu" and is_busy() else "wall",
        started=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def _check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise UsageError(f"{name} is {value!r}; choose one of {', '.join(allowed)}.")
