"""What a pass over a workload's training data reads, example by example."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol, cast, runtime_checkable

from torch.utils.data import DataLoader, IterableDataset

from rightbatch.errors import WorkloadError
from rightbatch.training.streams.batches import rows_of
from rightbatch.workload import Workload
from rightbatch.workload.data import is_stream


@runtime_checkable
class Stateful(Protocol):
    """A stream, or its iterator, that knows its place and can go there.

    As datasets of `datasets`, loaders of `torchdata` and others do.
    """

    def state_dict(self) -> dict[str, Any]:
        """The place, in plain values and tensors."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes there: of a stream, when it is iterated next."""
        ...


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


def begin_at(
    place: dict[str, Any] | None, iterable: Iterable[Any]
) -> tuple[Iterator[Any], Stateful | None]:
    """Begins a pass, where a stream's own state says.

    Args:
        place: What its `state_dict` gave; None: at the beginning.
        iterable: The stream.

    Returns:
        An iterator over its examples, and what knows its place: the stream or the iterator.

    Raises:
        WorkloadError: If there is a place, and nothing that can go there.
    """
    if isinstance(iterable, Stateful):
        if place is not None:
            iterable.load_state_dict(place)
        return iter(iterable), iterable
    iterator = iter(iterable)
    if isinstance(iterator, Stateful):
        if place is not None:
            iterator.load_state_dict(place)
        return iterator, iterator
    if place is not None:
        raise WorkloadError(
            f"The run cannot go on: its stream gave its own state when it was saved, and now it is "
            f"a {type(iterable).__name__} without load_state_dict. Give the stream it was begun "
            "with."
        )
    return iterator, None


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
