"""Everything compiled for a workload, kept as long as the workload lives."""

from __future__ import annotations

from weakref import WeakKeyDictionary

from rightbatch.engines.device_set import put_on_device
from rightbatch.engines.evaluator import Evaluator
from rightbatch.engines.program import Program
from rightbatch.engines.trace import find_layout
from rightbatch.engines.unsupported import Unsupported
from rightbatch.workload import Workload


class Compiler:
    """A workload's data on the device, its programs and its evaluator.

    Args:
        workload: The workload. It is not kept: this object lives in a table whose weak keys are
            workloads.

    Raises:
        Unsupported: If the workload cannot be compiled at any batch size.
    """

    def __init__(self, workload: Workload) -> None:
        self.data = put_on_device(workload.train_examples)
        rows = min(2, self.data.num_examples)
        model = workload.build_model(0)
        self.layout = find_layout(workload, model, self.data.whole, rows)
        self.evaluator: Evaluator | None = None
        if workload.val_examples is not None:
            validation = put_on_device(workload.val_examples)
            self.evaluator = Evaluator(workload, self.layout, validation)
        self._programs: dict[int, Program | Unsupported] = {}

    def program(self, workload: Workload, global_batch: int) -> Program:
        """The program for a global batch, traced at the first call.

        Args:
            workload: The workload this compiler was made for.
            global_batch: Examples per update.

        Returns:
            The program.

        Raises:
            Unsupported: If the training step cannot be compiled at this size.
        """
        size = min(global_batch, self.data.num_examples)
        if size not in self._programs:
            try:
                self._programs[size] = Program(workload, size, self.layout, self.data)
            except Unsupported as reason:
                self._programs[size] = reason
        program = self._programs[size]
        if isinstance(program, Unsupported):
            raise Unsupported(str(program))
        return program

    def refuse(self, global_batch: int, reason: Unsupported) -> None:
        """Remembers that a program was found wrong, so that it is not tried again.

        Args:
            global_batch: Examples per update.
            reason: What was found.
        """
        self._programs[min(global_batch, self.data.num_examples)] = reason


_compilers: WeakKeyDictionary[Workload, Compiler | Unsupported] = WeakKeyDictionary()


def compiler_of(workload: Workload) -> Compiler:
    """The compiler of a workload, made at the first call.

    Args:
        workload: The workload.

    Returns:
        Its compiler.

    Raises:
        Unsupported: If the workload cannot be compiled at any batch size.
    """
    if workload not in _compilers:
        try:
            _compilers[workload] = Compiler(workload)
        except Unsupported as reason:
            _compilers[workload] = reason
    compiler = _compilers[workload]
    if isinstance(compiler, Unsupported):
        raise Unsupported(str(compiler))
    return compiler
