"""One real forward and backward pass before anything else, so that mistakes get a plain sentence.

The pass runs on a throw-away model and leaves nothing behind. Beside what makes torch raise, it
finds mistakes that train silently and wrongly: a loss that sums where a mean is expected, outputs
and targets that broadcast, an optimizer that ignores the learning rate or misses parameters, a
factory that hands out the same model again.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rightbatch.errors import RightbatchError, WorkloadError
from rightbatch.isolate import preserved_state
from rightbatch.workload.check_loss import check_reduction, measured_loss
from rightbatch.workload.check_optimizer import check_optimizer
from rightbatch.workload.count import count_tokens
from rightbatch.workload.crossing import check_crossing
from rightbatch.workload.data import Examples
from rightbatch.workload.describe import describe, move, tensors_in
from rightbatch.workload.workload import Workload

CHECKED_EXAMPLES = 4
"""Examples in the trial batch: BatchNorm needs two, and a wrong reduction shows from two on."""


@dataclass(frozen=True, kw_only=True)
class WorkloadFacts:
    """What the check saw.

    Attributes:
        num_examples: Training examples N.
        num_val_examples: Validation examples; None without a validation set.
        num_parameters: Trainable numbers in the model.
        first_loss: Mean loss of the trial batch at the initial weights.
        tokens_per_example: In the trial batch; None where examples are not sequences.
        truncated: Whether the training data are the beginning of a longer stream.
    """

    num_examples: int
    num_val_examples: int | None
    num_parameters: int
    first_loss: float
    tokens_per_example: float | None
    truncated: bool


def check_workload(workload: Workload, device: str = "cpu") -> WorkloadFacts:
    """Runs one step of a workload on a throw-away model and says what is wrong with it.

    Args:
        workload: What to check.
        device: Where to run it.

    Returns:
        What was seen.

    Raises:
        WorkloadError: With one sentence on what is wrong, the value seen, and how to mend it.
    """
    with preserved_state():
        check_crossing(workload)
        model = _fresh_model(workload, device)
        examples = workload.train_examples
        batch, size = _first_batch(workload, examples, "training", device)
        torch.set_grad_enabled(True)
        loss_sum, count = measured_loss(workload, model, batch, size, "training")
        mean = _check_first_step(workload, model, batch, loss_sum / count)
        check_optimizer(workload, model)
        num_val_examples = _check_validation(workload, model, batch, device)
        check_reduction(workload, model.eval(), examples, size, device)
        tokens = count_tokens(batch, count, size)
    return WorkloadFacts(
        num_examples=examples.num_examples,
        num_val_examples=num_val_examples,
        num_parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
        first_loss=mean,
        tokens_per_example=None if tokens is None else tokens / size,
        truncated=examples.truncated,
    )


def _fresh_model(workload: Workload, device: str) -> nn.Module:
    """A model from the factory, after a look at whether it makes a new one at each call."""
    models = [_build(workload, device) for _ in range(2)]
    first, second = models
    if first is second:
        raise WorkloadError(
            f"make_model of workload {workload.name!r} returned the same model twice, so every run "
            "would continue the one before. Build it inside: make_model=lambda: Net(...)."
        )
    shared = {id(p) for p in first.parameters()} & {id(p) for p in second.parameters()}
    if shared:
        names = [name for name, p in first.named_parameters() if id(p) in shared]
        raise WorkloadError(
            f"Two models from make_model of workload {workload.name!r} share {len(shared)} "
            f"parameters ({names[0]}, …), so every run would continue the one before. Build all "
            "layers inside make_model, or return copy.deepcopy of a template."
        )
    return first


def _build(workload: Workload, device: str) -> nn.Module:
    try:
        return workload.build_model(0, device)
    except RightbatchError:
        raise
    except Exception as error:
        raise WorkloadError(
            f"make_model of workload {workload.name!r} failed with {_in_words(error)}. It is "
            "called without arguments and must return a fresh torch.nn.Module."
        ) from error


def _first_batch(workload: Workload, examples: Examples, role: str, device: str) -> tuple[Any, int]:
    size = min(CHECKED_EXAMPLES, examples.num_examples)
    try:
        batch = examples.batch(torch.arange(size))
    except RightbatchError:
        raise
    except Exception as error:
        raise WorkloadError(
            f"A batch of {size} {role} examples of workload {workload.name!r} could not be made: "
            f"{_in_words(error)}. Make every example the same shape, or pass `collate`, which "
            "turns a list of examples into a batch."
        ) from error
    if workload.loss is not None:
        _check_pair(workload, batch, size, role)
    return move(batch, device), size


def _check_pair(workload: Workload, batch: Any, size: int, role: str) -> None:
    """With `loss`, a batch is (inputs, targets), both with one entry per example."""
    if not (isinstance(batch, tuple | list) and len(batch) == 2):
        raise WorkloadError(
            f"A {role} batch of workload {workload.name!r} is {describe(batch)}, not "
            "(inputs, targets). Give examples of that form, or use compute_loss(model, batch) "
            "-> (loss_sum, count) instead of loss."
        )
    inputs, targets = batch
    lengths = [len(part) for part in (*tensors_in(inputs), targets) if hasattr(part, "__len__")]
    if not hasattr(targets, "__len__") or any(length != size for length in lengths):
        raise WorkloadError(
            f"A {role} batch of {size} examples of workload {workload.name!r} has inputs "
            f"{describe(inputs)} and targets {describe(targets)}. The first dimension of both must "
            f"be the number of examples, {size}."
        )


def _check_first_step(workload: Workload, model: nn.Module, batch: Any, mean: Tensor) -> float:
    """The first loss and its gradient are numbers."""
    if not bool(torch.isfinite(mean.detach())):
        raise WorkloadError(
            f"The loss of workload {workload.name!r} is {float(mean.detach()):g} at the first "
            f"step, before any training. {_why_not_finite(model, batch)}"
        )
    try:
        mean.backward()
    except RuntimeError as error:
        raise WorkloadError(
            f"The loss of workload {workload.name!r} has no gradient ({error}). Compute it from "
            "the model's outputs without .item(), .detach() or torch.no_grad()."
        ) from error
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    if not gradients:
        raise WorkloadError(
            f"The loss of workload {workload.name!r} does not depend on any parameter of the "
            "model. Compute it from the model's outputs."
        )
    for name, gradient in gradients.items():
        if not bool(torch.isfinite(gradient).all()):
            raise WorkloadError(
                f"The gradient of {name!r} in workload {workload.name!r} is not finite at the "
                f"first step, though the loss is {float(mean.detach()):g}. Look for a square root "
                "or logarithm of zero, or a division by zero, in the model and the loss."
            )
    return float(mean.detach())


def _why_not_finite(model: nn.Module, batch: Any) -> str:
    for name, tensor in model.named_parameters():
        if not bool(torch.isfinite(tensor.detach()).all()):
            return f"The initial value of {name!r} is not finite: initialise it."
    for tensor in tensors_in(batch):
        broken = int((~torch.isfinite(tensor)).sum()) if tensor.is_floating_point() else 0
        if broken:
            return (
                f"{broken} of the {tensor.numel()} numbers in the batch's {describe(tensor)} are "
                "NaN or infinite: clean the data."
            )
    return "The data are finite, so look for a logarithm or division by zero in model and loss."


def _check_validation(
    workload: Workload, model: nn.Module, train_batch: Any, device: str
) -> int | None:
    """The validation set can be evaluated with the same model and loss, and the metric is one."""
    examples = workload.val_examples
    if examples is None:
        return None
    batch, size = _first_batch(workload, examples, "validation", device)
    model.eval()
    try:
        with torch.no_grad():
            loss_sum, count = measured_loss(workload, model, batch, size, "validation")
    except WorkloadError as error:
        raise WorkloadError(
            f"A validation batch, {describe(batch)}, does not go through the model although a "
            f"training batch, {describe(train_batch)}, does. Prepare val_data exactly like "
            f"train_data. ({error})"
        ) from error
    if not bool(torch.isfinite(loss_sum / count)):
        raise WorkloadError(
            f"The validation loss of workload {workload.name!r} is "
            f"{float(loss_sum / count):g} before any training. {_why_not_finite(model, batch)}"
        )
    if workload.loss is not None and workload.metric is not None:
        _check_metric(workload, model, batch)
    return examples.num_examples


@torch.no_grad()
def _check_metric(workload: Workload, model: nn.Module, batch: Any) -> None:
    assert workload.metric is not None
    inputs, targets = batch
    remedy = "metric(outputs, targets) must return the mean over examples, one number."
    try:
        value = workload.metric(model(inputs), targets)
    except Exception as error:
        raise WorkloadError(
            f"The metric of workload {workload.name!r} failed with {_in_words(error)}. {remedy}"
        ) from error
    number = None
    with suppress(TypeError, ValueError, RuntimeError):
        number = float(value)
    if number is None:
        raise WorkloadError(
            f"The metric of workload {workload.name!r} returned {describe(value)}. {remedy}"
        )


def _in_words(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
