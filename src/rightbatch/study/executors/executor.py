"""What every executor does: it takes groups of trainings and says how they ended."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from rightbatch.study.group import Engine, Finished
from rightbatch.study.trials import TrialKey

ExecutorName = Literal["local", "ray"]


@dataclass(frozen=True, kw_only=True)
class GroupTask:
    """A group of trainings that run together.

    Attributes:
        number: No two tasks of a study have the same.
        keys: Which trainings, of one batch size.
        steps: Updates of each.
        engine: What runs them.
        step_seconds: Of one update in the training loop, or None.
        smallest: Examples that the model needs in one pass.
        watch: The weight to follow, as in `rightbatch.Watch`; None watches nothing.
    """

    number: int
    keys: tuple[TrialKey, ...]
    steps: int
    engine: Engine
    step_seconds: float | None
    smallest: int
    watch: str | None = None


@dataclass(frozen=True, kw_only=True)
class Failure:
    """What was raised, as data: it may come from another process.

    Attributes:
        kind: `usage` (what was asked for cannot be done, at no size), `memory`, or `other`.
        text: Its type and message.
    """

    kind: Literal["usage", "memory", "other"]
    text: str


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a group ended: in results, in an error, or not at all.

    Attributes:
        task: Which.
        finished: Its trainings, where they ended.
        ran_by: Which engine ran them, and why.
        failure: What was raised instead.
        lost: Or how what ran it was lost, a sentence; it may be run again.
    """

    task: GroupTask
    finished: Sequence[Finished] = ()
    ran_by: str = ""
    failure: Failure | None = None
    lost: str = ""


class Executor(Protocol):
    """Runs groups of trainings.

    Attributes:
        capacity: Groups that it runs at once.
    """

    capacity: int

    def submit(self, task: GroupTask) -> None:
        """Takes a group; it may begin at once or later."""
        ...

    @property
    def pending(self) -> int:
        """Groups that it has taken and not given back."""
        ...

    def wait(self) -> list[Outcome]:
        """Groups that ended, at least one where any is pending."""
        ...

    def close(self) -> None:
        """Ends all that runs and leaves nothing behind."""
        ...
