"""The torch optimizers' updates in JAX."""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jax import Array

from rightbatch.engines.optimizer_plan import Group

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
