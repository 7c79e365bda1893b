"""The interpreter: runs an fx graph of ATen operations on JAX arrays (usually while JAX traces)."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jax import Array
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import flop_registry

from rightbatch.engines.lowering.dtypes import jax_dtype, to_jax
from rightbatch.engines.lowering.indexing import INDEXING
from rightbatch.engines.lowering.normalization import MUTATED, NORMALIZATION
from rightbatch.engines.lowering.pointwise import POINTWISE
from rightbatch.engines.lowering.pooling import POOLING
from rightbatch.engines.lowering.products import PRODUCTS
from rightbatch.engines.lowering.reductions import REDUCTIONS
from rightbatch.engines.lowering.shapes import SHAPES
from rightbatch.engines.unsupported import Unsupported

Lowering = Callable[..., Any]
LOWERINGS: dict[str, Lowering] = {
    **POINTWISE,
    **REDUCTIONS,
    **SHAPES,
    **INDEXING,
    **PRODUCTS,
    **POOLING,
    **NORMALIZATION,
}


@dataclass(frozen=True, eq=False)
class Lowered:
    """A graph that is called with JAX arrays.

    Attributes:
        graph: The traced graph.
        constants: Tensors the model made up while it ran, by attribute name.
    """

    graph: GraphModule
    constants: dict[str, Array]

    @property
    def result_bytes(self) -> int:
        """Bytes of all operations' results together, none fused: how large a step is."""
        return sum(
            t.nbytes for node in self.graph.graph.nodes for t in _expected(node) if t is not None
        )

    @property
    def flops_per_product(self) -> float:
        """Mean floating-point operations of a matrix product or convolution; 0 without any."""
        counts = [c for node in self.graph.graph.nodes if (c := _product_flops(node))]
        return sum(counts) / max(1, len(counts))

    def __call__(self, *trees: Any) -> Any:
        """Runs the graph.

        Args:
            trees: Arguments in the containers the graph was traced with.

        Returns:
            What the traced function returned, as JAX arrays.
        """
        inputs = iter(pytree.tree_leaves(trees))
        values: dict[Node, Any] = {}
        for node in self.graph.graph.nodes:
            if node.op == "placeholder":
                values[node] = next(inputs)
            elif node.op == "get_attr":
                values[node] = self.constants[str(node.target)]
            elif node.op == "call_function":
                values[node] = _run_node(node, values)
        output = self.graph.graph.output_node()
        return self._packed(map_arg(output.args[0], values.__getitem__))

    def _packed(self, outputs: Any) -> Any:
        """Flat outputs in the containers that the traced function returned."""
        spec = getattr(self.graph, "_out_spec", None)
        return outputs if spec is None else pytree.tree_unflatten(list(outputs), spec)


def lower(graph: GraphModule) -> Lowered:
    """Prepares a graph to be run on JAX arrays.

    Args:
        graph: A flat graph of ATen operations.

    Returns:
        A callable with the graph's arguments.

    Raises:
        Unsupported: If an operation has no lowering; all such operations are named.
    """
    missing = sorted({name for node in graph.graph.nodes if (name := _missing_name(node))})
    if missing:
        raise Unsupported(f"it has no lowering for {', '.join(missing)}")
    for node in graph.graph.nodes:
        _check_dtypes(node)
    constants = {
        str(node.target): to_jax(_attribute(graph, str(node.target)))
        for node in graph.graph.nodes
        if node.op == "get_attr"
    }
    return Lowered(graph, constants)


def _missing_name(node: Node) -> str | None:
    if node.op in {"placeholder", "get_attr", "output"} or node.target is operator.getitem:
        return None
    return None if str(node.target) in LOWERINGS else str(node.target)


def _check_dtypes(node: Node) -> None:
    for meta in _expected(node):
        # A 0-dimensional float64 is a Python number in disguise.
        if meta is not None and not (meta.dtype == torch.float64 and meta.ndim == 0):
            jax_dtype(meta.dtype)


def _attribute(graph: GraphModule, path: str) -> Tensor:
    value: Any = graph
    for part in path.split("."):
        value = getattr(value, part)
    return value


def _product_flops(node: Node) -> int:
    count = flop_registry.get(getattr(node.target, "overloadpacket", None))
    if count is None:
        return 0
    args: Any = map_arg(node.args, lambda n: n.meta.get("val"))
    return int(count(*args, out_val=node.meta.get("val")))


def _run_node(node: Node, values: dict[Node, Any]) -> Any:
    args: Any = map_arg(node.args, values.__getitem__)
    kwargs: Any = map_arg(node.kwargs, values.__getitem__)
    if node.target is operator.getitem:
        return args[0][args[1]]
    name = str(node.target)
    try:
        result = LOWERINGS[name](*args, **kwargs)
        if name in MUTATED:
            result, changed = result
            # Later readers of the buffer, the graph's output among them, see its new value.
            for position, value in changed.items():
                buffer = node.args[position]
                assert isinstance(buffer, Node)
                values[buffer] = value.astype(values[buffer].dtype)
        return _as_torch_would(node, result)
    except Unsupported:
        raise
    except Exception as error:
        raise Unsupported(f"{name} cannot be lowered here ({error})") from error


def _expected(node: Node) -> Sequence[Tensor | None]:
    value = node.meta.get("val")
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, tuple | list):
        return [v if isinstance(v, Tensor) else None for v in value]
    return []


def _as_torch_would(node: Node, result: Any) -> Any:
    """Casts to torch's dtypes, and refuses another shape than torch computed."""
    expected = _expected(node)
    if isinstance(result, tuple | list):
        return [_cast(node, r, e) for r, e in zip(result, expected, strict=True)]
    return _cast(node, result, expected[0]) if expected else result


def _cast(node: Node, value: Any, expected: Tensor | None) -> Any:
    if value is None or expected is None:
        return value
    if tuple(value.shape) != tuple(expected.shape):
        raise Unsupported(
            f"{node.target} was lowered to shape {tuple(value.shape)} and torch computes "
            f"{tuple(expected.shape)}"
        )
    narrow = torch.float32 if expected.dtype == torch.float64 else expected.dtype
    return value.astype(jax_dtype(narrow))
