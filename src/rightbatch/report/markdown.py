"""A report as Markdown: the same words, with the numbers of each figure as a table."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from rightbatch.report.contents import Contents, Section
from rightbatch.report.data.table import Table
from rightbatch.report.shown import show_text

_SPECIAL = re.compile(r"([\\`*_{}\[\]()#+!|<>~&])")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]+")


def escape(text: str) -> str:
    r"""Text that Markdown shows as it is, on one line.

    Args:
        text: Anything that may hold what users named.

    Returns:
        The text, escaped.

    Example:
        >>> escape("val_loss<=0.1")
        'val\\_loss\\<=0.1'
    """
    return _SPECIAL.sub(r"\\\1", _CONTROL.sub(" ", show_text(text)))


def as_markdown(contents: Contents) -> str:
    """The report as text.

    Args:
        contents: What it says.

    Returns:
        The whole file.
    """
    parts = [f"# {escape(contents.workload)}", f"**{escape(contents.answer)}**"]
    parts += [escape(contents.doubts)] if contents.doubts else []
    parts.append("## Why")
    if contents.reasons:
        rows = [(r.field, r.value, r.because, r.source) for r in contents.reasons]
        parts.append(_table(("field", "value", "because", "rests on"), rows))
    parts += [escape(sentence) for sentence in contents.sentences]
    parts += [f"Note: {escape(warning)}" for warning in contents.warnings]
    for section in contents.sections:
        parts += _section(section)
    parts += ["## Evidence", _table(("what", "value"), contents.evidence)]
    return "\n\n".join(parts) + "\n"


def _section(section: Section) -> Iterable[str]:
    table: Table = section.data.table()
    yield f"## {escape(section.data.finding)}"
    yield f"*{escape(section.subject)}.* {escape(section.data.note)}"
    yield _table(table.header, table.rows)


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *([escape(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
