"""The torch model's loss and gradient, and its evaluation, as flat graphs of ATen operations.

`make_fx` runs the workload's own loss once on proxies and writes down every ATen operation of the
forward and the backward pass. Buffers are copied inside the traced function, so that what the
forward pass does to them (BatchNorm's running statistics) comes out as new values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._decomp import core_aten_decompositions, decomposition_table
from torch.func import functional_call, functionalize, grad_and_value
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.attention import SDPBackend, sdpa_kernel

from rightbatch.engines.unsupported import Unsupported
from rightbatch.engines.whole_set import WholeSet
from rightbatch.workload import Workload

_UPDATED_DTYPE = torch.float32


@dataclass(frozen=True, kw_only=True, eq=False)
class Layout:
    """Which tensors of the model are trained, and which are carried along.

    Attributes:
        trained: Names of the parameters that receive a gradient.
        carried: Names of all other parameters and of the buffers.
        names: State-dict name to the name under which the tensor is held (tied weights).
    """

    trained: tuple[str, ...]
    carried: tuple[str, ...]
    names: dict[str, str]


class _Loss(nn.Module):
    """The workload's loss as a module, so that `functional_call` swaps the model's tensors."""

    def __init__(self, workload: Workload, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self._workload = workload

    def forward(self, batch: Any) -> tuple[Tensor, Any]:
        return self._workload.loss_sum(self.model, batch)


class _Evaluation(_Loss):
    """Loss sum, count and metric of one batch, as `rightbatch.training.evaluate` computes them."""

    def forward(self, batch: Any) -> tuple[Tensor, Any]:
        workload = self._workload
        if workload.loss is None or workload.metric is None:
            loss_sum, count = workload.loss_sum(self.model, batch)
            return loss_sum, (count, None)
        inputs, targets = batch
        outputs = self.model(inputs)
        metric = workload.metric(outputs, targets)
        if not isinstance(metric, Tensor):
            raise Unsupported("the metric returns a Python number, not a tensor")
        return workload.loss(outputs, targets) * len(targets), (len(targets), metric)


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers of a model by name, tied ones once."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def find_layout(workload: Workload, model: nn.Module, data: WholeSet, num_rows: int) -> Layout:
    """Runs one backward pass to see which parameters receive a gradient.

    Args:
        workload: Says how the loss is computed.
        model: A fresh model; its buffers may change.
        data: The training set.
        num_rows: Examples in the batch.

    Returns:
        The layout.

    Raises:
        Unsupported: If a trained parameter is not float32.
    """
    loss_sum, _ = workload.loss_sum(model, data.container(data.rows(num_rows)))
    wanted = {name: p for name, p in model.named_parameters() if p.requires_grad}
    gradients = torch.autograd.grad(loss_sum, list(wanted.values()), allow_unused=True)
    trained = tuple(n for n, g in zip(wanted, gradients, strict=True) if g is not None)
    held = named_tensors(model)
    for name in trained:
        if held[name].dtype != _UPDATED_DTYPE:
            raise Unsupported(f"parameter {name} is {held[name].dtype}, not float32")
    home = {id(tensor): name for name, tensor in held.items()}
    state = model.state_dict(keep_vars=True)
    return Layout(
        trained=trained,
        carried=tuple(name for name in held if name not in trained),
        names={key: home[id(t)] for key, t in state.items() if id(t) in home},
    )


def trace_training(
    workload: Workload, model: nn.Module, layout: Layout, data: WholeSet, num_rows: int
) -> GraphModule:
    """Traces one forward and backward pass over a batch of `num_rows` examples.

    The graph takes the trained tensors, the carried ones and the leaves of the batch, and returns
    the mean loss, the gradients of the trained tensors and the new carried tensors.

    Args:
        workload: Says how the loss is computed.
        model: A model in training mode.
        layout: Which tensors are trained.
        data: The training set.
        num_rows: Examples in the batch.

    Returns:
        The graph.

    Raises:
        Unsupported: If the pass cannot be traced.
    """
    held = named_tensors(model)
    module = _Loss(workload, model)

    def gradients_and_loss(
        trained: list[Tensor], carried: list[Tensor], leaves: list[Tensor]
    ) -> tuple[Any, Any, Any]:
        def mean_loss(trained: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
            copies = [tensor.clone() for tensor in carried]
            swapped = _swapped(layout, trained, copies)
            loss_sum, count = functional_call(module, swapped, (data.container(leaves),))
            return loss_sum / count, copies

        gradients, (loss, copies) = grad_and_value(mean_loss, has_aux=True)(trained)
        return loss, gradients, copies

    return trace_function(
        gradients_and_loss,
        [held[name].detach().clone() for name in layout.trained],
        [held[name].detach().clone() for name in layout.carried],
        data.rows(num_rows),
    )


def trace_evaluation(
    workload: Workload, model: nn.Module, layout: Layout, data: WholeSet, num_rows: int
) -> GraphModule:
    """Traces the evaluation of a batch of `num_rows` examples, in evaluation mode.

    The graph takes what `trace_training`'s takes, and returns loss sum, count and, where the
    workload has one, the metric times the number of examples.

    Args:
        workload: Says how loss and metric are computed.
        model: A model; it is put in evaluation mode.
        layout: Which tensors are trained.
        data: The validation set.
        num_rows: Examples in the batch.

    Returns:
        The graph.

    Raises:
        Unsupported: If the pass cannot be traced.
    """
    held = named_tensors(model)
    module = _Evaluation(workload, model.eval())

    def losses(
        trained: list[Tensor], carried: list[Tensor], leaves: list[Tensor]
    ) -> tuple[Tensor, ...]:
        copies = [tensor.clone() for tensor in carried]
        swapped = _swapped(layout, trained, copies)
        loss_sum, (count, metric) = functional_call(module, swapped, (data.container(leaves),))
        count = count if isinstance(count, Tensor) else torch.full((), float(count))
        values = (loss_sum, count) if metric is None else (loss_sum, count, metric * num_rows)
        return tuple(value.to(torch.float32) for value in values)

    with torch.no_grad():
        return trace_function(
            losses,
            [held[name].detach().clone() for name in layout.trained],
            [held[name].detach().clone() for name in layout.carried],
            data.rows(num_rows),
        )


def _swapped(layout: Layout, trained: list[Tensor], carried: list[Tensor]) -> dict[str, Tensor]:
    tensors = dict(zip(layout.trained, trained, strict=True))
    tensors.update(zip(layout.carried, carried, strict=True))
    return {f"model.{name}": tensor for name, tensor in tensors.items()}


def trace_function(function: Callable[..., Any], *args: Any) -> GraphModule:
    """The graph of a function of tensors, without in-place operations.

    Args:
        function: Takes and returns containers of tensors.
        args: Arguments to run it with.

    Returns:
        The graph.

    Raises:
        Unsupported: If torch cannot trace it, or it draws random numbers.
    """
    try:
        with plain_attention(), torch.random.fork_rng():
            graph = make_fx(functionalize(function), decomposition_table=_decompositions())(*args)
    except Unsupported:
        raise
    except Exception as error:
        raise Unsupported(f"the model cannot be traced ({first_line(error)})") from error
    check_deterministic(graph)
    return graph


def check_deterministic(graph: GraphModule) -> None:
    """Refuses graphs that draw random numbers: every copy would draw the same ones.

    Raises:
        Unsupported: If an operation draws random numbers; it is named.
    """
    for node in graph.graph.nodes:
        tags = getattr(node.target, "tags", ())
        if torch.Tag.nondeterministic_seeded in tags:
            raise Unsupported(f"{node.target} draws random numbers (dropout or noise)")


@contextmanager
def plain_attention() -> Iterator[None]:
    """Attention as matrix products and a softmax instead of one fused operation.

    Yields:
        Nothing.
    """
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)


def _decompositions() -> dict[Any, Callable[..., Any]]:
    """Every decomposition that torch knows, except of operations that are lowered whole."""
    from rightbatch.engines.lowering import LOWERINGS

    known = {**decomposition_table, **core_aten_decompositions()}
    return {op: rule for op, rule in known.items() if str(op) not in LOWERINGS}


def first_line(error: Exception) -> str:
    """The kind of an error and the first line of what it says."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:200]}" if text else type(error).__name__
