"""Validation: the mean loss and metric over a set, exact whatever the batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from rightbatch.workload import Examples, Workload
from rightbatch.workload.count import count_terms

EVALUATION_BATCH = 512
"""Examples per forward pass of evaluation; limited by the recipe's micro-batch where larger."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Mean loss, and metric where the workload has one, over a whole set."""

    loss: float
    metric: float | None = None


@torch.no_grad()
def evaluate(
    workload: Workload,
    model: nn.Module,
    examples: Examples,
    *,
    device: str | torch.device = "cpu",
    max_batch: int = EVALUATION_BATCH,
) -> Evaluation:
    """Evaluates the model on a set, in evaluation mode; training mode is put back.

    Args:
        workload: Says how loss and metric are computed.
        model: The model.
        examples: The set.
        device: Where batches are put.
        max_batch: Examples per forward pass.

    Returns:
        Loss and metric, averaged over examples (over tokens where the workload counts them).
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        return _evaluate(workload, model, examples, device, max_batch)
    finally:
        for module, training in modes:
            module.training = training


def _evaluate(
    workload: Workload,
    model: nn.Module,
    examples: Examples,
    device: str | torch.device,
    max_batch: int,
) -> Evaluation:
    has_metric = workload.loss is not None and workload.metric is not None
    loss_total, loss_count, metric_total = 0.0, 0.0, 0.0
    for indices in torch.arange(examples.num_examples).split(max_batch):
        batch = to_device(examples.batch(indices), device)
        if workload.loss is not None and workload.metric is not None:
            inputs, targets = batch
            outputs = model(inputs)
            count = count_terms(targets)
            if count == 0:  # Padding alone: means over nothing are no numbers.
                continue
            loss_sum = workload.loss(outputs, targets) * count
            metric_total += float(workload.metric(outputs, targets)) * count
        else:
            loss_sum, count = workload.loss_sum(model, batch)
        loss_total += float(loss_sum)
        loss_count += float(count)
    return Evaluation(
        loss=loss_total / loss_count,
        metric=metric_total / loss_count if has_metric else None,
    )


def to_device(batch: Any, device: str | torch.device) -> Any:
    """A batch with all its tensors on a device; containers keep their kind."""
    if str(device) == "cpu":
        return batch
    if isinstance(batch, torch.Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, dict):
        return {key: to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, tuple | list):
        return type(batch)(to_device(value, device) for value in batch)
    return batch
