"""What every figure's data have in common: a finding, how to read it, and the exact numbers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from rightbatch.laws.estimate import Estimate
from rightbatch.report.units import show_interval, show_number


@dataclass(frozen=True, kw_only=True)
class Table:
    """Numbers as text.

    Attributes:
        header: One per column.
        rows: The cells.
    """

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


class FigureData(Protocol):
    """What a figure shows.

    Attributes:
        finding: Its title: what it shows here, in words.
        note: How to read it, and what it rests on.
    """

    @property
    def finding(self) -> str:
        """What it shows here."""
        ...

    @property
    def note(self) -> str:
        """How to read it."""
        ...

    def table(self) -> Table:
        """The exact numbers."""
        ...


def with_interval(estimate: Estimate) -> str:
    """A value and its interval.

    Args:
        estimate: The estimate.

    Returns:
        Such as `12 (10–14)`, or `at least 4`.

    Example:
        >>> with_interval(Estimate(value=12.0, low=10.0, high=14.0, n=5))
        '12 (10–14)'
    """
    if estimate.value is None:
        return show_interval(estimate)
    return f"{show_number(estimate.value)} ({show_interval(estimate)})"


def sizes_in_words(sizes: Iterable[int]) -> str:
    """Batch sizes in a sentence.

    Args:
        sizes: The sizes.

    Returns:
        Such as `1, 10 and 1,000`; more than five are shortened to the first and last.

    Example:
        >>> sizes_in_words([1, 10, 1000]), sizes_in_words([1, 2, 4, 8, 16, 32])
        ('1, 10 and 1,000', '1 to 32')
    """
    words: Sequence[str] = [f"{size:,}" for size in sorted(sizes)]
    if len(words) > 5:
        return f"{words[0]} to {words[-1]}"
    return " and ".join(words) if len(words) < 3 else f"{', '.join(words[:-1])} and {words[-1]}"


def overlap(first: Estimate, second: Estimate) -> bool:
    """Whether two intervals meet; an open side reaches as far as need be."""
    infinity = float("inf")
    low = [-infinity if e.low is None else e.low for e in (first, second)]
    high = [infinity if e.high is None else e.high for e in (first, second)]
    return low[0] <= high[1] and low[1] <= high[0]
