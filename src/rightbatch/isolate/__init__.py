"""Run something without leaving a trace: in place with all state put back, or in a child."""

from rightbatch.isolate.preserve import preserved_state

__all__ = ["preserved_state"]
