"""A training state as JSON data and tensors, and back: a tree of plain values, no objects.

What JSON holds exactly stands for itself: None, booleans, 64-bit integers, finite numbers, text,
lists. Everything else is an object with one key, its kind:

    {"tuple": [node, ...]}
    {"dict": [[key, node], ...]}       keys are text or integers, in their order
    {"ordered": {"items": [[key, node], ...], "metadata": node}}
    {"int": "0x1f…"}                   integers beyond 64 bits
    {"float": "7ff8000000000000"}      NaN and infinities, by their bits
    {"text": "eda080"}                 text that is not Unicode (file names can be), by its bytes
    {"tensor": {"name": "12"}}         with "order", "dtype" and "shape" where they are needed

Reading builds values of these types alone; a kind that is not in this list is refused.
"""

from __future__ import annotations

import math
import struct
from collections import OrderedDict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from rightbatch.errors import UsageError

MAX_DEPTH = 64
"""Deepest nesting. A tree that contains itself is refused by it, and no file exhausts the stack."""

_NATIVE = frozenset(
    {
        torch.float64,
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.int64,
        torch.int32,
        torch.int16,
        torch.int8,
        torch.uint8,
        torch.bool,
    }
)
"""What every version of safetensors stores; other dtypes are stored as bytes, with their name."""

# Not the quantized ones (torch.qint8): bytes viewed as these have no scale and crash when used.
_DTYPES = {
    str(dtype): dtype
    for dtype in vars(torch).values()
    if isinstance(dtype, torch.dtype) and not str(dtype).startswith("torch.q")
}

Path = tuple[str | int, ...]


def flatten(state: Any) -> tuple[Any, dict[str, Tensor]]:
    """Takes a state apart into its structure and its tensors.

    Args:
        state: A tree of dict (keys str or int), OrderedDict, list, tuple, None, bool, int, float,
            str and Tensor.

    Returns:
        The structure as JSON data without NaN, and the tensors by name: on the CPU, contiguous,
        no two of them in the same memory. Those that need no copy share the memory of the state.

    Raises:
        UsageError: If something else is in the tree; it names the place.
    """
    pool = _TensorPool()
    return _to_node(state, (), pool), pool.tensors


def unflatten(structure: Any, tensors: dict[str, Tensor]) -> Any:
    """Puts a state together again.

    Args:
        structure: The data from `flatten`.
        tensors: The tensors from `flatten`.

    Returns:
        The state. Its tensors are on the CPU, without gradient; two places that held one tensor
        hold one tensor again.

    Raises:
        ValueError: If the data are not such a structure. As they may be anything, other
            exceptions can come from Python's and the tensors' own checks.
    """
    return _from_node(structure, tensors, 0)


# ---------------------------------------------------------------------------------------- writing


def _to_node(value: Any, path: Path, pool: _TensorPool) -> Any:
    if len(path) > MAX_DEPTH:
        raise UsageError(
            f"{_name(path[:3])}… is nested more than {MAX_DEPTH} deep. Flatten the state; if it "
            "contains itself, take that reference out."
        )
    # Exact types: an enum is an int too, and would come back as a plain one.
    kind = type(value)
    if kind in (type(None), bool, int, float, str):
        return _scalar_to_node(value)
    if kind is list:
        return _items_to_nodes(value, path, pool)
    if kind is tuple:
        return {"tuple": _items_to_nodes(value, path, pool)}
    if kind is dict:
        return {"dict": _pairs_to_nodes(value, path, pool)}
    if kind is OrderedDict:
        # PyTorch hangs the versions of the modules on a state dict, as an attribute.
        metadata = _to_node(getattr(value, "_metadata", None), (*path, "_metadata"), pool)
        return {"ordered": {"items": _pairs_to_nodes(value, path, pool), "metadata": metadata}}
    if kind is Tensor:
        return {"tensor": pool.add(value, path)}
    raise UsageError(
        f"{_name(path)} is a {kind.__name__}, which a checkpoint cannot give back as it is. Save "
        "numbers, text and plain tensors (x.detach()), in dicts, lists and tuples."
    )


def _scalar_to_node(value: Any) -> Any:
    if type(value) is int and not -(2**63) <= value < 2**63:
        return {"int": hex(value)}
    if type(value) is float and not math.isfinite(value):
        return {"float": struct.pack(">d", value).hex()}
    if type(value) is str and any("\ud800" <= letter <= "\udfff" for letter in value):
        return {"text": value.encode("utf-8", errors="surrogatepass").hex()}
    return value


def _items_to_nodes(values: Iterable[Any], path: Path, pool: _TensorPool) -> list[Any]:
    return [_to_node(value, (*path, place), pool) for place, value in enumerate(values)]


