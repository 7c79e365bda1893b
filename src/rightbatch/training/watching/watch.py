"""`Watch`: collects what happens in a training: records, paths of weights, distances, curves."""

from __future__ import annotations

import itertools
import math
import warnings
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rightbatch.errors import UsageError
from rightbatch.laws.path import path_roughness
from rightbatch.training.watching.callbacks import Callback, Point, StepRecord, StepRecords
from rightbatch.training.watching.distance import distance_from, initial_weights
from rightbatch.training.watching.watched_weight import WatchedWeight

if TYPE_CHECKING:
    from rightbatch.training.loop import Training

Axis = Literal["epochs", "steps", "examples", "seconds"]
Array = NDArray[np.float64]

_AXES = ("epochs", "steps", "examples", "seconds")
_OF_STEPS = ("loss", "gradient_norm", "learning_rate", "global_batch")
_OF_EVALUATIONS = ("train_loss", "val_loss", "val_metric")
_FEWEST_KEPT = 16
_GATHERED = 32
"""Groups of records that are put into columns together."""
_SECONDS = StepRecord._fields.index("seconds")


@dataclass(frozen=True, kw_only=True)
class Distance:
    """How far the weights are from the initial ones.

    Attributes:
        step: Updates done.
        epochs: Passes over the training set.
        examples: Examples processed.
        seconds: Wall time of the updates so far.
        value: ‖w − w₀‖ over all parameters.
    """

    step: int
    epochs: float
    examples: int
    seconds: float
    value: float


