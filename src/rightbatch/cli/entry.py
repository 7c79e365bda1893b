"""The entry point: runs a command and turns however it ends into an exit code.

0 ok · 1 failure · 2 usage · 3 no batch fits · 4 diverged · 5 corrupt state · 130 interrupted
(Ctrl-C) · 143 terminated.
"""

from __future__ import annotations

import atexit
import os
import signal
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, NoReturn

import typer

from rightbatch.cli.app import app
from rightbatch.errors import RightbatchError

# Typer has exchanged the click beneath it once; these are its own classes, whichever it is.
_UsageError: Any = typer.BadParameter.__mro__[1]
_ClickException: Any = _UsageError.__mro__[1]

_SIGNALS = {signal.SIGINT: 130, signal.SIGTERM: 143}


class _Interruption:
    """Which signal ended the command, if one did; both end it in the same orderly way."""

    exit_code = 0

    def receive(self, number: int, _frame: FrameType | None) -> None:
        self.exit_code = _SIGNALS[signal.Signals(number)]
        raise KeyboardInterrupt


def run_and_exit() -> NoReturn:
    """Runs the process's command and ends the process with its exit code."""
    code = main()
    if code in _SIGNALS.values():
        # Taking torch apart can last seconds; who interrupts wants the prompt. What others
        # registered for the end (temporary folders, child processes) is still done.
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                stream.flush()
        os._exit(code)
    sys.exit(code)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        arguments: What stands after `rightbatch`. Default: the process's own.

    Returns:
        The exit code.
    """
    interruption = _Interruption()
    with _signals_raise(interruption), warnings.catch_warnings():
        warnings.showwarning = _show_warning
        code = _run(arguments)
    # A command that was interrupted may still have printed what it had, and ended well.
    if interruption.exit_code and code == 0:
        _say("Interrupted; the answer is the best that was known by then.")
    return interruption.exit_code or code


def _run(arguments: Sequence[str] | None) -> int:
    try:
        result = typer.main.get_command(app)(
            args=None if arguments is None else list(arguments),
            prog_name="rightbatch",
            standalone_mode=False,
        )
        sys.stdout.flush()
    except _ClickException as error:
        error.show()
        return 2 if isinstance(error, _UsageError) else 1
    except (KeyboardInterrupt, typer.Abort):
        result = 130
    except RightbatchError as error:
        _say(str(error))
        return error.exit_code
    except OSError as error:
        _say(str(error))
        return 1
    if result == 130:  # Typer itself turns KeyboardInterrupt into this.
        _say("Interrupted.")
    return result if isinstance(result, int) else 0


def _show_warning(message: Warning | str, *_: Any) -> None:
    """A warning is a sentence for the user; where in the code it was raised is not."""
    _say(f"warning: {message}")


def _say(message: str) -> None:
    print(f"rightbatch: {message}", file=sys.stderr)  # noqa: T201


@contextmanager
def _signals_raise(interruption: _Interruption) -> Iterator[None]:
    """SIGINT and SIGTERM raise KeyboardInterrupt, so that partial results are kept by either."""
    before: dict[signal.Signals, Any] = {}
    try:
        for number in _SIGNALS:
            before[number] = signal.signal(number, interruption.receive)
    except ValueError:
        pass  # Not in the main thread: signals are someone else's there.
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
