"""Which trainings a comparison of sharpness needs, and where on their way they are measured."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from rightbatch.study.sharpness.records import Matched, Rate


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One batch size at one learning rate, and after which updates it is measured.

    Attributes:
        batch_size: Examples per update.
        learning_rate: Learning rate.
        stops: Updates, ascending.
    """

    batch_size: int
    learning_rate: float
    stops: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Course:
    """What all trainings share, and how long each setting is.

    Attributes:
        fixed: The learning rate of all in the settings at a fixed rate.
        tuned: The own rate of each batch size.
        epochs: Passes of the settings at matched epochs.
        steps: Updates of the settings at matched steps.
        steps_of_epochs: Updates of each size in so many epochs.
    """

    fixed: float
    tuned: dict[int, float]
    epochs: int
    steps: int
    steps_of_epochs: dict[int, int]

    def rate(self, rate: Rate, size: int) -> float:
        """The learning rate of a size in a setting."""
        return self.fixed if rate == "fixed" else self.tuned[size]

    def stop(self, matched: Matched, size: int) -> int:
        """The updates of a size in a setting."""
        return self.steps if matched == "steps" else self.steps_of_epochs[size]

    def settings(self) -> Iterator[tuple[Matched, Rate]]:
        """What is held the same, and at which rates."""
        kinds: tuple[tuple[Matched, Rate], ...] = (
            ("epochs", "fixed"),
            ("epochs", "tuned"),
            ("steps", "fixed"),
            ("steps", "tuned"),
        )
        yield from kinds

    def arms(self) -> list[Arm]:
        """Every training that is needed, once, whatever number of settings it serves."""
        stops: dict[tuple[int, float], set[int]] = {}
        for matched, rate in self.settings():
            for size in self.tuned:
                stops.setdefault((size, self.rate(rate, size)), set()).add(self.stop(matched, size))
        return [
            Arm(batch_size=size, learning_rate=rate, stops=tuple(sorted(own)))
            for (size, rate), own in sorted(stops.items())
        ]
