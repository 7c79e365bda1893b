"""What runs in the child: real training at one size, with the heaviest examples first.

Everything here is called through `rightbatch.isolate.Child`, never in the user's process.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rightbatch.device import memory
from rightbatch.recipe import Precision
from rightbatch.training.evaluate import evaluate, to_device
from rightbatch.training.step import optimizer_step
from rightbatch.workload import Examples, Workload
from rightbatch.workload.data import TensorExamples

SURVEY_SECONDS = 2.0
MAX_STEPS = 10
SETTLED_AFTER = 3
"""Steps without a new peak after which a heap is taken to have found its shape."""
_GROWTH = 0.002
_LEARNING_RATE = 1e-6
_SEED = 0


@dataclass(frozen=True, kw_only=True)
class Survey:
    """The data as memory sees them.

    Attributes:
        num_examples: Training examples.
        heaviest: Indices of the training examples, heaviest first; None where all weigh the same.
        heaviest_val: The same for validation.
        num_weighed: How many training examples were weighed to order them.
        data_bytes: The process's memory with libraries and data loaded, before anything is built.
    """

    num_examples: int
    heaviest: Tensor | None
    heaviest_val: Tensor | None
    num_weighed: int
    data_bytes: int


@dataclass(frozen=True, kw_only=True)
class Usage:
    """What training at one size took, in bytes.

    Attributes:
        peak_bytes: The most memory at any time, libraries and data included.
        parameters_bytes: Parameters.
        gradients_bytes: Their gradients.
        optimizer_bytes: Tensors in the optimizer's state.
        saved_bytes: Kept by the forward pass for the backward pass, or None.
        num_steps: Updates done.
        num_examples: Examples trained on.
        settled: Whether the peak had stopped growing, or is far from the limit.
    """

    peak_bytes: int
    parameters_bytes: int
    gradients_bytes: int
    optimizer_bytes: int
    saved_bytes: int | None
    num_steps: int
    num_examples: int
    settled: bool


class SentWorkload:
    """Opens the workload's data once, when it arrives in the child.

    Args:
        workload: What to send.
    """

    def __init__(self, workload: Workload) -> None:
        self.workload = workload

    def __reduce__(self) -> Any:
        return _open_data, (self.workload,)


def _open_data(workload: Workload) -> Workload:
    _ = workload.train_examples, workload.val_examples
    return workload


def survey(workload: Workload) -> Survey:
    """Looks at the data: how many, and which are the heaviest.

    Args:
        workload: What is trained.

    Returns:
        The survey.
    """
    before = memory.read_host_memory().data_bytes
    train, val = workload.train_examples, workload.val_examples
    weighed, heaviest = _order_by_weight(train)
    return Survey(
        num_examples=train.num_examples,
        heaviest=heaviest,
        heaviest_val=None if val is None else _order_by_weight(val)[1],
        num_weighed=weighed,
        data_bytes=before,
    )


def _order_by_weight(examples: Examples) -> tuple[int, Tensor | None]:
    """How many examples were weighed, and all indices with the heaviest of these first."""
    if isinstance(examples, TensorExamples):
        return examples.num_examples, None
    generator = torch.Generator().manual_seed(_SEED)
    order = torch.randperm(examples.num_examples, generator=generator)
    end, weights = time.monotonic() + SURVEY_SECONDS, []
    for index in order:
        try:
            weights.append(_weigh(examples.batch(index.reshape(1))))
        except Exception:  # a collate function may want company; the training steps will tell
            return 0, None
        if time.monotonic() > end:
            break
    if len(set(weights)) == 1:
        return len(weights), None
    ranks = torch.tensor(weights).argsort(descending=True, stable=True)
    return len(weights), torch.cat([order[ranks], order[len(weights) :]])


def _weigh(batch: Any) -> int:
    """Bytes of all tensors in a batch."""
    return sum(tensor.numel() * tensor.element_size() for tensor in _tensors_in(batch))


def _tensors_in(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from _tensors_in(each)
    elif isinstance(value, tuple | list | set):
        for each in value:
            yield from _tensors_in(each)
    elif hasattr(value, "__dict__") and not isinstance(value, type):
        yield from _tensors_in(vars(value))


def train_at(
    workload: Workload,
    micro_batch: int,
    found: Survey,
    device: str,
    precision: Precision,
    patience_seconds: float,
    ample_bytes: float,
) -> Usage:
    """Trains at one size until the peak stops growing.

    Steps alternate between one micro-batch and, where the data allow it, two accumulated ones
    (whose gradients are alive together with the activations), after which comes an evaluation. The
    first steps do not show the peak: optimizer state appears in the first, and a fragmented heap
    goes on growing for some.

    Args:
        workload: What is trained.
        micro_batch: Examples in one forward and backward pass.
        found: The survey of its data.
        device: Where.
        precision: Arithmetic of the forward pass.
        patience_seconds: After this long, three steps are enough.
        ample_bytes: Below this peak two steps are: no heap fragments by that much.

    Returns:
        What it took.
    """
    autocast = torch.bfloat16 if precision == "bfloat16" else None
    model = workload.build_model(_SEED, device)
    optimizer = workload.make_optimizer(model.parameters(), _LEARNING_RATE)
    indices = _first(found.heaviest, micro_batch)
    widths = (1, 2) if 2 * micro_batch <= found.num_examples else (1, 1)
    end = time.monotonic() + patience_seconds
    peak, unchanged, num_steps, num_examples = 0, 0, 0, 0
    while num_steps < MAX_STEPS and unchanged < SETTLED_AFTER:
        window = [
            to_device(workload.train_examples.batch(indices), device)
            for _ in range(widths[num_steps % 2])
        ]
        optimizer_step(workload, model, optimizer, window, autocast=autocast)
        num_examples += micro_batch * len(window)
        del window  # as in the training loop, the next batch is fetched without the last one
        num_steps += 1
        if num_steps == 2:
            _evaluate(workload, model, micro_batch, found, device)
        grown = memory.peak_bytes(device)
        unchanged = 0 if grown > peak * (1 + _GROWTH) else unchanged + 1
        peak = max(peak, grown)
        if num_steps >= 2 and peak < ample_bytes:
            break
        if num_steps >= 3 and time.monotonic() > end:
            break
    return Usage(
        peak_bytes=peak,
        parameters_bytes=_weigh(list(model.parameters())),
        gradients_bytes=_weigh([p.grad for p in model.parameters()]),
        optimizer_bytes=_weigh(list(optimizer.state.values())),
        saved_bytes=_saved_bytes(workload, model, indices, device, autocast),
        num_steps=num_steps,
        num_examples=num_examples,
        settled=unchanged >= SETTLED_AFTER or num_steps == MAX_STEPS or peak < ample_bytes,
    )


def _first(heaviest: Tensor | None, count: int) -> Tensor:
    return torch.arange(count) if heaviest is None else heaviest[:count]


class _Chosen:
    """Some of the examples, as examples of their own."""

    truncated = False

    def __init__(self, source: Examples, indices: Tensor) -> None:
        self._source = source
        self._indices = indices
        self.num_examples = len(indices)

    def batch(self, indices: Tensor) -> Any:
        return self._source.batch(self._indices[indices])


def _evaluate(
    workload: Workload, model: nn.Module, micro_batch: int, found: Survey, device: str
) -> None:
    examples = workload.val_examples
    if examples is not None:
        count = min(micro_batch, examples.num_examples)
        chosen = _Chosen(examples, _first(found.heaviest_val, count))
        evaluate(workload, model, chosen, device=device, max_batch=micro_batch)


def _saved_bytes(
    workload: Workload,
    model: nn.Module,
    indices: Tensor,
    device: str,
    autocast: torch.dtype | None,
) -> int | None:
    """Bytes that one forward pass keeps for the backward pass, parameters and inputs apart."""
    batch = to_device(workload.train_examples.batch(indices), device)
    known = {_address(tensor) for tensor in (*model.parameters(), *_tensors_in(batch))}
    saved: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        address = _address(tensor)
        if address not in known:
            saved[address] = tensor.untyped_storage().nbytes()
        return tensor

    try:
        with (
            torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor),
            torch.autocast(torch.device(device).type, dtype=autocast, enabled=autocast is not None),
        ):
            # The result keeps the graph, and with it the addresses, alive until they are counted.
            loss_sum, _count = workload.loss_sum(model, batch)
            return sum(saved.values()) if loss_sum.requires_grad else None
    except Exception:  # extra information; the steps before went well
        return None


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
