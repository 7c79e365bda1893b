"""Validation: the mean loss and metric over a set, exact whatever the batch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from rightbatch.device.out_of_memory import is_out_of_memory
from rightbatch.workload import Examples, Workload
from rightbatch.workload.count import count_terms

EVALUATION_BATCH = 512
"""Examples per forward pass of evaluation; halved where they do not fit."""


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
        max_batch: Examples per forward pass; half as many, and so on, where a device says that
            they do not fit.

    Returns:
        Loss and metric, averaged over examples (over tokens where the workload counts them).
    """
    with evaluating(model):
        return _evaluate(workload, model, examples, device, max_batch)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside the block; the mode of every module is put back.

    Args:
        model: The model.

    Yields:
        Nothing.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
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
    loss_total, loss_count, metric_total = 0.0, 0.0, 0.0
    done, N = 0, examples.num_examples
    while done < N:
        indices = torch.arange(done, min(done + max_batch, N))
        try:
            sums = measure_batch(workload, model, to_device(examples.batch(indices), device))
        except Exception as error:
            if len(indices) == 1 or not is_out_of_memory(error):
                raise
            max_batch = len(indices) // 2
            continue
        done += len(indices)
        loss_total += sums.loss
        loss_count += sums.terms
        metric_total += sums.metric
    return Evaluation(
        loss=loss_total / loss_count,
        metric=metric_total / loss_count if has_metric(workload) else None,
    )


class Sums(NamedTuple):
    """Loss and metric summed over the terms of a batch, and the count of terms."""

    loss: float
    metric: float
    terms: float


_NOTHING = Sums(0.0, 0.0, 0.0)


def has_metric(workload: Workload) -> bool:
    """Whether a metric can be evaluated: a batch must be (inputs, targets)."""
    return workload.loss is not None and workload.metric is not None


def measure_batch(workload: Workload, model: nn.Module, batch: Any) -> Sums:
    """Loss and metric of one batch, with the model as it is.

    Args:
        workload: Says how they are computed.
        model: The model; gradients and its mode are the caller's to set.
        batch: The batch, on the model's device.

    Returns:
        Sums; the metric's is 0 where there is none.
    """
    if workload.loss is None or workload.metric is None:
        loss_sum, count = workload.loss_sum(model, batch)
        # Padding alone: means over nothing are no numbers.
        return Sums(float(loss_sum), 0.0, float(count)) if count > 0 else _NOTHING
    inputs, targets = batch
    outputs = model(inputs)
    count = count_terms(targets)
    if count == 0:
        return _NOTHING
    loss, metric = workload.loss(outputs, targets), workload.metric(outputs, targets)
    return Sums(float(loss * count), float(metric) * count, count)


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
