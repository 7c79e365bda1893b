"""The gradient of the same examples twice: all at once, and micro-batch by micro-batch."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from rightbatch.device.out_of_memory import is_out_of_memory
from rightbatch.isolate import preserved_state
from rightbatch.training.evaluate import to_device
from rightbatch.training.step import compute_gradients
from rightbatch.workload import Workload

Gradient = list[Tensor | None]


class Cut:
    """Some examples as one batch, and as the micro-batches that training would make of them.

    The whole is put together from the micro-batches, so that both hold the same numbers even where
    the data draw random ones (augmentation, masks). Where that cannot be done, because each
    micro-batch is padded to its own length, say, the whole is fetched by itself.

    Args:
        workload: Where the examples are.
        indices: Which, one tensor for each micro-batch.
        device: Where batches are put.
    """

    def __init__(self, workload: Workload, indices: Sequence[Tensor], device: str) -> None:
        self._source, self._device = workload.train_examples, device
        self._indices = torch.cat([*indices])
        self.sizes = tuple(len(part) for part in indices)
        with preserved_state():
            self.parts = [self._fetch(part) for part in indices]
        joined = _join(self.parts, self.sizes)
        self.joined = joined is not None
        if self.joined:
            self.whole = joined
        else:
            with preserved_state():
                self.whole = self._fetch(self._indices)

    def fetched_whole(self) -> Any:
        """The whole batch, fetched anew unless it was put together from the micro-batches."""
        return self.whole if self.joined else self._fetch(self._indices)

    def reversed(self) -> Any:
        """The whole batch with its examples in reverse order."""
        if self.joined:
            return tree_map(lambda tensor: tensor.flip(0), self.whole)
        with preserved_state():
            return self._fetch(self._indices.flip(0))

    def _fetch(self, indices: Tensor) -> Any:
        return to_device(self._source.batch(indices), self._device)


class Comparison:
    """Takes both gradients of a cut. Every one starts from the same buffers and random numbers.

    Args:
        workload: Says how the loss is computed.
        model: The model, in the mode in which it is to be compared.
        cut: The examples.
        autocast: Lower precision of the forward pass, or None.

    Attributes:
        split_error: What the micro-batches raised when last tried, or None.
    """

    def __init__(
        self, workload: Workload, model: nn.Module, cut: Cut, autocast: torch.dtype | None
    ) -> None:
        self.workload, self.model, self.cut = workload, model, cut
        self._autocast = autocast
        self.split_error: Exception | None = None

    def gradient(self, window: Sequence[Any]) -> Gradient:
        """The mean gradient of a window, as training takes it; NaN where its loss is no number."""
        with self._undisturbed():
            loss = compute_gradients(self.workload, self.model, window, autocast=self._autocast)
            gradient = [p.grad for p in self.model.parameters()]
        # Where nothing counts there is no gradient, and nothing to compare.
        if loss is not None and bool(loss.isfinite()):
            return gradient
        return [torch.full((), math.nan) for _ in gradient]

    def difference(self, whole: Gradient | None = None) -> float:
        """‖g_split − g_whole‖ / ‖g_whole‖; infinite where the micro-batches give no gradient."""
        whole = whole or self.gradient([self.cut.whole])
        self.split_error = None
        try:
            split = self.gradient(self.cut.parts)
        except Exception as error:
            if is_out_of_memory(error):
                raise
            self.split_error = error.with_traceback(None)
            return math.inf
        return relative_difference(split, whole)

    def rounding(self) -> float:
        """How much the whole batch's gradient changes when its examples change places."""
        # What mixes the examples of a batch seldom minds their order; rounding does.
        reverse = self.gradient([self.cut.reversed()])
        return relative_difference(reverse, self.gradient([self.cut.whole]))

    def redraw_spread(self, seeders: Sequence[Callable[[], None]]) -> float:
        """How much other random numbers change the whole batch's gradient, root mean square."""
        whole = self.gradient([self.cut.whole])
        differences = []
        for seed in seeders:
            with preserved_state():
                seed()
                differences.append(
                    relative_difference(self.gradient([self.cut.fetched_whole()]), whole)
                )
        return math.hypot(*differences) / math.sqrt(len(differences))

    def forward_draws(self) -> bool:
        """Whether a forward pass draws random numbers."""
        with self._undisturbed():
            before = _random_state()
            self.forward(self.cut.whole)
            return _random_state() != before

    def fetching_draws(self) -> bool:
        """Whether the whole batch had to draw random numbers of its own when it was fetched."""
        with preserved_state():
            before = _random_state()
            self.cut.fetched_whole()
            return _random_state() != before

    def losses(self, batches: Sequence[Any]) -> list[tuple[float, float]]:
        """Loss sum and count of each batch."""
        with self._undisturbed(), self._in_precision():
            pairs = [self.workload.loss_sum(self.model, batch) for batch in batches]
        return [(float(loss.detach()), float(count)) for loss, count in pairs]

    @torch.no_grad()
    def outputs(self, batches: Sequence[Any]) -> list[Any]:
        """What the model makes of each batch of inputs; only for `(inputs, targets)` batches."""
        with self._undisturbed(), self._in_precision():
            return [self.model(inputs) for inputs, _ in batches]

    def forward(self, batch: Any) -> None:
        """One forward pass that leaves its marks on buffers and random states."""
        with self._in_precision():
            self.workload.loss_sum(self.model, batch)

    def _in_precision(self) -> torch.autocast:
        device_type = next(self.model.parameters()).device.type
        return torch.autocast(device_type, self._autocast, enabled=self._autocast is not None)

    @contextmanager
    def _undisturbed(self) -> Iterator[None]:
        buffers = [(buffer, buffer.clone()) for buffer in self.model.buffers()]
        try:
            with preserved_state():
                yield
        finally:
            with torch.no_grad():
                for buffer, value in buffers:
                    buffer.copy_(value)
            self.model.zero_grad(set_to_none=True)


