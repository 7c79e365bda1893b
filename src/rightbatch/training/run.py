"""`train`: a whole run, from a recipe to a trained model."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from torch import nn

from rightbatch.errors import ProbeError, UsageError
from rightbatch.recipe import Recipe
from rightbatch.training.checkpoints.interrupt import StopOnSignal
from rightbatch.training.checkpoints.saving import RunSettings, Saver, make_saver
from rightbatch.training.loop import Training
from rightbatch.training.preflight.check import check_accumulation
from rightbatch.training.ranks.distributed import count_processes, join_ranks
from rightbatch.training.watching.callbacks import Callback, Point
from rightbatch.workload import Workload

Outcome = Literal["complete", "diverged", "stopped"]


@dataclass(frozen=True, kw_only=True)
class Run:
    """A finished training.

    Attributes:
        recipe: What was run.
        model: The trained model.
        steps: Updates done.
        epochs: Passes over the training set, fractional when stopped inside one.
        examples: Training examples processed.
        train_loss: Mean loss of the updates since the evaluation before the last.
        val_loss: Last validation loss, or None without a validation set.
        val_metric: Last validation metric, or None without one.
        seconds: Wall time of the updates.
        state: `complete`; `diverged`: the loss became NaN, infinite or exploded; `stopped` by a
            signal or a callback before its end.
        reached_target: Whether the target was met; None without a target.
        steps_to_target: Updates done when the target was first met, or None.
        history: The evaluations, oldest first.
        checkpoint: The newest checkpoint of the run, or None.
    """

    recipe: Recipe
    model: nn.Module
    steps: int
    epochs: float
    examples: int
    train_loss: float
    val_loss: float | None
    val_metric: float | None
    seconds: float
    state: Outcome
    reached_target: bool | None
    steps_to_target: int | None
    history: list[Point] = field(repr=False)
    checkpoint: Path | None = None

    @property
    def diverged(self) -> bool:
        """Whether the loss became NaN, infinite or exploded."""
        return self.state == "diverged"


def train(
    workload: Workload,
    recipe: Recipe,
    *,
    epochs: float | None = None,
    steps: int | None = None,
    seed: int = 0,
    device: str = "cpu",
    until_target: bool = False,
    evaluate_every: int | None = None,
    callbacks: Sequence[Callback] = (),
    workers: int = 0,
    run_directory: str | Path | None = None,
    checkpoint_every: int | None = None,
    resume: bool = False,
    preflight: bool = True,
) -> Run:
    """Trains a workload as a recipe says.

    With a `run_directory` the run is saved every minute (or every `checkpoint_every` updates),
    where it ends, and where SIGINT or SIGTERM stop it, which then take effect as usual. A run that
    is resumed from there gives the same bits as one that was never stopped.
    A stream, of which the workload holds only the beginning, is gone through as it comes
    (`train_stream`): in its own order, an epoch being a whole pass. A pass over an endless one
    does not end, so that it needs `steps`.

    Under `torchrun` the processes train together, each on its share of every update, and all of
    them return the same run. Rank 0 calls the callbacks and writes the checkpoints.

    Args:
        workload: What to train.
        recipe: How.
        epochs: Passes over the training set (a limit, with `until_target`).
        steps: Updates; give either `epochs` or `steps`.
        seed: Decides initial weights, data order and dropout.
        device: Where.
        until_target: Stop at the first evaluation that meets the workload's target.
        evaluate_every: Updates between evaluations. Default: once an epoch.
        callbacks: What watches the run.
        workers: Processes that fetch examples ahead; 0 fetches between updates.
        run_directory: Where checkpoints are kept; None: nowhere.
        checkpoint_every: Updates between checkpoints, beside one a minute.
        resume: Go on from the newest checkpoint in `run_directory`, or begin where there is none.
        preflight: Measure first whether accumulated micro-batches give the gradient of the whole
            batch, and warn where they do not.

    Returns:
        The finished run.

    Raises:
        UsageError: If not exactly one of `epochs` and `steps` is given, or `run_directory` holds
            another run.
        CorruptStateError: If no checkpoint of the run to resume can be used.
        OSError: If a checkpoint cannot be written; the one before is kept.
    """
    if (epochs is None) == (steps is None):
        raise UsageError("Give either epochs or steps, and not both.")
    if workload.train_examples.truncated:
        from rightbatch.training.streams.stream import train_epochs  # which imports this module

        if count_processes() > 1:
            raise UsageError(
                f"The data are a stream, which {count_processes()} processes cannot divide among "
                "themselves. Start the program without torchrun, or give a data set with a length."
            )
        return train_epochs(
            workload,
            recipe,
            epochs=epochs,
            steps=steps,
            seed=seed,
            device=device,
            until_target=until_target,
            evaluate_every=evaluate_every,
            callbacks=callbacks,
            workers=workers,
            run_directory=run_directory,
            checkpoint_every=checkpoint_every,
            resume=resume,
        )
    settings = RunSettings(
        workload=workload.name,
        num_examples=workload.num_examples,
        recipe=recipe,
        seed=seed,
        epochs=epochs,
        steps=steps,
        until_target=until_target,
        evaluate_every=evaluate_every,
        workers=workers,
    )
    saver = make_saver(run_directory, settings, steps_between=checkpoint_every, resume=resume)
    with join_ranks(recipe, device) as ranks:
        if ranks is not None:
            device = ranks.device
            kept = {"kept": saver is not None, "every": checkpoint_every, "resume": resume}
            ranks.agree({**asdict(settings), **kept}, "Start all with the same arguments.")
        if not resume and (ranks is None or ranks.rank == 0):
            if saver is not None:
                saver.refuse_another_run()
            if preflight:
                _warn_of_the_split(workload, recipe, seed=seed, device=device)
        training = Training(
            workload,
            recipe,
            seed=seed,
            device=device,
            horizon=settings.horizon,
            callbacks=callbacks,
            workers=workers,
            ranks=ranks,
        )
        return run_to_end(
            training,
            until_target=until_target,
            evaluate_every=evaluate_every,
            saver=saver,
            resume=resume,
        )


def _warn_of_the_split(workload: Workload, recipe: Recipe, *, seed: int, device: str) -> None:
    """Says where micro-batches are not the whole batch, and by how much."""
    try:
        found = check_accumulation(workload, recipe, seed=seed, device=device)
    except ProbeError:
        return  # what cannot be compared will be told by the training itself
    if found.warning is not None:
        warnings.warn(found.warning, stacklevel=3)


def run_to_end(
    training: Training,
    *,
    until_target: bool,
    evaluate_every: int | None,
    saver: Saver | None = None,
    resume: bool = False,
) -> Run:
    """Advances a training to its end, with evaluations and checkpoints on the way.

    Args:
        training: At its beginning.
        until_target: Stop at the first evaluation that meets the target.
        evaluate_every: Updates between evaluations, or None: once an epoch.
        saver: Keeps the checkpoints, or None.
        resume: Begin at the newest checkpoint.

    Returns:
        The finished run.
    """
    course = _Course(
        training, until_target=until_target, evaluate_every=evaluate_every, saver=saver
    )
    return course.run(resume=resume)


class _Course:
    """The way of a run from evaluation to evaluation and from checkpoint to checkpoint.

    Args:
        training: The run.
        until_target: Stop at the first evaluation that meets the target.
        evaluate_every: Updates between evaluations, or None: once an epoch.
        saver: Keeps its checkpoints, or None.
    """

    def __init__(
        self,
        training: Training,
        *,
        until_target: bool,
        evaluate_every: int | None,
        saver: Saver | None,
    ) -> None:
        self._training = training
        self._until_target = until_target
        self._every = evaluate_every
        self._saver = saver
        self._target = training.workload.parsed_target
        self._history: list[Point] = []
        self._steps_to_target: int | None = None
        self._evaluated_steps = 0

    def run(self, *, resume: bool) -> Run:
        """The whole way, or the rest of it.

        Args:
            resume: Begin at the newest checkpoint.

        Returns:
            The finished run.
        """
        training = self._training
        if resume:
            self._restore()
        for callback in training.callbacks:
            callback.on_start(training)
        try:
            with nullcontext() if self._saver is None else StopOnSignal(training):
                self._finish()
                if self._saver is not None:
                    self._saver.save(training, self._state())
                run = self._result()
                for callback in training.callbacks:
                    callback.on_end(training, run)
        finally:
            training.close()
            if training.replica is not None:
                training.replica.close()
        return run

    def _finish(self) -> None:
        """Trains to the end, or to where the run stops for another reason."""
        while not self._over():
            self._advance()
            if self._training.steps > self._evaluated_steps and self._evaluation_is_due():
                self._evaluate()
            if self._saver is not None and self._saver.due(self._training):
                self._saver.save(self._training, self._state())

    def _over(self) -> bool:
        return self._over_by_itself() or self._training.over

    def _over_by_itself(self) -> bool:
        met = self._until_target and self._steps_to_target is not None
        return met or self._training.finished

    def _advance(self) -> None:
        """To the next evaluation or checkpoint."""
        training, saver, every = self._training, self._saver, self._every
        to_step = math.inf if every is None else (training.steps // every + 1) * every
        if saver is not None:
            to_step = min(to_step, saver.next_step(training.steps))
        training.advance(
            None if math.isinf(to_step) else round(to_step) - training.steps,
            to_epoch=self._next_epoch() if every is None else None,
            deadline=math.inf if saver is None else saver.deadline,
        )

    def _next_epoch(self) -> int | None:
        training = self._training
        # A stream ends its pass wherever it likes, and stops there by itself.
        return math.floor(training.epochs) + 1 if training.feed is None else None

    def _evaluation_is_due(self) -> bool:
        training, feed = self._training, self._training.feed
        if training.diverged or training.finished or (feed is not None and feed.between_passes):
            return True
        if self._every is not None:
            return training.steps % self._every == 0
        if feed is not None:
            return False
        return training.epochs == math.floor(training.epochs)

    def _evaluate(self) -> None:
        self._evaluated_steps = self._training.steps
        point = self._training.evaluate()
        self._history.append(point)
        for callback in self._training.callbacks:
            callback.on_evaluation(self._training, point)
        if self._target is None or self._steps_to_target is not None:
            return
        value = point_value(point, self._target.quantity)
        if value is not None and self._target.reached(value):
            self._steps_to_target = point.step

    def _state(self) -> dict[str, Any]:
        history = [asdict(point) for point in self._history]
        return {"history": history, "steps_to_target": self._steps_to_target}

    def _restore(self) -> None:
        state = None if self._saver is None else self._saver.restore(self._training)
        if state is not None:
            self._history = [Point(**point) for point in state["history"]]
            self._evaluated_steps = self._history[-1].step if self._history else 0
            self._steps_to_target = state["steps_to_target"]

    def _outcome(self) -> Outcome:
        if self._training.diverged:
            return "diverged"
        return "complete" if self._over_by_itself() else "stopped"

    def _result(self) -> Run:
        """The finished run."""
        training = self._training
        last = self._history[-1] if self._history else training.evaluate()
        return Run(
            recipe=training.recipe,
            model=training.whole_model(),
            steps=training.steps,
            epochs=training.epochs,
            examples=training.examples,
            seconds=training.seconds,
            train_loss=last.train_loss,
            val_loss=last.val_loss,
            val_metric=last.val_metric,
            state=self._outcome(),
            reached_target=None if self._target is None else self._steps_to_target is not None,
            steps_to_target=self._steps_to_target,
            history=self._history,
            checkpoint=None if self._saver is None else self._saver.latest,
        )


def point_value(point: Point, quantity: str) -> float | None:
    """The quantity of a target at an evaluation point, or None if it was not evaluated."""
    if quantity == "train_loss":
        return point.train_loss
    return point.val_loss if quantity == "val_loss" else point.val_metric
