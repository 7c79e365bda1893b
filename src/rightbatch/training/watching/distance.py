"""How far the weights are from the initial ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from rightbatch.training.model import make_model

if TYPE_CHECKING:
    from rightbatch.training.loop import Training


def initial_weights(training: Training) -> list[Tensor]:
    """A copy of the weights that a run began with, which depend on its seed alone.

    Args:
        training: The run, at any step.

    Returns:
        One tensor per parameter.
    """
    model: nn.Module = training.model
    if training.steps:
        model, _ = make_model(training.workload, training.recipe, training.seed, training.device)
        return [parameter.detach() for parameter in model.parameters()]
    return [parameter.detach().clone() for parameter in model.parameters()]


def distance_from(initial: Sequence[Tensor], model: nn.Module) -> Tensor:
    """‖w − w₀‖ over all parameters.

    Args:
        initial: As `initial_weights` gave them.
        model: The model now.

    Returns:
        The distance, a scalar on the model's device: reading it waits for a GPU.
    """
    with torch.no_grad():
        moved = [
            torch.linalg.vector_norm(_exact_enough(now.detach() - before)).double()
            for now, before in zip(model.parameters(), initial, strict=True)
        ]
        return torch.linalg.vector_norm(torch.stack(moved)) if moved else torch.zeros(())


def norm_of_weights(model: nn.Module) -> float:
    """‖w‖ over all parameters.

    Args:
        model: The model.

    Returns:
        The norm.
    """
    weights = [parameter.detach() for parameter in model.parameters()]
    norms = [float(torch.linalg.vector_norm(_exact_enough(w)).double()) for w in weights]
    return float(torch.linalg.vector_norm(torch.tensor(norms, dtype=torch.float64)))


def _exact_enough(values: Tensor) -> Tensor:
    return values.float() if values.dtype in (torch.bfloat16, torch.half) else values
