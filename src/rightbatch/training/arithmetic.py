"""In which precision a step is computed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.amp.grad_scaler import GradScaler

from rightbatch.recipe import Precision

_AUTOCAST = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}


def autocast_dtype(precision: Precision) -> torch.dtype | None:
    """The type that a forward pass is cast to; None: left as the model has it."""
    return _AUTOCAST[precision]


def make_scaler(precision: Precision, device: str | torch.device) -> GradScaler | None:
    """A gradient scaler, where small gradients would vanish without one.

    Half precision has 5 exponent bits: what is below 6e-8 becomes 0.

    Args:
        precision: Of the forward pass.
        device: Where it runs.

    Returns:
        The scaler, or None where the precision needs none.
    """
    return GradScaler(torch.device(device).type) if precision == "float16" else None


@contextmanager
def tensor_float_32(allowed: bool) -> Iterator[None]:
    """Allows TensorFloat-32 products within a block; a flag of the process, put back at its end.

    Args:
        allowed: False leaves the process's setting as it is.

    Yields:
        Nothing.
    """
    if not allowed:
        yield
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
