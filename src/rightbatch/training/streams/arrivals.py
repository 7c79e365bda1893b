"""Examples that arrive one after the other, cut into the windows of a training.

A stream has no order of its own to shuffle and no length: a window is full when as many examples
are there as the recipe's batch asks for at that place. No more than one window is ever held.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

import torch

from rightbatch.errors import RecipeError, RightbatchError, WorkloadError
from rightbatch.recipe import Recipe
from rightbatch.training.data.windows import Window, micro_batch_sizes
from rightbatch.training.evaluate import to_device
from rightbatch.training.model import smallest_pass
from rightbatch.training.streams.batches import Rows, as_read_by, collate_of, dtype_of, stack

if TYPE_CHECKING:
    from rightbatch.training.loop import Training

Before = Callable[[Window, list[Any]], None]
"""Called with each window before its update."""
_NO_ORDER = torch.empty(0, dtype=torch.int64)


class Feed(Protocol):
    """What gives a training its windows in place of a training set.

    Attributes:
        num_examples: Examples of a pass; infinite until one has ended.
        ended: Whether there will be no further window.
        between_passes: Whether a pass has ended and the next has not begun.
    """

    num_examples: float
    ended: bool
    between_passes: bool

    @property
    def taken(self) -> int:
        """Examples that were given to updates or left out; the place in the stream."""
        ...

    def windows_for(self, training: Training) -> Iterator[tuple[Window, list[Any]]]:
        """Windows with their micro-batches. It may stop, and go on when more has arrived."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """The place in the stream, as plain values and tensors."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes to the place of a saved one; `windows_for` was called before."""
        ...


