"""Text that users named, made fit to be shown; escaping it is left to what shows it."""

from __future__ import annotations

import re

_MOST_TEXT = 300
"""Longer names are shown cut; the record has them in full."""
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]")
_DIRECTION = re.compile("[\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")
"""Characters that turn the direction of what follows: one name could rewrite the line it is in."""


def show_text(text: str) -> str:
    """Text from a record as it is shown: cut, without controls; it is escaped afterwards.

    Args:
        text: Anything that may hold what users named.

    Returns:
        What is shown.

    Example:
        >>> show_text("a" * 400 + chr(0))[-3:]
        'aa…'
    """
    shown = _DIRECTION.sub("�", _CONTROL.sub("�", text))
    words = re.split(r"(\s+)", shown)
    return "".join(w if len(w) <= _MOST_TEXT else w[:_MOST_TEXT] + "…" for w in words)
