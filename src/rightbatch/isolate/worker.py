"""The child's side: loads what it was sent once, then runs each request in a fresh fork of itself.

Started as a plain program and fed through its standard input. (multiprocessing's spawn would run
the user's main module again, and fork would inherit a process with threads, devices and history.)

A fork of a process that has imported the libraries and loaded the data, and done nothing else,
costs milliseconds, while a fresh interpreter costs seconds; and unlike a worker that serves one
request after another it has a heap without history, so that its peak memory is its own. Where
forking is not possible or not safe (no fork, or loading started threads) the parent starts a
new process for each request instead.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import pickle
import select
import signal
import sys
import threading
import time
import traceback
from typing import Any

import psutil

from rightbatch.device import memory
from rightbatch.device.out_of_memory import is_out_of_memory, may_be_starvation
from rightbatch.isolate.transport import dump, load, read_message, write_message

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_LOOK_SECONDS = 0.002
"""Between two looks at a fork's data size, of which the kernel keeps no high-water mark."""


def main() -> None:
    """Serves requests until the parent closes the pipe."""
    parent = int(sys.argv[1])
    die_with(parent)
    memory.volunteer_for_the_kernel()
    _adopt_orphans()
    requests, replies = _take_over_pipes()
    hello = read_message(requests)
    if hello is None:
        return
    settings = load(hello)
    _import_libraries(settings)
    num_threads = psutil.Process().num_threads()
    _send(replies, {"alive": True})
    shared = read_message(requests)
    if shared is None:
        return
    try:
        loaded = load(shared)
    except BaseException as error:
        _send(replies, {"reply": pickle.dumps((describe_failure(error), []))})
        return
    del shared
    can_fork = sys.platform == "linux" and psutil.Process().num_threads() <= num_threads
    _send(replies, {"alive": True, "can_fork": can_fork})
    while (request := read_message(requests)) is not None:
        if can_fork:
            _send(replies, _run_in_fork(loaded, request, settings, requests, replies))
        else:
            _die_when_closed(requests)
            _send(replies, {"reply": execute(loaded, request, settings)})
            return


def die_with(parent: int) -> None:
    """Asks the kernel to kill this process when its parent dies, however it dies."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died before we asked
            os._exit(1)


def _adopt_orphans() -> None:
    """Processes that a request leaves behind become ours, so that they can be found and ended."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)


def _take_over_pipes() -> tuple[int, int]:
    """Keeps the pipes for the protocol: user code reads nothing, and prints to the log."""
    requests, replies = os.dup(0), os.dup(1)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.dup2(2, 1)
    return requests, replies


def _import_libraries(settings: dict[str, Any]) -> None:
    import importlib

    import torch

    for name in settings["preload"]:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    torch.set_default_dtype(getattr(torch, settings["default_dtype"]))


def _send(fd: int, message: dict[str, Any]) -> None:
    write_message(fd, [pickle.dumps(message)])


def _die_when_closed(requests: int) -> None:
    """Where the kernel does not tell us of the parent's death, the pipe does."""

    def watch() -> None:
        read_message(requests)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _run_in_fork(
    loaded: Any, request: Any, settings: dict[str, Any], requests: int, replies: int
) -> dict[str, Any]:
    read_end, write_end = os.pipe()
    server = os.getpid()
    pid = os.fork()
    if pid == 0:
        die_with(server)
        for fd in (read_end, requests, replies):
            os.close(fd)
        write_message(write_end, [execute(loaded, request, settings)])
        _flush()
        os._exit(0)
    os.close(write_end)
    reply, peak_data = _receive_reply(pid, read_end, requests)
    os.close(read_end)
    outcome: dict[str, Any] = {"alive": True, "reply": reply, "peak_data_bytes": peak_data}
    if reply is None:
        _pid, status, usage = os.wait4(pid, 0)
        outcome["exit_code"] = os.waitstatus_to_exitcode(status)
        outcome["peak_resident_bytes"] = usage.ru_maxrss * 1024
    _end_descendants()
    return outcome


def _receive_reply(pid: int, read_end: int, requests: int) -> tuple[bytes | None, int]:
    """The fork's reply, or None when it died without one; and the largest data size seen."""
    ready: list[int] = []
    peak = 0
    while not ready:
        peak = max(peak, memory.data_bytes_of(pid))
        ready, _, _ = select.select([read_end, requests], [], [], _LOOK_SECONDS)
        # Children of a dead fork may still hold the pipe open, so its end is no sufficient sign.
        if not ready and os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            return None, peak
    if read_end not in ready:  # a closed request pipe: the parent has gone
        _end_descendants()
        os._exit(1)
    parts = read_message(read_end)
    return (None if parts is None else bytes(parts[0])), peak


def _end_descendants() -> None:
    """Ends and buries the fork and whatever it started (loader workers, say)."""
    while descendants := psutil.Process().children(recursive=True):
        for process in descendants:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        with contextlib.suppress(ChildProcessError):
            while True:
                os.waitpid(-1, 0)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()


def execute(loaded: Any, request: Any, settings: dict[str, Any]) -> bytes:
    """Runs one request under the memory fence.

    Args:
        loaded: What the parent sent at the start.
        request: The message with limit, function and arguments.
        settings: Device, and threads of the parent.

    Returns:
        The pickled reply.
    """
    device, limit = settings["device"], pickle.loads(request[0])["limit_bytes"]
    memory.reset_peak()
    start = time.perf_counter()
    reply: dict[str, Any]
    value: list[bytes | memoryview] = []
    try:
        with memory.memory_fence(limit, device):
            _set_threads(settings["num_threads"])
            fn, args = load(request[1:])
            result = fn(loaded, *args)
        value = dump(result)
        reply = {"verdict": "fits"}
    except BaseException as error:
        reply = describe_failure(error)
    reply["seconds"] = time.perf_counter() - start
    reply["peak_bytes"] = memory.peak_bytes(device)
    return pickle.dumps((reply, [bytes(part) for part in value]))


def _set_threads(num_threads: int) -> None:
    import torch

    if torch.get_num_threads() != num_threads:
        torch.set_num_threads(num_threads)


def describe_failure(error: BaseException) -> dict[str, Any]:
    """What the parent is told about an exception.

    Args:
        error: What was raised.

    Returns:
        Verdict, the type's name, the message and the traceback as text.
    """
    exhausted = is_out_of_memory(error)
    return {
        "verdict": "oom" if exhausted else "error",
        "perhaps_memory": exhausted or may_be_starvation(error),
        "error_type": type(error).__name__,
        "message": str(error),
        "traceback": "".join(traceback.format_exception(error)),
    }


if __name__ == "__main__":
    main()
