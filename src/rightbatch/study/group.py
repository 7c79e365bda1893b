"""Runs trainings of one batch size together, evaluated at geometrically spaced updates."""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from rightbatch.engines import CopiesEvaluation, Engine, make_copies
from rightbatch.laws.progress import examples_after, spaced_steps
from rightbatch.study.trials import EvaluationPoint, TrialKey
from rightbatch.workload import Workload

SPACING = 1.12
"""Evaluations are at most so far apart in updates, where that is more than one."""
_MOST_BYTES = 2**29
"""Of weights, gradients and optimizer state of all trainings that run together."""
_MOST_TOGETHER = 128
_COPIES_OF_WEIGHTS = 4
_WORTH_STACKING, _WORTH_COMPILING = 1.0, 8.0
"""Seconds of all updates in the training loop; the vmapped engine takes 0.3 to 0.5 to begin with
and is then 3 to 8 times as fast, the compiled one takes one to four and is 10 times and more."""
_FEWEST_IN_A_THREAD = 8
"""Trainings: fewer gain nothing from being divided further."""
_PILOTS = 4
"""Trainings that an engine is chosen for, to see which it would be: fewer are not mapped."""
_FIRST_PIECE, _PIECE_SECONDS = 64, 0.25
"""Updates, then seconds, after which a thread looks whether it is to stop."""
_POLL_SECONDS = 0.05


@dataclass(frozen=True, kw_only=True)
class Finished:
    """One training of a group, at its end.

    Attributes:
        key: Which.
        diverged: Whether its loss left the numbers.
        points: Its evaluations while it had a loss.
    """

    key: TrialKey
    diverged: bool
    points: tuple[EvaluationPoint, ...]


def most_together(num_weights: int) -> int:
    """How many trainings fit into memory together.

    Args:
        num_weights: Of the model.

    Returns:
        At least 1.
    """
    fit = _MOST_BYTES // max(1, 4 * _COPIES_OF_WEIGHTS * num_weights)
    return max(1, min(_MOST_TOGETHER, fit))


def runs_one_by_one(workload: Workload, keys: Sequence[TrialKey], engine: Engine) -> bool:
    """Whether trainings would run one after the other, so that a group gains nothing.

    Args:
        workload: What to train.
        keys: Which trainings, of one batch size.
        engine: What is to run them.

    Returns:
        Whether the loop would run them.

    Raises:
        UsageError: If the engine that was asked for cannot.
    """
    few = keys[:_PILOTS]
    copies = make_copies(
        workload,
        global_batch=few[0].batch_size,
        learning_rates=[key.learning_rate for key in few],
        seeds=[key.seed for key in few],
        engine=engine,
    )
    return copies.engine == "loop"