def _pairs_to_nodes(values: dict[Any, Any], path: Path, pool: _TensorPool) -> list[Any]:
    for key in values:
        if type(key) not in (str, int):
            raise UsageError(
                f"{_name(path)} has the key {key!r}, a {type(key).__name__}. Keys of a checkpoint "
                "are str or int."
            )
    return [
        [_scalar_to_node(key), _to_node(value, (*path, key), pool)] for key, value in values.items()
    ]


def _name(path: Path) -> str:
    return ".".join(str(part) for part in path) or "The state"


class _TensorPool:
    """The tensors met so far, each once."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._names: dict[Any, str] = {}
        self._storages: set[int] = set()

    def add(self, tensor: Tensor, path: Path) -> dict[str, Any]:
        _check_dense(tensor, path)
        description: dict[str, Any] = {}
        values = tensor.detach()
        if not values.is_contiguous():
            # Stored from the outermost dimension to the innermost, so that the layout in memory
            # (channels last) comes back too: sums over another layout round otherwise.
            order = sorted(range(values.dim()), key=values.stride, reverse=True)
            values = values.permute(order)
            description["order"] = order
        if values.dtype not in _NATIVE:
            description["dtype"] = str(values.dtype)
            description["shape"] = list(values.shape)
        view = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        same = (*view, tensor.is_conj(), tensor.is_neg())
        if tensor.numel() == 0 or same not in self._names:
            self._names[same] = self._store(values)
        return {"name": self._names[same], **description}

    def _store(self, values: Tensor) -> str:
        values = values.resolve_conj().resolve_neg().cpu().contiguous()
        if values.dtype not in _NATIVE:
            values = values.flatten().view(torch.uint8)
        storage = values.untyped_storage().data_ptr()
        if storage in self._storages:  # another view of it is stored; safetensors wants no overlap
            values = values.clone()
        self._storages.add(values.untyped_storage().data_ptr())
        name = str(len(self.tensors))
        self.tensors[name] = values
        return name


def _check_dense(tensor: Tensor, path: Path) -> None:
    sort = None
    if tensor.is_nested or tensor.layout is not torch.strided:
        sort = "sparse or nested"
    elif tensor.is_quantized:
        sort = "quantized"
    elif tensor.is_meta:
        sort = "meta"
    if sort is not None:
        raise UsageError(
            f"{_name(path)} is a {sort} tensor, which a checkpoint cannot hold. Save a dense "
            "tensor with values."
        )


# ---------------------------------------------------------------------------------------- reading


def _from_node(node: Any, tensors: dict[str, Tensor], depth: int) -> Any:
    if depth > MAX_DEPTH:
        raise ValueError(f"it is nested more than {MAX_DEPTH} deep")
    if isinstance(node, list):
        return [_from_node(item, tensors, depth + 1) for item in node]
    if not isinstance(node, dict):
        return node
    [(kind, content)] = node.items()  # a ValueError where there is not one
    if kind in ("int", "float", "text"):
        return _scalar_from_node(kind, content)
    if kind == "tuple":
        return tuple(_from_node(item, tensors, depth + 1) for item in content)
    if kind == "dict":
        return dict(_pairs_from_nodes(content, tensors, depth))
    if kind == "ordered":
        return _ordered_from_node(content, tensors, depth)
    if kind == "tensor":
        return _tensor_from_node(content, tensors)
    raise ValueError(f"it holds the unknown kind of value {kind!r}")


def _scalar_from_node(kind: str, content: str) -> int | float | str:
    if kind == "int":
        return int(content, 16)
    if kind == "float":
        return struct.unpack(">d", bytes.fromhex(content))[0]
    return bytes.fromhex(content).decode("utf-8", errors="surrogatepass")


def _pairs_from_nodes(
    pairs: Any, tensors: dict[str, Tensor], depth: int
) -> list[tuple[str | int, Any]]:
    found = [
        (_from_node(key, tensors, depth + 1), _from_node(value, tensors, depth + 1))
        for key, value in pairs
    ]
    if any(type(key) not in (str, int) for key, _ in found):
        raise ValueError("a dict has a key that is neither text nor an integer")
    if len({key for key, _ in found}) != len(found):
        raise ValueError("a dict has a key twice")
    return found


def _ordered_from_node(
    content: Any, tensors: dict[str, Tensor], depth: int
) -> OrderedDict[str | int, Any]:
    values = OrderedDict(_pairs_from_nodes(content["items"], tensors, depth))
    metadata = _from_node(content["metadata"], tensors, depth + 1)
    if metadata is not None:
        values._metadata = metadata  # pyright: ignore[reportAttributeAccessIssue]
    return values


def _tensor_from_node(content: Any, tensors: dict[str, Tensor]) -> Tensor:
    tensor = tensors[content["name"]]
    if "dtype" in content:
        tensor = tensor.view(_DTYPES[content["dtype"]]).reshape(content["shape"])
    if "order" in content:
        order = content["order"]
        tensor = tensor.permute(sorted(range(len(order)), key=order.__getitem__))
    return tensor
