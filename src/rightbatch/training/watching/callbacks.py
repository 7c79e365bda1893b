"""What can watch a training: callbacks, and the records they are given."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, overload

if TYPE_CHECKING:
    from rightbatch.training.loop import Training
    from rightbatch.training.run import Run


class StepRecord(NamedTuple):
    """One update.

    Attributes:
        step: Updates done, this one included.
        epochs: Passes over the training set, this update included.
        examples: Examples processed, this update's included.
        global_batch: Examples of this update.
        learning_rate: Of the optimizer's first group.
        loss: Mean loss of the update's examples before it.
        gradient_norm: Norm of the update's gradient before clipping.
        seconds: Wall time since the update before.
    """

    step: int
    epochs: float
    examples: int
    global_batch: int
    learning_rate: float
    loss: float
    gradient_norm: float
    seconds: float


class StepRecords(Sequence[StepRecord]):
    """Some updates' records, in order; each is made when it is looked at.

    Args:
        columns: One per field of `StepRecord`, all of the same length.
    """

    def __init__(self, columns: Sequence[Sequence[Any]]) -> None:
        self.columns = columns

    def __len__(self) -> int:
        return len(self.columns[0])

    @overload
    def __getitem__(self, index: int) -> StepRecord: ...

    @overload
    def __getitem__(self, index: slice) -> StepRecords: ...

    def __getitem__(self, index: int | slice) -> StepRecord | StepRecords:
        if isinstance(index, slice):
            return StepRecords([column[index] for column in self.columns])
        return StepRecord(*[column[index] for column in self.columns])

    def __iter__(self) -> Iterator[StepRecord]:
        return map(StepRecord._make, zip(*self.columns, strict=True))


@dataclass(frozen=True, kw_only=True)
class Point:
    """One evaluation during a run.

    Attributes:
        step: Updates done.
        examples: Training examples processed.
        train_loss: Mean loss of the updates since the last evaluation.
        val_loss: Validation loss, or None without a validation set.
        val_metric: Validation metric, or None without one.
        epochs: Passes over the training set.
        seconds: Wall time of the run's updates so far. It differs from run to run, so that it
            does not count in comparisons.
    """

    step: int
    examples: int
    train_loss: float
    val_loss: float | None
    val_metric: float | None
    epochs: float = 0.0
    seconds: float = field(default=0.0, compare=False)


class Callback(Protocol):
    """Watches a training. Inherit from it and define what is of interest; the rest does nothing.

    A callback may read the training, and set `training.stop_requested`. It is called on the
    training's own thread, so what it raises ends the training.

    Attributes:
        needs_gradient_norm: Whether it reads the gradient's norm. Where no callback does, it is
            not measured, and is NaN in the records: it is most of what watching costs.
    """

    needs_gradient_norm: bool = True

    def on_start(self, training: Training) -> None:
        """Before the first update of this process."""

    def on_step(self, training: Training) -> None:
        """After each update. Keep it short; on a GPU, reading a value waits for the device."""

    def on_records(self, training: Training, records: StepRecords) -> None:
        """Some updates' records, in order: several at a time, since reading losses takes time."""

    def on_evaluation(self, training: Training, point: Point) -> None:
        """After each evaluation."""

    def on_end(self, training: Training, run: Run) -> None:
        """After the last update, however the run ended."""


def watches_steps(callback: Callback) -> bool:
    """Whether a callback does something after each update."""
    return type(callback).on_step is not Callback.on_step


def reads_norms(callback: Callback) -> bool:
    """Whether a callback is given records, and reads the gradient's norm in them."""
    given_records = type(callback).on_records is not Callback.on_records
    return given_records and callback.needs_gradient_norm
