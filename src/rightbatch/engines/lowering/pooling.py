"""Pooling over windows, forward and backward, as sums and maxima of strided slices."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from rightbatch.engines.lowering.products import taps


def _pair(value: Sequence[int]) -> list[int]:
    return list(value) * 2 if len(value) == 1 else list(value)


def _out_size(size: int, kernel: int, stride: int, pad: int, dilation: int, ceil: bool) -> int:
    """Number of windows; with `ceil`, one may reach over the end but must start before it."""
    span = size + 2 * pad - dilation * (kernel - 1) - 1
    count = (span + (stride - 1 if ceil else 0)) // stride + 1
    if ceil and (count - 1) * stride >= size + pad:
        count -= 1
    return count


class _Windows:
    """Where the windows of a 2-D pooling lie."""

    def __init__(
        self,
        x: Array,
        kernel: Sequence[int],
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        ceil: bool,
    ) -> None:
        self.kernel = _pair(kernel)
        self.stride = _pair(stride) if len(stride) else self.kernel
        self.padding, self.dilation = _pair(padding), _pair(dilation)
        self.space = list(x.shape[-2:])
        self.out = [
            _out_size(*sizes, ceil)
            for sizes in zip(
                self.space, self.kernel, self.stride, self.padding, self.dilation, strict=True
            )
        ]

    def _widths(self) -> list[tuple[int, int, int]]:
        """Padding that makes every window complete (negative where the end is not reached)."""
        widths = [(0, 0, 0), (0, 0, 0)]
        for n, k, s, p, d, o in zip(
            self.space, self.kernel, self.stride, self.padding, self.dilation, self.out,
            strict=True,
        ):  # fmt: skip
            widths.append((p, (o - 1) * s + d * (k - 1) + 1 - n - p, 0))
        return widths

    def slices(self, x: Array, fill: Any) -> list[Array]:
        padded = lax.pad(x, jnp.asarray(fill, x.dtype), self._widths())
        return taps(padded, self.kernel, self.stride, self.dilation, self.out)


def _four_dimensional(function: Callable[..., Any]) -> Callable[..., Any]:
    """Lets a function of (batch, channels, height, width) take (channels, height, width) too."""

    def apply(x: Array, *args: Any, **kwargs: Any) -> Any:
        if x.ndim == 4:
            return function(x, *args, **kwargs)
        return jax.tree.map(lambda y: y[0], function(x[None], *args, **kwargs))

    return apply


@_four_dimensional
def _max_pool(
    x: Array,
    kernel: Sequence[int],
    stride: Sequence[int] = (),
    padding: Sequence[int] = (0,),
    dilation: Sequence[int] = (1,),
    ceil_mode: bool = False,
) -> tuple[Array, Array]:
    windows = _Windows(x, kernel, stride, padding, dilation, ceil_mode)
    lowest = -jnp.inf if jnp.issubdtype(x.dtype, jnp.floating) else jnp.iinfo(x.dtype).min
    values = windows.slices(x, lowest)
    places = lax.broadcasted_iota(jnp.int32, (1, 1, *windows.space), 2) * windows.space[
        1
    ] + lax.broadcasted_iota(jnp.int32, (1, 1, *windows.space), 3)
    best, where = values[0], None
    for value, place in zip(values, windows.slices(places, -1), strict=True):
        # The first of equal values wins, and NaN wins over all, as in torch. What starts as the
        # best may be padding, which never does.
        if where is None:
            where = jnp.broadcast_to(place, value.shape)
            continue
        better = (value > best) | jnp.isnan(value) | ((where < 0) & (place >= 0))
        best, where = jnp.where(better, value, best), jnp.where(better, place, where)
    assert where is not None
    return best, where


def _max_pool_backward(
    grad: Array,
    x: Array,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
    indices: Array,
) -> Array:
    if x.ndim == 3:
        lifted = (grad[None], x[None], kernel, stride, padding, dilation, ceil_mode)
        return _max_pool_backward(*lifted, indices[None])[0]
    windows = _Windows(x, kernel, stride, padding, dilation, ceil_mode)
    places = jnp.arange(windows.space[0] * windows.space[1]).reshape(1, 1, *windows.space)
    hits = [place == indices for place in windows.slices(places, -1)]
    routed = [jnp.where(hit, grad, 0) for hit in hits]
    # The transpose of cutting slices out: each slice is added back where it came from.
    (result,) = jax.vjp(lambda value: windows.slices(value, 0), jnp.zeros_like(x))[1](routed)
    return result


@_four_dimensional
def _average_pool(
    x: Array,
    kernel: Sequence[int],
    stride: Sequence[int] = (),
    padding: Sequence[int] = (0,),
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Array:
    windows = _Windows(x, kernel, stride, padding, (1,), ceil_mode)
    total = functools.reduce(jnp.add, windows.slices(x, 0))
    if divisor_override is not None:
        return total / divisor_override
    return total / jnp.asarray(_window_sizes(windows, count_include_pad), x.dtype)


def _window_sizes(windows: _Windows, include_pad: bool) -> np.ndarray[Any, Any]:
    """How many entries each window averages; what lies beyond the padding never counts."""
    sizes = []
    for n, k, s, p, o in zip(
        windows.space, windows.kernel, windows.stride, windows.padding, windows.out, strict=True
    ):
        first = np.arange(o) * s - p
        last = np.minimum(first + k, n + p)
        if not include_pad:
            first, last = np.maximum(first, 0), np.minimum(last, n)
        sizes.append(last - first)
    return np.outer(sizes[0], sizes[1])


def _average_pool_backward(grad: Array, x: Array, *options: Any) -> Array:
    (result,) = jax.vjp(lambda value: _average_pool(value, *options), jnp.zeros_like(x))[1](grad)
    return result


def _adaptive_average_pool(x: Array, size: Sequence[int]) -> Array:
    rows, columns = (
        jnp.asarray(_adaptive_weights(n, o), x.dtype)
        for n, o in zip(x.shape[-2:], size, strict=True)
    )
    exact = lax.Precision.HIGHEST
    return jnp.einsum("...hw,oh,pw->...op", x, rows, columns, precision=exact)


def _adaptive_weights(size: int, out: int) -> np.ndarray[Any, Any]:
    """Output o averages inputs ⌊o·size/out⌋ … ⌈(o+1)·size/out⌉ − 1; shape (out, size)."""
    weights = np.zeros((out, size))
    for o in range(out):
        first, last = o * size // out, -(-(o + 1) * size // out)
        weights[o, first:last] = 1 / (last - first)
    return weights


def _adaptive_average_pool_backward(grad: Array, x: Array) -> Array:
    size = grad.shape[-2:]
    zeros = jnp.zeros_like(x)
    (result,) = jax.vjp(lambda value: _adaptive_average_pool(value, size), zeros)[1](grad)
    return result


POOLING: dict[str, Callable[..., Any]] = {
    "aten.max_pool2d_with_indices.default": _max_pool,
    "aten.max_pool2d_with_indices_backward.default": _max_pool_backward,
    "aten.avg_pool2d.default": _average_pool,
    "aten.avg_pool2d_backward.default": _average_pool_backward,
    "aten._adaptive_avg_pool2d.default": _adaptive_average_pool,
    "aten._adaptive_avg_pool2d_backward.default": _adaptive_average_pool_backward,
}
