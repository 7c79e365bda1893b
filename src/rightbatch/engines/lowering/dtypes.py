"""Torch dtypes as JAX ones. Integers are 32 bits wide: JAX's default, and enough for indices."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import torch
from jax import Array
from torch import Tensor

from rightbatch.engines.unsupported import Unsupported

_DTYPES: dict[torch.dtype, Any] = {
    torch.float32: jnp.float32,
    torch.bfloat16: jnp.bfloat16,
    torch.float16: jnp.float16,
    torch.int64: jnp.int32,
    torch.int32: jnp.int32,
    torch.int16: jnp.int16,
    torch.int8: jnp.int8,
    torch.uint8: jnp.uint8,
    torch.bool: jnp.bool_,
}
_INT32 = np.iinfo(np.int32)


def jax_dtype(dtype: torch.dtype) -> Any:
    """The JAX dtype that stands for a torch dtype.

    Args:
        dtype: Of a torch tensor.

    Returns:
        The dtype of the array.

    Raises:
        Unsupported: If there is none (float64, complex, quantised).
    """
    if dtype not in _DTYPES:
        raise Unsupported(f"it computes in {dtype}")
    return _DTYPES[dtype]


def to_numpy(tensor: Tensor) -> np.ndarray[Any, Any]:
    """A tensor's values in the width that JAX keeps.

    Args:
        tensor: On any device.

    Returns:
        The same values.

    Raises:
        Unsupported: If its dtype has no counterpart, or an integer does not fit into 32 bits.
    """
    dtype = jax_dtype(tensor.dtype)
    tensor = tensor.detach().cpu()
    if tensor.dtype == torch.bfloat16:
        return np.asarray(tensor.float().numpy()).astype(dtype)
    values = tensor.numpy()
    wide = tensor.dtype == torch.int64 and values.size > 0
    if wide and (values.max() > _INT32.max or values.min() < _INT32.min):
        raise Unsupported("an integer tensor holds values beyond 32 bits")
    return values.astype(dtype)


def to_jax(tensor: Tensor) -> Array:
    """A tensor as a JAX array."""
    return jnp.asarray(to_numpy(tensor))


def to_torch(values: Any, dtype: torch.dtype) -> Tensor:
    """A JAX array as a torch tensor of a dtype."""
    array = np.array(values)
    if dtype == torch.bfloat16:
        array = array.astype(np.float32)
    return torch.from_numpy(array).to(dtype)
