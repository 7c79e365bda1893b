"""Where the windows of a stream come from: passes over an iterable, and the way back into one.

A place in a stream is a pass and a count of its examples. To go there again, a stream that knows
its own place (`Stateful`) is asked to; any other is read again from the start of the pass, with the
random states from then, and what the run had taken is passed over. So is one behind a buffer that
shuffles: what was in the buffer comes from all over the pass.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rightbatch.errors import RightbatchError, WorkloadError
from rightbatch.recipe import Recipe
from rightbatch.training.data.windows import Window
from rightbatch.training.loop import Training
from rightbatch.training.random_state import OwnRandomState, global_draws, set_global_draws
from rightbatch.training.rates import Horizon
from rightbatch.training.streams.arrivals import Arrivals
from rightbatch.training.streams.fingerprint import Fingerprint
from rightbatch.training.streams.source import Stateful, begin_at, shuffled, source_of
from rightbatch.workload import Workload

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
        between_passes: Whether a pass has ended and the next has not begun.

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
        self.between_passes = False
        self._arrivals = Arrivals(recipe)
        self._open = source_of(workload)
        self._kind = type(workload.train_data).__name__
        self._once = isinstance(workload.train_data, Iterator)
        if self._once and passes != 1:
            raise WorkloadError(
                f"The data are a {self._kind}, which can be read only once. Pass an "
                "object whose __iter__ starts again, or passes=1."
            )
        self._passes = math.inf if passes is None else passes
        self._horizon = horizon
        self._limit = None if horizon is None else horizon.examples
        self._buffer = shuffle_buffer
        self._seed = seed
        self._random = OwnRandomState(seed + DRAWS, "cpu")
        self._pass = 0
        self._start: dict[str, Any] | None = None
        self._stateful: Stateful | None = None
        self._fingerprint = Fingerprint()
        self._exhausted = False

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
        if self._start is None:
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

    # ------------------------------------------------------------------------------- passes

    def _begin_pass(self) -> None:
        if self._pass == self._passes:
            self._refuse_early_end()
        self._start = {"read": self.read, "taken": self.taken, **self._draws()}
        self._pass += 1
        self.between_passes = False
        self._arrivals.read_from(self._examples())

    def _examples(self, place: dict[str, Any] | None = None) -> Iterator[Any]:
        """The examples of a pass as they are to be taken, from a stateful stream's place on."""
        with self._random.swapped_in(), self._explaining():
            iterator, self._stateful = begin_at(place, self._open())
        examples = self._read_pass(iterator)
        if not self._buffer:
            return examples
        return shuffled(examples, self._buffer, seed=self._seed, epoch=self._pass - 1)

    def _end_pass(self) -> None:
        assert self._start is not None
        before = self._start["read"]
        if self.read == before:
            raise WorkloadError(
                f"Pass {self._pass} over the stream gave no example, after {before:,} before it. "
                "Pass an object whose __iter__ starts again and yields at least one."
            )
        self._start = None
        self.between_passes = True
        if self._limit is not None and self.read >= self._limit:
            self.ended = True
        elif math.isinf(self.num_examples):
            self.num_examples = self.read
        if self._pass == self._passes and self._horizon is None:
            self.ended = True

    def _read_pass(self, iterator: Iterator[Any]) -> Iterator[Any]:
        """The examples of a pass, up to the limit."""
        self._fingerprint, before = Fingerprint(), self.read
        self._exhausted = False
        with self._explaining():
            for example in iterator:
                self._fingerprint.see(self.read - before, example)
                self.read += 1
                yield example
                if self._limit is not None and self.read >= self._limit:
                    break
        self._exhausted = True

    @contextmanager
    def _explaining(self) -> Iterator[None]:
        """What the iterable raises is told with its place."""
        try:
            yield
        except RightbatchError:
            raise
        except Exception as error:
            raise WorkloadError(
                f"The stream raised {type(error).__name__} at example {self.read + 1:,}: {error}. "
                "Mend it there, or leave that example out in its __iter__."
            ) from error

    def _refuse_early_end(self) -> None:
        assert self._horizon is not None  # else it ended with its last pass
        steps, examples = self._horizon.steps, self._horizon.examples
        wanted = f"{steps:,} updates" if steps is not None else f"{examples:,} examples"
        raise WorkloadError(
            f"The stream ended after example {self.read:,}, before the {wanted} that were asked "
            "for. Ask for fewer, or give passes=None, which begins it again."
        )

    # ------------------------------------------------------------------------- going on

    def _draws(self) -> dict[str, Any]:
        """The random states that the stream draws from next."""
        return {"torch": self._random.states, **global_draws()}

    def _set_draws(self, states: dict[str, Any]) -> None:
        self._random.states = states["torch"]
        set_global_draws(states)

    def state_dict(self) -> dict[str, Any]:
        """The place in the stream.

        Returns:
            Plain values and tensors: which pass, how it began, how much of it was taken, and a hash
            of a few of its examples; or the place as the stream itself gives it.
        """
        place = None
        if self._start is not None and self._stateful is not None and not self._buffer:
            place = self._stateful.state_dict()
        return {
            "pass": self._pass,
            "read": self.read,
            "num_examples": None if math.isinf(self.num_examples) else self.num_examples,
            "ended": self.ended,
            "between_passes": self.between_passes,
            "arrivals": self._arrivals.state_dict(),
            "start": self._start,
            "exhausted": self._exhausted,
            "fingerprint": self._fingerprint.digest,
            "place": place,
            "draws": self._draws(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes to the place of a saved one.

        Args:
            state: What `state_dict` gave.

        Raises:
            WorkloadError: If the pass cannot be read again.
        """
        self._pass, self._start = state["pass"], state["start"]
        self.num_examples = math.inf if state["num_examples"] is None else state["num_examples"]
        self.ended, self.between_passes = state["ended"], state["between_passes"]
        self._arrivals.load_state_dict(state["arrivals"])
        if state["exhausted"] and not self._buffer:
            self._exhausted = True
            self._arrivals.read_from(iter(()))
        elif self._start is not None and state["place"] is not None:
            self.read = state["read"]
            self._arrivals.read_from(self._examples(state["place"]))
        elif self._start is not None:
            self._read_again(self._start, state)
        self.read = state["read"]
        self._set_draws(state["draws"])

    def _read_again(self, start: dict[str, Any], state: dict[str, Any]) -> None:
        """Reads the pass from its start to the place."""
        self._set_draws(start)
        self.read, wanted = start["read"], self.taken - start["taken"]
        examples = self._examples()
        with self._random.swapped_in():
            found = sum(1 for _ in itertools.islice(examples, wanted))
        if found < wanted:
            raise WorkloadError(
                f"The run cannot go on: it had taken {wanted:,} examples of pass {self._pass} over "
                f"the stream, which now gives {found:,}. Give a stream that begins anew with the "
                "same examples."
            )
        if self._fingerprint.digest != state["fingerprint"]:
            self._tell_of_others(wanted)
        self._arrivals.read_from(examples)

    def _tell_of_others(self, wanted: int) -> None:
        """The examples that are passed over are not those that were learned from."""
        which = f"the first {wanted:,} examples of pass {self._pass} over the stream"
        if self._once:
            raise WorkloadError(
                f"The run cannot go on: {which} are not those it has learned from, and the data "
                f"are a {self._kind}, which is then not at its beginning. Give a new one."
            )
        warnings.warn(
            f"The stream has changed: {which} are not those the run has learned from. It goes on "
            "behind them, but not to the weights it would have had. For those, give a stream whose "
            "__iter__ gives the same examples again.",
            stacklevel=2,
        )
