"""Whether a workload can be sent to a child process, where memory is measured."""

from __future__ import annotations

import dataclasses
import io
from typing import Any

from rightbatch.errors import WorkloadError
from rightbatch.workload.data import TensorExamples
from rightbatch.workload.workload import Workload


class _Discarded(io.RawIOBase):
    """A file that keeps nothing: large data are pickled only to see whether they can be."""

    def writable(self) -> bool:
        return True

    def write(self, data: Any, /) -> int:
        return len(data)


def check_crossing(workload: Workload) -> None:
    """Pickles the workload part by part, as it will be when a probe runs in a child process.

    Lambdas and classes of a notebook can cross; open files, locks, database connections and what
    holds on to one cannot. Tensors always can and are not copied.

    Args:
        workload: The workload.

    Raises:
        WorkloadError: Naming the part that cannot cross, and why.
    """
    for field in dataclasses.fields(workload):
        value = getattr(workload, field.name)
        examples = {"train_data": "train_examples", "val_data": "val_examples"}.get(field.name)
        if examples and isinstance(getattr(workload, examples), TensorExamples):
            continue
        _check_part(workload, field.name, value)


def _check_part(workload: Workload, part: str, value: Any) -> None:
    import cloudpickle

    try:
        cloudpickle.CloudPickler(_Discarded()).dump(value)
    except Exception as error:
        raise WorkloadError(
            f"{part} of workload {workload.name!r} cannot be sent to a child process: {error}. "
            "Lambdas and notebook classes can; open files, locks, generators and connections "
            "cannot, so create those inside the function or the dataset's first __getitem__."
        ) from error
