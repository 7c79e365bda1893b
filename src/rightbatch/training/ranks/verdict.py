"""One verdict for all ranks: when one of them fails, every one says the same.

Ranks wait for each other in every update, so that a rank that fails would leave the others waiting,
or with an error about a closed connection, which says nothing. Here the one that fails writes what
happened on a board that all can read; the others read it there and raise the same error. Where
nothing is written, the ranks call the roll: who does not answer has vanished.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Literal

import torch.distributed as dist

from rightbatch import errors
from rightbatch.device.out_of_memory import is_out_of_memory
from rightbatch.errors import (
    ReplicaError,
    ReplicaOutOfMemoryError,
    ReplicaVanishedError,
    RightbatchError,
)

GRACE_SECONDS = 1.0
"""For a rank that failed to write why, after its connections closed."""
ROLL_CALL_SECONDS = 4.0
"""For the others to answer, who may still be computing."""
_POLL_SECONDS = 0.02
_CONNECTION_WORDINGS = re.compile(
    r"gloo|Connection (closed|reset|refused)|Broken pipe|NCCL|Timed out|timed out|Socket"
)


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Why a training on several ranks ended.

    Attributes:
        kind: What happened.
        ranks: To whom.
        type_name: Of the exception.
        message: Of the exception.
        step: Updates done.
        micro_batch: Examples of a pass.
    """

    kind: Literal["out-of-memory", "error", "vanished"]
    ranks: tuple[int, ...]
    type_name: str = ""
    message: str = ""
    step: int = 0
    micro_batch: int = 0

    def as_error(self) -> RightbatchError:
        """The error that every rank raises."""
        who = _name(self.ranks)
        if self.kind == "vanished":
            return ReplicaVanishedError(
                f"{who} vanished after update {self.step} without a word: killed, or cut off. Look "
                "at its own output and at the system's log, which names processes that were killed "
                "for lack of memory; then go on from the last checkpoint."
            )
        if self.kind == "out-of-memory":
            passes = f" with micro-batches of {self.micro_batch}" if self.micro_batch else ""
            return ReplicaOutOfMemoryError(
                f"{who} ran out of memory after update {self.step}{passes} ({self.message}). Give "
                "the recipe a smaller micro_batch: more of them are summed, and the training stays "
                "the same. If that rank has less memory than others, give it a smaller share with "
                "replica_batches."
            )
        own = getattr(errors, self.type_name, None)
        if isinstance(own, type) and issubclass(own, RightbatchError):
            try:
                return own(f"{who}: {self.message}")
            except TypeError:  # it is made from something else than a message
                pass
        return ReplicaError(
            f"{who} failed after update {self.step} with {self.type_name}: {self.message}. The "
            "traceback is in its own output."
        )


def verdict_on(exception: BaseException, *, rank: int, step: int, micro_batch: int) -> Verdict:
    """What an exception of this rank means for all of them.

    Args:
        exception: What was raised here.
        rank: This rank.
        step: Updates done.
        micro_batch: Examples of a pass.

    Returns:
        The verdict.
    """
    message = " ".join(str(exception).split())[:500].rstrip(".") or "no message"
    return Verdict(
        kind="out-of-memory" if is_out_of_memory(exception) else "error",
        ranks=(rank,),
        type_name=type(exception).__name__,
        message=message if not isinstance(exception, RightbatchError) else str(exception),
        step=step,
        micro_batch=micro_batch,
    )


def is_connection_failure(exception: BaseException) -> bool:
    """Whether an exception says only that another rank cannot be reached.

    Args:
        exception: What was raised.

    Returns:
        True if the reason is to be looked for at another rank.

    Example:
        >>> is_connection_failure(RuntimeError("[gloo/tcp/pair.cc:553] Connection closed"))
        True
        >>> is_connection_failure(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
        False
    """
    if isinstance(exception, dist.DistError):
        return not is_out_of_memory(exception)
    return (
        type(exception) is RuntimeError
        and _CONNECTION_WORDINGS.search(str(exception)) is not None
        and not is_out_of_memory(exception)
    )


class Board:
    """Where ranks write what the others must know when they cannot be reached otherwise.

    Args:
        store: Keys and values that all ranks see. It may be gone, with the rank that held it.
        rank: This rank.
        size: How many there are.
    """

    def __init__(self, store: dist.Store, rank: int, size: int) -> None:
        self._store = store
        self._rank = rank
        self._size = size

    def post(self, verdict: Verdict) -> Verdict:
        """Writes a verdict, unless another rank was first.

        Args:
            verdict: This rank's.

        Returns:
            The one that counts.
        """
        try:
            written = self._store.compare_set("verdict", "", json.dumps(asdict(verdict)))
            return _read(written)
        except RuntimeError:
            return verdict

    def read(self) -> Verdict | None:
        """The verdict, if there is one."""
        try:
            return _read(self._store.get("verdict")) if self._store.check(["verdict"]) else None
        except RuntimeError:
            return None

    def wait(self, seconds: float) -> Verdict | None:
        """The verdict, if one is written within some seconds.

        Args:
            seconds: How long to wait.

        Returns:
            The verdict or None.
        """
        found: list[Verdict] = []

        def look() -> bool:
            verdict = self.read()
            if verdict is not None:
                found.append(verdict)
            return bool(found)

        _until(look, seconds)
        return found[0] if found else None

    def find_missing(self, seconds: float) -> tuple[int, ...]:
        """Calls the roll.

        Args:
            seconds: How long to wait for answers.

        Returns:
            The ranks that did not answer.
        """
        try:
            self._store.set(f"here/{self._rank}", "1")
            _until(lambda: not self._unset("here"), seconds)
            return self._unset("here")
        except RuntimeError:  # the store is gone, with the rank that held it
            return (0,)

    def part(self, seconds: float, without: tuple[int, ...] = ()) -> None:
        """Waits until all ranks know the verdict: the store may live in this process.

        Args:
            seconds: How long at most.
            without: Ranks not to wait for.
        """
        try:
            self._store.set(f"gone/{self._rank}", "1")
            _until(lambda: set(self._unset("gone")) <= {*without}, seconds)
        except RuntimeError:
            return

    def _unset(self, key: str) -> tuple[int, ...]:
        return tuple(r for r in range(self._size) if not self._store.check([f"{key}/{r}"]))


def _until(condition: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(_POLL_SECONDS)


def _read(text: bytes) -> Verdict:
    fields = json.loads(text)
    return Verdict(**{**fields, "ranks": tuple(fields["ranks"])})


def _name(ranks: tuple[int, ...]) -> str:
    if len(ranks) == 1:
        return f"Rank {ranks[0]}"
    return f"Ranks {', '.join(map(str, ranks[:-1]))} and {ranks[-1]}"
