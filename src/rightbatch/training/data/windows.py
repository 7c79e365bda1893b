"""Which examples each update sees: a pure function of (seed, place in the data, batch).

An epoch visits the training set in the order of `epoch_order`; updates take consecutive pieces of
it. The place is counted in examples, so that a run may change its batch in the middle of an epoch,
stop there, and go on there, without seeing an example twice or losing one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rightbatch.recipe import LastBatch
from rightbatch.training.data.order import epoch_order

_ORDERED_TOGETHER, _MOST_TOGETHER = 2**14, 8
"""Examples and epochs whose order is decided at once."""


class Place(NamedTuple):
    """A place in the data.

    Attributes:
        epoch: Passes over the training set begun before this one.
        offset: Examples of this pass that were consumed.
    """

    epoch: int = 0
    offset: int = 0


class Window(NamedTuple):
    """The examples of one update.

    Attributes:
        order: The epoch's order, int64, shape (N,).
        start: Position in it of the first example.
        size: Examples of the update, over all ranks.
        padding: How many of them are the epoch's first ones, seen once more.
        epoch: Of the passes over the training set, the one it belongs to.
        end: Position at which the next update begins.
        global_batch: The batch that was asked for; the last window of an epoch may be smaller.
        rate_factor: What its learning rate is multiplied by.
    """

    order: Tensor
    start: int
    size: int
    padding: int
    epoch: int
    end: int
    global_batch: int
    rate_factor: float

    @property
    def indices(self) -> Tensor:
        """Into the training set, int64, shape (size,)."""
        own = self.order[self.start : self.start + self.size - self.padding]
        return torch.cat([own, self.order[: self.padding]]) if self.padding else own


def plan_windows(
    num_examples: int,
    *,
    seed: int,
    start: Place,
    batch_at: Callable[[int], int],
    last_batch: LastBatch = "keep",
    smallest: int = 1,
) -> Iterator[Window]:
    """Endless windows from a place on.

    Args:
        num_examples: Size of the training set N.
        seed: Decides the order of each epoch.
        start: Where to begin.
        batch_at: The global batch of the update that begins after so many examples, counted over
            all epochs.
        last_batch: What becomes of the smaller last batch of an epoch.
        smallest: Examples that the model needs at least in one pass.

    Yields:
        One window an update.
    """
    N = num_examples
    epoch, offset = start
    for order in _orders_from(epoch, N, seed=seed):
        while offset < N:
            asked = batch_at(epoch * N + offset)
            batch = min(asked, N)  # a set smaller than the batch is one window
            size = take(N - offset, batch, last_batch, smallest)
            if size == 0:
                break
            first, end, padding, factor = offset, offset + size, 0, 1.0
            if size < batch:
                padding = batch - size if last_batch == "pad" else 0
                factor = size / batch if last_batch == "scale-lr" else 1.0
            offset = end
            if last_batch == "drop" and N - end < min(batch_at(epoch * N + end), N):
                offset = N  # the epoch ends here, and not with an update that takes nothing
            yield Window(order, first, size + padding, padding, epoch, offset, asked, factor)
        epoch, offset = epoch + 1, 0


def _orders_from(epoch: int, num_examples: int, *, seed: int) -> Iterator[Tensor]:
    """The orders of an epoch and of all after it."""
    # An order takes 0.1 ms between other work, and a fifth of it right after another one: where an
    # epoch has six updates of 0.4 ms, that is 4 % of them.
    together = max(1, min(_MOST_TOGETHER, _ORDERED_TOGETHER // num_examples))
    while True:
        yield from [epoch_order(num_examples, seed=seed, epoch=epoch + i) for i in range(together)]
        epoch += together


def take(remaining: int, global_batch: int, last_batch: LastBatch, smallest: int) -> int:
    """How many of an epoch's remaining examples the next update takes.

    Args:
        remaining: Examples of the epoch that are left.
        global_batch: Examples that an update takes; no more than there are in all.
        last_batch: What becomes of a smaller last batch.
        smallest: A rest smaller than this, which the model could not train on, is taken along
            (where it is neither dropped nor padded).

    Returns:
        The number; 0 where the epoch ends without using the rest.

    Example:
        >>> [take(n, 50, "keep", 1) for n in (105, 55, 5)]
        [50, 50, 5]
        >>> [take(n, 50, "merge", 1) for n in (105, 55)]
        [50, 55]
        >>> [take(n, 50, "drop", 1) for n in (105, 55, 5)]
        [50, 50, 0]
    """
    if remaining <= global_batch:
        return 0 if last_batch == "drop" and remaining < global_batch else remaining
    if last_batch in ("drop", "pad"):
        return global_batch
    rest = remaining - global_batch
    joined = rest < global_batch if last_batch == "merge" else rest < smallest
    return remaining if joined else global_batch


def micro_batch_sizes(num_examples: int, micro_batch: int, smallest: int = 1) -> list[int]:
    """How a rank cuts its share of a window into passes.

    Args:
        num_examples: Examples of the share.
        micro_batch: Examples that fit in one pass.
        smallest: Examples that the model needs at least in one pass.

    Returns:
        Sizes, none above `micro_batch`; a rest below `smallest` is evened out with the pass
        before, or joined to it where two would still be too small.

    Example:
        >>> micro_batch_sizes(100, 32), micro_batch_sizes(65, 32, smallest=2)
        ([32, 32, 32, 4], [32, 17, 16])
    """
    full, rest = divmod(num_examples, micro_batch)
    if rest == 0:
        return [micro_batch] * full
    if rest >= smallest or full == 0:
        return [micro_batch] * full + [rest]
    joined = micro_batch + rest
    last = [joined - joined // 2, joined // 2] if joined // 2 >= smallest else [joined]
    return [micro_batch] * (full - 1) + last


def share_of_rank(
    num_examples: int, rank: int, weights: Sequence[int], smallest: int = 1
) -> tuple[int, int]:
    """The part of a window that a rank trains on, in proportion to the ranks' weights.

    Args:
        num_examples: Examples of the window.
        rank: Which rank.
        weights: Of each rank: its share of a full window.
        smallest: Examples that the model needs at least in one pass; a smaller share goes to the
            rank before, and rank 0 is given what it lacks.

    Returns:
        First and end position within the window; the same for an empty share. Every example
        belongs to exactly one rank, and rank 0 has some.

    Example:
        >>> [share_of_rank(10, rank, (1, 1, 2)) for rank in range(3)]
        [(0, 3), (3, 5), (5, 10)]
    """
    total, sizes, reached, summed = sum(weights), [], 0, 0
    for weight in weights:
        summed += weight
        end = -(-num_examples * summed // total)
        sizes.append(end - reached)
        reached = end
    for later in range(len(sizes) - 1, 0, -1):
        if 0 < sizes[later] < smallest:
            sizes[later - 1] += sizes[later]
            sizes[later] = 0
    lacking = smallest - sizes[0]
    giver = next((r for r in range(1, len(sizes)) if sizes[r]), 0)
    if lacking > 0 and giver:
        given = lacking if sizes[giver] - lacking >= smallest else sizes[giver]
        sizes[0] += given
        sizes[giver] -= given
    first = sum(sizes[:rank])
    return first, first + sizes[rank]
