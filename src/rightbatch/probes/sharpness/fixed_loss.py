"""The mean loss of fixed examples as a function of one weight vector, with two derivatives.

f(w) = Σ loss over the terms / their count, as the workload counts them (examples, or tokens where
targets are sequences). The examples are cut into micro-batches, whose sums add up to the whole, so
that memory is bounded whatever the number of examples.

A Hessian-vector product is the gradient of (∇f · v): two backward passes, with no matrix
(Pearlmutter 1994, "Fast Exact Multiplication by the Hessian"). It is exact to rounding. Where f is
made of pieces, as with ReLU, it is the Hessian of the piece.

The model is in evaluation mode: dropout is off and BatchNorm uses its running statistics, so that f
is a function, and the same one however the examples are cut.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from rightbatch.device.out_of_memory import is_out_of_memory
from rightbatch.errors import ProbeError
from rightbatch.training.evaluate import to_device
from rightbatch.workload import Workload

_FORWARD, _GRADIENT, _PRODUCT = 1 / 3, 1.0, 3.0
"""Cost of a pass in gradients."""
_MOST_BYTES = 2**30
"""Of what one pass keeps for the backward passes."""
_MOST_IN_A_PASS = 1024
_COPIES = 4
"""A backward pass that is differentiated again keeps about so many times what a plain one keeps."""


class FixedLoss:
    """The mean loss of fixed examples around the weights of a model, which it changes and may keep.

    Args:
        workload: Says how the loss is computed.
        model: A copy that belongs to this object; it is put into evaluation mode.
        device: Where the model is.
        indices: Which training examples.
        micro_batch: Examples in one pass; halved where they do not fit. None: as many as keep about
            1 GiB for the backward passes.
        seed: Set before each pass, for a loss that draws random numbers.

    Attributes:
        num_weights: Trainable weights n.
        num_examples: How many examples.
        cost: Examples processed so far.
        epsilon: Rounding of the weights' arithmetic, relative.
    """

    def __init__(
        self,
        workload: Workload,
        model: nn.Module,
        *,
        device: str,
        indices: Tensor,
        micro_batch: int | None,
        seed: int,
    ) -> None:
        self._workload, self._model, self._device = workload, model.eval(), device
        self._indices, self._seed = indices, seed
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self.num_weights = sum(p.numel() for p in self._parameters)
        self.num_examples = len(indices)
        self.cost = 0.0
        self.epsilon = max(torch.finfo(p.dtype).eps for p in self._parameters)
        self._micro_batch = micro_batch or self._fitting_micro_batch()
        self._batches = self._cut()

    def _fitting_micro_batch(self) -> int:
        """As many examples as keep about a gigabyte, by what one example keeps."""
        own = {p.data_ptr() for p in self._parameters}
        kept = 0

        def count(tensor: Tensor) -> Tensor:
            nonlocal kept
            kept += 0 if tensor.data_ptr() in own else tensor.nbytes
            return tensor

        batch = to_device(self._workload.train_examples.batch(self._indices[:1]), self._device)
        with (
            self._differentiable_twice(),
            torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor),
        ):
            self._workload.loss_sum(self._model, batch)
        fitting = _MOST_BYTES // max(_COPIES * kept, 1)
        return max(1, min(fitting, _MOST_IN_A_PASS))

    def _cut(self) -> list[Any]:
        """Fetched once: what a data set draws at random is then fixed as well."""
        pieces = self._indices.split(self._micro_batch)
        examples = self._workload.train_examples
        return [to_device(examples.batch(piece), self._device) for piece in pieces]

    @property
    def weights(self) -> Tensor:
        """The present weights, float64, shape (n,)."""
        return _flat([p.detach() for p in self._parameters])

    def place(self, weights: Tensor) -> None:
        """Puts weights into the model.

        Args:
            weights: Shape (n,).
        """
        with torch.no_grad():
            for p, part in zip(self._parameters, self._split(weights), strict=True):
                p.copy_(part)

    def rounding(self, loss: float) -> float:
        """About how far rounding moves a loss: as a sum of squares of which each root is rounded.

        Args:
            loss: f.

        Returns:
            The distance.
        """
        return 4 * self.epsilon * max(abs(loss), math.sqrt(abs(loss)))

    def loss(self) -> float:
        """The loss f at the present weights."""
        with torch.no_grad():
            total, _ = self._over_batches(lambda loss: (loss, None), _FORWARD)
        return total

    def loss_and_gradient(self) -> tuple[float, Tensor]:
        """The loss f and ∇f at the present weights.

        Returns:
            The loss, and its gradient, float64, shape (n,).
        """

        def gradient(loss: Tensor) -> tuple[Tensor, Tensor]:
            return loss, _flat(self._gradients(loss, create_graph=False))

        total, found = self._over_batches(gradient, _GRADIENT)
        assert found is not None
        return total, found

    def hessian_product(self, vector: Tensor) -> Tensor:
        """H v at the present weights.

        Args:
            vector: v, float64, shape (n,).

        Returns:
            The product, likewise.
        """
        parts = self._split(vector)

        def product(loss: Tensor) -> tuple[Tensor, Tensor]:
            gradients = self._gradients(loss, create_graph=True)
            along = sum(
                ((g * part).sum() for g, part in zip(gradients, parts, strict=True)),
                start=loss.new_zeros(()),
            )
            if not along.requires_grad:  # the loss is linear in the weights
                return loss, torch.zeros_like(vector)
            return loss, _flat(self._gradients(along, create_graph=False))

        found = self._over_batches(product, _PRODUCT)[1]
        assert found is not None
        return found

    def _gradients(self, value: Tensor, *, create_graph: bool) -> list[Tensor]:
        found = torch.autograd.grad(
            value, self._parameters, create_graph=create_graph, materialize_grads=True
        )
        return list(found)

    def _over_batches(
        self, measure: Callable[[Tensor], tuple[Tensor, Tensor | None]], cost: float
    ) -> tuple[float, Tensor | None]:
        """Means of what is summed over the terms of each micro-batch."""
        with self._differentiable_twice():
            while True:
                try:
                    found = self._pass(measure)
                    break
                except Exception as error:
                    if self._micro_batch == 1 or not is_out_of_memory(error):
                        raise
                self._micro_batch = max(1, min(self._micro_batch, self.num_examples) // 2)
                self._batches = self._cut()
        self.cost += cost * self.num_examples
        return found

    def _pass(
        self, measure: Callable[[Tensor], tuple[Tensor, Tensor | None]]
    ) -> tuple[float, Tensor | None]:
        total, terms = 0.0, 0.0
        summed: Tensor | None = None
        for index, batch in enumerate(self._batches):
            self._set_seed(self._seed + index)
            loss_sum, count = self._workload.loss_sum(self._model, batch)
            if not float(count) > 0:  # padding alone: a mean over nothing is no number
                continue
            value, vector = measure(loss_sum)
            total += float(value.detach())
            terms += float(count)
            if vector is not None:
                summed = vector if summed is None else summed + vector
        if terms == 0:
            raise ProbeError(
                f"The loss of {self.num_examples} examples of {self._workload.name!r} counts no "
                "term, so it has no mean. Use more examples, or check the targets for padding."
            )
        return total / terms, None if summed is None else summed / terms

    def _set_seed(self, seed: int) -> None:
        """`torch.manual_seed` without what it queues for devices that were never used."""
        torch.default_generator.manual_seed(seed)
        if torch.device(self._device).type == "cuda":
            torch.cuda.manual_seed(seed)

    @contextmanager
    def _differentiable_twice(self) -> Iterator[None]:
        """Fused kernels of attention, and cuDNN's of recurrence, have no second derivative."""
        with ExitStack() as stack:
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            if any(isinstance(module, nn.RNNBase) for module in self._model.modules()):
                stack.enter_context(torch.backends.cudnn.flags(enabled=False))
            yield

    def _split(self, vector: Tensor) -> list[Tensor]:
        parts = vector.split([p.numel() for p in self._parameters])
        return [
            part.view_as(p).to(p.dtype) for part, p in zip(parts, self._parameters, strict=True)
        ]


def _flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([t.detach().reshape(-1).double() for t in tensors])
