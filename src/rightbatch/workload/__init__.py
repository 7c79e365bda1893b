"""What to train, as factories, so that it can be built afresh and can cross processes."""

from rightbatch.workload.check import WorkloadFacts, check_workload
from rightbatch.workload.count import count_terms, count_tokens
from rightbatch.workload.data import Examples, open_examples
from rightbatch.workload.label_noise import with_label_noise
from rightbatch.workload.metrics import accuracy
from rightbatch.workload.subset import with_examples
from rightbatch.workload.target import Target, parse_target
from rightbatch.workload.workload import Workload

__all__ = [
    "Examples",
    "Target",
    "Workload",
    "WorkloadFacts",
    "accuracy",
    "check_workload",
    "count_terms",
    "count_tokens",
    "open_examples",
    "parse_target",
    "with_examples",
    "with_label_noise",
]
