"""One pass over a batch for several copies at once: `torch.func.vmap` over stacked tensors.

The training pass is written down once as a flat graph of ATen operations on stacked tensors
(`make_fx` of `vmap` of `grad`), and run as that: called directly, the transforms themselves would
take about as long as all operations of a small model.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from rightbatch.engines.trace import (
    Layout,
    check_deterministic,
    first_line,
    named_tensors,
    plain_attention,
)
from rightbatch.engines.unsupported import Unsupported
from rightbatch.engines.whole_set import WholeSet
from rightbatch.training.evaluate import has_metric
from rightbatch.workload import Workload
from rightbatch.workload.count import count_terms

_TRACING = threading.Lock()
"""Tracing swaps a model's tensors and torch's settings: one thread at a time."""

Pass = Callable[
    [list[Tensor], list[Tensor], list[Tensor]], tuple[Tensor, list[Tensor], list[Tensor]]
]


class Evaluated(NamedTuple):
    """One batch's evaluation of several copies.

    Attributes:
        loss_sums: Shape (copies,).
        counts: Terms that it was summed over, shape (copies,).
        metrics: Mean over the batch, shape (copies,), or None.
    """

    loss_sums: Tensor
    counts: Tensor
    metrics: Tensor | None


class _Forward(nn.Module):
    """Runs a function of the model as a module, so that `functional_call` swaps its tensors."""

    def __init__(self, model: nn.Module, function: Callable[[nn.Module, Any], Any]) -> None:
        super().__init__()
        self.model = model
        self._function = function

    def forward(self, batch: Any) -> Any:
        return self._function(self.model, batch)


def _swapped(layout: Layout, trained: list[Tensor], carried: list[Tensor]) -> dict[str, Tensor]:
    names = [*layout.trained, *layout.carried]
    return {f"model.{n}": t for n, t in zip(names, [*trained, *carried], strict=True)}


def trace_stacked_pass(
    workload: Workload, layout: Layout, data: WholeSet, num_copies: int, num_rows: int, device: str
) -> Pass:
    """Loss and gradients of several copies, each on its own batch.

    Args:
        workload: Says how the loss is computed.
        layout: Which tensors are trained.
        data: The training set, on the device.
        num_copies: Copies.
        num_rows: Examples in each batch.
        device: Where.

    Returns:
        A function of the stacked trained tensors, the stacked other tensors and the leaves of the
        batches, each of shape (copies, rows, …), that returns the losses, shape (copies,), the
        gradients and the new values of the other tensors.

    Raises:
        Unsupported: If the pass cannot be mapped over copies, or draws random numbers.
    """
    model = workload.build_model(0, device)
    held = named_tensors(model)
    module = _Forward(model, lambda own, batch: _mean_loss(workload, own, batch))

    def one(trained: list[Tensor], carried: list[Tensor], leaves: list[Tensor]) -> Any:
        def loss_and_buffers(trained: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
            # Copied, so that what the pass does to its buffers comes out as new values.
            own = [tensor.clone() for tensor in carried]
            swapped = _swapped(layout, trained, own)
            return functional_call(module, swapped, (data.container(leaves),)), own

        gradients, (loss, own) = grad_and_value(loss_and_buffers, has_aux=True)(trained)
        return loss, gradients, own

    def stacked(names: tuple[str, ...]) -> list[Tensor]:
        return [torch.stack([held[name].detach()] * num_copies) for name in names]

    leaves = [torch.stack([leaf[:num_rows]] * num_copies) for leaf in data.leaves]
    with torch.enable_grad():
        return _traced(
            vmap(one, randomness="different"),
            stacked(layout.trained),
            stacked(layout.carried),
            leaves,
        )


def _traced(function: Callable[..., Any], *arguments: list[Tensor]) -> GraphModule:
    try:
        with _TRACING, plain_attention(), torch.random.fork_rng():
            graph = make_fx(function)(*arguments)
    except Exception as error:
        raise Unsupported(f"it cannot be mapped over copies ({first_line(error)})") from error
    check_deterministic(graph)
    return graph


def _mean_loss(workload: Workload, model: nn.Module, batch: Any) -> Tensor:
    if workload.compute_loss is not None:
        loss_sum, count = workload.compute_loss(model, batch)
        return loss_sum / count
    assert workload.loss is not None  # by the workload's own check
    inputs, targets = batch
    return workload.loss(model(inputs), targets)


def measure_pass_bytes(workload: Workload, data: WholeSet, num_rows: int, device: str) -> int:
    """Bytes of the results of all operations of one copy's training pass, none freed.

    Args:
        workload: Says how the loss is computed.
        data: The training set, on the device.
        num_rows: Examples in the batch.
        device: Where.

    Returns:
        An upper bound of the memory that a pass takes.
    """
    model = workload.build_model(0, device)
    counting = _Counting()
    with torch.random.fork_rng(), torch.enable_grad(), counting:
        _mean_loss(workload, model, data.container(data.rows(num_rows))).backward()
    return counting.total_bytes


class _Counting(TorchDispatchMode):
    """Adds up the bytes of what operations return."""

    def __init__(self) -> None:
        super().__init__()
        self.total_bytes = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        tensors = [t for t in pytree.tree_leaves(result) if isinstance(t, Tensor)]
        self.total_bytes += sum(t.nbytes for t in tensors)
        return result


class StackedEvaluation:
    """The evaluation of several copies on the same batch.

    Args:
        workload: Says how loss and metric are computed.
        layout: Which tensors are trained.
        data: The validation set, on the device.
        device: Where.

    Attributes:
        with_metric: Whether there is a metric.
        num_examples: Of the validation set.
    """

    def __init__(self, workload: Workload, layout: Layout, data: WholeSet, device: str) -> None:
        self.num_examples = data.num_examples
        self.with_metric = has_metric(workload)
        # The workload is not kept: this object lives as long as its workload does.
        self._layout, self._data = layout, data
        self._model = workload.build_model(0, device).eval()
        self._traced: dict[tuple[int, int], GraphModule] = {}

    @torch.no_grad()
    def __call__(
        self,
        workload: Workload,
        trained: list[Tensor],
        carried: list[Tensor],
        start: int,
        stop: int,
    ) -> Evaluated:
        """Evaluates examples `start` to `stop`.

        Args:
            workload: The workload this was made for.
            trained: Trained tensors, stacked.
            carried: All other tensors, stacked.
            start: First example.
            stop: End.

        Returns:
            Sums of every copy.
        """
        leaves = [leaf[start:stop] for leaf in self._data.leaves]
        key = (len(trained[0]), len(leaves[0]))
        if key not in self._traced:
            self._traced[key] = self._trace(workload, trained, carried, leaves)
        losses, more = self._traced[key](trained, carried, leaves)
        if workload.loss is None:
            return Evaluated(losses, more, None)
        _, targets = self._data.container(leaves)
        count = count_terms(targets)
        metrics = _metrics(workload, more, targets) if self.with_metric and count else None
        return Evaluated(losses * count, torch.full_like(losses, count), metrics)

    def _trace(self, workload: Workload, *arguments: list[Tensor]) -> GraphModule:
        module = _Forward(self._model, lambda model, batch: _loss_and_more(workload, model, batch))

        def one(trained: list[Tensor], carried: list[Tensor], leaves: list[Tensor]) -> Any:
            own = [tensor.clone() for tensor in carried]
            swapped = _swapped(self._layout, trained, own)
            return functional_call(module, swapped, (self._data.container(leaves),))

        return _traced(vmap(one, in_dims=(0, 0, None), randomness="different"), *arguments)


def _loss_and_more(workload: Workload, model: nn.Module, batch: Any) -> tuple[Tensor, Any]:
    """Mean loss and outputs; of a workload that counts by itself, loss sum and count."""
    if workload.compute_loss is not None:
        loss_sum, count = workload.compute_loss(model, batch)
        return loss_sum, torch.as_tensor(count, device=loss_sum.device)
    assert workload.loss is not None  # by the workload's own check
    inputs, targets = batch
    outputs = model(inputs)
    return workload.loss(outputs, targets), outputs


def _metrics(workload: Workload, outputs: Any, targets: Any) -> Tensor:
    """The metric of every copy, one by one: it may return a Python number."""
    assert workload.metric is not None
    num_copies = len(pytree.tree_leaves(outputs)[0])
    metrics = [
        float(workload.metric(pytree.tree_map(lambda t, i=i: t[i], outputs), targets))
        for i in range(num_copies)
    ]
    return torch.tensor(metrics, dtype=torch.float64)
