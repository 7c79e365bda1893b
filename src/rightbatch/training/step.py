"""One optimizer step over a window of micro-batches: the only one in rightbatch.

The gradient of a window is Σ_k ∇(loss sum of micro-batch k) / Σ_k count_k: the sum of all losses
divided by the true count of examples (or tokens) in the whole window, over all micro-batches and
ranks. Averaging the micro-batches' means instead is wrong whenever they are unequal
(32 + 32 + 32 + 4 examples: by about 100 %).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler

from rightbatch.recipe import Reduction
from rightbatch.workload import Workload

if TYPE_CHECKING:
    from rightbatch.training.ranks.replica import Replica


class StepResult(NamedTuple):
    """What one update was.

    Attributes:
        loss: The window's mean loss before the update, a detached scalar tensor; None where the
            window held nothing to count (padding alone) and there was no update.
        gradient_norms: The norm of each parameter's gradient before clipping, where asked for.
        gradients: Those of the parameters that were asked for.
    """

    loss: Tensor | None
    gradient_norms: list[Tensor] | None = None
    gradients: list[Tensor | None] | None = None


def compute_gradients(
    workload: Workload,
    model: nn.Module,
    window: Sequence[Any],
    *,
    autocast: torch.dtype | None,
    scaler: GradScaler | None = None,
    reduction: Reduction = "mean",
    observe: Callable[[float, float], None] | None = None,
) -> Tensor | None:
    """Leaves the window's gradient in `.grad` of the parameters.

    Args:
        workload: Says how the loss is computed.
        model: The model; its gradients must be None or zero.
        window: The micro-batches of one update.
        autocast: Lower precision of the forward pass, or None.
        scaler: Multiplies the loss, so that small gradients survive half precision.
        reduction: Mean over the window's examples, or their sum.
        observe: Called after the backward pass of each of several micro-batches, with its count
            and a factor; `.grad` then holds the sum so far, times this factor.

    Returns:
        The window's mean loss, a detached scalar tensor; None where there was nothing to count.
    """
    if len(window) == 1 and reduction == "mean":
        # The mean as it is, without multiplying by the count and dividing again.
        loss, count = forward_loss(workload.loss_mean, model, window[0], autocast)
        if count == 0:
            return None
        scaled(loss, scaler).backward()
        return loss.detach()
    losses, total, unit = [], 0.0, 1.0
    for batch in window:
        loss_sum, count = forward_loss(workload.loss_sum, model, batch, autocast)
        # A micro-batch of padding alone has no mean: NaN times no count.
        if count > 0:
            if scaler is not None and not losses:
                # In half precision a sum leaves the numbers where a mean does not.
                unit = float(count)
            scaled(loss_sum if unit == 1 else loss_sum / unit, scaler).backward()
            losses.append(loss_sum.detach())
            total = total + count
            if observe is not None:
                observe(float(count), (1.0 if scaler is None else scaler.get_scale()) / unit)
    if not losses:
        return None
    divisor = (float(total) if reduction == "mean" else 1.0) / unit
    if divisor != 1:
        _divide_gradients(model, divisor)
    return sum(losses[1:], start=losses[0]) / total


def forward_loss(
    compute: Any, model: nn.Module, batch: Any, autocast: torch.dtype | None
) -> tuple[Tensor, Any]:
    """A loss and its count, computed in lower precision where asked for."""
    if autocast is None:
        return compute(model, batch)
    with torch.autocast(next(model.parameters()).device.type, dtype=autocast):
        return compute(model, batch)


def scaled(loss: Tensor, scaler: GradScaler | None) -> Tensor:
    """The loss as its gradient is taken."""
    return loss if scaler is None else scaler.scale(loss)


def _divide_gradients(model: nn.Module, total: float) -> None:
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    torch._foreach_div_(gradients, total)


def optimizer_step(
    workload: Workload,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    window: Sequence[Any],
    *,
    autocast: torch.dtype | None = None,
    scaler: GradScaler | None = None,
    reduction: Reduction = "mean",
    clip_norm: float | None = None,
    want_norms: bool = False,
    want_gradients_of: Sequence[Tensor] = (),
    observe: Callable[[float, float], None] | None = None,
    replica: Replica | None = None,
) -> StepResult:
    """One update from one window of micro-batches.

    Args:
        workload: Says how the loss is computed.
        model: The model to update.
        optimizer: Its optimizer.
        window: The micro-batches of this update.
        autocast: Lower precision of the forward pass, or None.
        scaler: The gradient scaler of a run in half precision; it leaves an update out whose
            gradient is not finite, and lowers its scale.
        reduction: Mean over the window's examples, or their sum.
        clip_norm: The whole window's gradient is scaled down to this norm.
        want_norms: Whether the norms of the gradient are kept.
        want_gradients_of: Parameters whose gradients are returned, and not copied: for those who
            know that the optimizer leaves them as they are.
        observe: As for `compute_gradients`.
        replica: Where several ranks train: this one's part. The window is then this rank's, and
            the gradient that of all of them.

    Returns:
        Loss and norms.
    """
    _clear_gradients(optimizer)
    compute = compute_gradients if replica is None else replica.gradients
    loss = compute(
        workload,
        model,
        window,
        autocast=autocast,
        scaler=scaler,
        reduction=reduction,
        observe=observe,
    )
    if loss is None:
        return StepResult(None)
    norms = None
    if want_norms or clip_norm is not None or scaler is not None:
        norms = _prepare_gradients(optimizer, scaler, clip_norm, replica)
    # Before the optimizer looks at them: one Python object each is made then, and not two.
    gradients = [p.grad for p in want_gradients_of] if want_gradients_of else None
    if scaler is None:
        optimizer.step()
    else:
        scaler.step(optimizer)
        scaler.update()
    return StepResult(loss, norms if want_norms else None, gradients)


def _clear_gradients(optimizer: torch.optim.Optimizer) -> None:
    """What `zero_grad` does, without its bookkeeping, which costs 5 % of a small step."""
    if type(optimizer).zero_grad is not torch.optim.Optimizer.zero_grad:
        optimizer.zero_grad()
        return
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = None


def _prepare_gradients(
    optimizer: torch.optim.Optimizer,
    scaler: GradScaler | None,
    clip_norm: float | None,
    replica: Replica | None,
) -> list[Tensor]:
    """Unscales, measures, then clips: the norm that counts is that of the true gradient."""
    if scaler is not None:
        scaler.unscale_(optimizer)
    groups = optimizer.param_groups
    gradients = [p.grad for group in groups for p in group["params"] if p.grad is not None]
    if replica is None:
        norms = list(torch._foreach_norm(gradients))
    else:
        gradients = replica.local(gradients)
        norms = replica.norms(gradients)
    if clip_norm is not None:
        parts = torch.stack(norms)
        whole = torch.linalg.vector_norm(parts.to(torch.promote_types(parts.dtype, torch.float32)))
        # As torch clips: the small number keeps a gradient of zero from becoming NaN.
        factor = torch.clamp(clip_norm / (whole + 1e-6), max=1.0)
        torch._foreach_mul_(gradients, factor)
    return norms
