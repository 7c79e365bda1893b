"""What the loss returns, and whether it is the mean (or the sum) that it has to be."""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from rightbatch.errors import WorkloadError
from rightbatch.workload.data import Examples
from rightbatch.workload.describe import describe, move
from rightbatch.workload.workload import Workload

_TOLERANCE = 1e-3
"""Relative; float32 sums over four examples agree far better, wrong reductions far worse."""


def measured_loss(
    workload: Workload, model: nn.Module, batch: Any, size: int, role: str
) -> tuple[Tensor, float]:
    """The loss of a batch and what it counts, both checked.

    Args:
        workload: Says how the loss is computed.
        model: The model.
        batch: A batch on the model's device.
        size: Examples in it.
        role: `training` or `validation`, for messages.

    Returns:
        `(loss_sum, count)`: scalar tensor and positive number.

    Raises:
        WorkloadError: If the loss fails or returns something else.
    """
    if workload.compute_loss is not None:
        return _from_compute_loss(workload, model, batch)
    return _from_loss(workload, model, batch, size, role)


def _from_loss(
    workload: Workload, model: nn.Module, batch: Any, size: int, role: str
) -> tuple[Tensor, float]:
    assert workload.loss is not None
    inputs, targets = batch
    try:
        outputs = model(inputs)
    except Exception as error:
        raise WorkloadError(
            f"The model of workload {workload.name!r} failed on {role} inputs {describe(inputs)} "
            f"with {type(error).__name__}: {error}. {_why_model(model, inputs, error)}"
        ) from error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loss = workload.loss(outputs, targets)
    except Exception as error:
        raise WorkloadError(
            f"The loss of workload {workload.name!r} failed on outputs {describe(outputs)} and "
            f"targets {describe(targets)} with {type(error).__name__}: {error}. "
            f"{_why_loss(outputs, targets)}"
        ) from error
    _check_scalar(workload, loss, "loss(outputs, targets)", "the mean over examples")
    _check_broadcasting(workload, outputs, targets)
    return loss * size, size


def _why_model(model: nn.Module, inputs: Any, error: Exception) -> str:
    """A remedy for a failed forward pass."""
    weights = next(model.parameters())
    if isinstance(inputs, Tensor):
        expected = str(weights.dtype).removeprefix("torch.")
        if inputs.dtype == torch.float64 and weights.dtype != torch.float64:
            return f"The inputs are float64 and the model is {expected}: convert the inputs."
        if not inputs.is_floating_point() and "dtype" in str(error).lower():
            return f"The inputs are integers and the model is {expected}: convert with .float()."
    if isinstance(inputs, dict):
        return "The model gets the dict as one argument; use compute_loss to pass it otherwise."
    return "Check the shape and dtype that the model expects of its inputs."


def _why_loss(outputs: Any, targets: Any) -> str:
    """A remedy for a failed loss."""
    if not (isinstance(outputs, Tensor) and isinstance(targets, Tensor)):
        return "Return a tensor from the model, or use compute_loss(model, batch)."
    if targets.is_floating_point() and targets.shape != outputs.shape:
        return (
            "A classification loss such as cross_entropy needs integer class indices "
            "(targets.long()); a regression loss needs targets of the outputs' shape."
        )
    if targets.dtype not in (torch.int64, torch.uint8) and not targets.is_floating_point():
        return "Class indices must be int64: convert the targets with .long()."
    if targets.dtype == torch.int64 and outputs.ndim == targets.ndim + 1 and targets.numel():
        low, high = int(targets.min()), int(targets.max())
        if high >= outputs.shape[1] or low < 0:
            return (
                f"The targets go from {low} to {high} but the outputs have {outputs.shape[1]} "
                "classes: number the classes from 0, or give the model more outputs."
            )
    if targets.dtype == torch.int64 and outputs.shape == targets.shape:
        return "This loss compares numbers: convert the targets with .float()."
    return "Give the loss targets of the type and shape that it needs."


def _check_scalar(workload: Workload, loss: Any, what: str, meaning: str) -> None:
    if isinstance(loss, Tensor) and loss.ndim == 0 and loss.is_floating_point():
        return
    seen = describe(loss)
    reduced = isinstance(loss, Tensor) and loss.ndim > 0
    remedy = "reduce it, for example with reduction='mean' or .mean()" if reduced else "return that"
    if meaning.startswith("the sum"):
        remedy = remedy.replace("mean", "sum")
    raise WorkloadError(
        f"{what} of workload {workload.name!r} returned {seen}, not a scalar tensor. It must be "
        f"{meaning}: {remedy}."
    )


