"""The update rule of a workload's optimizer, read from what its own factory makes.

The factory is called once for every learning rate, so a group's rate may depend on it in any way
(a smaller rate for the head, weight decay that grows with the rate). Everything else must be the
same at every rate.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from rightbatch.engines.unsupported import Unsupported
from rightbatch.workload import Workload

_IGNORED = {"params", "lr", "weight_decay", "foreach", "fused", "capturable", "differentiable"}
"""Entries of a parameter group that are read apart, or change only how fast torch is."""
_KINDS: dict[type[torch.optim.Optimizer], Literal["sgd", "adam"]] = {
    torch.optim.SGD: "sgd",
    torch.optim.Adam: "adam",
    torch.optim.AdamW: "adam",
}


@dataclass(frozen=True, kw_only=True)
class Group:
    """One parameter group: which tensors it updates, and the settings that all copies share.

    Attributes:
        members: Positions among the trained tensors.
        kind: The family of update rule.
        settings: The remaining settings, sorted by name.
        decays: Whether any copy has weight decay.
    """

    members: tuple[int, ...]
    kind: Literal["sgd", "adam"]
    settings: tuple[tuple[str, Any], ...]
    decays: bool

    def __getitem__(self, name: str) -> Any:
        return dict(self.settings)[name]


@dataclass(frozen=True, kw_only=True, eq=False)
class OptimizerPlan:
    """How to update, and the numbers that differ between copies.

    Attributes:
        groups: The parameter groups.
        learning_rates: Shape (groups, copies), float64.
        decays: Shape (groups, copies): weight decay λ; where it is decoupled, the factor 1 − ηλ.
    """

    groups: tuple[Group, ...]
    learning_rates: NDArray[np.float64]
    decays: NDArray[np.float64]


def read_optimizer(
    workload: Workload, model: nn.Module, trained: Sequence[str], learning_rates: NDArray[Any]
) -> OptimizerPlan:
    """Reads the update rule from the optimizers that the workload makes.

    Args:
        workload: Has the factory.
        model: A model of this workload.
        trained: Names of the tensors that receive gradients.
        learning_rates: One per copy, shape (copies,).

    Returns:
        The plan.

    Raises:
        Unsupported: If the rule is none of SGD, Adam and AdamW, or changes with the rate.
    """
    named = dict(model.named_parameters())
    positions = {id(named[name]): i for i, name in enumerate(trained)}
    distinct, which = np.unique(learning_rates, return_inverse=True)
    plans = [
        _read_groups(workload.make_optimizer(model.parameters(), float(lr)), positions)
        for lr in distinct
    ]
    shapes = {tuple((g.members, g.kind, g.settings) for g, _, _ in plan) for plan in plans}
    if len(shapes) != 1:
        raise Unsupported("the optimizer's settings change with the learning rate")
    decays_at_all = [any(plan[g][0].decays for plan in plans) for g in range(len(plans[0]))]
    return OptimizerPlan(
        groups=tuple(
            Group(members=g.members, kind=g.kind, settings=g.settings, decays=decays)
            for (g, _, _), decays in zip(plans[0], decays_at_all, strict=True)
        ),
        learning_rates=np.array([[lr for _, lr, _ in plan] for plan in plans]).T[:, which],
        decays=np.array([[decay for _, _, decay in plan] for plan in plans]).T[:, which],
    )


def _read_groups(
    optimizer: torch.optim.Optimizer, positions: dict[int, int]
) -> list[tuple[Group, float, float]]:
    kind = _KINDS.get(type(optimizer))
    if kind is None:
        raise Unsupported(f"it has no update rule for the optimizer {type(optimizer).__name__}")
    hooks = (optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks)
    if "step" in vars(optimizer) or any(hooks):
        raise Unsupported("the optimizer's step is changed by a scheduler or a hook")
    groups = []
    for group in optimizer.param_groups:
        settings = tuple(sorted((k, _plain(v)) for k, v in group.items() if k not in _IGNORED))
        lr, decay = float(group["lr"]), float(group["weight_decay"])
        members = [positions[id(p)] for p in group["params"] if id(p) in positions]
        decays = decay != 0
        if dict(settings).get("decoupled_weight_decay"):
            decay = 1 - lr * decay
        record = Group(members=tuple(members), kind=kind, settings=settings, decays=decays)
        groups.append((record, lr, decay))
    return groups


def _plain(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.item()
    return tuple(_plain(v) for v in value) if isinstance(value, tuple | list) else value
