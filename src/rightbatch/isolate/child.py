"""In a child: whatever happens there, the user's process lives and learns what it was.

The parent's side. It starts `rightbatch.isolate.worker`, watches it, ends it when the time is up,
when it stands still or when the user presses Ctrl-C, and says in one word how each request ended.
"""

from __future__ import annotations

import pickle
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal, Self

from rightbatch.device import memory
from rightbatch.device.out_of_memory import last_words_mean_out_of_memory
from rightbatch.errors import ProbeError
from rightbatch.isolate.process import Outcome, Watch, WorkerProcess
from rightbatch.isolate.transport import Parts, dump, load

Verdict = Literal["fits", "oom", "error", "timeout", "killed"]

DEFAULT_TIMEOUT_SECONDS = 600.0
RESERVE = 0.05
"""Share of the available memory that a child without a given limit leaves alone."""
_NEARLY_ALL = 0.9
_NO_ROOM_BYTES = 32 << 20  # a thread's stack is 8 MiB, a oneDNN scratchpad may be larger


@dataclass(frozen=True, kw_only=True)
class ChildResult:
    """How a request to a child ended.

    Attributes:
        verdict: `fits` (it returned), `oom` (memory ran out), `error` (it raised anything else),
            `timeout` (too slow, or standing still) or `killed` (the process died otherwise).
        value: What the function returned, or None.
        message: What went wrong; empty when it returned.
        perhaps_memory: Whether exhausted memory is among what may have caused a failure; of an
            `error` or a `killed` only another run with more memory can tell.
        error_type: Name of the exception's class, or empty.
        traceback: The exception's traceback as text, or the end of what the child printed.
        peak_bytes: The most memory the child had, its libraries and data included; None when it
            is not known.
        limit_bytes: What it was allowed.
        seconds: How long the function ran.
    """

    verdict: Verdict
    value: Any = None
    message: str = ""
    perhaps_memory: bool = False
    error_type: str = ""
    traceback: str = ""
    peak_bytes: int | None = None
    limit_bytes: int
    seconds: float = 0.0


def run_in_child(
    fn: Callable[..., Any],
    *args: Any,
    memory_limit_bytes: int | None = None,
    timeout_seconds: float = DEFAULT_TIMEOUT_SECONDS,
    stall_seconds: float | None = None,
) -> ChildResult:
    """Runs a function in a fenced child process.

    The child is a fresh interpreter that does not run the main module again, so scripts without a
    main guard, notebooks and `python -c` work; lambdas and classes of the main module travel with
    the function.

    Args:
        fn: The function.
        *args: Its arguments.
        memory_limit_bytes: The most memory the child may have, its libraries included. Default:
            what is available now, less a reserve.
        timeout_seconds: How long it may take, besides starting.
        stall_seconds: How long it may use no processor time. Default: as long as it likes.

    Returns:
        How it ended. Nothing that the function raises is raised here.

    Example:
        >>> run_in_child(lambda a, b: a + b, 1, 2).value
        3
    """
    with Child((fn, args), memory_limit_bytes=memory_limit_bytes) as child:
        return child.run(_apply, timeout_seconds=timeout_seconds, stall_seconds=stall_seconds)


def _apply(call: tuple[Callable[..., Any], tuple[Any, ...]]) -> Any:
    fn, args = call
    return fn(*args)