def _check_broadcasting(workload: Workload, outputs: Any, targets: Any) -> None:
    """Outputs (n, 1) against targets (n) make an n × n table of differences, silently."""
    if not (isinstance(outputs, Tensor) and isinstance(targets, Tensor)):
        return
    if outputs.shape == targets.shape or outputs.numel() != targets.numel() or len(targets) < 2:
        return
    if not targets.is_floating_point():
        return
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if _compares_all_with_all(workload, outputs, targets):
            raise WorkloadError(
                f"The outputs of workload {workload.name!r} are {describe(outputs)} and the "
                f"targets {describe(targets)}: the loss compares every output with every target. "
                "Give both the same shape, for example with a last layer nn.Flatten(0) or "
                "targets[:, None]."
            )


def _compares_all_with_all(workload: Workload, outputs: Tensor, targets: Tensor) -> bool:
    """Whether the loss is the mean over examples only after the shapes were made equal."""
    assert workload.loss is not None
    loss = workload.loss
    singly = [loss(outputs[i : i + 1], targets[i : i + 1]) for i in range(len(targets))]
    mean = float(torch.stack(singly).mean())
    if _near(float(loss(outputs, targets)), mean):
        return False
    try:
        return _near(float(loss(outputs.reshape(targets.shape), targets)), mean)
    except Exception:
        return False  # The loss expects the shapes that it got.


def _from_compute_loss(workload: Workload, model: nn.Module, batch: Any) -> tuple[Tensor, float]:
    assert workload.compute_loss is not None
    contract = "compute_loss(model, batch) must return (loss_sum, count)"
    try:
        result = workload.compute_loss(model, batch)
    except Exception as error:
        raise WorkloadError(
            f"compute_loss of workload {workload.name!r} failed on the batch {describe(batch)} "
            f"with {type(error).__name__}: {error}. {contract}: a scalar tensor, and how many "
            "examples or tokens were summed."
        ) from error
    if not (isinstance(result, tuple) and len(result) == 2):
        raise WorkloadError(
            f"compute_loss of workload {workload.name!r} returned {describe(result)}. {contract}: "
            "a scalar tensor, and how many examples or tokens were summed."
        )
    loss_sum, count = result
    _check_scalar(workload, loss_sum, "The loss_sum of compute_loss", "the sum over the batch")
    number = _as_number(count)
    if number is None or not (math.isfinite(number) and number > 0):
        raise WorkloadError(
            f"The count of compute_loss of workload {workload.name!r} is {describe(count)}. "
            "Return how many examples or tokens were summed, a positive number."
        )
    return loss_sum, number


def _as_number(count: Any) -> float | None:
    if isinstance(count, Tensor):
        return float(count) if count.numel() == 1 else None
    return float(count) if isinstance(count, int | float) else None


@torch.no_grad()
def check_reduction(
    workload: Workload, model: nn.Module, examples: Examples, size: int, device: str
) -> None:
    """A batch and the same batch twice over tell a mean from a sum.

    A mean stays as it is and a sum doubles; a loss that does neither (one that depends on the
    batch) is left alone.

    Args:
        workload: The workload.
        model: A model in evaluation mode, so that dropout and BatchNorm do not interfere.
        examples: The training set.
        size: Examples to take.
        device: Where the model is.

    Raises:
        WorkloadError: If `loss` is a sum, or `compute_loss` returns a mean as its sum.
    """
    once = torch.arange(size)
    results: list[tuple[float, float]] = []
    for indices in (once, torch.cat([once, once])):
        batch = move(examples.batch(indices), device)
        loss_sum, count = measured_loss(workload, model, batch, len(indices), "training")
        results.append((float(loss_sum), float(count)))
    (first, first_count), (second, second_count) = results
    if abs(first) < 1e-12 or not _near(second_count, 2 * first_count):
        return
    if workload.compute_loss is not None and _near(second, first):
        raise WorkloadError(
            f"compute_loss of workload {workload.name!r} returned {first:.4g} for {first_count:g} "
            f"and for {second_count:g} of the same, so it is a mean. Return the sum: "
            "reduction='sum', or the mean times the count."
        )
    # measured_loss multiplies the mean by the number of examples, so a sum shows fourfold.
    if workload.loss is not None and _near(second, 4 * first):
        raise WorkloadError(
            f"The loss of workload {workload.name!r} doubles when the batch is doubled, so it is a "
            "sum, and the learning rate would mean another thing at every batch size. Return the "
            "mean: reduction='mean'."
        )


def _near(a: float, b: float) -> bool:
    return abs(a - b) <= _TOLERANCE * max(abs(a), abs(b)) + 1e-12
