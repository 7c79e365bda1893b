"""Matrix products and convolutions, in full float32 precision on every device."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

_EXACT = lax.Precision.HIGHEST


def matmul(x: Array, y: Array) -> Array:
    """The matrix product, without TF32 or other shortcuts."""
    return jnp.matmul(x, y, precision=_EXACT)


def _addmm(bias: Array, x: Array, y: Array, *, beta: Any = 1, alpha: Any = 1) -> Array:
    product = matmul(x, y)
    product = product if alpha == 1 else alpha * product
    if beta == 0:
        return product
    return product + (bias if beta == 1 else beta * bias)


def _dot(x: Array, y: Array) -> Array:
    return jnp.dot(x, y, precision=_EXACT)


def taps(
    x: Array,
    kernel: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    out: Sequence[int],
) -> list[Array]:
    """For each position of a kernel, the inputs it meets: a strided slice of shape (…, *out).

    Args:
        x: Padded input, shape (batch, channels, *space).
        kernel: Size of the kernel in each dimension of space.
        stride: Distance between outputs.
        dilation: Distance between positions of the kernel.
        out: Size of the output in each dimension of space.

    Returns:
        One array per position, the last dimension of the kernel running fastest.
    """
    positions: list[tuple[int, ...]] = [()]
    for size in kernel:
        positions = [(*p, k) for p in positions for k in range(size)]
    results = []
    for position in positions:
        starts = [k * d for k, d in zip(position, dilation, strict=True)]
        stops = [a + (n - 1) * s + 1 for a, n, s in zip(starts, out, stride, strict=True)]
        results.append(lax.slice(x, (0, 0, *starts), (*x.shape[:2], *stops), (1, 1, *stride)))
    return results


def _pad_space(x: Array, padding: Sequence[int]) -> Array:
    return lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), (0, 0, 0), *((p, p, 0) for p in padding)])


def convolution(
    x: Array,
    weight: Array,
    bias: Array | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
) -> Array:
    """Convolution as slices and one matrix product.

    XLA's own convolution becomes a grouped one when it is mapped over copies with different
    weights, which its CPU code runs without blocking; slices and a batched product stay fast.

    Args:
        x: Input, shape (batch, channels, *space).
        weight: Shape (out_channels, channels / groups, *kernel); transposed: the first two
            swapped.
        bias: Shape (out_channels,), or None.
        stride: Per dimension of space.
        padding: Per dimension of space, on both sides.
        dilation: Per dimension of space.
        transposed: Whether this is a transposed convolution.
        output_padding: Extra size of a transposed convolution's output.
        groups: Groups of channels that do not mix.

    Returns:
        Shape (batch, out_channels, *out_space).
    """
    dims = x.ndim - 2
    stride, padding, dilation = (_spread(v, dims) for v in (stride, padding, dilation))
    kernel = weight.shape[2:]
    if transposed:
        x, weight = _as_direct(x, weight, stride, padding, dilation, output_padding, groups)
        stride = [1] * dims
    else:
        x = _pad_space(x, padding)
    out = [
        (size - d * (k - 1) - 1) // s + 1
        for size, k, s, d in zip(x.shape[2:], kernel, stride, dilation, strict=True)
    ]
    result = _as_product(x, weight, stride, dilation, out, groups)
    return result if bias is None else result + bias.reshape(1, -1, *[1] * dims)


def _spread(value: Sequence[int], dims: int) -> list[int]:
    return list(value) * dims if len(value) == 1 else list(value)


def _as_direct(
    x: Array,
    weight: Array,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    output_padding: Sequence[int],
    groups: int,
) -> tuple[Array, Array]:
    """A transposed convolution as a direct one: zeros between inputs, kernel turned round."""
    dims = x.ndim - 2
    spreads = [(0, 0, 0), (0, 0, 0)]
    for k, s, p, d, o in zip(
        weight.shape[2:], stride, padding, dilation, _spread(output_padding, dims), strict=True
    ):
        edge = d * (k - 1) - p
        spreads.append((edge, edge + o, s - 1))
    x = lax.pad(x, jnp.zeros((), x.dtype), spreads)
    ins, outs = weight.shape[0], weight.shape[1]
    weight = weight.reshape(groups, ins // groups, outs, *weight.shape[2:])
    weight = jnp.swapaxes(weight, 1, 2).reshape(groups * outs, ins // groups, *weight.shape[3:])
    return x, jnp.flip(weight, axis=tuple(range(2, 2 + dims)))


def _as_product(
    x: Array,
    weight: Array,
    stride: Sequence[int],
    dilation: Sequence[int],
    out: Sequence[int],
    groups: int,
) -> Array:
    batch, channels = x.shape[:2]
    out_channels, kernel = weight.shape[0], weight.shape[2:]
    # Channels lead and examples stay beside places, so that the stacked slices are the right
    # factor of one product as they lie in memory: no transposed copy of the patches is made.
    slices = taps(jnp.swapaxes(x, 0, 1), kernel, stride, dilation, out)
    columns = batch * math.prod(out)
    patches = jnp.stack(slices)
    rows = weight.reshape(out_channels, channels // groups, len(slices))
    if groups == 1:
        patches = patches.reshape(len(slices) * channels, columns)
        result = matmul(jnp.swapaxes(rows, 1, 2).reshape(out_channels, -1), patches)
    else:
        patches = patches.reshape(len(slices), groups, channels // groups, columns)
        rows = rows.reshape(groups, out_channels // groups, channels // groups, len(slices))
        result = jnp.einsum("gock,kgcp->gop", rows, patches, precision=_EXACT)
    return jnp.swapaxes(result.reshape(out_channels, batch, *out), 0, 1)


def _convolution_backward(
    grad: Array,
    x: Array,
    weight: Array,
    bias_sizes: Any,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
    wanted: Sequence[bool],
) -> list[Array | None]:
    def forward(x: Array, weight: Array) -> Array:
        return convolution(
            x, weight, None, stride, padding, dilation, transposed, output_padding, groups
        )

    grad_x = grad_weight = grad_bias = None
    if wanted[0]:
        (grad_x,) = jax.vjp(lambda value: forward(value, weight), x)[1](grad)
    if wanted[1]:
        (grad_weight,) = jax.vjp(lambda value: forward(x, value), weight)[1](grad)
    if wanted[2]:
        grad_bias = jnp.sum(grad, axis=(0, *range(2, grad.ndim)))
    return [grad_x, grad_weight, grad_bias]


PRODUCTS: dict[str, Callable[..., Any]] = {
    "aten.mm.default": matmul,
    "aten.bmm.default": matmul,
    "aten.mv.default": matmul,
    "aten.dot.default": _dot,
    "aten.addmm.default": _addmm,
    "aten.baddbmm.default": _addmm,
    "aten.convolution.default": convolution,
    "aten.convolution_backward.default": _convolution_backward,
}
