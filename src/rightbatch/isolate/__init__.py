"""Run something without leaving a trace: in place with all state put back, or in a child."""

from rightbatch.isolate.child import Child, ChildResult, run_in_child
from rightbatch.isolate.preserve import preserved_state

__all__ = ["Child", "ChildResult", "preserved_state", "run_in_child"]
