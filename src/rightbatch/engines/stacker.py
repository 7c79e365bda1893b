"""What copies of a workload that are stacked share, kept as long as the workload lives."""

from __future__ import annotations

from dataclasses import replace
from weakref import WeakKeyDictionary

from rightbatch.engines.stacked_pass import (
    Pass,
    StackedEvaluation,
    measure_pass_bytes,
    trace_stacked_pass,
)
from rightbatch.engines.trace import find_layout
from rightbatch.engines.unsupported import Unsupported
from rightbatch.engines.whole_set import WholeSet, collate_all
from rightbatch.workload import Examples, Workload


class Stacker:
    """A workload's data on a device, and its passes over stacked tensors.

    Args:
        workload: The workload. It is not kept: this object lives in a table whose weak keys are
            workloads.
        device: Where.

    Attributes:
        data: The training set.
        layout: Which tensors are trained.
        evaluation: On the validation set, or None without one.
        verified: Global batches whose first steps agreed with the plain loop.

    Raises:
        Unsupported: If its data are not rows of fixed tensors, or a weight is not float32.
    """

    def __init__(self, workload: Workload, device: str) -> None:
        self.device = device
        self.data = _on(device, workload.train_examples)
        rows = min(2, self.data.num_examples)
        self.layout = find_layout(workload, workload.build_model(0, device), self.data, rows)
        self.evaluation: StackedEvaluation | None = None
        if workload.val_examples is not None:
            validation = _on(device, workload.val_examples)
            self.evaluation = StackedEvaluation(workload, self.layout, validation, device)
        self.verified: set[int] = set()
        self._bytes: dict[int, int] = {}
        self._passes: dict[tuple[int, int], Pass] = {}

    def pass_bytes(self, workload: Workload, num_rows: int) -> int:
        """Bytes that one copy's training pass takes at most.

        Args:
            workload: The workload this was made for.
            num_rows: Examples in the batch.

        Returns:
            Bytes.
        """
        if num_rows not in self._bytes:
            self._bytes[num_rows] = measure_pass_bytes(workload, self.data, num_rows, self.device)
        return self._bytes[num_rows]

    def training_pass(self, workload: Workload, num_copies: int, num_rows: int) -> Pass:
        """The training pass of so many copies at a batch size, traced at the first call.

        Args:
            workload: The workload this was made for.
            num_copies: Copies.
            num_rows: Examples in each batch.

        Returns:
            The pass.
        """
        key = (num_copies, num_rows)
        if key not in self._passes:
            self._passes[key] = trace_stacked_pass(
                workload, self.layout, self.data, num_copies, num_rows, self.device
            )
        return self._passes[key]


def _on(device: str, examples: Examples) -> WholeSet:
    whole = collate_all(examples)
    return replace(whole, leaves=tuple(leaf.to(device) for leaf in whole.leaves))


_stackers: WeakKeyDictionary[Workload, dict[str, Stacker | Unsupported]] = WeakKeyDictionary()


def stacker_of(workload: Workload, device: str) -> Stacker:
    """The stacker of a workload on a device, made at the first call.

    Args:
        workload: The workload.
        device: Where.

    Returns:
        Its stacker.

    Raises:
        Unsupported: If copies of this workload cannot be stacked.
    """
    own = _stackers.setdefault(workload, {})
    if device not in own:
        try:
            own[device] = Stacker(workload, device)
        except Unsupported as reason:
            own[device] = reason
    stacker = own[device]
    if isinstance(stacker, Unsupported):
        raise Unsupported(str(stacker))
    return stacker
