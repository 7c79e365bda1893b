"""One optimizer step over a window of micro-batches: the only one in rightbatch.

The gradient of a window is Σ_k ∇(loss sum of micro-batch k) / Σ_k count_k: the sum of all losses
divided by the true count of examples (or tokens) in the whole window. Averaging the micro-batches'
means instead is wrong whenever they are unequal (32 + 32 + 32 + 4 examples: by about 100 %).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rightbatch.workload import Workload


def compute_gradients(
    workload: Workload, model: nn.Module, window: Sequence[Any], *, autocast: torch.dtype | None
) -> Tensor:
    """Leaves the window's mean gradient in `.grad` of the parameters.

    Args:
        workload: Says how the loss is computed.
        model: The model; its gradients must be None or zero.
        window: The micro-batches of one update.
        autocast: Lower precision of the forward pass, or None.

    Returns:
        The window's mean loss, a detached scalar tensor.
    """
    losses, counts = [], []
    device_type = next(model.parameters()).device.type
    for batch in window:
        with torch.autocast(device_type, dtype=autocast, enabled=autocast is not None):
            loss_sum, count = workload.loss_sum(model, batch)
        # A single micro-batch is divided before the backward pass, which saves touching every
        # gradient once more; the result is the same.
        (loss_sum / count if len(window) == 1 else loss_sum).backward()
        losses.append(loss_sum.detach())
        counts.append(count)
    total = sum(counts)
    if len(window) > 1:
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        torch._foreach_div_(gradients, float(total))
    return sum(losses[1:], start=losses[0]) / total


def optimizer_step(
    workload: Workload,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    window: Sequence[Any],
    *,
    autocast: torch.dtype | None = None,
) -> Tensor:
    """One update from one window of micro-batches.

    Args:
        workload: Says how the loss is computed.
        model: The model to update.
        optimizer: Its optimizer.
        window: The micro-batches of this update.
        autocast: Lower precision of the forward pass, or None.

    Returns:
        The window's mean loss before the update, a detached scalar tensor.
    """
    optimizer.zero_grad(set_to_none=True)
    loss = compute_gradients(workload, model, window, autocast=autocast)
    optimizer.step()
    return loss
