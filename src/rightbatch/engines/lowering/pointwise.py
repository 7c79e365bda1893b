"""Elementwise operations. Dtypes follow from torch's own result, to which each is cast."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax


def _add(x: Any, y: Any, *, alpha: Any = 1) -> Array:
    return jnp.add(x, y if alpha == 1 else y * alpha)


def _sub(x: Any, y: Any, *, alpha: Any = 1) -> Array:
    return jnp.subtract(x, y if alpha == 1 else y * alpha)


def _rsub(x: Any, y: Any, alpha: Any = 1) -> Array:
    return jnp.subtract(y, x if alpha == 1 else x * alpha)


def _divide(x: Any, y: Any, *, rounding_mode: str | None = None) -> Array:
    if rounding_mode is None:
        return jnp.true_divide(x, y)
    if rounding_mode == "floor":
        return jnp.floor_divide(x, y)
    if jnp.issubdtype(jnp.result_type(x, y), jnp.integer):
        return lax.div(*jnp.broadcast_arrays(*_promoted(x, y)))
    return jnp.trunc(jnp.true_divide(x, y))


def _promoted(x: Any, y: Any) -> tuple[Array, Array]:
    dtype = jnp.result_type(x, y)
    return jnp.asarray(x, dtype), jnp.asarray(y, dtype)


def _power(x: Any, exponent: Any) -> Array:
    if isinstance(exponent, int | float):
        if exponent == 0.5:
            return jnp.sqrt(x)
        if exponent == int(exponent) and abs(exponent) <= 8:
            x = jnp.asarray(x)
            if jnp.issubdtype(x.dtype, jnp.integer) and exponent < 0:
                raise ValueError("an integer to a negative power")
            return lax.integer_pow(x, int(exponent))
    return jnp.power(x, exponent)


def _clamp(x: Array, low: Any = None, high: Any = None) -> Array:
    x = x if low is None else jnp.maximum(x, low)
    return x if high is None else jnp.minimum(x, high)


def _gelu(x: Array, *, approximate: str = "none") -> Array:
    if approximate == "tanh":
        inner = 0.7978845608028654 * (x + 0.044715 * x * x * x)
        return 0.5 * x * (1 + jnp.tanh(inner))
    return 0.5 * x * (1 + lax.erf(x * 0.7071067811865476))


def _where(condition: Array, x: Any, y: Any) -> Array:
    return jnp.where(condition, x, y)


def _masked_fill(x: Array, mask: Array, value: Any) -> Array:
    return jnp.where(mask, jnp.asarray(value, x.dtype), x)


def _addcmul(x: Array, a: Array, b: Array, *, value: Any = 1) -> Array:
    return x + value * a * b


def _addcdiv(x: Array, a: Array, b: Array, *, value: Any = 1) -> Array:
    return x + value * a / b


def _bitwise(
    logical: Callable[..., Array], integer: Callable[..., Array]
) -> Callable[[Any, Any], Array]:
    def apply(x: Any, y: Any) -> Array:
        both_bool = jnp.result_type(x, y) == jnp.bool_
        return logical(x, y) if both_bool else integer(x, y)

    return apply


def _same(x: Any, *_: Any, **__: Any) -> Any:
    return x


def _copy(_: Array, source: Array, **__: Any) -> Array:
    return jnp.broadcast_to(source, _.shape)


def _round(x: Array, *, decimals: int = 0) -> Array:
    if decimals:
        raise ValueError("rounding to decimals")
    return jnp.round(x)


def _nan_to_num(x: Array, nan: Any = None, posinf: Any = None, neginf: Any = None) -> Array:
    return jnp.nan_to_num(x, nan=0.0 if nan is None else nan, posinf=posinf, neginf=neginf)


_BINARY: dict[str, Callable[..., Any]] = {
    "mul": jnp.multiply,
    "eq": jnp.equal,
    "ne": jnp.not_equal,
    "lt": jnp.less,
    "le": jnp.less_equal,
    "gt": jnp.greater,
    "ge": jnp.greater_equal,
    "bitwise_and": _bitwise(jnp.logical_and, jnp.bitwise_and),
    "bitwise_or": _bitwise(jnp.logical_or, jnp.bitwise_or),
    "bitwise_xor": _bitwise(jnp.logical_xor, jnp.bitwise_xor),
    "add": _add,
    "sub": _sub,
    "div": _divide,
    "remainder": jnp.remainder,
    "fmod": jnp.fmod,
}

_UNARY: dict[str, Callable[..., Any]] = {
    "abs": jnp.abs,
    "neg": jnp.negative,
    "exp": jnp.exp,
    "exp2": jnp.exp2,
    "expm1": jnp.expm1,
    "log": jnp.log,
    "log1p": jnp.log1p,
    "log2": jnp.log2,
    "log10": jnp.log10,
    "sqrt": jnp.sqrt,
    "rsqrt": lax.rsqrt,
    "reciprocal": jnp.reciprocal,
    "sin": jnp.sin,
    "cos": jnp.cos,
    "tan": jnp.tan,
    "asin": jnp.arcsin,
    "acos": jnp.arccos,
    "atan": jnp.arctan,
    "sinh": jnp.sinh,
    "cosh": jnp.cosh,
    "tanh": jnp.tanh,
    "sigmoid": jax.nn.sigmoid,
    "relu": lambda x: jnp.maximum(x, 0),
    "erf": lax.erf,
    "sign": jnp.sign,
    "floor": jnp.floor,
    "ceil": jnp.ceil,
    "trunc": jnp.trunc,
    "isnan": jnp.isnan,
    "isinf": jnp.isinf,
    "logical_not": jnp.logical_not,
    "bitwise_not": jnp.invert,
    "clone": _same,
    "detach": _same,
    "alias": _same,
    "lift_fresh_copy": _same,
    "_to_copy": _same,
    "gelu": _gelu,
    "round": _round,
    "nan_to_num": _nan_to_num,
}

POINTWISE: dict[str, Callable[..., Any]] = {
    **{f"aten.{name}.{kind}": f for name, f in _BINARY.items() for kind in ("Tensor", "Scalar")},
    **{f"aten.{name}.default": f for name, f in _UNARY.items()},
    "aten.div.Tensor_mode": _divide,
    "aten.div.Scalar_mode": _divide,
    "aten.floor_divide.default": jnp.floor_divide,
    "aten.rsub.Scalar": _rsub,
    "aten.rsub.Tensor": _rsub,
    "aten.pow.Tensor_Scalar": _power,
    "aten.pow.Tensor_Tensor": _power,
    "aten.pow.Scalar": _power,
    "aten.maximum.default": jnp.maximum,
    "aten.minimum.default": jnp.minimum,
    "aten.atan2.default": jnp.arctan2,
    "aten.logical_and.default": jnp.logical_and,
    "aten.logical_or.default": jnp.logical_or,
    "aten.logical_xor.default": jnp.logical_xor,
    "aten.clamp.default": _clamp,
    "aten.clamp.Tensor": _clamp,
    "aten.clamp_min.default": _clamp,
    "aten.clamp_max.default": lambda x, high: _clamp(x, None, high),
    "aten.where.self": _where,
    "aten.masked_fill.Scalar": _masked_fill,
    "aten.masked_fill.Tensor": _masked_fill,
    "aten.addcmul.default": _addcmul,
    "aten.addcdiv.default": _addcdiv,
    "aten.copy.default": _copy,
}
