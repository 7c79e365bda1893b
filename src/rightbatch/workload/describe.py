"""Batches in words, for error messages, and their tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor


def describe(value: Any) -> str:
    """A batch, or a part of one, in a few words: kinds, dtypes and shapes.

    Args:
        value: Anything.

    Returns:
        Such as `(float32 (4, 3), int64 (4))`.

    Example:
        >>> describe((torch.zeros(4, 3), torch.zeros(4).long()))
        '(float32 (4, 3), int64 (4))'
        >>> describe({"text": [1, 2]})
        "{'text': a list of 2}"
    """
    if isinstance(value, Tensor):
        shape = ", ".join(str(size) for size in value.shape)
        return f"{str(value.dtype).removeprefix('torch.')} ({shape})"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key!r}: {describe(v)}" for key, v in value.items()) + "}"
    if isinstance(value, tuple | list) and len(value) <= 4 and [*tensors_in(value)]:
        return "(" + ", ".join(describe(part) for part in value) + ")"
    if isinstance(value, tuple | list):
        return f"a {type(value).__name__} of {len(value)}"
    if value is None or isinstance(value, bool | int | float | str):
        return repr(value)[:80]
    return f"a {type(value).__name__}"


def tensors_in(value: Any) -> Iterator[Tensor]:
    """All tensors in nested tuples, lists and mappings, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from tensors_in(part)
    elif isinstance(value, tuple | list):
        for part in value:
            yield from tensors_in(part)


def move(value: Any, device: str | torch.device) -> Any:
    """A batch with its tensors on a device; containers keep their kind."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: move(part, device) for key, part in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(move(part, device) for part in value))
    if isinstance(value, tuple | list):
        return type(value)(move(part, device) for part in value)
    return value
