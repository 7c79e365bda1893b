"""Views, copies into other shapes, and tensors made from nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from rightbatch.engines.lowering.dtypes import jax_dtype


def _dtype(dtype: Any, default: Any = jnp.float32) -> Any:
    return default if dtype is None else jax_dtype(dtype)


def _view(x: Array, size: Sequence[int]) -> Array:
    return jnp.reshape(x, tuple(size))


def _permute(x: Array, dims: Sequence[int]) -> Array:
    return jnp.transpose(x, [d % x.ndim for d in dims]) if x.ndim else x


def _transpose(x: Array, dim0: int, dim1: int) -> Array:
    return jnp.swapaxes(x, dim0, dim1) if x.ndim else x


def _expand(x: Array, size: Sequence[int], *, implicit: bool = False) -> Array:
    offset = len(size) - x.ndim
    shape = [x.shape[i - offset] if s == -1 else s for i, s in enumerate(size)]
    return jnp.broadcast_to(x, shape)


def _unsqueeze(x: Array, dim: int) -> Array:
    return jnp.expand_dims(x, dim)


def _squeeze(x: Array, dim: Any = None) -> Array:
    dims = range(x.ndim) if dim is None else dim if isinstance(dim, Sequence) else [dim]
    axes = {d % x.ndim for d in dims} if x.ndim else set()
    return jnp.squeeze(x, tuple(axis for axis in sorted(axes) if x.shape[axis] == 1))


def _bounds(length: int, start: int | None, end: int | None) -> tuple[int, int]:
    first, last, _ = slice(start, end).indices(length)
    return first, max(first, last)


def _slice(
    x: Array, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> Array:
    first, last = _bounds(x.shape[dim], start, end)
    return lax.slice_in_dim(x, first, last, step, axis=dim % x.ndim)


def _slice_scatter(
    x: Array,
    source: Array,
    dim: int = 0,
    start: int | None = None,
    end: int | None = None,
    step: int = 1,
) -> Array:
    first, last = _bounds(x.shape[dim], start, end)
    where = (slice(None),) * (dim % x.ndim) + (slice(first, last, step),)
    return x.at[where].set(source)


def _select(x: Array, dim: int, index: int) -> Array:
    return lax.index_in_dim(x, index, axis=dim % x.ndim, keepdims=False)


def _select_scatter(x: Array, source: Array, dim: int, index: int) -> Array:
    return x.at[(slice(None),) * (dim % x.ndim) + (index,)].set(source)


def _cat(tensors: Sequence[Array], dim: int = 0) -> Array:
    # An empty 1-D tensor may be concatenated with anything in torch.
    used = [t for t in tensors if t.shape != (0,)] or list(tensors)
    return jnp.concatenate(used, axis=dim)


def _stack(tensors: Sequence[Array], dim: int = 0) -> Array:
    return jnp.stack(tensors, axis=dim)


def _split_with_sizes(x: Array, sizes: Sequence[int], dim: int = 0) -> list[Array]:
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return [
        lax.slice_in_dim(x, a, a + n, axis=dim % x.ndim) for a, n in zip(starts, sizes, strict=True)
    ]


def _split(x: Array, size: int, dim: int = 0) -> list[Array]:
    length = x.shape[dim]
    sizes = [min(size, length - a) for a in range(0, length, size)] or [0]
    return _split_with_sizes(x, sizes, dim)


def _unbind(x: Array, dim: int = 0) -> list[Array]:
    return [_select(x, dim, i) for i in range(x.shape[dim])]


def _repeat(x: Array, repeats: Sequence[int]) -> Array:
    return jnp.tile(x, tuple(repeats))


def _flip(x: Array, dims: Sequence[int]) -> Array:
    return jnp.flip(x, axis=tuple(dims))


def _roll(x: Array, shifts: Sequence[int], dims: Sequence[int] = ()) -> Array:
    if not dims:
        return jnp.roll(x, shifts[0])
    return jnp.roll(x, tuple(shifts), axis=tuple(dims))


def _pad(x: Array, pad: Sequence[int], value: Any = 0) -> Array:
    """Pads are given from the last dimension backwards, and may be negative."""
    widths = [(0, 0, 0)] * x.ndim
    for i in range(len(pad) // 2):
        widths[x.ndim - 1 - i] = (pad[2 * i], pad[2 * i + 1], 0)
    return lax.pad(x, jnp.asarray(value, x.dtype), widths)


def _full(size: Sequence[int], value: Any, *, dtype: Any = None, **_: Any) -> Array:
    return jnp.full(tuple(size), value, None if dtype is None else jax_dtype(dtype))


def _full_like(x: Array, value: Any, *, dtype: Any = None, **_: Any) -> Array:
    return jnp.full(x.shape, value, _dtype(dtype, x.dtype))


def _zeros(size: Sequence[int], *, dtype: Any = None, **_: Any) -> Array:
    return jnp.zeros(tuple(size), _dtype(dtype))


def _new_zeros(x: Array, size: Sequence[int], *, dtype: Any = None, **_: Any) -> Array:
    return jnp.zeros(tuple(size), _dtype(dtype, x.dtype))


def _scalar_tensor(value: Any, *, dtype: Any = None, **_: Any) -> Array:
    return jnp.asarray(value)


def _arange(start: Any, end: Any, step: Any = 1, *, dtype: Any = None, **_: Any) -> Array:
    return jnp.arange(start, end, step, None if dtype is None else jax_dtype(dtype))


def _tril(x: Array, diagonal: int = 0) -> Array:
    return jnp.tril(x, diagonal)


def _triu(x: Array, diagonal: int = 0) -> Array:
    return jnp.triu(x, diagonal)


def _diagonal(x: Array, offset: int = 0, dim1: int = 0, dim2: int = 1) -> Array:
    return jnp.diagonal(x, offset, dim1, dim2)


SHAPES: dict[str, Callable[..., Any]] = {
    "aten.view.default": _view,
    "aten._unsafe_view.default": _view,
    "aten.reshape.default": _view,
    "aten.permute.default": _permute,
    "aten.transpose.int": _transpose,
    "aten.t.default": lambda x: x.T,
    "aten.expand.default": _expand,
    "aten.unsqueeze.default": _unsqueeze,
    "aten.squeeze.default": _squeeze,
    "aten.squeeze.dim": _squeeze,
    "aten.squeeze.dims": _squeeze,
    "aten.slice.Tensor": _slice,
    "aten.slice_scatter.default": _slice_scatter,
    "aten.select.int": _select,
    "aten.select_scatter.default": _select_scatter,
    "aten.cat.default": _cat,
    "aten.stack.default": _stack,
    "aten.split.Tensor": _split,
    "aten.split_with_sizes.default": _split_with_sizes,
    "aten.unbind.int": _unbind,
    "aten.repeat.default": _repeat,
    "aten.flip.default": _flip,
    "aten.roll.default": _roll,
    "aten.constant_pad_nd.default": _pad,
    "aten.tril.default": _tril,
    "aten.triu.default": _triu,
    "aten.diagonal.default": _diagonal,
    "aten.full.default": _full,
    "aten.full_like.default": _full_like,
    "aten.zeros.default": _zeros,
    "aten.zeros_like.default": lambda x, **options: _full_like(x, 0, **options),
    "aten.ones_like.default": lambda x, **options: _full_like(x, 1, **options),
    "aten.empty.memory_format": _zeros,
    "aten.empty_permuted.default": lambda size, _, **options: _zeros(size, **options),
    "aten.new_zeros.default": _new_zeros,
    "aten.scalar_tensor.default": _scalar_tensor,
    "aten.arange.start_step": _arange,
}
