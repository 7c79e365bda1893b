"""The vmapped engine: copies stacked on a leading axis and advanced by `torch.func.vmap`.

It needs no compiler and no other library than torch, and knows every operation that torch can map.
Copies whose passes would take much memory together are advanced in chunks. On a CUDA device an
update is captured as a CUDA graph where that holds, which leaves one launch an update.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from rightbatch.engines.copies import (
    BoolArray,
    CopiesEvaluation,
    EngineName,
    FloatArray,
    IntArray,
    Watched,
    make_watched,
    without_diverged,
)
from rightbatch.engines.first_steps import check_first_steps
from rightbatch.engines.optimizer_plan import read_optimizer
from rightbatch.engines.stack import Stack
from rightbatch.engines.stacked_path import WeightPlace
from rightbatch.engines.stacker import stacker_of
from rightbatch.engines.unsupported import Unsupported
from rightbatch.training.evaluate import EVALUATION_BATCH
from rightbatch.training.loop import EXPLOSION
from rightbatch.training.watching.watched_weight import find_weight, weight_name
from rightbatch.workload import Workload

MAX_CHUNK_BYTES = 256 * 2**20
"""Copies are advanced together while the results of their passes take up to this much."""
SMALL_PASS_BYTES = 16 * 2**20
"""Copies gain from being stacked while the results of one copy's pass take up to this much."""
FEWEST_COPIES = 4
"""Fewer copies gain little from being stacked."""
_STEPS_TOGETHER = 256
"""Updates after which losses are read."""


