"""The first step of every command: the workload, found and checked."""

from __future__ import annotations

import torch

from rightbatch.catalog import load_workload
from rightbatch.errors import UsageError
from rightbatch.workload import Workload, check_workload


def open_workload(reference: str, device: str, threads: int | None = None) -> Workload:
    """Finds a workload and runs one step of it, so that mistakes show before anything is timed.

    Args:
        reference: Catalog name, `path/to/file.py:name` or `package.module:name`.
        device: Where it will run.
        threads: CPU threads that torch uses from here on. Default: as many as it has now.

    Returns:
        The workload.

    Raises:
        UsageError: If there is no such device.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"The device {device!r} cannot be used ({reason}). Try cpu.") from error
    workload = load_workload(reference)
    check_workload(workload, device)
    return workload
