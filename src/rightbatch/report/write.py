"""`write_report`: a plan or a study as one page, one text or one JSON object."""

from __future__ import annotations

import json
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from rightbatch.errors import MissingExtraError, UsageError
from rightbatch.plan.records import Plan
from rightbatch.report.contents import SCHEMA, Contents, collect_contents
from rightbatch.report.markdown import as_markdown
from rightbatch.report.source import open_source
from rightbatch.store import write_atomically
from rightbatch.study.study import Study

Format = Literal["html", "md", "json"]
FORMATS: tuple[Format, ...] = ("html", "md", "json")


def write_report(
    given: Plan | Study | str | Path,
    path: str | Path = "report.html",
    *,
    format: Format | None = None,
) -> Path:
    """Writes what a plan or a study says: the answer, why, the figures, the evidence.

    The page is one file that needs nothing else: no server, no network.

    Args:
        given: A plan, a study, a `plan.json`, or the folder of a study. Only the folder has the
            evaluations along each training, so that only there the page has their curves.
        path: Where to write.
        format: `html`; `md`: text with tables; `json`: the data of every figure. Default: by the
            ending of the path.

    Returns:
        The path.

    Raises:
        UsageError: If there is nothing to report, the format is unknown, or the path's folder does
            not exist.

    Example:
        >>> from rightbatch import load_workload, run_study, write_report
        >>> study = run_study(
        ...     load_workload("max3"), batch_sizes=["full", 50], learning_rates=[0.1, 1.0],
        ...     seeds=2, epochs=4,
        ... )
        >>> import tempfile, pathlib
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     report = write_report(study, pathlib.Path(folder) / "report.html")
        ...     "Best for max3" in report.read_text()
        True
    """
    target = Path(path)
    kind = format or _by_ending(target)
    if kind not in FORMATS:
        raise UsageError(f"The format is {kind!r}. Give {', '.join(FORMATS[:-1])} or json.")
    if not target.parent.is_dir():
        raise UsageError(
            f"There is no folder {str(target.parent)!r} for {target.name!r}. Make it first."
        )
    contents = collect_contents(open_source(given))
    write_atomically(target, render_report(contents, kind).encode("utf-8", errors="replace"))
    return target


def render_report(contents: Contents, format: Format) -> str:
    """A report as text.

    Args:
        contents: What it says.
        format: `html`, `md` or `json`.

    Returns:
        The whole file.

    Raises:
        MissingExtraError: If the page is wanted and what draws it is not installed.
    """
    if format == "json":
        data = as_data(contents)
        return json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    if format == "md":
        return as_markdown(contents)
    for package in ("plotly", "jinja2"):
        if find_spec(package) is None:
            raise MissingExtraError(package, "report")
    # Only pages need these packages.
    from rightbatch.report.page import make_page

    return make_page(contents)


def as_data(contents: Contents) -> dict[str, Any]:
    """A report as plain data.

    Args:
        contents: What it says.

    Returns:
        What JSON knows, with its schema first.
    """
    figures = [
        {"name": section.name, "subject": section.subject, **asdict(section.data)}  # pyright: ignore[reportArgumentType] (all figure data are dataclasses)
        for section in contents.sections
    ]
    return {
        "schema": SCHEMA,
        "workload": contents.workload,
        "answer": contents.answer,
        "doubts": contents.doubts,
        "because": list(contents.sentences),
        "reasons": [asdict(row) for row in contents.reasons],
        "warnings": list(contents.warnings),
        "figures": figures,
        "evidence": [{"name": name, "value": value} for name, value in contents.evidence],
    }


def _by_ending(path: Path) -> Format:
    return {".md": "md", ".json": "json"}.get(path.suffix.lower(), "html")  # pyright: ignore[reportReturnType]
