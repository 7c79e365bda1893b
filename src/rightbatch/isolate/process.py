"""One child process seen from its parent: its pipes, its log, and the watch over it."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import psutil
import torch

from rightbatch.device import memory
from rightbatch.errors import ProbeError
from rightbatch.isolate.transport import Parts, dump, read_message, write_message

_START_SECONDS = 180.0
_POLL_SECONDS = 0.1
_LOG_TAIL_BYTES = 4000
_BOOTSTRAP = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[2]); "
    "from rightbatch.isolate.worker import main; main()"
)
# Importing these starts threads that survive a fork; the child must know them from others.
_PRELOAD = ("scipy.linalg",)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What came back after a message.

    Attributes:
        reply: The pickled reply, or None when the process that worked on it died.
        objection: Why the watch ended the waiting, or empty.
        alive: Whether the child can take the next message.
        can_fork: Whether it may serve it from a fork (said once, after loading).
        exit_code: Of the process that died; negative: by which signal. None: ask the child's own.
        peak_resident_bytes: The largest resident size of the process that died, where known.
        peak_data_bytes: The largest data size that was seen, where somebody looked.
    """

    reply: bytes | None = None
    objection: str = ""
    alive: bool = False
    can_fork: bool = False
    exit_code: int | None = None
    peak_resident_bytes: int = 0
    peak_data_bytes: int = 0


class Watch:
    """Decides when a request has taken too long, stands still or has grown too much.

    Args:
        timeout_seconds: The longest it may take.
        stall_seconds: The longest it may use no processor time, or None.
        limit_bytes: Watched from here where the platform has no fence of its own.
        fenced: Whether it has one.
    """

    def __init__(
        self,
        timeout_seconds: float,
        stall_seconds: float | None,
        limit_bytes: int,
        *,
        fenced: bool,
    ) -> None:
        self.timeout_seconds = timeout_seconds
        self.stall_seconds = stall_seconds
        self.limit_bytes = limit_bytes
        self._fenced = fenced
        self.restart()

    def restart(self) -> None:
        """Starts all clocks anew."""
        self._start = self._last_progress = time.monotonic()
        self._processor_seconds = -1.0

    @property
    def elapsed_seconds(self) -> float:
        """Since the last restart."""
        return time.monotonic() - self._start

    def objection(self, process: psutil.Process) -> str | None:
        """Why the process must be ended, or None.

        Args:
            process: The child.

        Returns:
            A sentence, or None. It starts with "Memory" when that is why.
        """
        if self.elapsed_seconds > self.timeout_seconds:
            return f"It took longer than {self.timeout_seconds:g} s."
        if not self._fenced:
            resident = _sum(_family(process), lambda p: p.memory_info().rss)
            if resident > self.limit_bytes:
                return f"Memory: it took {memory.format_bytes(resident)}."
        if self.stall_seconds is not None and self._stands_still(process, self.stall_seconds):
            return (
                f"It made no progress for {self.stall_seconds:g} s: no processor time was used. "
                "Something waits for ever, a lock or a connection perhaps."
            )
        return None

    def _stands_still(self, process: psutil.Process, stall_seconds: float) -> bool:
        # A server that looks after a fork is busy looking; the fork's progress is what counts.
        workers = _family(process)[1:] or [process]
        seconds = _sum(workers, lambda p: sum(p.cpu_times()[:2]))
        waits_for_disk = _sum(workers, lambda p: p.status() == psutil.STATUS_DISK_SLEEP)
        # A clock tick is 10 ms; a process that ends takes its seconds away, which is progress too.
        if waits_for_disk or abs(seconds - self._processor_seconds) >= 0.02:
            self._processor_seconds = seconds
            self._last_progress = time.monotonic()
        return time.monotonic() - self._last_progress > stall_seconds


def _family(process: psutil.Process) -> list[psutil.Process]:
    """A process and all that it started, if it is still there."""
    with contextlib.suppress(psutil.Error):
        return [process, *process.children(recursive=True)]
    return []


def _sum(processes: Sequence[psutil.Process], measure: Callable[[psutil.Process], float]) -> float:
    total = 0.0
    for process in processes:
        with contextlib.suppress(psutil.Error):
            total += measure(process)
    return total


