"""Why a workload cannot be compiled: raised inside the engines, never seen by users."""

from __future__ import annotations


class Unsupported(Exception):  # noqa: N818 - a verdict that picks another engine, not an error
    """The compiled engine cannot run this workload; the message is the reason, a clause."""