class VmappedCopies:
    """Copies that are stacked and trained at once.

    Args:
        workload: What to train.
        global_batch: Examples per update.
        learning_rates: Shape (copies,).
        seeds: Shape (copies,).
        reason: Why this engine was taken.
        device: Where.
        only_if_faster: Refuse where the plain loop is expected to be as fast.
        watch: The weight to follow, as in `rightbatch.Watch`; None watches nothing.

    Raises:
        Unsupported: If the workload cannot be mapped over copies, or the first steps disagree with
            the plain loop.
    """

    engine: EngineName = "vmapped"

    def __init__(
        self,
        workload: Workload,
        *,
        global_batch: int,
        learning_rates: FloatArray,
        seeds: IntArray,
        reason: str,
        device: str = "cpu",
        only_if_faster: bool = False,
        watch: str | None = None,
    ) -> None:
        self.learning_rates = learning_rates
        self.seeds = seeds
        self.reason = reason
        self.steps = 0
        self._workload = workload
        self._stacker = stacker_of(workload, device)
        self._batch = min(global_batch, self._stacker.data.num_examples)
        pass_bytes = self._stacker.pass_bytes(workload, self._batch)
        if only_if_faster:
            _check_gain(pass_bytes, len(seeds), device)
        model, layout = workload.build_model(0), self._stacker.layout
        self._plan = read_optimizer(workload, model, layout.trained, learning_rates)
        self.watching: str | None = None
        self._watched: WeightPlace | None = None
        if watch is not None:
            name, index = find_weight(model, watch)
            self.watching = weight_name(name, index)
            # Under the name by which a tied weight is held.
            self._watched = layout.names.get(name, name), index
        self._together = max(1, MAX_CHUNK_BYTES // max(1, pass_bytes))
        self._evaluation = self._stacker.evaluation
        self._begin()
        if self._batch not in self._stacker.verified:
            check_first_steps(self, workload, global_batch)
            self._stacker.verified.add(self._batch)
            self._begin()

    def _begin(self) -> None:
        self.steps = self._losses_since = 0
        count = len(self.seeds)
        self._first = np.full(count, np.nan)
        self._sums = np.zeros(count)
        self._diverged = np.zeros(count, dtype=np.bool_)
        self._stacks = [
            Stack(
                self._workload,
                self._stacker,
                self._plan,
                self.seeds,
                part,
                self._batch,
                self._watched,
            )
            for part in np.array_split(np.arange(count), -(-count // self._together))
        ]

    def advance(self, num_steps: int) -> None:
        """Does `num_steps` updates of every copy that has not diverged."""
        last = self.steps + num_steps
        while self.steps < last:
            count = min(_STEPS_TOGETHER, last - self.steps)
            if len(self.seeds):
                self._read([stack.advance(self.steps, count) for stack in self._stacks])
            self.steps += count
        self._losses_since += num_steps

    def _read(self, losses: list[Tensor]) -> None:
        """Adds up the losses of some updates, and sees a divergence among them."""
        read = torch.cat(losses, dim=1).double().cpu().numpy()
        if self.steps == 0:
            self._first = np.abs(read[0])
        # Not `abs(loss) > limit`, which is false of NaN; and an infinite first loss has no limit.
        sound = np.abs(read) <= EXPLOSION * np.maximum(self._first, 1e-8)
        self._diverged |= ~(sound & np.isfinite(read)).all(axis=0)
        self._sums += read.sum(axis=0)

    def wait(self) -> None:
        """Nothing to wait for: reading the losses has waited."""

    def evaluate(self) -> CopiesEvaluation:
        """Evaluates every copy on the validation set and closes the training-loss interval."""
        diverged = self._diverged.copy()
        mean = self._sums / self._losses_since if self._losses_since else self._sums * np.nan
        self._sums, self._losses_since = np.zeros(len(self.seeds)), 0
        val_loss, val_metric = self._validate()
        train_loss = without_diverged(mean, diverged)
        assert train_loss is not None
        return CopiesEvaluation(
            train_loss=train_loss,
            val_loss=without_diverged(val_loss, diverged),
            val_metric=without_diverged(val_metric, diverged),
            diverged=diverged,
            watched=self._look(diverged) if self.watching is not None else None,
        )

    def _look(self, diverged: BoolArray) -> Watched:
        looks = [stack.look() for stack in self._stacks] or [(np.zeros(0),) * 4]
        names = ("distance", "initial_norm", "weight", "roughness")
        columns = [np.concatenate(values) for values in zip(*looks, strict=True)]
        return make_watched(diverged=diverged, **dict(zip(names, columns, strict=True)))

    def _validate(self) -> tuple[FloatArray | None, FloatArray | None]:
        if self._evaluation is None:
            return None, None
        rows = min(EVALUATION_BATCH, self._evaluation.num_examples)
        together = max(1, self._together * self._batch // max(rows, self._batch))
        results = [stack.evaluate(self._evaluation, rows, together) for stack in self._stacks]
        if not results:
            nothing = np.zeros(0)
            return nothing, nothing if self._evaluation.with_metric else None
        loss, metric = (np.concatenate(values) for values in zip(*results, strict=True))
        return loss, metric if self._evaluation.with_metric else None

    def keep(self, mask: Any) -> None:
        """Retires the copies whose entry in `mask` (bool, shape (copies,)) is false."""
        kept = np.asarray(mask, dtype=np.bool_)
        self.learning_rates, self.seeds = self.learning_rates[kept], self.seeds[kept]
        self._first, self._sums = self._first[kept], self._sums[kept]
        self._diverged = self._diverged[kept]
        start, left = 0, []
        for stack in self._stacks:
            own = kept[start : start + stack.num_copies]
            start += stack.num_copies
            if own.any():
                stack.keep(own)
                left.append(stack)
        self._stacks = left

    def state_dict(self, copy_index: int) -> dict[str, Tensor]:
        """Weights and buffers of one copy (an index into the copies still held)."""
        index = range(len(self.seeds))[copy_index]
        for stack in self._stacks:
            if index < stack.num_copies:
                return stack.state_dict(index)
            index -= stack.num_copies
        raise IndexError(copy_index)  # not reached: `range` has checked it


def _check_gain(pass_bytes: int, num_copies: int, device: str) -> None:
    """Refuses what the plain loop does as fast.

    Raises:
        Unsupported: If little is gained; why.
    """
    if num_copies < FEWEST_COPIES:
        raise Unsupported(f"with fewer than {FEWEST_COPIES} copies little is gained")
    if pass_bytes > SMALL_PASS_BYTES and device == "cpu":
        raise Unsupported(
            f"a pass of one copy takes {pass_bytes / 2**20:.0f} MiB, and little is gained above "
            f"{SMALL_PASS_BYTES // 2**20}"
        )
