"""In which precision a step is computed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch.amp.grad_scaler import GradScaler

from rightbatch.recipe import Precision

_AUTOCAST = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}
_NOTHING = nullcontext()


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


def tensor_float_32(allowed: bool) -> AbstractContextManager[None]:
    """Allows TensorFloat-32 products within a block; a flag of the process, put back at its end.

    Args:
        allowed: False leaves the process's setting as it is.

    Returns:
        The block's context.
    """
    return _allowing_tensor_float_32() if allowed else _NOTHING


@contextmanager
def _allowing_tensor_float_32() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def gradients_on() -> AbstractContextManager[None]:
    """A block in which gradients are recorded, whatever the caller has switched off.

    Returns:
        The block's context.
    """
    if torch.is_grad_enabled() and not torch.is_inference_mode_enabled():
        return _NOTHING  # entering the two below costs 3 % of a small step
    return _switching_gradients_on()


@contextmanager
def _switching_gradients_on() -> Iterator[None]:
    with torch.inference_mode(False), torch.enable_grad():
        yield
