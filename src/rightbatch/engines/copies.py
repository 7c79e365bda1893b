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
class Watched:
    """Where the weights of every copy are, and the way of one of them; arrays of shape (copies,).

    All are NaN for copies that diverged.

    Attributes:
        distance: ‖w − w₀‖ over all parameters.
        relative_distance: ‖w − w₀‖/‖w₀‖.
        weight: The value of the watched weight.
        roughness: Of its path over the updates so far (`path_roughness`); NaN where it never moved.
    """

    distance: FloatArray
    relative_distance: FloatArray
    weight: FloatArray
    roughness: FloatArray


@dataclass(frozen=True, kw_only=True, eq=False)
class CopiesEvaluation:
    """One evaluation of every copy; arrays of shape (copies,).

    Attributes:
        train_loss: Mean loss of the updates since the last evaluation; NaN if there were none.
        val_loss: Validation loss, or None without a validation set.
        val_metric: Validation metric, or None without one.
        diverged: Copies whose loss became NaN, infinite or exploded. Their losses and metrics
            are NaN: an engine does not promise where a run that left the numbers ends up.
        watched: Where the weights are, where they are watched.
    """

    train_loss: FloatArray
    val_loss: FloatArray | None
    val_metric: FloatArray | None
    diverged: BoolArray
    watched: Watched | None = None


class Copies(Protocol):
    """A group of trainings that share workload and global batch.

    Attributes:
        engine: Which engine runs them.
        reason: Why this one, a sentence.
        learning_rates: Shape (copies,).
        seeds: Shape (copies,).
        steps: Updates asked of each copy so far. A copy that diverged does no more.
        watching: Name of the watched weight, such as `0.weight[0,0]`; None where none is.
    """

    engine: EngineName
    reason: str
    learning_rates: FloatArray
    seeds: IntArray
    steps: int
    watching: str | None

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


def make_watched(
    *,
    distance: FloatArray,
    initial_norm: FloatArray,
    weight: FloatArray,
    roughness: FloatArray,
    diverged: BoolArray,
) -> Watched:
    """What an engine saw of the weights, with NaN for the copies that diverged.

    Args:
        distance: ‖w − w₀‖, shape (copies,).
        initial_norm: ‖w₀‖, likewise.
        weight: The watched weight, likewise.
        roughness: Of its path, likewise.
        diverged: Which copies diverged, likewise.

    Returns:
        The record; a distance from weights that are all 0 is relative to nothing, and NaN.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        relative = np.where(initial_norm > 0, distance / initial_norm, np.nan)

    def kept(values: FloatArray) -> FloatArray:
        return np.where(diverged, np.nan, values)

    return Watched(
        distance=kept(distance),
        relative_distance=kept(relative),
        weight=kept(weight),
        roughness=kept(roughness),
    )


def without_diverged(values: FloatArray | None, diverged: BoolArray) -> FloatArray | None:
    """The values with NaN for the copies that diverged."""
    return None if values is None else np.where(diverged, np.nan, values)
