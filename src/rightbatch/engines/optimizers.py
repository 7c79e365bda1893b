"""The torch optimizers' updates in JAX, read from what the workload's own factory makes.

The factory is called once for every learning rate, so a group's rate may depend on it in any way
(a smaller rate for the head, weight decay that grows with the rate). Everything else must be the
same at every rate.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
import torch
from jax import Array
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


State = dict[str, list[Array]]


def init_state(groups: Sequence[Group], parameters: Sequence[Array]) -> list[State]:
    """The optimizer state before the first update, one dict of lists per group."""
    states: list[State] = []
    for group in groups:
        if group.kind == "sgd":
            names = ["momentum"] if group["momentum"] != 0 else []
        else:
            names = ["mean", "square", "largest"] if group["amsgrad"] else ["mean", "square"]
        states.append({n: [jnp.zeros_like(parameters[i]) for i in group.members] for n in names})
    return states


def update(
    groups: Sequence[Group],
    parameters: Sequence[Array],
    gradients: Sequence[Array],
    states: Sequence[State],
    learning_rates: Sequence[Array],
    decays: Sequence[Array],
    step: Array,
) -> tuple[list[Array], list[State]]:
    """One update of one copy.

    Args:
        groups: The parameter groups.
        parameters: The trained tensors.
        gradients: Their gradients.
        states: The optimizer's state, as `init_state` made it.
        learning_rates: One scalar per group.
        decays: One scalar per group, as in `OptimizerPlan`.
        step: Updates done before this one.

    Returns:
        New parameters and new state.
    """
    new_parameters, new_states = list(parameters), []
    for group, state, lr, decay in zip(groups, states, learning_rates, decays, strict=True):
        rule = _sgd if group.kind == "sgd" else _adam
        new_state: State = {name: list(values) for name, values in state.items()}
        for slot, position in enumerate(group.members):
            gradient = gradients[position]
            if group["maximize"]:
                gradient = -gradient
            own = {name: values[slot] for name, values in state.items()}
            new_parameters[position], changed = rule(
                group, parameters[position], gradient, own, lr, decay, step
            )
            for name, value in changed.items():
                new_state[name][slot] = value
        new_states.append(new_state)
    return new_parameters, new_states


def _sgd(
    group: Group, p: Array, g: Array, own: dict[str, Array], lr: Array, decay: Array, step: Array
) -> tuple[Array, dict[str, Array]]:
    if group.decays:
        g = g + decay * p
    if not own:
        return p - lr * g, {}
    momentum, dampening = group["momentum"], group["dampening"]
    buffer = momentum * own["momentum"] + (1 - dampening) * g
    if dampening:
        # The first buffer is the gradient itself, undamped.
        buffer = jnp.where(step == 0, g, buffer)
    direction = g + momentum * buffer if group["nesterov"] else buffer
    return p - lr * direction, {"momentum": buffer}


def _adam(
    group: Group, p: Array, g: Array, own: dict[str, Array], lr: Array, decay: Array, step: Array
) -> tuple[Array, dict[str, Array]]:
    beta1, beta2 = group["betas"]
    if group.decays:
        if group["decoupled_weight_decay"]:
            p = p * decay
        else:
            g = g + decay * p
    mean = own["mean"] + (1 - beta1) * (g - own["mean"])
    square = beta2 * own["square"] + (1 - beta2) * g * g
    changed = {"mean": mean, "square": square}
    if group["amsgrad"]:
        changed["largest"] = jnp.maximum(own["largest"], square)
    root = jnp.sqrt(changed.get("largest", square)) / jnp.sqrt(_bias_correction(beta2, step))
    return p - lr / _bias_correction(beta1, step) * mean / (root + group["eps"]), changed


def _bias_correction(beta: float, step: Array) -> Array:
    """1 − βᵗ for t = step + 1, through expm1: the difference itself loses digits in float32."""
    if beta == 0:
        return jnp.ones(())
    return -jnp.expm1((step + 1) * np.float32(np.log(beta)))