class Child:
    """A child that is sent something large once and then asked about it repeatedly.

    Each request runs in a process of its own with a peak of its own (see `worker`), so neither a
    crash nor a leak reaches the next. A context manager: leaving it ends every process.

    Args:
        shared: Sent once; the first argument of every function that is run.
        memory_limit_bytes: The most memory each request may have. Default: what is available
            when it is made, less a reserve.
        device: Where limit and peak are meant: `cpu` or a CUDA device.
        preload: Modules that the child imports once, before any request, because every request
            would import them (torch's optimizers import `torch._dynamo`, which takes seconds).
    """

    def __init__(
        self,
        shared: Any = None,
        *,
        memory_limit_bytes: int | None = None,
        device: str = "cpu",
        preload: Sequence[str] = (),
    ) -> None:
        self._preload = tuple(preload)
        self.memory_limit_bytes = memory_limit_bytes
        self.device = device
        self._shared: Parts = dump(shared)
        self._process: WorkerProcess | None = None

    def run(
        self,
        fn: Callable[..., Any],
        *args: Any,
        timeout_seconds: float = DEFAULT_TIMEOUT_SECONDS,
        stall_seconds: float | None = None,
        memory_limit_bytes: int | None = None,
    ) -> ChildResult:
        """Runs `fn(shared, *args)`.

        Args:
            fn: The function.
            *args: Its arguments after the shared one.
            timeout_seconds: How long it may take, besides starting.
            stall_seconds: How long it may use no processor time.
            memory_limit_bytes: For this request, instead of the child's own limit.

        Returns:
            How it ended.
        """
        limit = memory_limit_bytes or self.memory_limit_bytes or self.available_bytes()
        fenced = memory.can_fence(self.device)
        watch = Watch(timeout_seconds, stall_seconds, limit, fenced=fenced)
        request = [
            pickle.dumps({"limit_bytes": limit if fenced else None}),
            *dump((fn, args)),
        ]
        kills = memory.num_kernel_kills()
        try:
            process, outcome = self._ready_process(watch)
            if outcome is None:
                watch.restart()
                outcome = process.ask(request, watch)
            result = _read_outcome(outcome, process, watch, kills, self.device)
        except BaseException:  # Ctrl-C above all: nothing is left running
            self.close()
            raise
        if not (process.can_fork and outcome.alive):
            self.close()
        return result

    def _ready_process(self, watch: Watch) -> tuple[WorkerProcess, Outcome | None]:
        """A process that has loaded what is shared, or how the loading failed."""
        if self._process is not None:
            return self._process, None
        process = self._process = WorkerProcess(self.device, self._preload)
        outcome = process.start(self._shared, watch)
        return process, None if process.loaded else outcome

    def available_bytes(self) -> int:
        """What a request may have when nobody gave a limit.

        Returns:
            Bytes.

        Raises:
            ProbeError: If the device cannot be asked.
        """
        if self.device == "cpu":
            return round(memory.available_bytes() * (1 - RESERVE))
        # Asked in a child: the question alone would open the device in the user's process.
        answer = run_in_child(memory.available_bytes, self.device)
        if answer.value is None:
            raise ProbeError(f"The memory of {self.device!r} cannot be read: {answer.message}")
        return round(answer.value * (1 - RESERVE))

    def close(self) -> None:
        """Ends the child and all that it started."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _read_outcome(
    outcome: Outcome, process: WorkerProcess, watch: Watch, kills: int | None, device: str
) -> ChildResult:
    if outcome.objection:
        return ChildResult(
            verdict="oom" if outcome.objection.startswith("Memory") else "timeout",
            message=outcome.objection,
            traceback=process.read_log(),
            limit_bytes=watch.limit_bytes,
            seconds=watch.elapsed_seconds,
        )
    if outcome.reply is None:
        return _hold_inquest(outcome, process, watch, kills, device)
    fields, value = pickle.loads(outcome.reply)
    if device == "cpu":
        peak = max(fields.get("peak_bytes", 0), outcome.peak_data_bytes)
        # What was returned stayed below the fence; the look from outside counts the stack too.
        fields["peak_bytes"] = min(peak, watch.limit_bytes) if fields["verdict"] == "fits" else peak
        if fields.get("perhaps_memory") and peak > watch.limit_bytes - _NO_ROOM_BYTES:
            fields["verdict"] = "oom"
    return ChildResult(
        value=load(value) if value else None, limit_bytes=watch.limit_bytes, **fields
    )


def _hold_inquest(
    outcome: Outcome, process: WorkerProcess, watch: Watch, kills: int | None, device: str
) -> ChildResult:
    """The process died without a word. Of what?"""
    code = process.exit_code() if outcome.exit_code is None else outcome.exit_code
    log = process.read_log()
    peak = max(outcome.peak_data_bytes, outcome.peak_resident_bytes)
    nearly_full = device == "cpu" and peak > _NEARLY_ALL * watch.limit_bytes
    kills_now = memory.num_kernel_kills()
    if code == -signal.SIGKILL and kills is not None and kills_now is not None:
        # The kernel keeps count of its kills; another process may have been its victim, though
        # ours volunteered.
        verdict: Verdict = "oom" if kills_now > kills else "killed"
    else:
        verdict = "oom" if nearly_full or last_words_mean_out_of_memory(log) else "killed"
    how = f"by signal {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
    return ChildResult(
        verdict=verdict,
        message=f"The child process died {how}.",
        perhaps_memory=True,
        traceback=log,
        peak_bytes=peak or None,
        limit_bytes=watch.limit_bytes,
        seconds=watch.elapsed_seconds,
    )
