"""The model of a training, prepared as the recipe says."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from rightbatch.errors import RecipeError
from rightbatch.isolate.preserve import preserved_state
from rightbatch.recipe import Recipe
from rightbatch.training.activations import checkpoint_activations, keep_activations
from rightbatch.training.evaluate import to_device
from rightbatch.training.ghost_norm import use_ghost_norm
from rightbatch.workload import Workload

# Otherwise all models of a process share a limit of 8, and further ones are silently not compiled.
_ISOLATED = (
    {"isolate_recompiles": True}
    if "isolate_recompiles" in inspect.signature(torch.compile).parameters
    else {}
)


def make_model(
    workload: Workload,
    recipe: Recipe,
    seed: int,
    device: str | torch.device,
    *,
    like: nn.Module | None = None,
) -> tuple[nn.Module, nn.Module]:
    """A fresh model, and what is called in its place where the recipe compiles it.

    Args:
        workload: Makes the model.
        recipe: Says how it is prepared.
        seed: Of the initial weights.
        device: Where it is put.
        like: Copied instead of making a fresh one.

    Returns:
        The model, and the module to call for a forward pass; they share every parameter.
    """
    model = workload.build_model(seed, device) if like is None else copy.deepcopy(like)
    if recipe.ghost_batch is not None:
        use_ghost_norm(model, recipe.ghost_batch)
    keep_activations(model)  # a copy may be of a model that recomputes them
    if recipe.activation_checkpointing:
        checkpoint_activations(model)
    if recipe.compile is None:
        return model, model
    # Sizes as symbols: the smaller last batch, or a batch that grows, compiles nothing anew.
    options: Any = {"backend": recipe.compile, "dynamic": True, **_ISOLATED}
    compiled: Any = torch.compile(model, **options)
    return model, compiled


def smallest_pass(
    workload: Workload, model: nn.Module, recipe: Recipe, device: str | torch.device
) -> int:
    """Examples that the model needs at least in one pass in training mode: 1, or 2.

    BatchNorm over a single value per channel has no variance, and torch refuses it. Whether it is
    a single value depends on the shapes inside, so one example is tried.

    Args:
        workload: Gives the example.
        model: The model; it is left as it was.
        recipe: Its batches must be large enough.
        device: Where the model is.

    Returns:
        1 or 2.

    Raises:
        RecipeError: If a micro-batch, or a batch on the way, is smaller than that.
    """
    layer = next((n for n, m in model.named_modules() if isinstance(m, _BatchNorm)), None)
    if layer is None or _trains_on_one(workload, model, device):
        return 1
    if workload.num_examples < 2:
        return 2
    batches = {"micro_batch": recipe.micro_batch, "batch_ramp": _least_batch(recipe)}
    for field, batch in batches.items():
        if batch < 2:
            raise RecipeError(
                f"{field} asks for passes of {batch}, but layer {layer!r} is a BatchNorm, which "
                "needs at least 2 examples to see a variance. Use 2 or more, or GroupNorm."
            )
    return 2


def _least_batch(recipe: Recipe) -> int:
    return min(recipe.global_batch, *(batch for _, batch in recipe.batch_ramp), recipe.global_batch)


def _trains_on_one(workload: Workload, model: nn.Module, device: str | torch.device) -> bool:
    with preserved_state(model), torch.no_grad():
        batch = to_device(workload.train_examples.batch(torch.tensor([0])), device)
        try:
            workload.loss_sum(model, batch)
        except ValueError as error:
            return "more than 1 value per channel" not in str(error)
    return True
