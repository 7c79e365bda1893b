"""Every lowered operation against torch's own, over shapes, dtypes and options."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

pytest.importorskip("jax")

from rightbatch.engines.lowering import LOWERINGS, lower
from rightbatch.engines.lowering.dtypes import to_jax, to_numpy
from rightbatch.engines.trace import trace_function
from rightbatch.engines.unsupported import Unsupported

Arguments = tuple[list[Any], dict[str, Any]]
SHAPES = [(), (1,), (4,), (2, 3), (1, 3), (2, 1, 3)]
few = functools.partial(
    settings,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


class Draw:
    """Random tensors and choices for one case."""

    def __init__(self, data: st.DataObject) -> None:
        self._data = data
        self._generator = torch.Generator().manual_seed(data.draw(st.integers(0, 10_000)))

    def of(self, *choices: Any) -> Any:
        return self._data.draw(st.sampled_from(choices))

    def shape(self, least: int = 0) -> tuple[int, ...]:
        return self.of(*[s for s in SHAPES if len(s) >= least])

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self._generator)

    def positive(self, *shape: int) -> Tensor:
        return self.normal(*shape).abs() + 0.1

    def unit(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self._generator) * 1.8 - 0.9

    def integers(self, *shape: int, low: int = -4, high: int = 5) -> Tensor:
        return torch.randint(low, high, shape, generator=self._generator)

    def bools(self, *shape: int) -> Tensor:
        return self.normal(*shape) > 0

    def number(self, *shape: int) -> Tensor:
        """Of a drawn dtype, with ties, so that equal values are met."""
        values = self.integers(*shape)
        return values.to(self.of(torch.float32, torch.int64, torch.int32))

    def broadcast_pair(self, make: Callable[..., Tensor]) -> tuple[Tensor, Tensor]:
        shape = self.shape()
        other = self.of(shape, tuple(1 for _ in shape), ())
        return make(*shape), make(*other)

    def dim(self, tensor: Tensor) -> int:
        return self.of(*range(-tensor.ndim, tensor.ndim)) if tensor.ndim else 0

    def dims(self, tensor: Tensor) -> Any:
        every = list(range(tensor.ndim))
        return self.of([], every, every[:1], [-1] if every else [])


def _unary(make: str) -> Callable[[Draw], Arguments]:
    return lambda d: ([getattr(d, make)(*d.shape())], {})


def _binary_tensor(d: Draw) -> Arguments:
    return list(d.broadcast_pair(d.of(d.number, d.normal))), {}


def _binary_scalar(d: Draw) -> Arguments:
    return [d.number(*d.shape()), d.of(2, -3, 0.5)], {}


def _nonzero_divisor(d: Draw) -> Arguments:
    x, y = d.broadcast_pair(d.number)
    return [x, torch.where(y == 0, torch.ones_like(y), y)], {}


def _bitwise_tensor(d: Draw) -> Arguments:
    return list(d.broadcast_pair(d.of(d.bools, d.integers))), {}


def _bitwise_scalar(d: Draw) -> Arguments:
    return [d.integers(*d.shape()), d.of(3, -2)], {}


def _reduce(d: Draw) -> Arguments:
    x = d.number(*d.shape(1))
    return [x, d.dims(x), d.of(True, False)], {}


def _reduce_float(d: Draw) -> Arguments:
    x = d.normal(*d.shape(1))
    return [x, d.dims(x), d.of(True, False)], {}


def _along(make: str = "number") -> Callable[[Draw], Arguments]:
    def build(d: Draw) -> Arguments:
        x = getattr(d, make)(*d.shape(1))
        return [x, d.dim(x)], {}

    return build


def _variance(d: Draw) -> Arguments:
    x = d.normal(3, 4)
    options = {"correction": d.of(None, 0, 1), "keepdim": d.of(True, False)}
    return [x, d.of([0], [1], [0, 1], None)], options


def _index_rows(d: Draw, *, rows: int = 3) -> tuple[Tensor, int, Tensor]:
    """A matrix, a dimension, and indices along it: one per row, or several."""
    dim = d.of(0, 1, -1)
    x = d.normal(rows, 5)
    shape = [rows, 5]
    shape[dim] = d.of(1, 2)
    return x, dim, d.integers(*shape, low=0, high=x.shape[dim])


def _scatter(d: Draw) -> Arguments:
    x, dim, index = _index_rows(d)
    # Each target once: the result of writing twice is not defined.
    length = index.shape[dim]
    order = torch.argsort(d.normal(*x.shape), dim=dim).narrow(dim, 0, length)
    return [x, dim, order], {}


def _scatter_with(source: str) -> Callable[[Draw], Arguments]:
    def build(d: Draw) -> Arguments:
        (x, dim, index), _ = _scatter(d)
        return [x, dim, index, 2.5 if source == "value" else d.normal(*x.shape)], {}

    return build


def _scatter_add(d: Draw) -> Arguments:
    x, dim, index = _index_rows(d)
    return [x, dim, index, d.normal(*index.shape)], {}


def _put(d: Draw, *, accumulate: bool) -> Arguments:
    rows = d.of(4, 600)  # a short table takes the dense way
    x = d.normal(rows, 2)
    index = d.integers(3, low=-4, high=4) if accumulate else torch.tensor([1, -1, 2])
    return [x, [index], d.normal(3, 2), accumulate], {}


def _embedding_gradient(d: Draw) -> Arguments:
    rows = d.of(4, 600)
    index = d.integers(2, 3, low=0, high=4)
    return [d.normal(2, 3, 5), index, rows, d.of(-1, 2), False], {}


def _matrices(d: Draw) -> Arguments:
    n, k, m = d.of(1, 3), d.of(1, 4), d.of(1, 5)
    return [d.normal(n, k), d.normal(k, m)], {}


def _add_product(d: Draw, *, batched: bool = False) -> Arguments:
    lead = (2,) if batched else ()
    x, y = d.normal(*lead, 3, 4), d.normal(*lead, 4, 5)
    bias = d.normal(*lead, 3, 5) if batched else d.normal(*d.of((5,), (3, 5)))
    return [bias, x, y], d.of({}, {"beta": 2, "alpha": 0.5}, {"beta": 0})


def _convolution(d: Draw) -> Arguments:
    dims = d.of(1, 2)
    groups, transposed = d.of(1, 2), d.of(False, True)
    ins, outs = 2 * groups, 3 * groups
    shape = (ins, 3) if transposed else (outs, ins // groups)
    kernel = [d.of(1, 3), d.of(2, 3)][:dims]
    stride = [d.of(1, 2) for _ in range(dims)]
    return [
        d.normal(2, ins, *[7, 6][:dims]),
        d.normal(*shape, *kernel),
        d.of(None, d.normal(outs)),
        stride,
        [d.of(0, 1)] * dims,
        [d.of(1, 2)] * dims,
        transposed,
        [s - 1 if transposed else 0 for s in stride],
        groups,
    ], {}


def _convolution_backward(d: Draw) -> Arguments:
    arguments, _ = _convolution(d)
    x, weight, _, *options = arguments
    out = torch.ops.aten.convolution.default(*arguments)
    wanted = d.of([True, True, True], [False, True, True], [True, False, False])
    return [d.normal(*out.shape), x, weight, [out.shape[1]], *options, wanted], {}


def _max_pool(d: Draw) -> Arguments:
    x = d.of(d.normal, d.integers)(*d.of((2, 3, 7, 6), (3, 7, 6))).float()
    x.view(-1)[:1] = d.of(math.nan, 0.0)
    padding = d.of([0, 0], [1, 1])
    return [
        x,
        [2, 3],
        d.of([], [1, 2], [3, 3]),
        padding,
        d.of([1, 1], [2, 1]),
        d.of(True, False),
    ], {}


def _max_pool_backward(d: Draw) -> Arguments:
    (x, *options), _ = _max_pool(d)
    out, indices = torch.ops.aten.max_pool2d_with_indices.default(x, *options)
    return [d.normal(*out.shape), x, *options, indices], {}


def _average_pool(d: Draw) -> Arguments:
    x = d.normal(*d.of((2, 3, 7, 6), (3, 7, 6)))
    stride, padding = d.of([], [1, 2], [3, 3]), d.of([0, 0], [1, 1])
    return [x, [2, 3], stride, padding, d.of(True, False), d.of(True, False), d.of(None, 4)], {}


def _average_pool_backward(d: Draw) -> Arguments:
    (x, *options), _ = _average_pool(d)
    out = torch.ops.aten.avg_pool2d.default(x, *options)
    return [d.normal(*out.shape), x, *options], {}


def _adaptive(d: Draw) -> Arguments:
    return [d.normal(2, 3, 7, 6), d.of([1, 1], [3, 2], [4, 4], [7, 6])], {}


def _adaptive_backward(d: Draw) -> Arguments:
    return [d.normal(2, 3, *d.of((2, 2), (3, 4))), d.normal(2, 3, 7, 6)], {}


def _batch_norm(d: Draw) -> Arguments:
    x = d.normal(*d.of((4, 3), (4, 3, 5), (2, 3, 4, 2)))
    affine = d.of((None, None), (d.normal(3), d.normal(3)))
    return [x, *affine, d.normal(3), d.positive(3), d.of(True, False), 0.1, 1e-5], {}


def _batch_norm_without_stats(d: Draw) -> Arguments:
    return [d.normal(4, 3, 5), d.normal(3), d.normal(3), True, 0.1, 1e-5], {}


def _layer_norm(d: Draw) -> Arguments:
    shape = d.of([4], [3, 4])
    affine = d.of((None, None), (d.normal(*shape), d.normal(*shape)))
    return [d.normal(2, 3, 4), shape, *affine, 1e-5], {}


def _group_norm(d: Draw) -> Arguments:
    affine = d.of((None, None), (d.normal(4), d.normal(4)))
    return [d.normal(2, 4, 3, 5), *affine, 2, 4, 15, d.of(1, 2, 4), 1e-5], {}


FLOAT_UNARY = {
    "normal": [
        "exp",
        "exp2",
        "expm1",
        "sin",
        "cos",
        "tan",
        "atan",
        "sinh",
        "cosh",
        "tanh",
        "sigmoid",
        "erf",
        "isnan",
        "isinf",
        "gelu",
    ],
    "positive": ["log", "log1p", "log2", "log10", "sqrt", "rsqrt", "reciprocal"],
    "unit": ["asin", "acos"],
    "number": [
        "abs",
        "neg",
        "sign",
        "relu",
        "floor",
        "ceil",
        "trunc",
        "round",
        "logical_not",
        "clone",
        "detach",
        "alias",
    ],
    "integers": ["bitwise_not"],
}
SAME = ["lift_fresh_copy", "_to_copy"]

CASES: dict[str, Callable[[Draw], Arguments]] = {
    **{f"aten.{op}.default": _unary(make) for make, ops in FLOAT_UNARY.items() for op in ops},
    **{f"aten.{op}.default": _unary("normal") for op in SAME},
    **{
        f"aten.{op}.Tensor": _binary_tensor
        for op in ["add", "sub", "mul", "eq", "ne", "lt", "le", "gt", "ge"]
    },
    **{
        f"aten.{op}.Scalar": _binary_scalar
        for op in ["add", "sub", "mul", "eq", "ne", "lt", "le", "gt", "ge", "div"]
    },
    **{f"aten.{op}.Tensor": _nonzero_divisor for op in ["div", "remainder", "fmod"]},
    **{f"aten.{op}.Scalar": _binary_scalar for op in ["remainder", "fmod", "rsub"]},
    **{f"aten.bitwise_{op}.Tensor": _bitwise_tensor for op in ["and", "or", "xor"]},
    **{f"aten.bitwise_{op}.Scalar": _bitwise_scalar for op in ["and", "or", "xor"]},
    **{f"aten.logical_{op}.default": _bitwise_tensor for op in ["and", "or", "xor"]},
    **{f"aten.{op}.default": _binary_tensor for op in ["maximum", "minimum"]},
    "aten.atan2.default": lambda d: ([d.normal(2, 3), d.normal(2, 3)], {}),
    "aten.rsub.Tensor": lambda d: ([*d.broadcast_pair(d.normal)], {"alpha": d.of(1, 2)}),
    "aten.floor_divide.default": _nonzero_divisor,
    "aten.div.Tensor_mode": lambda d: (
        _nonzero_divisor(d)[0],
        {"rounding_mode": d.of(None, "floor", "trunc")},
    ),
    "aten.div.Scalar_mode": lambda d: (
        [d.number(4), d.of(2, -3)],
        {"rounding_mode": d.of(None, "floor", "trunc")},
    ),
    "aten.nan_to_num.default": lambda d: (
        [torch.tensor([math.nan, math.inf, -math.inf, 1.0]), *d.of([], [1.0, 2.0, 3.0])],
        {},
    ),
    "aten.pow.Tensor_Scalar": lambda d: ([d.positive(4), d.of(2, 3, 0.5, -1, -0.5, 1.7, 9)], {}),
    "aten.pow.Tensor_Tensor": lambda d: ([d.positive(4), d.normal(4)], {}),
    "aten.pow.Scalar": lambda d: ([2.5, d.normal(4)], {}),
    "aten.clamp.default": lambda d: ([d.number(4), *d.of([-1, 2], [None, 1], [0, None])], {}),
    "aten.clamp.Tensor": lambda d: ([d.normal(4), d.normal(4), d.of(None, d.positive(4))], {}),
    "aten.clamp_min.default": lambda d: ([d.normal(4), 0.2], {}),
    "aten.clamp_max.default": lambda d: ([d.normal(4), 0.2], {}),
    "aten.where.self": lambda d: ([d.bools(2, 3), d.normal(*d.of((2, 3), ())), d.normal(3)], {}),
    "aten.masked_fill.Scalar": lambda d: (
        [d.normal(2, 3), d.bools(*d.of((2, 3), (3,))), d.of(-math.inf, 2)],
        {},
    ),
    "aten.masked_fill.Tensor": lambda d: ([d.normal(2, 3), d.bools(3), d.normal()], {}),
    "aten.addcmul.default": lambda d: (
        [d.normal(3), d.normal(3), d.normal(3)],
        {"value": d.of(1, 0.3)},
    ),
    "aten.addcdiv.default": lambda d: (
        [d.normal(3), d.normal(3), d.positive(3)],
        {"value": d.of(1, 0.3)},
    ),
    "aten.copy.default": lambda d: ([d.normal(2, 3), d.of(d.normal(2, 3), d.integers(3))], {}),
    "aten.sum.default": lambda d: (
        [d.of(d.number, d.bools)(*d.shape())],
        d.of({}, {"dtype": torch.float32}),
    ),
    "aten.sum.dim_IntList": _reduce,
    "aten.mean.default": _unary("normal"),
    "aten.mean.dim": _reduce_float,
    "aten.var.correction": _variance,
    "aten.var_mean.correction": _variance,
    "aten.prod.default": _unary("number"),
    "aten.prod.dim_int": _along(),
    "aten.amax.default": _reduce,
    "aten.amin.default": _reduce,
    "aten.max.default": _unary("number"),
    "aten.min.default": _unary("number"),
    "aten.max.dim": _along("normal"),
    "aten.min.dim": _along("normal"),
    "aten.argmax.default": lambda d: ([d.normal(2, 3), d.of(None, 0, -1), d.of(True, False)], {}),
    "aten.argmin.default": lambda d: ([d.normal(2, 3), d.of(None, 0, -1), d.of(True, False)], {}),
    "aten.any.default": _unary("bools"),
    "aten.any.dim": _along("bools"),
    "aten.any.dims": lambda d: ([d.bools(2, 3), d.of([0], [0, 1]), d.of(True, False)], {}),
    "aten.all.default": _unary("bools"),
    "aten.all.dim": _along("bools"),
    "aten.cumsum.default": _along(),
    "aten._softmax.default": lambda d: ([d.normal(2, 3) * 30, d.of(0, -1), False], {}),
    "aten._log_softmax.default": lambda d: ([d.normal(2, 3) * 30, d.of(0, -1), False], {}),
    "aten.sort.default": lambda d: ([d.normal(2, 5), d.of(0, -1), d.of(True, False)], {}),
    "aten.view.default": lambda d: ([d.normal(2, 6), d.of([3, 4], [-1], [2, -1, 2])], {}),
    "aten._unsafe_view.default": lambda d: ([d.normal(2, 6), d.of([3, 4], [12])], {}),
    "aten.reshape.default": lambda d: ([d.normal(2, 6), d.of([3, 4], [-1])], {}),
    "aten.permute.default": lambda d: ([d.normal(2, 3, 4), d.of([2, 0, 1], [-1, 1, 0])], {}),
    "aten.transpose.int": lambda d: ([d.normal(2, 3, 4), d.of(0, -1), d.of(1, 2)], {}),
    "aten.t.default": lambda d: ([d.normal(2, 3)], {}),
    "aten.expand.default": lambda d: ([d.normal(1, 3), d.of([4, 3], [2, -1, 3], [-1, -1])], {}),
    "aten.unsqueeze.default": lambda d: ([d.normal(2, 3), d.of(0, 2, -1, -3)], {}),
    "aten.squeeze.default": lambda d: ([d.normal(1, 3, 1)], {}),
    "aten.squeeze.dim": lambda d: ([d.normal(1, 3, 1), d.of(0, 1, -1)], {}),
    "aten.squeeze.dims": lambda d: ([d.normal(1, 3, 1), d.of([0], [0, 1, -1])], {}),
    "aten.slice.Tensor": lambda d: (
        [d.normal(3, 6), d.of(0, 1, -1), d.of(0, 1, -2), d.of(2, -1, 2**63 - 1), d.of(1, 2)],
        {},
    ),
    "aten.slice_scatter.default": lambda d: (
        [d.normal(2, 6), d.normal(2, 2), 1, d.of(1, -5), 5, 2],
        {},
    ),
    "aten.select.int": lambda d: ([d.normal(3, 6), d.of(0, -1), d.of(0, -1, 2)], {}),
    "aten.select_scatter.default": lambda d: ([d.normal(3, 6), d.normal(3), 1, d.of(0, -2)], {}),
    "aten.cat.default": lambda d: (
        [[d.normal(2, 3), d.normal(2, 3), d.of(d.normal(2, 3), d.normal(0))], d.of(0, -1)],
        {},
    ),
    "aten.stack.default": lambda d: ([[d.normal(2, 3), d.normal(2, 3)], d.of(0, 1, -1)], {}),
    "aten.split.Tensor": lambda d: ([d.normal(2, 5), d.of(2, 5), 1], {}),
    "aten.split_with_sizes.default": lambda d: ([d.normal(2, 5), [1, 4], -1], {}),
    "aten.unbind.int": lambda d: ([d.normal(2, 3), d.of(0, 1)], {}),
    "aten.repeat.default": lambda d: ([d.normal(2, 3), d.of([2, 1], [2, 1, 3])], {}),
    "aten.flip.default": lambda d: ([d.normal(2, 3), d.of([0], [0, -1])], {}),
    "aten.roll.default": lambda d: (
        [d.normal(2, 3), *d.of(([1], [1]), ([1, -1], [0, 1]), ([2],))],
        {},
    ),
    "aten.constant_pad_nd.default": lambda d: (
        [d.normal(2, 3), d.of([1, 2], [0, 1, 2, 0], [-1, 0]), d.of(0, 1.5)],
        {},
    ),
    "aten.tril.default": lambda d: ([d.normal(3, 4), d.of(0, 1, -1)], {}),
    "aten.triu.default": lambda d: ([d.normal(3, 4), d.of(0, 1, -1)], {}),
    "aten.diagonal.default": lambda d: ([d.normal(3, 4), d.of(0, 1)], {}),
    "aten.full.default": lambda d: (
        [[2, 3], d.of(1, 0.5)],
        {"dtype": d.of(torch.float32, torch.bool)},
    ),
    "aten.full_like.default": lambda d: (
        [d.number(2, 3), d.of(1, 2)],
        d.of({}, {"dtype": torch.float32}),
    ),
    "aten.zeros.default": lambda d: ([[2, 3]], d.of({}, {"dtype": torch.int64})),
    "aten.zeros_like.default": _unary("number"),
    "aten.ones_like.default": _unary("number"),
    "aten.new_zeros.default": lambda d: ([d.number(2), [3, 1]], {}),
    "aten.scalar_tensor.default": lambda d: (
        [d.of(2, 0.5)],
        {"dtype": d.of(torch.float32, torch.int64)},
    ),
    "aten.arange.start_step": lambda d: (
        [d.of(0, 3), 10, d.of(1, 4)],
        {"dtype": d.of(torch.int64, torch.float32)},
    ),
    "aten.gather.default": lambda d: (list(_index_rows(d, rows=d.of(3, 600))), {}),
    "aten.scatter.value": _scatter_with("value"),
    "aten.scatter.src": _scatter_with("src"),
    "aten.scatter_add.default": _scatter_add,
    "aten.index_select.default": lambda d: (
        [d.normal(4, 3), d.of(0, 1), d.integers(2, low=0, high=3)],
        {},
    ),
    "aten.embedding.default": lambda d: (
        [d.normal(4, 3), d.integers(*d.of((2,), (2, 5)), low=0, high=4)],
        {},
    ),
    "aten.embedding_dense_backward.default": _embedding_gradient,
    "aten.index.Tensor": lambda d: (
        [d.normal(4, 3), d.of([d.integers(2, low=-4, high=4)], [None, torch.tensor([1, -1])])],
        {},
    ),
    "aten._unsafe_index.Tensor": lambda d: ([d.normal(4, 3), [d.integers(2, low=0, high=4)]], {}),
    "aten.index_put.default": lambda d: _put(d, accumulate=d.of(True, False)),
    "aten._unsafe_index_put.default": lambda d: _put(d, accumulate=d.of(True, False)),
    "aten.mm.default": _matrices,
    "aten.bmm.default": lambda d: ([d.normal(2, 3, 4), d.normal(2, 4, d.of(1, 5))], {}),
    "aten.mv.default": lambda d: ([d.normal(3, 4), d.normal(4)], {}),
    "aten.dot.default": lambda d: ([d.normal(4), d.normal(4)], {}),
    "aten.addmm.default": _add_product,
    "aten.baddbmm.default": lambda d: _add_product(d, batched=True),
    "aten.convolution.default": _convolution,
    "aten.convolution_backward.default": _convolution_backward,
    "aten.max_pool2d_with_indices.default": _max_pool,
    "aten.max_pool2d_with_indices_backward.default": _max_pool_backward,
    "aten.avg_pool2d.default": _average_pool,
    "aten.avg_pool2d_backward.default": _average_pool_backward,
    "aten._adaptive_avg_pool2d.default": _adaptive,
    "aten._adaptive_avg_pool2d_backward.default": _adaptive_backward,
    "aten.native_batch_norm.default": _batch_norm,
    "aten._native_batch_norm_legit.default": _batch_norm,
    "aten._native_batch_norm_legit.no_stats": _batch_norm_without_stats,
    "aten.native_layer_norm.default": _layer_norm,
    "aten.native_group_norm.default": _group_norm,
}
UNDEFINED = {"aten.empty.memory_format", "aten.empty_permuted.default"}
"""Their values are not defined; only what never reads them may use them."""


def _operation(name: str) -> Any:
    return functools.reduce(getattr, name.split("."), torch.ops)


def _as_jax(value: Any) -> Any:
    if isinstance(value, Tensor):
        return to_jax(value)
    return [_as_jax(v) for v in value] if isinstance(value, list) else value


def _assert_close(ours: Any, theirs: Tensor, tolerance: float) -> None:
    expected = to_numpy(theirs)
    assert ours.shape == expected.shape
    values = np.asarray(ours)
    if expected.dtype == np.bool_ or np.issubdtype(expected.dtype, np.integer):
        np.testing.assert_array_equal(values.astype(expected.dtype), expected)
    else:
        np.testing.assert_allclose(
            values.astype(np.float32), expected, rtol=tolerance, atol=tolerance
        )


def test_every_lowering_has_a_case() -> None:
    assert set(CASES) == set(LOWERINGS) - UNDEFINED


@pytest.mark.parametrize("name", sorted(CASES))
@given(data=st.data())
@few(max_examples=3)
def test_a_lowering_computes_what_torch_computes(name: str, data: st.DataObject) -> None:
    args, kwargs = CASES[name](Draw(data))
    ours: Any = LOWERINGS[name](*[_as_jax(a) for a in args], **kwargs)
    held = [a.clone() if isinstance(a, Tensor) else a for a in args]
    theirs = _operation(name)(*held, **kwargs)
    if "native_batch_norm" in name and isinstance(ours[1], dict):
        ours, changed = ours
        for position, value in changed.items():
            _assert_close(value, held[position], 2e-5)
    pairs = zip(ours, theirs, strict=True) if isinstance(theirs, tuple | list) else [(ours, theirs)]
    for our, their in pairs:
        if their is None:
            assert our is None
        else:
            _assert_close(our, their, 2e-5)


@pytest.mark.parametrize("op", ["sum.dim_IntList", "mean.dim", "amax.default", "amin.default"])
def test_an_empty_list_of_dimensions_means_all(op: str) -> None:
    x = torch.arange(6.0).reshape(2, 3)
    for keepdim in (False, True):
        ours = LOWERINGS[f"aten.{op}"](to_jax(x), [], keepdim)
        _assert_close(ours, _operation(f"aten.{op}")(x, [], keepdim), 1e-6)


@pytest.mark.parametrize("padding", [0, 1])
@pytest.mark.parametrize("value", [math.nan, -math.inf, 0.0])
def test_max_pooling_of_nan_infinities_and_ties(value: float, padding: int) -> None:
    x = torch.zeros(1, 1, 4, 4)
    x[0, 0, 1, 1] = value
    x[0, 0, :, 3] = -math.inf
    options = ([2, 2], [2, 2], [padding, padding])
    ours = LOWERINGS["aten.max_pool2d_with_indices.default"](to_jax(x), *options)
    theirs = torch.ops.aten.max_pool2d_with_indices.default(x, *options)
    for our, their in zip(ours, theirs, strict=True):
        _assert_close(our, their, 0)


def _gradient_of(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    def both(x: Tensor) -> tuple[Tensor, Tensor]:
        weights = torch.arange(1.0, 1.0 + function(x).numel()).reshape(function(x).shape).sin()
        gradient = torch.func.grad(lambda value: (function(value) * weights).sum())(x)
        return function(x), gradient

    return both


COMPOSED: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "elu": F.elu,
    "leaky relu": F.leaky_relu,
    "hardtanh": F.hardtanh,
    "softplus": F.softplus,
    "log sigmoid": F.logsigmoid,
    "softmax": lambda x: x.softmax(-1),
    "normalise": lambda x: F.normalize(x.flatten(1), dim=1),
    "layer norm": lambda x: F.layer_norm(x, x.shape[-1:]),
    "group norm": lambda x: F.group_norm(x, 2),
    "batch norm": lambda x: F.batch_norm(x, None, None, training=True),
    "instance norm": lambda x: F.instance_norm(x),
    "max pool": lambda x: F.max_pool2d(x, 2),
    "max pool 1d": lambda x: F.max_pool1d(x.flatten(2), 3),
    "average pool": lambda x: F.avg_pool2d(x, 3, padding=1),
    "adaptive pool": lambda x: F.adaptive_avg_pool2d(x, 3),
    "attention": lambda x: F.scaled_dot_product_attention(x, x, x, is_causal=True),
    "logsumexp": lambda x: x.logsumexp(1),
    "standard deviation": lambda x: x.std(dim=2),
    "norm": lambda x: torch.linalg.vector_norm(x, dim=-1),
    "sorted": lambda x: x.sort(-1).values.cumsum(-1),
    "strided": lambda x: x[:, ::2, 1:, -1].flip(1),
    "huber": lambda x: F.huber_loss(x, torch.zeros_like(x)),
    "binary cross-entropy": lambda x: F.binary_cross_entropy_with_logits(x, x.sign().relu()),
    "pixel shuffle": lambda x: F.pixel_shuffle(x, 2),
    "unfold": lambda x: F.unfold(x, 2),
    "in place": lambda x: x.clone().mul_(2).add_(1),
}


@pytest.mark.parametrize("name", COMPOSED)
def test_a_traced_function_and_its_gradient_are_torchs(name: str) -> None:
    x = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(1))
    function = _gradient_of(COMPOSED[name])
    ours = lower(trace_function(function, x))(to_jax(x))
    for our, their in zip(ours, function(x), strict=True):
        _assert_close(our, their, 2e-5)


def test_a_missing_operation_is_named() -> None:
    with pytest.raises(Unsupported, match=r"no lowering for aten\._linalg_det"):
        lower(trace_function(torch.linalg.det, torch.eye(3)))


def test_float64_is_refused() -> None:
    with pytest.raises(Unsupported, match=r"computes in torch\.float64"):
        lower(trace_function(lambda x: x.double().exp(), torch.ones(3)))


def test_random_operations_are_named() -> None:
    with pytest.raises(Unsupported, match=r"aten\.\S+ draws random numbers"):
        trace_function(lambda x: F.dropout(x), torch.ones(3))


def test_control_flow_on_values_is_refused() -> None:
    with pytest.raises(Unsupported, match="cannot be traced"):
        trace_function(lambda x: x * 2 if x.sum() > 0 else x, torch.ones(3))


def test_large_integers_are_refused() -> None:
    with pytest.raises(Unsupported, match="beyond 32 bits"):
        to_jax(torch.tensor([2**40]))


def test_bfloat16_keeps_its_dtype() -> None:
    x = torch.randn(4, generator=torch.Generator().manual_seed(1))
    ours = lower(trace_function(lambda x: (x.bfloat16() * 3).exp(), x))(to_jax(x))
    assert str(ours.dtype) == "bfloat16"
    _assert_close(ours, (x.bfloat16() * 3).exp(), 2e-2)
