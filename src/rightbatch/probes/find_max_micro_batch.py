"""The largest micro-batch of a step that the user wrote, in the user's own process."""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, overload

from rightbatch.device.memory import release_cached_memory
from rightbatch.device.out_of_memory import is_out_of_memory
from rightbatch.errors import NoBatchFitsError
from rightbatch.laws.search import CeilingSearch, Trial, bracket

StepFunction = Callable[[int], Any]


@dataclass(frozen=True, kw_only=True)
class StepTrial:
    """One size that was run.

    Attributes:
        micro_batch: Examples.
        verdict: `fits` or `oom`.
        message: What the exhausted memory said, or empty.
        seconds: How long the step took.
    """

    micro_batch: int
    verdict: Literal["fits", "oom"]
    message: str = ""
    seconds: float


@dataclass(frozen=True, kw_only=True)
class MaxMicroBatch:
    """The largest micro-batch that ran.

    Attributes:
        micro_batch: Examples; one of the trials that fitted.
        smallest_failed: The smallest size that did not fit, or None: none was met.
        trials: Every size that was run, in order.
    """

    micro_batch: int
    smallest_failed: int | None
    trials: tuple[StepTrial, ...]


@overload
def find_max_micro_batch(
    step_fn: StepFunction, *, max_size: int, start: int = 1, exact: bool = False
) -> MaxMicroBatch: ...


@overload
def find_max_micro_batch(
    *, max_size: int, start: int = 1, exact: bool = False
) -> Callable[[StepFunction], Callable[[], MaxMicroBatch]]: ...


def find_max_micro_batch(
    step_fn: StepFunction | None = None,
    *,
    max_size: int,
    start: int = 1,
    exact: bool = False,
) -> MaxMicroBatch | Callable[[StepFunction], Callable[[], MaxMicroBatch]]:
    """Runs a step at growing sizes until memory runs out, then closes in on the largest that fits.

    The sizes double from `start`, and then halve the gap between what fitted and what did not
    until the answer is at least 90 % of what may fit (all of it with `exact`). Only exhausted
    memory ends a trial quietly; any other exception of the step goes through unchanged.

    The step runs in this process, so its side effects are the caller's: give it a throw-away model.
    `measure_memory` does the same in child processes, which survive a kill by the kernel.

    Without `step_fn` it is a decorator: calling the decorated function, with nothing, searches.

    Args:
        step_fn: `step_fn(n)` runs one real step (forward, backward, update) of n examples.
        max_size: The largest size that makes sense, such as the number of examples.
        start: The first size.
        exact: Go on until the size above the answer has failed.

    Returns:
        The answer and all trials; or, as a decorator, a function that returns it.

    Raises:
        NoBatchFitsError: If not even one example fits.

    Example:
        >>> def step(n):
        ...     if n > 90:
        ...         raise MemoryError
        >>> find_max_micro_batch(step, max_size=100, exact=True).micro_batch
        90
        >>> @find_max_micro_batch(max_size=64)
        ... def search(n): ...
        >>> search().micro_batch
        64
    """
    # No limit on trials: each is a step, not a process, and without peaks six would not be enough.
    search = CeilingSearch(max_size=max_size, start=start, exact=exact, max_trials=None)
    if step_fn is not None:
        return _search(step_fn, search)

    def decorate(step: StepFunction) -> Callable[[], MaxMicroBatch]:
        @functools.wraps(step, assigned=("__module__", "__name__", "__qualname__", "__doc__"))
        def run() -> MaxMicroBatch:
            return _search(step, search)

        del run.__wrapped__  # its signature is another one
        return run

    return decorate


def _search(step_fn: StepFunction, search: CeilingSearch) -> MaxMicroBatch:
    trials: list[StepTrial] = []
    outcomes: list[Trial] = []
    while (size := search.next_size(outcomes)) is not None:
        trials.append(_try(step_fn, size))
        release_cached_memory()
        outcomes.append(Trial(size=size, fits=trials[-1].verdict == "fits"))
    answer, failed = bracket(outcomes, search.max_size)
    if answer == 0:
        raise NoBatchFitsError(
            f"No micro-batch fits: one example runs out of memory ({trials[-1].message}). Lower "
            "the precision, turn on activation checkpointing, or use a smaller model."
        )
    return MaxMicroBatch(
        micro_batch=answer,
        smallest_failed=failed if failed <= search.max_size else None,
        trials=tuple(trials),
    )


def _try(step_fn: StepFunction, size: int) -> StepTrial:
    start = time.perf_counter()
    try:
        step_fn(size)
        _wait_for_device()
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        # The exception itself must not outlive this block: its traceback holds the tensors.
        message = (str(error) or type(error).__name__).splitlines()[0]
        seconds = time.perf_counter() - start
        return StepTrial(micro_batch=size, verdict="oom", message=message, seconds=seconds)
    return StepTrial(micro_batch=size, verdict="fits", seconds=time.perf_counter() - start)


def _wait_for_device() -> None:
    """Work that was only queued has not been run yet, and may still exhaust memory."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()