class WorkerProcess:
    """A running `rightbatch.isolate.worker`.

    Args:
        device: Where its memory is fenced and measured.
        preload: Modules that it imports before anything is sent.

    Raises:
        ProbeError: If it cannot be started.
    """

    def __init__(self, device: str, preload: Sequence[str] = ()) -> None:
        self.loaded = False
        self.can_fork = False
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed by kill
        self._log_start = 0
        try:
            self._popen = subprocess.Popen(
                [sys.executable, "-c", _BOOTSTRAP, str(os.getpid()), json.dumps(sys.path)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._log,
                bufsize=0,
                # Ctrl-C reaches the parent alone, which ends the child and its children at once.
                start_new_session=True,
            )
        except OSError as error:
            self._log.close()
            raise ProbeError(
                f"A child process could not be started: {error}. Its interpreter would have been "
                f"{sys.executable!r}."
            ) from error
        self._observed = psutil.Process(self._popen.pid)
        self._outbox: queue.SimpleQueue[Parts | None] = queue.SimpleQueue()
        self._inbox: queue.SimpleQueue[Outcome] = queue.SimpleQueue()
        self._threads = [
            threading.Thread(target=self._write, daemon=True),
            threading.Thread(target=self._read, daemon=True),
        ]
        for thread in self._threads:
            thread.start()
        self._device = device
        self._preload = [*preload, *(name for name in _PRELOAD if name in sys.modules)]

    def start(self, shared: Parts, watch: Watch) -> Outcome:
        """Waits until libraries are imported and `shared` is loaded.

        Args:
            shared: What every request refers to.
            watch: Applied to the loading.

        Returns:
            How the loading ended; `loaded` and `can_fork` are set when it went well.

        Raises:
            ProbeError: If the interpreter or its imports fail.
        """
        hello = {
            "device": self._device,
            "num_threads": torch.get_num_threads(),
            "default_dtype": str(torch.get_default_dtype()).removeprefix("torch."),
            "preload": self._preload,
        }
        patience = Watch(_START_SECONDS, None, watch.limit_bytes, fenced=True)
        started = self.ask(dump(hello), patience)
        if not started.alive:
            self._log_start = 0  # It may have said why before it was asked anything.
            raise ProbeError(
                f"The child process did not start. {started.objection} Its last words: "
                f"{self.read_log() or 'none'}"
            )
        watch.restart()
        outcome = self.ask(shared, watch)
        self.loaded, self.can_fork = outcome.alive, outcome.can_fork
        return outcome

    def ask(self, message: Parts, watch: Watch) -> Outcome:
        """Sends a message and waits for what comes back.

        Args:
            message: What to send.
            watch: Ends the waiting.

        Returns:
            The reply, the watch's objection, or the news of a death.
        """
        self._log_start = os.fstat(self._log.fileno()).st_size
        self._outbox.put(message)
        while True:
            with contextlib.suppress(queue.Empty):
                return self._inbox.get(timeout=_POLL_SECONDS)
            objection = watch.objection(self._observed)
            if objection is not None:
                return Outcome(objection=objection)

    def exit_code(self) -> int:
        """How the dead process ended; negative: by which signal."""
        return self._popen.wait()

    def read_log(self) -> str:
        """The end of what was printed since the last question."""
        size = os.fstat(self._log.fileno()).st_size
        start = max(self._log_start, size - _LOG_TAIL_BYTES)
        return os.pread(self._log.fileno(), size - start, start).decode(errors="replace").strip()

    def kill(self) -> None:
        """Ends the process and all that it started, and frees what belongs to it."""
        family = _family(self._observed)
        if os.name == "posix":
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._popen.pid, signal.SIGKILL)
        self._popen.kill()
        for process in family[1:]:
            with contextlib.suppress(psutil.Error):
                process.kill()
        self._popen.wait()
        self._outbox.put(None)
        for thread in self._threads:
            thread.join(timeout=5)
        for stream in (self._popen.stdin, self._popen.stdout, self._log):
            if stream is not None:
                stream.close()

    def _write(self) -> None:
        assert self._popen.stdin is not None
        fd = self._popen.stdin.fileno()
        while (message := self._outbox.get()) is not None:
            try:
                write_message(fd, message)
            except OSError:  # the child died; the reader notices
                return

    def _read(self) -> None:
        assert self._popen.stdout is not None
        fd = self._popen.stdout.fileno()
        while (parts := read_message(fd)) is not None:
            self._inbox.put(Outcome(**pickle.loads(parts[0])))
        self._inbox.put(Outcome())  # the child died
