"""What to train, as factories, so that it can be built afresh and can cross processes."""

from rightbatch.workload.data import Examples, open_examples
from rightbatch.workload.metrics import accuracy
from rightbatch.workload.target import Target, parse_target
from rightbatch.workload.workload import Workload

__all__ = ["Examples", "Target", "Workload", "accuracy", "open_examples", "parse_target"]
