"""Aligned columns without boxes."""

from __future__ import annotations

from collections.abc import Sequence

WIDTH = 80


def make_table(header: Sequence[str], rows: Sequence[Sequence[str]], *, left: int = 1) -> str:
    """Rows in aligned columns, at most 80 wide.

    Args:
        header: One word or two per column.
        rows: The cells.
        left: How many columns from the left hold text and are aligned left; the others hold
            numbers and are aligned right.

    Returns:
        The lines; the last column is cut where a line would be too long.

    Example:
        >>> print(make_table(("size", "time"), [("1", "10 ms"), ("128", "9 ms")], left=0))
        size   time
           1  10 ms
         128   9 ms
    """
    lines = [header, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    return "\n".join(_line(cells, widths, left) for cells in lines)


def make_wrapped_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Rows in aligned columns whose last column is prose, broken at words to 80 columns.

    Args:
        header: One word or two per column.
        rows: The cells.

    Returns:
        The lines; those after a row's first are indented to the last column.

    Example:
        >>> print(make_wrapped_table(("field", "why"), [("batch", "because " * 12)]))
        field  why
        batch  because because because because because because because because because
               because because because
    """
    lines = [header, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header) - 1)]
    indent = sum(widths) + 2 * len(widths)
    shown: list[str] = []
    for cells in lines:
        prose = wrap(cells[-1], WIDTH - indent).splitlines() or [""]
        left = "".join(f"{cell.ljust(w)}  " for cell, w in zip(cells[:-1], widths, strict=True))
        shown.append((left + prose[0]).rstrip())
        shown.extend(" " * indent + line for line in prose[1:])
    return "\n".join(shown)


def _line(cells: Sequence[str], widths: Sequence[int], left: int) -> str:
    parts = [
        cell.ljust(width) if i < left else cell.rjust(width)
        for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
    ]
    text = "  ".join(parts).rstrip()
    return text if len(text) <= WIDTH else text[: WIDTH - 1] + "…"


def wrap(text: str, width: int = WIDTH) -> str:
    """Prose broken at words to 80 columns.

    Args:
        text: One paragraph.
        width: Columns.

    Returns:
        Its lines.
    """
    import textwrap

    return textwrap.fill(text, width, break_long_words=False, break_on_hyphens=False)
