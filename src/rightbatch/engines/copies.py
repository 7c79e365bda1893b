"""The interface that both engines share: a group of trainings that are advanced together.

The copies of a group share the workload and the global batch; they differ in learning rate and
seed. What a copy does is what `rightbatch.training.Training` does with the unsplit recipe
(micro-batch = global batch, float32, no warm-up): same initial weights, same data order, same
smaller last batch of an epoch, same rule for divergence.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
BoolArray = NDArray[np.bool_]
EngineName = Literal["compiled", "vmapped", "loop"]


@dataclass(frozen=True, kw_only=True, eq=False)
class CopiesEvaluation:
    """One evaluation of every copy; arrays of shape (copies,).

    Attributes:
        train_loss: Mean loss of the updates since the last evaluation; NaN if there were none.
        val_loss: Validation loss, or None without a validation set.
        val_metric: Validation metric, or None without one.
        diverged: Copies whose loss became NaN, infinite or exploded. Their losses and metrics
            are NaN: an engine does not promise where a run that left the numbers ends up.
    """

    train_loss: FloatArray
    val_loss: FloatArray | None
    val_metric: FloatArray | None
    diverged: BoolArray


class Copies(Protocol):
    """A group of trainings that share workload and global batch.

    Attributes:
        engine: Which engine runs them.
        reason: Why this one, a sentence.
        learning_rates: Shape (copies,).
        seeds: Shape (copies,).
        steps: Updates asked of each copy so far. A copy that diverged does no more.
    """

    engine: EngineName
    reason: str
    learning_rates: FloatArray
    seeds: IntArray
    steps: int

    def advance(self, num_steps: int) -> None:
        """Does `num_steps` updates of every copy that has not diverged."""
        ...

    def wait(self) -> None:
        """Returns when the updates that were asked for are done: `advance` may return before."""
        ...

    def evaluate(self) -> CopiesEvaluation:
        """Evaluates every copy on the validation set and closes the training-loss interval."""
        ...

    def keep(self, mask: Any) -> None:
        """Retires the copies whose entry in `mask` (bool, shape (copies,)) is false."""
        ...

    def state_dict(self, copy_index: int) -> dict[str, Tensor]:
        """Weights and buffers of one copy (an index into the copies still held)."""
        ...


def without_diverged(values: FloatArray | None, diverged: BoolArray) -> FloatArray | None:
    """The values with NaN for the copies that diverged."""
    return None if values is None else np.where(diverged, np.nan, values)