class Watch(Callback):
    """Collects what one run does, to be looked at during the run or afterwards.

    Args:
        weights: Entries of parameters whose paths are kept, such as `0.weight[3,1]`, with names as
            in `named_parameters`; `first` is the first weight of the first layer.
        distance: Whether the distance from the initial weights is measured, at each evaluation. A
            copy of the initial weights is kept for it.
        distance_every: Measure it every so many updates as well.
        keep: Updates whose records and weights are kept, about: beyond it every second one is let
            go, then every second of the rest, and so on. Default: all, at 72 bytes an update and 8
            for each weight.

    Raises:
        UsageError: If a number is out of range.

    Example:
        >>> import rightbatch
        >>> watch = Watch(weights=["0.weight[2,0]", "0.bias[2]"])
        >>> recipe = rightbatch.Recipe(global_batch=100, learning_rate=0.1)
        >>> max3 = rightbatch.load_workload("max3")
        >>> run = rightbatch.train(max3, recipe, epochs=2, callbacks=[watch])
        >>> len(watch.records), watch.paths["0.bias[2]"].shape
        (20, (21,))
        >>> epochs, val_loss = watch.curve("val_loss", against="epochs")
        >>> epochs
        array([1., 2.])
    """

    def __init__(
        self,
        weights: Iterable[str] = (),
        *,
        distance: bool = True,
        distance_every: int | None = None,
        keep: int | None = None,
    ) -> None:
        if distance_every is not None and distance_every < 1:
            raise UsageError(f"distance_every is {distance_every}. Give 1 or more updates.")
        if keep is not None and keep < _FEWEST_KEPT:
            raise UsageError(f"keep is {keep}. Give {_FEWEST_KEPT} or more updates, or None.")
        self._asked = (weights,) if isinstance(weights, str) else tuple(weights)
        self._wants_distance = distance or distance_every is not None
        self._every = distance_every
        self._keep = keep
        self._weights: list[WatchedWeight] = []
        self._initial: list[Tensor] = []
        self._distances: list[Distance] = []
        self._unread: list[tuple[tuple[int, float, int, float], Tensor]] = []
        self._points: list[Point] = []
        self._warnings: list[str] = []
        # By column, and not as a list of records: a fifth of the memory, nothing for the collector.
        self._columns = [array("d") for _ in (*StepRecord._fields, "elapsed")]
        self._paths: list[array[float]] = []
        self._fresh: list[Sequence[Sequence[float]]] = []
        self._seen, self._stride = 0, 1
        self._elapsed = 0.0
        self._start: tuple[float, float, float, float] | None = None

    # -------------------------------------------------------------------------------- collecting

    def on_start(self, training: Training) -> None:
        """Finds the weights, and notes where they begin.

        Args:
            training: The run, before its first update here.

        Raises:
            UsageError: If a weight does not exist, or this has watched a run before.
        """
        if self._start is not None:
            raise UsageError("This Watch has watched a run already. Make one for each run.")
        self._start = (training.epochs, training.steps, training.examples, training.seconds)
        self._elapsed = training.seconds
        self._weights = [WatchedWeight(training.model, n, training.epochs) for n in self._asked]
        self._paths = [array("d") for _ in self._weights]
        if self._wants_distance:
            self._initial = initial_weights(training)
            self._measure_distance(training)

    def on_step(self, training: Training) -> None:
        """Notes the weights after an update."""
        for weight in self._weights:
            weight.look()
        if self._every is not None and training.steps % self._every == 0:
            self._measure_distance(training)

    def on_records(self, training: Training, records: StepRecords) -> None:
        """Keeps some updates' records, and what was noted after each of them."""
        if self._start is None:
            raise UsageError("This Watch was not told of the start. Call on_start(training) first.")
        self._fresh.append(records.columns)
        for weight in self._weights:
            self._warn(weight.judge(training.epochs, training.optimizer))
        if len(self._fresh) >= _GATHERED:
            self._gather()

    def _gather(self) -> None:
        """Puts what came since the last time into the columns: many updates at once cost less."""
        fresh, self._fresh = self._fresh, []
        columns = [list(itertools.chain(*parts)) for parts in zip(*fresh, strict=True)]
        if not columns:
            return
        first = -(self._seen + 1) % self._stride
        self._seen += len(columns[0])
        _, *elapsed = itertools.accumulate(columns[_SECONDS], initial=self._elapsed)
        self._elapsed = elapsed[-1]
        for kept, values in zip(self._columns, [*columns, elapsed], strict=True):
            kept.extend(values[first :: self._stride])
        for weight, path in zip(self._weights, self._paths, strict=True):
            path.extend(weight.take()[first :: self._stride])
        while self._keep is not None and len(self._columns[0]) > self._keep:
            self._thin()
        self._read_distances()

    def on_evaluation(self, training: Training, point: Point) -> None:
        """Keeps an evaluation, and measures the distance there."""
        self._points.append(point)
        if self._wants_distance:
            self._measure_distance(training)

    def _thin(self) -> None:
        # What is kept are the updates whose number is a multiple of the stride.
        self._stride *= 2
        self._columns = [column[1::2] for column in self._columns]
        self._paths = [path[1::2] for path in self._paths]

    def _warn(self, text: str | None) -> None:
        if text is not None:
            self._warnings.append(text)
            warnings.warn(text, stacklevel=2)

    def _measure_distance(self, training: Training) -> None:
        here = (training.steps, training.epochs, training.examples, training.seconds)
        measured = [position[0] for position, _ in self._unread[-1:]]
        measured += [distance.step for distance in self._distances[-1:]]
        if training.steps not in measured:
            self._unread.append((here, distance_from(self._initial, training.model)))

    def _read_distances(self) -> None:
        """Fetches the distances; not in the step, since on a GPU that waits."""
        unread, self._unread = self._unread, []
        values = torch.stack([value for _, value in unread]).tolist() if unread else []
        for (step, epochs, examples, seconds), value in zip(
            [position for position, _ in unread], values, strict=True
        ):
            self._distances.append(
                Distance(step=step, epochs=epochs, examples=examples, seconds=seconds, value=value)
            )

    # ------------------------------------------------------------------------------------ reading

    @property
    def records(self) -> tuple[StepRecord, ...]:
        """The kept records, oldest first."""
        self._gather()
        rows = zip(*self._columns[:-1], strict=True)
        return tuple(
            StepRecord(int(step), epochs, int(examples), int(size), rate, loss, norm, seconds)
            for step, epochs, examples, size, rate, loss, norm, seconds in rows
        )

    @property
    def evaluations(self) -> tuple[Point, ...]:
        """The evaluations, oldest first."""
        return tuple(self._points)

    @property
    def distances(self) -> tuple[Distance, ...]:
        """The measured distances from the initial weights, oldest first."""
        self._read_distances()
        return tuple(self._distances)

    @property
    def warnings(self) -> tuple[str, ...]:
        """What there was to warn of."""
        return tuple(self._warnings)

    @property
    def weights(self) -> Mapping[str, str]:
        """Per weight as asked for, its name in the model."""
        return {weight.asked: weight.name for weight in self._weights}

    @property
    def paths(self) -> Mapping[str, Array]:
        """Per weight as asked for, its value at the start and after each kept update."""
        self._gather()
        return {
            weight.asked: _frozen([weight.initial, *path])
            for weight, path in zip(self._weights, self._paths, strict=True)
        }

    def roughness(self, weight: str) -> float:
        """How jagged the path of a weight was (see `rightbatch.laws.path`).

        Args:
            weight: As it was asked for.

        Returns:
            At least 1; NaN where it did not move.
        """
        _, path = self.curve(weight)
        return path_roughness(path) if len(path) > 1 else math.nan

    def curve(self, quantity: str = "val_loss", against: Axis = "epochs") -> tuple[Array, Array]:
        """One quantity over the run.

        Args:
            quantity: `loss`, `gradient_norm`, `learning_rate` or `global_batch` of the updates;
                `train_loss`, `val_loss` or `val_metric` of the evaluations; `distance`; or a
                weight, as it was asked for.
            against: What it is drawn against. Seconds are those of the updates alone.

        Returns:
            Two arrays of the same length, x and y.

        Raises:
            UsageError: If there is no such quantity, or it was not watched.
        """
        if against not in _AXES:
            raise UsageError(f"against is {against!r}. Give one of: {', '.join(_AXES)}.")
        self._gather()
        self._read_distances()
        if quantity in self._asked:
            begin = self._start or (0.0, 0.0, 0.0, 0.0)
            x = [begin[_AXES.index(against)], *self._positions(against)]
            return _frozen(x), self.paths[quantity]
        if quantity in _OF_STEPS:
            column = self._columns[StepRecord._fields.index(quantity)]
            return _frozen(self._positions(against)), _frozen(column)
        field = "step" if against == "steps" else against
        if quantity == "distance" and self._wants_distance:
            values = [(getattr(d, field), d.value) for d in self._distances]
        elif quantity in _OF_EVALUATIONS:
            pairs = [(getattr(point, field), getattr(point, quantity)) for point in self._points]
            values = [(x, y) for x, y in pairs if y is not None]
        else:
            known = [*_OF_STEPS, *_OF_EVALUATIONS, *["distance"] * self._wants_distance]
            raise UsageError(
                f"{quantity!r} was not watched. There are: {', '.join([*known, *self._asked])}."
            )
        return _frozen([x for x, _ in values]), _frozen([y for _, y in values])

    def _positions(self, against: Axis) -> array[float]:
        column = {"epochs": "epochs", "steps": "step", "examples": "examples"}.get(against)
        return self._columns[-1 if column is None else StepRecord._fields.index(column)]


def _frozen(values: Iterable[float]) -> Array:
    made = np.array(values if isinstance(values, array) else list(values), dtype=np.float64)
    made.flags.writeable = False
    return made