def relative_difference(
    actual: Sequence[Tensor | None], expected: Sequence[Tensor | None]
) -> float:
    """‖actual − expected‖ / ‖expected‖ over all tensors together, added up in float64.

    Args:
        actual: Tensors; None is zero.
        expected: Tensors of the same shapes; None is zero.

    Returns:
        The relative difference: infinite if it is not a number, or if only `expected` is zero.
    """
    difference = reference = 0.0
    for a, e in zip(actual, expected, strict=True):
        a64 = 0.0 if a is None else a.detach().double()
        e64 = 0.0 if e is None else e.detach().double()
        difference += float(torch.as_tensor(a64 - e64).square().sum())
        reference += float(torch.as_tensor(e64).square().sum())
    if difference == 0.0:
        return 0.0
    ratio = difference / reference if reference else math.inf
    return math.sqrt(ratio) if math.isfinite(ratio) else math.inf


def norm_of(gradient: Sequence[Tensor | None]) -> float:
    """The Euclidean norm of a gradient, added up in float64.

    Args:
        gradient: Tensors; None is zero.

    Returns:
        The norm.
    """
    return math.hypot(*(float(g.detach().double().norm()) for g in gradient if g is not None))


def _random_state() -> tuple[Any, ...]:
    """Of all generators, in a form that can be compared."""
    name, keys, *rest = np.random.get_state()
    states = [torch.random.get_rng_state()]
    if torch.cuda.is_initialized():
        states += torch.cuda.get_rng_state_all()
    torch_states = tuple(state.numpy().tobytes() for state in states)
    return random.getstate(), name, np.asarray(keys).tobytes(), *rest, *torch_states


def _join(parts: Sequence[Any], sizes: Sequence[int]) -> Any | None:
    """One batch of all parts; None unless each is made of tensors with one row per example."""
    flat = [tree_flatten(part) for part in parts]
    specs = [spec for _, spec in flat]
    if any(spec != specs[0] for spec in specs) or not specs[0].num_leaves:
        return None
    columns = [*zip(*(leaves for leaves, _ in flat), strict=True)]
    if not all(_is_column(column, sizes) for column in columns):
        return None
    return tree_unflatten([torch.cat(column) for column in columns], specs[0])


def _is_column(tensors: Sequence[Any], sizes: Sequence[int]) -> bool:
    if not all(isinstance(tensor, Tensor) and tensor.ndim for tensor in tensors):
        return False
    same = all(tensor.shape[1:] == tensors[0].shape[1:] for tensor in tensors)
    return same and all(len(t) == size for t, size in zip(tensors, sizes, strict=True))
