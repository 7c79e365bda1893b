"""Where the windows of a stream come from: passes over an iterable, shuffled as far as a buffer."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Iterator
from typing import Any, cast

from torch.utils.data import DataLoader, IterableDataset

from rightbatch.errors import RightbatchError, WorkloadError
from rightbatch.recipe import Recipe
from rightbatch.training.data.windows import Window
from rightbatch.training.loop import Training
from rightbatch.training.random_state import OwnRandomState
from rightbatch.training.rates import Horizon
from rightbatch.training.streams.arrivals import Arrivals
from rightbatch.training.streams.batches import rows_of
from rightbatch.workload import Workload
from rightbatch.workload.data import is_stream

DRAWS = 0x57EA
"""Sets the stream's draws apart from those of the initial weights and of dropout."""


class StreamFeed:
    """The windows of a training from passes over an iterable.

    At the end of a pass it stops once, so that an evaluation can be made there, and goes on with
    the next.

    Args:
        workload: Its `train_data` are read.
        recipe: Says the batch.
        passes: How many; None: as many as are asked for.
        horizon: The length that was promised; a stream that ends before it is an error.
        shuffle_buffer: Examples among which the next one is drawn.
        seed: Decides draws.

    Attributes:
        num_examples: Examples of the first pass; infinite until it has ended.
        read: Examples read from the iterable, over all passes.
        ended: Whether there will be no further window.

    Raises:
        WorkloadError: If the data can be read once and more is asked.
    """

    def __init__(
        self,
        workload: Workload,
        recipe: Recipe,
        *,
        passes: int | None,
        horizon: Horizon | None,
        shuffle_buffer: int,
        seed: int,
    ) -> None:
        self.num_examples = math.inf
        self.read = 0
        self.ended = False
        self._arrivals = Arrivals(recipe)
        self._open = source_of(workload)
        self._once = isinstance(workload.train_data, Iterator)
        if self._once and passes != 1:
            raise WorkloadError(
                f"The data are a {type(workload.train_data).__name__}, which can be read only "
                "once. Pass an object whose __iter__ starts again, or passes=1."
            )
        self._left = math.inf if passes is None else passes
        self._horizon = horizon
        self._limit = None if horizon is None else horizon.examples
        self._buffer = shuffle_buffer
        self._seed = seed
        self._random = OwnRandomState(seed + DRAWS, "cpu")
        self._pass = 0
        self._reading = False

    @property
    def taken(self) -> int:
        """Examples that were given to updates or left out."""
        return self._arrivals.taken

    def windows_for(self, training: Training) -> Iterator[tuple[Window, list[Any]]]:
        """Windows for a training; one at a time.

        Args:
            training: The training.

        Returns:
            This.
        """
        self._arrivals.windows_for(training)
        return self

    def __iter__(self) -> Iterator[tuple[Window, list[Any]]]:
        return self

    def __next__(self) -> tuple[Window, list[Any]]:
        if self.ended:
            raise StopIteration
        if not self._reading:
            self._begin_pass()
        found = self._next_window()
        if found is not None:
            return found
        self._arrivals.close()
        found = next(self._arrivals, None)
        if found is None:
            self._end_pass()
            raise StopIteration
        return found

    def _next_window(self) -> tuple[Window, list[Any]] | None:
        with self._random.swapped_in():  # what the iterable draws does not depend on dropout
            self._arrivals.fill()
        return next(self._arrivals, None)

    def _begin_pass(self) -> None:
        if self._left == 0:
            self._refuse_early_end()
        self._left -= 1
        examples = self._examples()
        if self._buffer:
            examples = shuffled(examples, self._buffer, seed=self._seed, epoch=self._pass)
        self._arrivals.read_from(examples)
        self._pass += 1
        self._reading = True

    def _end_pass(self) -> None:
        self._reading = False
        if self._limit is not None and self.read >= self._limit:
            self.ended = True
        elif math.isinf(self.num_examples):
            self.num_examples = self.read
        if self._left == 0 and self._horizon is None:
            self.ended = True

    def _examples(self) -> Iterator[Any]:
        """The examples of one pass, up to the limit; what the iterable raises is explained."""
        before = self.read
        try:
            for example in self._open():
                self.read += 1
                yield example
                if self._limit is not None and self.read >= self._limit:
                    return
        except RightbatchError:
            raise
        except Exception as error:
            raise WorkloadError(
                f"The stream raised {type(error).__name__} at example {self.read + 1:,}: {error}. "
                "Mend it there, or leave that example out in its __iter__."
            ) from error
        if self.read == before:
            raise WorkloadError(
                f"Pass {self._pass} over the stream gave no example, after {before:,} before it. "
                "Pass an object whose __iter__ starts again and yields at least one."
            )

    def _refuse_early_end(self) -> None:
        assert self._horizon is not None  # else it ended with its last pass
        steps, examples = self._horizon.steps, self._horizon.examples
        wanted = f"{steps:,} updates" if steps is not None else f"{examples:,} examples"
        raise WorkloadError(
            f"The stream ended after example {self.read:,}, before the {wanted} that were asked "
            "for. Ask for fewer, or give passes=None, which begins it again."
        )


def source_of(workload: Workload) -> Callable[[], Iterable[Any]]:
    """What begins a pass over a workload's training data, example by example.

    Args:
        workload: Its `train_data` in any form; a stream is not read here.

    Returns:
        A function that gives an iterable of single examples.
    """
    data = workload.train_data
    if isinstance(data, DataLoader) and data.batch_sampler is not None:
        dataset = cast("Any", data).dataset
        data = dataset if isinstance(dataset, IterableDataset) else data
    if is_stream(data) and not isinstance(data, DataLoader):
        return lambda: data
    examples = workload.train_examples
    return lambda: rows_of(examples)


def shuffled(examples: Iterable[Any], size: int, *, seed: int, epoch: int) -> Iterator[Any]:
    """Examples in an order shuffled as far as a buffer reaches.

    The next example is drawn from `size` of them, and the stream's next takes its place. One
    cannot come more than `size` − 1 places early; how late is a matter of chance.

    Args:
        examples: The stream.
        size: Examples held. A buffer of the whole stream gives a uniform shuffle.
        seed: Of the run.
        epoch: The pass: each has another order.

    Yields:
        Every example once.
    """
    # Of a version of its own: `random()` of a seeded Random is the same everywhere.
    draw = random.Random(f"{seed} {epoch}").random
    held: list[Any] = []
    for example in examples:
        if len(held) < size:
            held.append(example)
            continue
        place = int(draw() * size)
        yield held[place]
        held[place] = example
    while held:
        place = int(draw() * len(held))
        held[place], held[-1] = held[-1], held[place]
        yield held.pop()
