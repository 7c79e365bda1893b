"""Reading and writing at computed indices.

A scatter or gather that touches one entry per row is written as a comparison with the row's
positions: dense, but it fuses and needs no loop, which on small rows is many times faster.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array, lax

DENSE_ROW = 512
"""Rows up to this long are read and written by comparison."""
DENSE_VOCABULARY = 512
"""Embedding tables up to this long receive their gradient by a product with one-hot rows."""


def _nonnegative(index: Array, length: int) -> Array:
    return jnp.where(index < 0, index + length, index)


def _is_dense(x: Array, dim: int, index: Array) -> bool:
    others = [d for d in range(x.ndim) if d != dim]
    return (
        index.ndim == x.ndim
        and index.shape[dim] == 1
        and x.shape[dim] <= DENSE_ROW
        and all(index.shape[d] == x.shape[d] for d in others)
    )


def _hits(x: Array, dim: int, index: Array) -> Array:
    return lax.broadcasted_iota(jnp.int32, x.shape, dim) == index


def _gather(x: Array, dim: int, index: Array, *, sparse_grad: bool = False) -> Array:
    if x.ndim == 0:
        return jnp.broadcast_to(x, index.shape)
    dim %= x.ndim
    if _is_dense(x, dim, index):
        return jnp.sum(jnp.where(_hits(x, dim, index), x, 0), axis=dim, keepdims=True)
    return x[_grid(index, dim)]


def _grid(index: Array, dim: int) -> tuple[Array, ...]:
    """Full index arrays: positions in every dimension, `index` itself in `dim`."""
    return tuple(
        index if d == dim else lax.broadcasted_iota(jnp.int32, index.shape, d)
        for d in range(index.ndim)
    )


def _scatter_value(x: Array, dim: int, index: Array, value: Any) -> Array:
    dim %= x.ndim
    if _is_dense(x, dim, index):
        return jnp.where(_hits(x, dim, index), jnp.asarray(value, x.dtype), x)
    return x.at[_grid(index, dim)].set(value)


def _scatter_source(x: Array, dim: int, index: Array, source: Array) -> Array:
    dim %= x.ndim
    trimmed = source[tuple(slice(n) for n in index.shape)]
    if _is_dense(x, dim, index):
        return jnp.where(_hits(x, dim, index), trimmed, x)
    return x.at[_grid(index, dim)].set(trimmed)


def _scatter_add(x: Array, dim: int, index: Array, source: Array) -> Array:
    dim %= x.ndim
    trimmed = source[tuple(slice(n) for n in index.shape)]
    if _is_dense(x, dim, index):
        return jnp.where(_hits(x, dim, index), x + trimmed, x)
    return x.at[_grid(index, dim)].add(trimmed)


def _index_select(x: Array, dim: int, index: Array) -> Array:
    return jnp.take(x, index, axis=dim)


def _embedding(weight: Array, index: Array, *_: Any, **__: Any) -> Array:
    return weight[index]


def _embedding_gradient(
    grad: Array, index: Array, num_weights: int, padding: int, by_frequency: bool
) -> Array:
    if by_frequency:
        raise ValueError("scale_grad_by_freq")
    rows = grad.reshape(-1, grad.shape[-1])
    return _add_rows(jnp.zeros((num_weights, rows.shape[1]), grad.dtype), index, rows, padding)


def _add_rows(table: Array, index: Array, rows: Array, padding: int = -1) -> Array:
    flat = index.reshape(-1)
    if len(table) <= DENSE_VOCABULARY:
        hot = flat[:, None] == jnp.arange(len(table))
        if padding >= 0:
            hot &= (flat != padding)[:, None]
        product = jnp.matmul(hot.T.astype(rows.dtype), rows, precision=lax.Precision.HIGHEST)
        return table + product
    if padding >= 0:
        rows = jnp.where((flat == padding)[:, None], 0, rows)
    return table.at[flat].add(rows)


def _resolved(x: Array, indices: Sequence[Array | None]) -> tuple[Any, ...]:
    if any(i is not None and i.dtype == jnp.bool_ for i in indices):
        raise ValueError("a boolean mask, whose result has no fixed shape")
    return tuple(
        slice(None) if i is None else _nonnegative(i, x.shape[d]) for d, i in enumerate(indices)
    )


def _index(x: Array, indices: Sequence[Array | None]) -> Array:
    return x[_resolved(x, indices)]


def _index_put(
    x: Array, indices: Sequence[Array | None], values: Array, accumulate: bool = False
) -> Array:
    one = len(indices) == 1 and indices[0] is not None and x.ndim == 2
    if one and accumulate and values.shape == (*indices[0].shape, x.shape[1]):  # pyright: ignore[reportOptionalMemberAccess]
        index = _resolved(x, indices)[0]
        return _add_rows(x, index, values.reshape(-1, x.shape[1]))
    at = x.at[_resolved(x, indices)]
    return at.add(values) if accumulate else at.set(values)


INDEXING: dict[str, Callable[..., Any]] = {
    "aten.gather.default": _gather,
    "aten.scatter.value": _scatter_value,
    "aten.scatter.src": _scatter_source,
    "aten.scatter_add.default": _scatter_add,
    "aten.index_select.default": _index_select,
    "aten.embedding.default": _embedding,
    "aten.embedding_dense_backward.default": _embedding_gradient,
    "aten.index.Tensor": _index,
    "aten.index_put.default": _index_put,
    "aten._unsafe_index.Tensor": _index,
    "aten._unsafe_index_put.default": _index_put,
}
