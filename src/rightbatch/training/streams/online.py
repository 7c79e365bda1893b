"""Online learning: a model that is updated as each example arrives.

Online, mini-batch and full-batch are one axis: the recipe's global batch B says after how many
examples an update is made, and B = 1 makes one for each. The learner is fed by hand; what it does
with a full window is the one training loop.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import nn

from rightbatch.errors import CorruptStateError, DivergedError, UsageError
from rightbatch.recipe import Recipe
from rightbatch.training.checkpoints.checkpoint import load_checkpoint, save_checkpoint
from rightbatch.training.checkpoints.state import (
    check_same_run,
    describe_run,
    restore_training,
    training_state,
)
from rightbatch.training.data.windows import Window
from rightbatch.training.evaluate import evaluating, has_metric, measure_batch, to_device
from rightbatch.training.loop import Training
from rightbatch.training.streams.arrivals import Arrivals
from rightbatch.training.streams.batches import (
    as_read_by,
    as_tensors,
    collate_of,
    dtype_of,
    kept,
    rows_of,
)
from rightbatch.training.streams.running_mean import RunningMean
from rightbatch.workload import Workload, open_examples
from rightbatch.workload.data import TensorExamples

FORM = "rightbatch.online/2"
"""Marks the checkpoints of learners."""


@dataclass(frozen=True, kw_only=True)
class OnlineStats:
    """Where a learner is.

    Attributes:
        examples: Examples learned from.
        steps: Updates done.
        waiting: Examples that came and wait until their update's batch is full.
        running_loss: Mean loss of the recent examples, each before it was learned; NaN at first.
        running_metric: The same of the workload's metric; None without one.
        mean_loss: Mean loss of all examples so far, each before it was learned.
        mean_metric: The same of the metric; None without one.
        diverged: Whether the loss became NaN, infinite or exploded.
        examples_per_second: Over the time spent inside updates; 0 before the first.
    """

    examples: int
    steps: int
    waiting: int
    running_loss: float
    running_metric: float | None
    mean_loss: float
    mean_metric: float | None
    diverged: bool
    examples_per_second: float


class OnlineLearner:
    """Learns from a stream, in its order and in constant memory.

    Each example is first predicted and then learned (test, then train), so that the running loss
    and metric are of examples that the model had not seen. The prediction is a forward pass of its
    own in evaluation mode. At one example an update, on small networks and one CPU thread,
    `learn_one` takes 1.2 times a hand-written update without it and 1.8 times with it.

    float64 inputs and targets become float32 where the model is float32; other types are left
    alone.

    Args:
        workload: Makes model, loss and optimizer. Its training data are never read.
        recipe: `global_batch` examples make an update.
        seed: Decides initial weights and dropout.
        device: Where.
        prequential: False leaves the prediction out: the running loss is then that of the updates'
            own forward passes (dropout on), weighted by examples, and there is no metric.
        half_life: Examples after which one counts half in the running means.

    Raises:
        RecipeError: If the recipe asks for what a stream cannot give, such as a schedule that
            needs an end.
        UsageError: If the half-life is not a positive number.

    Example:
        >>> from rightbatch import OnlineLearner, Recipe, load_workload
        >>> workload = load_workload("max3")
        >>> learner = OnlineLearner(workload, Recipe(global_batch=1, learning_rate=0.1))
        >>> for example in zip(*workload.train_data):
        ...     _ = learner.learn_one(example)
        >>> learner.stats.steps, learner.stats.running_metric > 0.5
        (1000, True)
    """

    def __init__(
        self,
        workload: Workload,
        recipe: Recipe,
        *,
        seed: int = 0,
        device: str = "cpu",
        prequential: bool = True,
        half_life: float = 1000.0,
    ) -> None:
        if not (math.isfinite(half_life) and half_life > 0):
            raise UsageError(f"half_life is {half_life}; it must be a positive number of examples.")
        self._prequential = prequential
        self._loss, self._metric = RunningMean(half_life), RunningMean(half_life)
        self._unnoted = 0
        self._arrivals = Arrivals(recipe, before=self._before_update)
        self._training = Training(workload, recipe, seed=seed, device=device, feed=self._arrivals)

    def __repr__(self) -> str:
        stats = self.stats
        shown = [
            f"{self._training.workload.name!r}",
            f"{stats.examples} examples",
            f"{stats.steps} updates",
        ]
        if math.isfinite(stats.running_loss):
            shown.append(f"running loss {stats.running_loss:.4g}")
        return f"OnlineLearner({', '.join(shown)}{', diverged' * stats.diverged})"

    @property
    def model(self) -> nn.Module:
        """The model as it is now."""
        return self._training.model

    @property
    def stats(self) -> OnlineStats:
        """Counts and running means."""
        training, judged = self._training, self._prequential and has_metric(self._training.workload)
        seconds = training.seconds
        return OnlineStats(
            examples=training.examples,
            steps=training.steps,
            waiting=len(self._arrivals.waiting),
            running_loss=self._loss.recent,
            running_metric=self._metric.recent if judged else None,
            mean_loss=self._loss.whole,
            mean_metric=self._metric.whole if judged else None,
            diverged=training.diverged,
            examples_per_second=training.examples / seconds if seconds else 0.0,
        )

    def learn_one(self, example: Any) -> Self:
        """Learns from one example; the update is made when the batch is full.

        Args:
            example: What one item of the training data is, such as `(input, target)`; tensors,
                NumPy arrays or numbers. It is copied where it has to wait.

        Returns:
            The learner.

        Raises:
            DivergedError: If the loss became NaN, infinite or exploded; the state is kept.
        """
        self._refuse_if_diverged()
        waiting = self._arrivals.waiting
        if self._arrivals.missing > 1:
            waiting.append(kept(example))
            return self
        waiting.append(as_tensors(example))
        self._advance(1)
        return self

    def partial_fit(self, inputs: Any, targets: Any = None) -> Self:
        """Learns from many examples, in order: the same, bit for bit, as `learn_one` of each.

        Args:
            inputs: With `targets`, an array or tensor whose first dimension counts examples.
                Without, a whole batch: a tensor, a tuple or dict of them, or a dataset or list of
                single examples.
            targets: An array or tensor.

        Returns:
            The learner.

        Raises:
            UsageError: If the two are not arrays.
            DivergedError: If the loss became NaN, infinite or exploded; nothing more is learned
                and the state is kept. On a GPU it is seen at most 16 updates later.
        """
        self._refuse_if_diverged()
        data = inputs if targets is None else (inputs, targets)
        examples = open_examples(data, collate_of(self._training.workload))
        if targets is not None and not isinstance(examples, TensorExamples):
            raise UsageError(
                f"partial_fit was given a {type(inputs).__name__} and a {type(targets).__name__}. "
                "Give two arrays whose first dimension counts examples, or one list of examples."
            )
        arrivals = self._arrivals
        arrivals.read_from(rows_of(examples))
        try:
            self._advance(None)
        finally:
            arrivals.read_from(iter(()))
            arrivals.waiting[:] = [kept(example) for example in arrivals.waiting]
        return self

    def flush(self) -> Self:
        """Ends the stream here: what waits is one smaller update, or left out (`last_batch`).

        Returns:
            The learner, which can go on.
        """
        self._refuse_if_diverged()
        self._arrivals.close()
        self._advance(1)
        return self

    def predict(self, inputs: Any) -> Any:
        """The model's outputs, in evaluation mode.

        Args:
            inputs: A batch of inputs, as the model takes them; tensors or NumPy arrays.

        Returns:
            What the model returns, without gradient.
        """
        training = self._training
        inputs = as_read_by(dtype_of(training.model), as_tensors(inputs))
        with torch.no_grad(), evaluating(training.model):
            return training.model(to_device(inputs, training.device))

    # ------------------------------------------------------------------------------ inside

    def _advance(self, num_steps: int | None) -> None:
        self._training.advance(num_steps)
        self._note_losses()
        self._refuse_if_diverged()

    def _refuse_if_diverged(self) -> None:
        training = self._training
        if training.diverged:
            raise DivergedError(
                f"The loss left the numbers at example {training.consumed:,} of the stream, the "
                f"last of update {training.steps:,}. Lower the learning rate, or look at the "
                "examples of that update."
            )

    def _before_update(self, window: Window, batches: list[Any]) -> None:
        """Tests on a window before it is trained on."""
        if not self._prequential:
            self._note_losses()
            self._unnoted += window.size
            return
        training = self._training
        loss, metric, count = 0.0, 0.0, 0.0
        with torch.no_grad(), evaluating(training.model):
            for batch in batches:
                sums = measure_batch(training.workload, training.model, batch)
                loss, metric, count = loss + sums.loss, metric + sums.metric, count + sums.terms
        self._loss.add(loss, count, window.size)
        self._metric.add(metric, count, window.size)

    def _note_losses(self) -> None:
        """Without a test of their own, examples are judged by the updates' losses."""
        if self._unnoted == 0:
            return
        loss = self._training.recent_train_loss()
        if math.isfinite(loss):  # else nothing was read yet, or nothing counted
            self._loss.add(loss * self._unnoted, self._unnoted, self._unnoted)
            self._unnoted = 0

    # -------------------------------------------------------------------------- checkpoints

    def save(self, folder: str | Path) -> Path:
        """Writes a checkpoint, from which `load` goes on to the same bits.

        Args:
            folder: Where the checkpoints of this learner are; the newest two are kept.

        Returns:
            The file.
        """
        training = self._training
        state = {
            "form": FORM,
            "run": describe_run(training),
            "seed": training.seed,
            "prequential": self._prequential,
            "half_life": self._loss.half_life,
            "training": training_state(training),
            "loss": self._loss.sums,
            "metric": self._metric.sums,
            "unnoted": self._unnoted,
        }
        return save_checkpoint(folder, state, steps=training.steps)

    @classmethod
    def load(
        cls, folder: str | Path, workload: Workload, recipe: Recipe, *, device: str = "cpu"
    ) -> Self:
        """A learner that goes on where a saved one was.

        Args:
            folder: Where it was saved; the newest sound checkpoint is read.
            workload: The one it was made with.
            recipe: The one it was made with.
            device: Where.

        Returns:
            The learner, with the seed and settings of the saved one.

        Raises:
            UsageError: If there is no checkpoint, or it is of another recipe, model or optimizer.
            CorruptStateError: If it cannot be read.
        """
        found = load_checkpoint(folder)
        if found is None:
            raise UsageError(
                f"{folder} holds no checkpoint. Save one first, or make a new learner."
            )
        state, path = found.state, found.path
        if not isinstance(state, dict) or state.get("form") != FORM:
            raise UsageError(f"{path} is not of an OnlineLearner. Give the folder of one.")
        try:
            learner = cls(
                workload,
                recipe,
                seed=state["seed"],
                device=device,
                prequential=state["prequential"],
                half_life=state["half_life"],
            )
            check_same_run(state["run"], learner._training, path)
            learner._restore(state)
        except (KeyError, TypeError, AttributeError, RuntimeError) as error:
            raise CorruptStateError(
                f"{path} does not hold a learner's state ({type(error).__name__}: {error})."
            ) from error
        return learner

    def _restore(self, state: dict[str, Any]) -> None:
        restore_training(self._training, state["training"])
        self._loss.sums, self._metric.sums = state["loss"], state["metric"]
        self._unnoted = state["unnoted"]
