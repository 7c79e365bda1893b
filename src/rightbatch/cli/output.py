"""Where text goes: the answer to standard output, progress and notes to standard error."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

_SECONDS_BETWEEN_LINES = 0.25


class Output:
    """How one command talks.

    Args:
        as_json: Print the answer as one JSON object.
        quiet: Say nothing on standard error but errors.
    """

    def __init__(self, *, as_json: bool, quiet: bool) -> None:
        self.as_json = as_json
        self.quiet = quiet

    def result(self, as_text: Callable[[], str], as_data: Callable[[], dict[str, Any]]) -> None:
        """Prints the answer in the form that was asked for.

        Args:
            as_text: Makes the text for a person.
            as_data: Makes the JSON object, with its `schema`.
        """
        if self.as_json:
            text = json.dumps(as_data(), indent=2, ensure_ascii=False, allow_nan=False)
        else:
            text = as_text().rstrip()
        # Names of workloads come from users; what the terminal cannot show must not end the run.
        encoding = sys.stdout.encoding or "utf-8"
        try:
            print(text.encode(encoding, errors="replace").decode(encoding), flush=True)  # noqa: T201
        except BrokenPipeError:
            # The reader, such as `head`, has seen enough. Python would try again at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    @contextmanager
    def progress(self, title: str) -> Iterator[Callable[..., None]]:
        """Shows what is being done: a live line on a terminal, JSON lines elsewhere.

        Args:
            title: What the whole is.

        Yields:
            `report(message, share=None)`: what is being done now and, where known, which share of
            the work is done.
        """
        if self.quiet:
            yield lambda *_: None
        elif sys.stderr.isatty():
            with _live_line(title) as report:
                yield report
        else:
            yield _json_lines()


@contextmanager
def _live_line(title: str) -> Iterator[Callable[..., None]]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=16),
        TimeElapsedColumn(),
    )
    # Rich itself obeys NO_COLOR and TERM=dumb.
    with Progress(*columns, console=Console(stderr=True), transient=True) as shown:
        task = shown.add_task(title, total=None)

        def report(message: str, share: float | None = None) -> None:
            total, completed = (None, 0.0) if share is None else (1.0, share)
            shown.update(task, description=message, total=total, completed=completed)

        yield report


def _json_lines() -> Callable[..., None]:
    """Progress for programs: at most four lines a second of one phase, its first at once."""
    start, last, phase = time.monotonic(), -1.0, ""

    def report(message: str, share: float | None = None) -> None:
        nonlocal last, phase
        now = time.monotonic() - start
        # What stands before the colon, as in "memory: how many examples fit at once".
        same, phase = message.split(":")[0] == phase, message.split(":")[0]
        if same and now - last < _SECONDS_BETWEEN_LINES:
            return
        last = now
        line: dict[str, Any] = {"progress": message, "seconds": round(now, 2)}
        if share is not None:
            line["share"] = round(share, 3)
        print(json.dumps(line, ensure_ascii=False), file=sys.stderr, flush=True)  # noqa: T201

    return report
