"""The torch optimizers' updates on stacked tensors, in place: one call for all copies."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from rightbatch.engines.optimizer_plan import Group, OptimizerPlan


class StackedOptimizer:
    """Updates the trained tensors of several copies at once.

    Everything is done in place and nothing is read back, so that an update can be captured in a
    CUDA graph.

    Args:
        plan: The rule, and the numbers of all copies.
        trained: The trained tensors, each of shape (copies, …).
        rows: Positions of these copies in the plan.
    """

    def __init__(self, plan: OptimizerPlan, trained: Sequence[Tensor], rows: Sequence[int]) -> None:
        device = trained[0].device
        self._groups = plan.groups
        self._trained = list(trained)
        self._rates, self._decays = (
            [torch.tensor(row[list(rows)], device=device) for row in values]
            for values in (plan.learning_rates, plan.decays)
        )
        self._steps = torch.zeros((), dtype=torch.float64, device=device)
        self._states = [
            {name: [torch.zeros_like(trained[i]) for i in group.members] for name in _names(group)}
            for group in plan.groups
        ]

    @property
    def tensors(self) -> list[Tensor]:
        """All that an update changes besides the trained tensors."""
        states = [t for state in self._states for tensors in state.values() for t in tensors]
        return [self._steps, *states]

    def keep(self, rows: Tensor, trained: Sequence[Tensor]) -> None:
        """Leaves out copies.

        Args:
            rows: Those that stay, int64.
            trained: Their trained tensors.
        """
        self._trained = list(trained)
        self._rates = [rates[rows] for rates in self._rates]
        self._decays = [decays[rows] for decays in self._decays]
        self._states = [
            {name: [t[rows] for t in tensors] for name, tensors in state.items()}
            for state in self._states
        ]

    def step(self, gradients: Sequence[Tensor]) -> None:
        """One update of every copy.

        Args:
            gradients: Of the trained tensors, in their order; they are not changed.
        """
        settings = zip(self._groups, self._states, self._rates, self._decays, strict=True)
        for group, state, rates, decays in settings:
            rule = self._sgd if group.kind == "sgd" else self._adam
            sign = -1.0 if group["maximize"] else 1.0
            for slot, position in enumerate(group.members):
                p, g = self._trained[position], gradients[position]
                own = {name: tensors[slot] for name, tensors in state.items()}
                rule(group, p, g if sign > 0 else -g, own, _along(rates, p), _along(decays, p))
        self._steps += 1

    def _sgd(
        self, group: Group, p: Tensor, g: Tensor, own: dict[str, Tensor], lr: Tensor, decay: Tensor
    ) -> None:
        if group.decays:
            g = torch.addcmul(g, decay.to(p.dtype), p)
        if own:
            momentum, dampening = group["momentum"], group["dampening"]
            buffer = own["momentum"].mul_(momentum).add_(g, alpha=1 - dampening)
            if dampening:  # the first buffer is the gradient itself, undamped
                buffer.copy_(torch.where(self._steps == 0, g, buffer))
            g = torch.add(g, buffer, alpha=momentum) if group["nesterov"] else buffer
        p.addcmul_(lr.to(p.dtype), g, value=-1)

    def _adam(
        self, group: Group, p: Tensor, g: Tensor, own: dict[str, Tensor], lr: Tensor, decay: Tensor
    ) -> None:
        beta1, beta2 = group["betas"]
        if group.decays and group["decoupled_weight_decay"]:
            p.mul_(decay.to(p.dtype))
        elif group.decays:
            g = torch.addcmul(g, decay.to(p.dtype), p)
        mean = own["mean"].lerp_(g, 1 - beta1)
        square = own["square"].mul_(beta2).addcmul_(g, g, value=1 - beta2)
        if group["amsgrad"]:
            square = torch.maximum(own["largest"], square, out=own["largest"])
        # 0-dimensional float64 keeps its digits and does not widen what it meets.
        root = square.sqrt().div_(self._correction(beta2).sqrt()).add_(group["eps"])
        rate = (lr / self._correction(beta1)).to(p.dtype)
        p.addcmul_(rate, mean / root, value=-1)

    def _correction(self, beta: float) -> Tensor:
        """1 − βᵗ, t the number of this update."""
        if beta == 0:
            return torch.ones_like(self._steps)
        return -torch.expm1((self._steps + 1) * math.log(beta))


def _names(group: Group) -> tuple[str, ...]:
    if group.kind == "sgd":
        return ("momentum",) if group["momentum"] != 0 else ()
    return ("mean", "square", "largest") if group["amsgrad"] else ("mean", "square")


def _along(values: Tensor, tensor: Tensor) -> Tensor:
    """Values per copy, shaped to be multiplied with a stacked tensor."""
    return values.view(-1, *[1] * (tensor.ndim - 1))