def count_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def run_group(
    workload: Workload,
    keys: Sequence[TrialKey],
    steps: int,
    *,
    engine: Engine = "auto",
    step_seconds: float | None = None,
    smallest: int = 1,
    threads: int | None = None,
    watch: str | None = None,
    progress: Callable[[float], None] | None = None,
) -> tuple[list[Finished], str]:
    """Runs trainings of one batch size to their end.

    An engine uses one core; with several, the trainings are divided among threads. The loop gains
    nothing from them.

    Args:
        workload: What to train.
        keys: Which trainings; all have the same batch size.
        steps: Updates of each.
        engine: What runs them.
        step_seconds: Of one update in the training loop: few and short ones are not worth
            compiling, and very few not worth stacking.
        smallest: Examples that the model needs in one pass.
        threads: How many. Default: the cores that this process may use.
        watch: The weight to follow, as in `rightbatch.Watch`.
        progress: Told the share of the updates that is done.

    Returns:
        The trainings in the order of `keys`, and which engine ran them and why.
    """
    seconds = math.inf if step_seconds is None else step_seconds * steps * len(keys)
    short = engine == "auto" and seconds < _WORTH_STACKING
    engine = "loop" if short else engine
    worth = seconds >= _WORTH_COMPILING
    most = count_cores() if threads is None else threads
    count = max(1, min(most, len(keys) // _FEWEST_IN_A_THREAD))

    # Interleaved, so that all take about as long: those that diverge end early.
    def part(share: Sequence[TrialKey]) -> _Part:
        return _Part(workload, share, steps, engine, smallest, worth, watch)

    parts = [part(keys[::count])]
    if count > 1 and parts[0].copies.engine != "loop":
        parts += [part(keys[i::count]) for i in range(1, count)]
        _run_in_threads(parts, progress)
    else:
        parts = parts if count == 1 else [part(keys)]
        parts[0].run(progress)
    found = {finished.key: finished for part in parts for finished in part.finished()}
    copies = parts[0].copies
    reason = copies.reason
    if short:
        reason = "Trainings so short are done before a compiler would be."
    return [found[key] for key in keys], f"{copies.engine}: {reason}"


class _Part:
    """Some of a group's trainings, run in one thread.

    Attributes:
        copies: The trainings.
        share: Of the updates, how many are done.
        stop: Set from outside: ends at the next pause.
        error: What ended it.
    """

    def __init__(
        self,
        workload: Workload,
        keys: Sequence[TrialKey],
        steps: int,
        engine: Engine,
        smallest: int,
        worth_compiling: bool,
        watch: str | None,
    ) -> None:
        self._keys, self._steps, self._smallest = keys, steps, smallest
        self._num_examples = workload.num_examples
        self.copies = make_copies(
            workload,
            global_batch=keys[0].batch_size,
            learning_rates=[key.learning_rate for key in keys],
            seeds=[key.seed for key in keys],
            engine=engine,
            worth_compiling=worth_compiling,
            watch=watch,
        )
        self._points: list[list[EvaluationPoint]] = [[] for _ in keys]
        self._diverged = np.zeros(len(keys), dtype=bool)
        self._held = np.arange(len(keys))
        self.share, self.stop = 0.0, False
        self.error: BaseException | None = None

    def run(self, progress: Callable[[float], None] | None = None) -> None:
        """Runs all to their end."""
        for step in spaced_steps(SPACING, self._steps):
            self._advance_to(step)
            if self.stop:
                return
            self._evaluate(step)
            self.share = step / self._steps
            if progress is not None:
                progress(self.share)
            if self._diverged[self._held].all():
                break
            self._retire()
        self.share = 1.0

    def run_quietly(self) -> None:
        """The same in a thread; what it raises is kept."""
        try:
            self.run()
        except BaseException as error:
            self.error = error

    def _advance_to(self, step: int) -> None:
        """In pieces that are short enough to be stopped between."""
        piece = _FIRST_PIECE
        while self.copies.steps < step and not self.stop:
            count = min(piece, step - self.copies.steps)
            began = time.perf_counter()
            self.copies.advance(count)
            if count < step - self.copies.steps or piece > _FIRST_PIECE:
                self.copies.wait()
                spent = max(time.perf_counter() - began, 1e-6)
                piece = max(1, min(8 * piece, int(count * _PIECE_SECONDS / spent)))

    def _evaluate(self, step: int) -> None:
        evaluation = self.copies.evaluate()
        self._diverged[self._held] |= evaluation.diverged
        batch, N = self._keys[0].batch_size, self._num_examples
        examples = round(examples_after(step, batch, N, self._smallest))
        for slot in np.flatnonzero(~evaluation.diverged):
            point = _point(evaluation, int(slot), step, examples)
            self._points[self._held[slot]].append(point)

    def _retire(self) -> None:
        """Leaves those that diverged out, where they are most of what is held."""
        alive = ~self._diverged[self._held]
        # Another number of copies is compiled anew: leaving a few out costs more than it saves.
        if 2 * alive.sum() <= len(self._held):
            self.copies.keep(alive)
            self._held = self._held[alive]

    def finished(self) -> list[Finished]:
        """The trainings at their end."""
        return [
            Finished(key=key, diverged=bool(left), points=tuple(own))
            for key, left, own in zip(self._keys, self._diverged, self._points, strict=True)
        ]


def _run_in_threads(parts: Sequence[_Part], progress: Callable[[float], None] | None) -> None:
    """Runs parts side by side; an interrupt ends them at their next pause."""
    running = [threading.Thread(target=part.run_quietly, daemon=True) for part in parts]
    for thread in running:
        thread.start()
    try:
        while any(thread.is_alive() for thread in running):
            for thread in running:
                thread.join(_POLL_SECONDS)
            if progress is not None:
                progress(sum(part.share for part in parts) / len(parts))
            if any(part.error for part in parts):
                break
    finally:
        for part in parts:
            part.stop = True
        for thread in running:
            thread.join()
    for part in parts:
        if part.error is not None:
            raise part.error


def _point(evaluation: CopiesEvaluation, slot: int, step: int, examples: int) -> EvaluationPoint:
    def value(of: np.ndarray | None) -> float | None:
        number = math.nan if of is None else float(of[slot])
        return number if math.isfinite(number) else None

    watched = evaluation.watched
    return EvaluationPoint(
        step=step,
        examples=examples,
        train_loss=value(evaluation.train_loss),
        val_loss=value(evaluation.val_loss),
        val_metric=value(evaluation.val_metric),
        distance=None if watched is None else value(watched.distance),
        relative_distance=None if watched is None else value(watched.relative_distance),
        weight=None if watched is None else value(watched.weight),
        roughness=None if watched is None else value(watched.roughness),
    )
