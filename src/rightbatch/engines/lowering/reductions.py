"""Sums, means, extremes, softmax. An empty list of dimensions means all of them in ATen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from rightbatch.engines.lowering.dtypes import jax_dtype


def _axes(x: Array, dim: Any) -> tuple[int, ...]:
    if dim is None or (isinstance(dim, Sequence) and len(dim) == 0):
        return tuple(range(x.ndim))
    dims = dim if isinstance(dim, Sequence) else (dim,)
    return tuple(d % x.ndim for d in dims) if x.ndim else ()


def _first_cast(x: Array, dtype: Any) -> Array:
    return x if dtype is None else x.astype(jax_dtype(dtype))


def _sum(x: Array, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Array:
    return jnp.sum(_first_cast(x, dtype), axis=_axes(x, dim), keepdims=keepdim)


def _mean(x: Array, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Array:
    return jnp.mean(_first_cast(x, dtype), axis=_axes(x, dim), keepdims=keepdim)


def _variance(
    x: Array, dim: Any = None, *, correction: float | None = None, keepdim: bool = False
) -> Array:
    axes = _axes(x, dim)
    ddof = 1 if correction is None else correction
    deviations = x - jnp.mean(x, axis=axes, keepdims=True)
    count = x.size // max(1, _size(jnp.sum(x, axis=axes)))
    return jnp.sum(deviations * deviations, axis=axes, keepdims=keepdim) / max(0, count - ddof)


def _size(x: Array) -> int:
    return x.size


def _variance_and_mean(x: Array, dim: Any = None, **options: Any) -> tuple[Array, Array]:
    keepdim = options.get("keepdim", False)
    return _variance(x, dim, **options), _mean(x, dim, keepdim)


def _product(x: Array, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Array:
    return jnp.prod(_first_cast(x, dtype), axis=_axes(x, dim), keepdims=keepdim)


def _amax(x: Array, dim: Any = (), keepdim: bool = False) -> Array:
    return jnp.max(x, axis=_axes(x, dim), keepdims=keepdim)


def _amin(x: Array, dim: Any = (), keepdim: bool = False) -> Array:
    return jnp.min(x, axis=_axes(x, dim), keepdims=keepdim)


def _arg(function: Callable[..., Array]) -> Callable[..., Array]:
    def apply(x: Array, dim: int | None = None, keepdim: bool = False) -> Array:
        if x.ndim == 0:
            return jnp.zeros((), jnp.int32)
        return function(x, axis=dim, keepdims=keepdim)

    return apply


def _with_index(
    extreme: Callable[..., Array], arg: Callable[..., Array]
) -> Callable[..., tuple[Array, Array]]:
    def apply(x: Array, dim: int, keepdim: bool = False) -> tuple[Array, Array]:
        return extreme(x, dim, keepdim), arg(x, dim, keepdim)

    return apply


def _any(x: Array, dim: Any = None, keepdim: bool = False) -> Array:
    return jnp.any(x, axis=_axes(x, dim), keepdims=keepdim)


def _all(x: Array, dim: Any = None, keepdim: bool = False) -> Array:
    return jnp.all(x, axis=_axes(x, dim), keepdims=keepdim)


def _cumulative_sum(x: Array, dim: int, *, dtype: Any = None) -> Array:
    return jnp.cumsum(_first_cast(x, dtype), axis=dim) if x.ndim else x


def _softmax(x: Array, dim: int, _half_to_float: bool = False) -> Array:
    if x.ndim == 0:
        return jnp.ones_like(x)
    shifted = jnp.exp(x - lax.stop_gradient(jnp.max(x, axis=dim, keepdims=True)))
    return shifted / jnp.sum(shifted, axis=dim, keepdims=True)


def _log_softmax(x: Array, dim: int, _half_to_float: bool = False) -> Array:
    return jnp.zeros_like(x) if x.ndim == 0 else jax.nn.log_softmax(x, axis=dim)


def _sort(x: Array, dim: int = -1, descending: bool = False) -> tuple[Array, Array]:
    order = jnp.argsort(x, axis=dim, stable=True, descending=descending)
    return jnp.take_along_axis(x, order, axis=dim), order


_argmax, _argmin = _arg(jnp.argmax), _arg(jnp.argmin)

REDUCTIONS: dict[str, Callable[..., Any]] = {
    "aten.sum.default": _sum,
    "aten.sum.dim_IntList": _sum,
    "aten.mean.default": _mean,
    "aten.mean.dim": _mean,
    "aten.var.correction": _variance,
    "aten.var_mean.correction": _variance_and_mean,
    "aten.prod.default": lambda x, **options: _product(x, None, **options),
    "aten.prod.dim_int": _product,
    "aten.amax.default": _amax,
    "aten.amin.default": _amin,
    "aten.max.default": _amax,
    "aten.min.default": _amin,
    "aten.max.dim": _with_index(_amax, _argmax),
    "aten.min.dim": _with_index(_amin, _argmin),
    "aten.argmax.default": _argmax,
    "aten.argmin.default": _argmin,
    "aten.any.default": _any,
    "aten.any.dim": _any,
    "aten.any.dims": _any,
    "aten.all.default": _all,
    "aten.all.dim": _all,
    "aten.cumsum.default": _cumulative_sum,
    "aten._softmax.default": _softmax,
    "aten._log_softmax.default": _log_softmax,
    "aten.sort.default": _sort,
}
