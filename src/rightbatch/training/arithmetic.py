"""In which precision a step is computed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

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


def tensor_float_32(allowed: bool, device: str | torch.device) -> AbstractContextManager[None]:
    """Allows TensorFloat-32 products and convolutions within a block, or forbids them.

    These are flags of the process, and its own settings come back at the end: a recipe gives the
    same arithmetic whatever they were (torch allows it in convolutions and not in products).

    Args:
        allowed: Whether they may be used.
        device: Where a training runs; only CUDA has them.

    Returns:
        The block's context.
    """
    return _setting_flags(allowed) if torch.device(device).type == "cuda" else _NOTHING


@contextmanager
def _setting_flags(allowed: bool) -> Iterator[None]:
    cudnn: Any = torch.backends.cudnn
    newer = [torch.backends.cuda.matmul, cudnn.conv, cudnn.rnn]
    before = [backend.fp32_precision for backend in newer]
    older = _older_flags()
    # The older functions keep the newer ones in step, and what compiles reads the older ones.
    torch.set_float32_matmul_precision("high" if allowed else "highest")
    torch.backends.cudnn.allow_tf32 = allowed
    try:
        yield
    finally:
        if older is not None:
            torch.set_float32_matmul_precision(older[0])
            torch.backends.cudnn.allow_tf32 = older[1]
        for backend, precision in zip(newer, before, strict=True):
            backend.fp32_precision = precision


def _older_flags() -> tuple[str, bool] | None:
    """What the older functions say; None where the newer were used, when they refuse to."""
    try:
        return torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    except RuntimeError:
        return None


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
