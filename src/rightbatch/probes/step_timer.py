"""Times blocks of real steps of a throw-away model, loading apart from computing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rightbatch.device.clock import Clock
from rightbatch.recipe import Precision
from rightbatch.training import epoch_order
from rightbatch.training.evaluate import evaluate, to_device
from rightbatch.training.loop import losses_read_together
from rightbatch.training.step import optimizer_step
from rightbatch.workload import Examples, Workload

STILL_LEARNING_RATE = 1e-8
"""Small enough to keep the weights where they start: a run that diverges fills them with NaN or
denormal numbers, which are computed at another speed."""


@dataclass(frozen=True, kw_only=True)
class TimedBlock:
    """A block of equal steps, timed together.

    Attributes:
        round: The round it belongs to.
        micro_batch: Examples in each step.
        num_steps: Steps in the block.
        loader_seconds: Per step: fetching, collating and moving the batch.
        compute_seconds: Per step: forward, backward and update.
        update_seconds: Per step: the update alone.
    """

    round: int
    micro_batch: int
    num_steps: int
    loader_seconds: float
    compute_seconds: float
    update_seconds: float

    @property
    def seconds(self) -> float:
        """A whole training step: loading and computing."""
        return self.loader_seconds + self.compute_seconds


class StepTimer:
    """A model, its optimizer and a clock.

    Args:
        workload: What to train.
        device: Where.
        precision: Arithmetic of the forward pass.
        seed: Decides initial weights and data order.
        clock: Tells the time.
    """

    def __init__(
        self, workload: Workload, *, device: str, precision: Precision, seed: int, clock: Clock
    ) -> None:
        self.examples = 0
        self.clock = clock
        self._workload = workload
        self._device = device
        self._autocast = torch.bfloat16 if precision == "bfloat16" else None
        self._model = workload.build_model(seed, device)
        self._optimizer = workload.make_optimizer(self._model.parameters(), STILL_LEARNING_RATE)
        self._order = epoch_order(workload.num_examples, seed=seed, epoch=0)
        self._position = 0

    def time_block(
        self, micro_batch: int, num_steps: int, *, round_index: int = 0, warm_up: bool = False
    ) -> TimedBlock:
        """Does `num_steps` real steps of one size and times them.

        Args:
            micro_batch: Examples in each step.
            num_steps: Steps.
            round_index: Noted in the result.
            warm_up: Do one more step before, untimed. The first step after one of another size
                finds caches and allocator in a state that training at one size never sees.

        Returns:
            Seconds per step.
        """
        if warm_up:
            self._steps([self._next_batch(micro_batch)], micro_batch)
        start = self.clock.now()
        batches = [self._next_batch(micro_batch) for _ in range(num_steps)]
        loaded = self.clock.now()
        self._steps(batches, micro_batch)
        computed = self.clock.now()
        # The gradients of the last step are still there, so the update can be repeated alone.
        for _ in range(num_steps):
            self._optimizer.step()
        updated = self.clock.now()
        return TimedBlock(
            round=round_index,
            micro_batch=micro_batch,
            num_steps=num_steps,
            loader_seconds=(loaded - start) / num_steps,
            compute_seconds=(computed - loaded) / num_steps,
            update_seconds=(updated - computed) / num_steps,
        )

    def time_evaluation(self, num_examples: int) -> float:
        """Evaluates on up to `num_examples` examples.

        Args:
            num_examples: How many.

        Returns:
            Seconds per example.
        """
        source = self._workload.val_examples or self._workload.train_examples
        part = _FirstExamples(source, min(num_examples, source.num_examples))
        start = self.clock.now()
        evaluate(self._workload, self._model, part, device=self._device)
        return (self.clock.now() - start) / part.num_examples

    def _next_batch(self, micro_batch: int) -> list[Any]:
        """The window of one step, cut and fetched as the training loop does it."""
        if self._position + micro_batch > len(self._order):
            self._position = 0
        window = self._order[self._position : self._position + micro_batch]
        self._position += micro_batch
        source = self._workload.train_examples
        return [to_device(source.batch(part), self._device) for part in window.split(micro_batch)]

    def _steps(self, windows: list[list[Any]], micro_batch: int) -> None:
        unread: list[Tensor] = []
        for window in windows:
            result = optimizer_step(
                self._workload, self._model, self._optimizer, window, autocast=self._autocast
            )
            if result.loss is not None:
                unread.append(result.loss)
            # The training loop reads its losses as well, in the same groups.
            if len(unread) >= losses_read_together(self._device):
                torch.stack(unread).tolist()
                unread.clear()
        self.examples += micro_batch * len(windows)


class _FirstExamples:
    """The first examples of a set."""

    def __init__(self, source: Examples, num_examples: int) -> None:
        self._source = source
        self.num_examples = num_examples
        self.truncated = True

    def batch(self, indices: Tensor) -> Any:
        """The examples at `indices`, as the whole set gives them."""
        return self._source.batch(indices)
