"""Every exception that rightbatch raises on purpose.

RightbatchError
├── WorkloadError            the workload is wrong (exit 2)
├── RecipeError              the recipe is wrong or cannot be met (exit 2)
├── UsageError               an argument is wrong (exit 2)
│   └── MissingExtraError    an optional dependency is not installed
├── NoBatchFitsError         not even one example fits in memory (exit 3)
├── DivergedError            the loss became NaN, infinite or exploded (exit 4)
├── CorruptStateError        a file is not what was written (exit 5)
├── ProbeError               a measurement failed for another reason than memory (exit 1)
└── ReplicaError             a data-parallel worker failed; all of them raise it (exit 1)
    ├── ReplicaVanishedError     it left no word: killed, or cut off
    └── ReplicaOutOfMemoryError  it ran out of memory (exit 3)

Each message says the fact, the value received, and what to do.
"""

from __future__ import annotations

from typing import ClassVar


class RightbatchError(Exception):
    """Base of all errors raised on purpose; `exit_code` is what the command line returns."""

    exit_code: ClassVar[int] = 1


class WorkloadError(RightbatchError, ValueError):
    """The workload cannot be trained as it was described."""

    exit_code: ClassVar[int] = 2


class RecipeError(RightbatchError, ValueError):
    """The recipe contradicts itself or the workload."""

    exit_code: ClassVar[int] = 2


class UsageError(RightbatchError, ValueError):
    """An argument is wrong."""

    exit_code: ClassVar[int] = 2


class MissingExtraError(UsageError, ImportError):
    """An optional dependency is not installed."""

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(
            f"{package} is not installed. Run: pip install 'rightbatch[{extra}]'",
        )


class NoBatchFitsError(RightbatchError):
    """Not even one example fits in memory."""

    exit_code: ClassVar[int] = 3


class DivergedError(RightbatchError):
    """Training left the numbers: the loss is NaN, infinite or exploding."""

    exit_code: ClassVar[int] = 4


class CorruptStateError(RightbatchError):
    """A file on disk is not what was written there."""

    exit_code: ClassVar[int] = 5


class ProbeError(RightbatchError):
    """A measurement could not be made, for another reason than memory."""


class ReplicaError(RightbatchError):
    """A data-parallel worker failed. Every worker raises this, whichever of them it was."""


class ReplicaVanishedError(ReplicaError):
    """A data-parallel worker left without a word: it was killed, or its connection was cut."""


class ReplicaOutOfMemoryError(ReplicaError, MemoryError):
    """A data-parallel worker ran out of memory."""

    exit_code: ClassVar[int] = 3
