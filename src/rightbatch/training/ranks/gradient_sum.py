"""Sums gradients over ranks while the backward pass still computes the rest of them.

The method is that of `DistributedDataParallel` (Li et al. 2020, "PyTorch Distributed", VLDB):
gradients are put together in buckets, in the reverse order of the parameters, and a bucket is sent
as soon as it is complete. What differs is what a bucket waits for. DDP sends when every gradient
has arrived, so a rank whose share is empty, whose last micro-batch is all padding, that does not
use a parameter or that runs out of memory halfway leaves the others waiting. Here `finish` sends
whatever was not sent, with zeros for what is missing: every rank makes the same calls in the same
order in every update, whatever happened to it. It is a sum, not an average of ranks with unequal
shares, and a rank's own gradient can be looked at before it is sent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from rightbatch.errors import WorkloadError

BUCKET_BYTES = 25 * 2**20
"""Of gradients sent together: DDP's default."""
_FIRST_BUCKET_BYTES = 2**20
"""Of those that arrive first, so that sending begins early."""


class GradientSum:
    """Sums the gradients of some parameters over ranks.

    Args:
        parameters: The same ones in the same order on every rank.
        send: Begins to sum a tensor over ranks, in place; gives what to wait for.
        bucket_bytes: Gradients sent together.

    Attributes:
        look: Called with parameters and this rank's gradients of them, just before they are sent.
        used: Of each parameter: whether this rank had a gradient for it in the last update.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        send: Callable[[Tensor], Any],
        *,
        bucket_bytes: int = BUCKET_BYTES,
    ) -> None:
        self.parameters = [p for p in parameters if p.requires_grad]
        self.look: Callable[[list[nn.Parameter], list[Tensor]], None] | None = None
        self.used: list[bool] = []
        self._send = send
        self._buckets = _make_buckets(self.parameters, bucket_bytes)
        self._bucket_of = {p: bucket for bucket in self._buckets for p in bucket.parameters}
        self._arrived: set[nn.Parameter] = set()
        self._armed = False
        self._next = 0
        self._hooks = [
            p.register_post_accumulate_grad_hook(self._on_gradient) for p in self.parameters
        ]

    def clear(self) -> None:
        """Lets go of the last update's sums, before the gradients of the next take their place."""
        for bucket in self._buckets:
            bucket.flat = torch.empty(0)

    def arm(self) -> None:
        """Before this rank's last backward pass of an update: gradients are sent as they come."""
        self._armed = True

    def finish(self) -> None:
        """Sends what was not sent."""
        self._armed = False
        while self._next < len(self._buckets):
            self._send_next()
        self.used = [p in self._arrived for p in self.parameters]
        self._next = 0
        self._arrived.clear()

    def wait(self) -> None:
        """Waits for the other ranks; `.grad` then holds sums.

        Parameters that no rank has used hold zeros: see `forget`.
        """
        for bucket in self._buckets:
            bucket.work.wait()
            bucket.work = None

    def forget(self, used: Iterable[float]) -> None:
        """Takes the zeros away from parameters that no rank used, as a single process has it.

        Args:
            used: Of each parameter: the number of ranks that used it.
        """
        for parameter, number in zip(self.parameters, used, strict=True):
            if not number:
                parameter.grad = None

    def divide(self, total: float) -> None:
        """Divides all gradients.

        Args:
            total: By what.
        """
        torch._foreach_div_([bucket.flat for bucket in self._buckets], total)

    @property
    def sums(self) -> list[Tensor]:
        """The summed gradients of the last update, flat."""
        return [bucket.flat for bucket in self._buckets]

    def close(self) -> None:
        """Leaves the parameters alone from now on."""
        for hook in self._hooks:
            hook.remove()

    def _on_gradient(self, parameter: Tensor) -> None:
        if not self._armed:
            return
        assert isinstance(parameter, nn.Parameter)
        bucket = self._bucket_of[parameter]
        if parameter in bucket.came:
            raise WorkloadError(
                f"A parameter of shape {tuple(parameter.shape)} got its gradient in several parts, "
                "as with reentrant checkpointing of shared weights, so that it is not known when "
                "it is complete. Call torch.utils.checkpoint with use_reentrant=False."
            )
        bucket.came.add(parameter)
        while self._next < len(self._buckets) and self._buckets[self._next].complete:
            self._send_next()

    def _send_next(self) -> None:
        bucket = self._buckets[self._next]
        self._next += 1
        gradients = [self._gradient_of(p) for p in bucket.parameters]
        if self.look is not None:
            self.look(bucket.parameters, gradients)
        bucket.flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
        parts = bucket.flat.split([p.numel() for p in bucket.parameters])
        for parameter, part in zip(bucket.parameters, parts, strict=True):
            parameter.grad = part.view_as(parameter)
        bucket.came.clear()
        bucket.work = self._send(bucket.flat)

    def _gradient_of(self, parameter: nn.Parameter) -> Tensor:
        gradient = parameter.grad
        if gradient is None:
            return torch.zeros_like(parameter)
        if gradient.layout != torch.strided:
            raise WorkloadError(
                f"A parameter of shape {tuple(parameter.shape)} has a sparse gradient, which "
                "cannot be summed over ranks. Make the layer with sparse=False."
            )
        self._arrived.add(parameter)
        return gradient


class _Bucket:
    """Gradients that are sent together."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self.parameters = parameters
        self.came: set[nn.Parameter] = set()
        self.flat = torch.empty(0)
        self.work: Any = None

    @property
    def complete(self) -> bool:
        return len(self.came) == len(self.parameters)


def _make_buckets(parameters: list[nn.Parameter], bucket_bytes: int) -> list[_Bucket]:
    """Neighbours in the reverse order, of one type and device each."""
    groups: list[list[nn.Parameter]] = []
    held, limit, kind = 0, 0, None
    for parameter in reversed(parameters):
        size = parameter.numel() * parameter.element_size()
        if not groups or (parameter.dtype, parameter.device) != kind or held + size > limit:
            limit = bucket_bytes if groups else min(_FIRST_BUCKET_BYTES, bucket_bytes)
            groups.append([])
            held, kind = 0, (parameter.dtype, parameter.device)
        groups[-1].append(parameter)
        held += size
    return [_Bucket(group) for group in groups]
