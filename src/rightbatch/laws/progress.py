"""Steps, examples and epochs of a run at one batch, whose last update of an epoch is smaller."""

from __future__ import annotations

import math
from collections.abc import Iterator


def steps_per_epoch(global_batch: int, num_examples: int, smallest: int = 1) -> int:
    """Updates of one pass over the training set: ⌈N/B⌉, or ⌊N/B⌋ where the rest is too small.

    Args:
        global_batch: B, at most N.
        num_examples: N.
        smallest: Examples that the model needs in one pass; a smaller rest joins the update before.

    Returns:
        The updates.

    Example:
        >>> steps_per_epoch(40, 100), steps_per_epoch(33, 100, smallest=2)
        (3, 3)
    """
    full, rest = divmod(num_examples, global_batch)
    return max(1, full + (rest >= smallest if rest else 0))


def examples_after(steps: float, global_batch: int, num_examples: int, smallest: int = 1) -> float:
    """Training examples in so many updates.

    Args:
        steps: Updates.
        global_batch: B, at most N.
        num_examples: N.
        smallest: As for `steps_per_epoch`.

    Returns:
        Examples.

    Example:
        >>> examples_after(3, 40, 100), examples_after(4, 40, 100)
        (100.0, 140.0)
    """
    epochs, rest = divmod(steps, steps_per_epoch(global_batch, num_examples, smallest))
    return float(epochs * num_examples + min(rest * global_batch, num_examples))


def steps_to_cover(examples: float, global_batch: int, num_examples: int, smallest: int = 1) -> int:
    """The fewest updates that process so many examples.

    Args:
        examples: How many, at least 0.
        global_batch: B, at most N.
        num_examples: N.
        smallest: As for `steps_per_epoch`.

    Returns:
        Updates.

    Example:
        >>> steps_to_cover(100, 40, 100), steps_to_cover(101, 40, 100), steps_to_cover(0, 40, 100)
        (3, 4, 0)
    """
    epochs, rest = divmod(examples, num_examples)
    per_epoch = steps_per_epoch(global_batch, num_examples, smallest)
    return int(epochs) * per_epoch + min(per_epoch, math.ceil(rest / global_batch))


def spaced_steps(spacing: float, limit: int | None = None) -> Iterator[int]:
    """Updates after which a run is looked at: 1, 2, 3, …, then a constant ratio apart.

    Args:
        spacing: Largest ratio of two neighbours, where they are more than one apart.
        limit: The last one. Default: none, and no end.

    Yields:
        Ascending.

    Example:
        >>> list(spaced_steps(1.12, 24))
        [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 19, 21, 23, 24]
    """
    step, last = 1, math.inf if limit is None else limit
    while step < last:
        yield step
        step = max(step + 1, math.floor(step * spacing))
    if limit is not None:
        yield limit
