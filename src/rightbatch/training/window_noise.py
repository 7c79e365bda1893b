"""The noise scale along a training, from the micro-batches that accumulation makes anyway.

The micro-batches of one update are draws of the same gradient, so their scatter is a measurement
of S = tr Σ and |G|² at no extra forward or backward pass (`rightbatch.laws.noise`). What it costs
is one pass over the gradients per micro-batch, so one update in `PAUSE` is drawn from: a fixed
number and no measured time, since a run must be the same run on a slower machine.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import asdict
from itertools import islice
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from rightbatch.laws.noise import NoiseEstimate
from rightbatch.laws.noise_sums import NoiseSums, group_moments
from rightbatch.laws.schedule import follow_noise_scale

PAUSE = 24
"""Updates from one draw to the next: keeps the cost below 2 % of the time."""
DRAWS = 12
"""Draws of one estimate: the noise scale changes slowly, and its interval must be usable."""
_MEMORY = 0.9
"""Of the running averages of |G|² and S, from draw to draw."""


class Observer(Protocol):
    """Watches one update's micro-batches."""

    def __call__(self, count: float, factor: float = 1.0) -> None:
        """After a micro-batch's backward pass: its examples (or tokens), and `.grad`'s factor."""

    def moments(self, num_examples: int) -> tuple[float, float] | None:
        """Unbiased |G|² and S in examples, or None where there is no telling."""


class WindowNoise:
    """Collects draws of (|G|², S) from the updates of one training, and follows the noise scale.

    Args:
        global_batch: The batch that the run begins with.
        largest: The batch is not raised beyond this; None: it is not followed at all.

    Attributes:
        latest: The newest noise scale, lowest and highest it may be, of enough draws; or None.
        batch: The batch that follows it, or None before the first rise.
    """

    def __init__(self, global_batch: int, largest: int | None) -> None:
        self._global_batch = global_batch
        self._largest = largest
        self.latest: NoiseEstimate | None = None
        self.batch: int | None = None
        self._reference: float | None = None
        self._sums = NoiseSums()
        self._running = (0.0, 0.0)
        self._num_draws = 0

    def observer(
        self,
        steps: int,
        optimizer: torch.optim.Optimizer,
        kind: Callable[[Iterable[nn.Parameter]], Observer] | None = None,
    ) -> Observer | None:
        """What is to observe the coming update, where it is one that is drawn from.

        Args:
            steps: Updates done.
            optimizer: Of whose parameters the gradient is.
            kind: Makes the observer. Default: of this process's micro-batches.

        Returns:
            The observer, or None.
        """
        if steps % PAUSE:
            return None
        return (kind or Draw)(p for group in optimizer.param_groups for p in group["params"])

    def add(self, draw: Observer, num_examples: int) -> bool:
        """Takes a draw in.

        Args:
            draw: What observed an update.
            num_examples: Examples that it saw: their number need not be what losses count.

        Returns:
            Whether the batch changes with the next update.
        """
        moments = draw.moments(num_examples)
        if moments is None:
            return False
        self._num_draws += 1
        self._running = tuple(  # pyright: ignore[reportAttributeAccessIssue]
            _MEMORY * old + (1 - _MEMORY) * new
            for old, new in zip(self._running, moments, strict=True)
        )
        self._sums = self._sums.add(*moments)
        if self._sums.num_draws < DRAWS:
            return False
        self.latest = self._sums.estimate(method="micro-batches of updates")
        self._sums = NoiseSums()
        return self._follow(self.latest.noise_scale.value)

    def _follow(self, noise_scale: float | None) -> bool:
        # What is unresolved says nothing; the batch stays as it is.
        if noise_scale is None or noise_scale <= 0 or self._largest is None:
            return False
        if self._reference is None:
            self._reference = noise_scale
        before = self.batch or self._global_batch
        wanted = follow_noise_scale(
            noise_scale,
            reference_batch=self._global_batch,
            reference_noise=self._reference,
            largest=self._largest,
        )
        # The scale grows over a training; that it seems to fall is the scatter of estimates.
        self.batch = max(wanted, before)
        return self.batch != before

    @property
    def running_moments(self) -> tuple[float, float] | None:
        """Running averages of |G|² and S over the last draws, or None before any."""
        if self._num_draws == 0:
            return None
        bias = 1 - _MEMORY**self._num_draws
        return self._running[0] / bias, self._running[1] / bias

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to go on exactly."""
        return {
            "sums": asdict(self._sums),
            "running": self._running,
            "num_draws": self._num_draws,
            "reference": self._reference,
            "batch": self.batch,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from a `state_dict`."""
        self._sums = NoiseSums(**state["sums"])
        self._running = state["running"]
        self._num_draws = state["num_draws"]
        self._reference = state["reference"]
        self.batch = state["batch"]


class Draw:
    """Observes one update: the squared norm of each micro-batch's own mean gradient.

    Args:
        parameters: What is trained; `.grad` holds the sum so far when it is called.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self._parameters = [p for p in parameters if p.requires_grad]
        self._before: list[Tensor] = []
        self._seen: list[int] = []
        self._factor = 1.0
        self._counts: list[float] = []
        self._norms: list[Tensor] = []
        self._parts: list[int] = []

    def __call__(self, count: float, factor: float = 1.0) -> None:
        """After a micro-batch's backward pass.

        Args:
            count: Examples (or tokens) of it.
            factor: What `.grad` is multiplied by, the same for the whole update.
        """
        gradients = [p.grad for p in self._parameters]
        seen = [index for index, gradient in enumerate(gradients) if gradient is not None]
        summed = [gradient for gradient in gradients if gradient is not None]
        if seen != self._seen:
            self._make_room(seen, summed)
        # Each tensor's norm; they are put together once, since small operations are dear.
        if self._counts:
            torch._foreach_sub_(self._before, summed)  # the sign does not matter
            self._norms += torch._foreach_norm(self._before)
        else:
            self._norms += torch._foreach_norm(summed)
        torch._foreach_copy_(self._before, summed)
        self._parts.append(len(summed))
        self._counts.append(count)
        self._factor = factor

    def _make_room(self, seen: list[int], summed: list[Tensor]) -> None:
        """For the sums of these parameters; of those that no micro-batch used before, zeros."""
        known = dict(zip(self._seen, self._before, strict=True))
        self._before = [
            known[index] if index in known else torch.zeros_like(gradient)
            for index, gradient in zip(seen, summed, strict=True)
        ]
        self._seen = seen

    def moments(self, num_examples: int) -> tuple[float, float] | None:
        """Unbiased |G|² and S, in examples also where losses count tokens.

        Args:
            num_examples: Examples of the update.

        Returns:
            Both, or None with fewer than two micro-batches or where a gradient was no number, as
            in half precision happens.
        """
        if len(self._counts) < 2:
            return None
        total = sum(self._counts)
        norms = iter(torch.stack([*self._norms, *torch._foreach_norm(self._before)]).tolist())
        squares = [
            math.hypot(*islice(norms, parts)) ** 2 / (count * self._factor) ** 2
            for parts, count in zip(self._parts, self._counts, strict=True)
        ]
        whole = math.hypot(*norms) ** 2 / (total * self._factor) ** 2
        if not math.isfinite(sum(squares) + whole):
            return None
        sizes = [count * num_examples / total for count in self._counts]
        return group_moments(sizes, squares, whole)


def squared_norm(tensors: Iterable[Tensor]) -> Tensor:
    """The squared norm of some tensors together, a scalar tensor."""
    # In double: the noise is a small difference of these where the gradient is large.
    return torch.stack(torch._foreach_norm(list(tensors))).double().square().sum()
