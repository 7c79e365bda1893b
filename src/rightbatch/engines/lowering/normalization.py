"""Batch, layer and group normalisation. Batch normalisation also returns its new statistics."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array, lax

Normalized = tuple[Array, Array, Array]


def _moments(x: Array, axes: Sequence[int]) -> tuple[Array, Array]:
    mean = jnp.mean(x, axis=axes, keepdims=True)
    deviation = x - mean
    return mean, jnp.mean(deviation * deviation, axis=axes, keepdims=True)


def _scaled(x: Array, weight: Array | None, bias: Array | None) -> Array:
    x = x if weight is None else x * weight
    return x if bias is None else x + bias


def _batch_norm(
    x: Array,
    weight: Array | None,
    bias: Array | None,
    running_mean: Array | None,
    running_var: Array | None,
    training: bool,
    momentum: float,
    eps: float,
) -> tuple[Normalized, dict[int, Array]]:
    """The outputs, and the new running statistics by argument position."""
    shape = (1, -1, *[1] * (x.ndim - 2))
    weight, bias = (None if v is None else v.reshape(shape) for v in (weight, bias))
    if not training:
        assert running_mean is not None
        assert running_var is not None
        inverse = lax.rsqrt(running_var + eps).reshape(shape)
        out = _scaled((x - running_mean.reshape(shape)) * inverse, weight, bias)
        return (out, jnp.zeros(0, x.dtype), jnp.zeros(0, x.dtype)), {}
    mean, var = _moments(x, (0, *range(2, x.ndim)))
    inverse = lax.rsqrt(var + eps)
    out = _scaled((x - mean) * inverse, weight, bias)
    changed: dict[int, Array] = {}
    if running_mean is not None and running_var is not None:
        count = x.size // x.shape[1]
        unbiased = var.reshape(-1) * (count / (count - 1) if count > 1 else jnp.nan)
        changed[3] = (1 - momentum) * running_mean + momentum * mean.reshape(-1)
        changed[4] = (1 - momentum) * running_var + momentum * unbiased
    return (out, mean.reshape(-1), inverse.reshape(-1)), changed


def _batch_norm_without_stats(
    x: Array,
    weight: Array | None,
    bias: Array | None,
    training: bool,
    momentum: float,
    eps: float,
) -> Normalized:
    return _batch_norm(x, weight, bias, None, None, training, momentum, eps)[0]


def _layer_norm(
    x: Array, shape: Sequence[int], weight: Array | None, bias: Array | None, eps: float
) -> Normalized:
    mean, var = _moments(x, tuple(range(x.ndim - len(shape), x.ndim)))
    inverse = lax.rsqrt(var + eps)
    return _scaled((x - mean) * inverse, weight, bias), mean, inverse


def _group_norm(
    x: Array,
    weight: Array | None,
    bias: Array | None,
    batch: int,
    channels: int,
    places: int,
    groups: int,
    eps: float,
) -> Normalized:
    grouped = x.reshape(batch, groups, channels // groups * places)
    mean, var = _moments(grouped, (2,))
    inverse = lax.rsqrt(var + eps)
    out = ((grouped - mean) * inverse).reshape(x.shape)
    shape = (1, channels, *[1] * (x.ndim - 2))
    weight, bias = (None if v is None else v.reshape(shape) for v in (weight, bias))
    return _scaled(out, weight, bias), mean[..., 0], inverse[..., 0]


NORMALIZATION: dict[str, Callable[..., Any]] = {
    "aten.native_batch_norm.default": _batch_norm,
    "aten._native_batch_norm_legit.default": _batch_norm,
    "aten._native_batch_norm_legit.no_stats": _batch_norm_without_stats,
    "aten.native_layer_norm.default": _layer_norm,
    "aten.native_group_norm.default": _group_norm,
}

MUTATED = {"aten.native_batch_norm.default", "aten._native_batch_norm_legit.default"}
"""Lowerings that also return new values for some of their arguments, by position."""