class Arrivals:
    """Cuts examples into windows as they arrive.

    The smaller last window is trained on by the recipe's `last_batch`: `keep` and `scale-lr` make
    an update of it, `drop` leaves it out. `merge` and `pad` need the batch before it, or the first
    examples, which are gone by then. A rest that the model cannot train on (one example, and
    BatchNorm) is left out.

    Args:
        recipe: Says the batch.
        before: Called with each window before its update.

    Attributes:
        num_examples: Set by who knows it.
        taken: Examples that were given to updates or left out.
        ended: Set by who knows it.
        between_passes: Never, of examples that come by hand.
        waiting: Examples of the window that is not yet full.

    Raises:
        RecipeError: If the recipe asks for what a stream cannot give.
    """

    def __init__(self, recipe: Recipe, *, before: Before | None = None) -> None:
        _check_recipe(recipe)
        self.num_examples = math.inf
        self.taken = 0
        self.ended = False
        self.between_passes = False
        self.waiting: list[Any] = []
        self._before = before
        self._source: Iterator[Any] = iter(())
        self._rows: Rows | None = None
        self._closing = False
        self._smallest: int | None = None

    def windows_for(self, training: Training) -> Iterator[tuple[Window, list[Any]]]:
        """Windows for a training; one at a time.

        Args:
            training: The training, which says batch, model and device.

        Returns:
            An iterator that stops where examples are missing, and goes on when they are there.
        """
        self._training = training
        self._collate = collate_of(training.workload)
        self._dtype = dtype_of(training.model)
        return self

    def state_dict(self) -> dict[str, Any]:
        """The place in the stream, and the examples that wait.

        Returns:
            Plain values and tensors, where the examples are.
        """
        return {"taken": self.taken, "waiting": self.waiting}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where a saved one was.

        Args:
            state: What `state_dict` gave.
        """
        self.taken, self.waiting = state["taken"], state["waiting"]

    def read_from(self, source: Iterator[Any]) -> None:
        """Takes the next examples from here.

        Args:
            source: Examples; none is read before a window needs it.
        """
        self._source = source
        # Rows of tensors are gathered for a window at once, unless someone else makes the batch.
        self._rows = source if isinstance(source, Rows) and self._collate is stack else None

    def close(self) -> None:
        """No more will come: the next window is what waits, as the recipe treats a last batch."""
        self._closing = True

    def fill(self) -> int:
        """Reads what the window still lacks, as far as there is some.

        Returns:
            The window's batch.
        """
        batch, waiting = self._training.batch_at(self.taken), self.waiting
        if len(waiting) < batch:
            waiting.extend(itertools.islice(self._source, batch - len(waiting)))
        return batch

    @property
    def missing(self) -> int:
        """How many examples the window still lacks."""
        return self._training.batch_at(self.taken) - len(self.waiting)

    def __iter__(self) -> Iterator[tuple[Window, list[Any]]]:
        return self

    def __next__(self) -> tuple[Window, list[Any]]:
        batch, rows = self._training.batch_at(self.taken), self._rows
        if rows is not None and not self.waiting and rows.left >= batch:
            return self._cut_rows(rows, batch)
        self.fill()
        if len(self.waiting) >= batch:
            return self._cut(batch, batch)
        if not self._closing:
            raise StopIteration
        self._closing = False
        return self._cut_rest(batch)

    def _cut_rest(self, batch: int) -> tuple[Window, list[Any]]:
        size, recipe = len(self.waiting), self._training.recipe
        if size and recipe.last_batch != "drop" and size >= self._needed(self.waiting[0]):
            return self._cut(size, batch)
        self.taken += size
        self.waiting.clear()
        raise StopIteration

    def _cut(self, size: int, batch: int) -> tuple[Window, list[Any]]:
        """The next window, of examples that wait."""
        sizes = self._sizes(size, self.waiting[0])
        # Taken before anything can fail: an example that cannot be trained on is not met again.
        examples = iter(self.waiting[:size])
        del self.waiting[:size]
        self.taken += size
        parts = [list(itertools.islice(examples, part)) for part in sizes]
        return self._window(size, batch, [self._batch(part, self.taken) for part in parts])

    def _cut_rows(self, rows: Rows, batch: int) -> tuple[Window, list[Any]]:
        """The next window, of rows of tensors."""
        sizes = self._sizes(batch, rows)
        self.taken += batch
        return self._window(batch, batch, [as_read_by(self._dtype, rows.take(n)) for n in sizes])

    def _sizes(self, size: int, first: Any) -> list[int]:
        """How the passes of a window are cut."""
        micro_batch, smallest = self._training.recipe.micro_batch, self._needed(first)
        return [size] if size <= micro_batch else micro_batch_sizes(size, micro_batch, smallest)

    def _window(self, size: int, batch: int, batches: list[Any]) -> tuple[Window, list[Any]]:
        """The window that ends with what was taken last, on the device."""
        training, end = self._training, self.taken
        factor = size / batch if training.recipe.last_batch == "scale-lr" else 1.0
        window = Window(_NO_ORDER, end - size, size, 0, 0, end, batch, factor)
        batches = to_device(batches, training.device)
        if self._before is not None:
            self._before(window, batches)
        return window, batches

    def _batch(self, examples: list[Any], end: int) -> Any:
        try:
            return as_read_by(self._dtype, self._collate(examples))
        except RightbatchError:
            raise
        except Exception as error:
            raise WorkloadError(
                f"Up to example {end:,} of the stream, {len(examples):,} examples could not be "
                f"made into a batch ({type(error).__name__}: {error}). Make every example the "
                "same shape, or pass `collate`, which turns a list of examples into a batch."
            ) from error

    def _needed(self, first: Any) -> int:
        """Examples that the model needs at least in one pass; tried with the first that came."""
        if self._smallest is None:
            training = self._training
            if isinstance(first, Rows):
                first = first.peek()

            def collate(examples: list[Any]) -> Any:
                return self._batch(examples, self.taken + 1)

            alone = replace(training.workload, train_data=_Repeated(first), collate=collate)
            model, recipe = training.model, training.recipe
            self._smallest = smallest_pass(alone, model, recipe, training.device)
        return self._smallest


class _Repeated:
    """A data set that holds one example twice."""

    def __init__(self, example: Any) -> None:
        self._example = example

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> Any:
        return self._example


def _check_recipe(recipe: Recipe) -> None:
    """Refuses what a stream cannot give, before anything is trained."""
    if recipe.replicas > 1:
        raise RecipeError(
            f"The recipe has {recipe.replicas} replicas, but a stream is read by one process. "
            "Use a recipe with replicas=1."
        )
    largest = max([recipe.global_batch, *[batch for _, batch in recipe.batch_ramp]])
    if recipe.last_batch in ("merge", "pad") and largest > 1:
        raise RecipeError(
            f"last_batch is {recipe.last_batch!r}, but when a stream ends its earlier examples "
            "are gone. Use 'keep', 'drop' or 'scale-lr'."
        )
    if recipe.batch_policy == "follow-noise" and recipe.largest_batch is None:
        raise RecipeError(
            "batch_policy is 'follow-noise' without largest_batch, and a stream has no length "
            "that would bound the batch. Give largest_batch."
        )
