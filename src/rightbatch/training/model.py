"""The model of a training, prepared as the recipe says."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from rightbatch.errors import RecipeError
from rightbatch.isolate.preserve import preserved_state
from rightbatch.recipe import Recipe
from rightbatch.training.evaluate import to_device
from rightbatch.training.ghost_norm import use_ghost_norm
from rightbatch.workload import Workload


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
    if like is not None:
        model = copy.deepcopy(like)
    else:
        model = workload.build_model(seed, device)
        if recipe.ghost_batch is not None:
            use_ghost_norm(model, recipe.ghost_batch)
        if recipe.activation_checkpointing:
            checkpoint_activations(model)
    if recipe.compile is None:
        return model, model
    # Sizes as symbols: the smaller last batch, or a batch that grows, compiles nothing anew.
    return model, torch.compile(model, backend=recipe.compile, dynamic=True)  # pyright: ignore[reportReturnType]


def smallest_pass(
    workload: Workload, model: nn.Module, recipe: Recipe, device: str | torch.device
) -> int:
    """Examples that the model needs at least in one pass in training mode: 1, or 2.

    BatchNorm over a single value per channel has no variance, and torch refuses it. Whether it is
    a single value depends on the shapes inside, so one example is tried.

    Args:
        workload: Gives the example.
        model: The model; it is left as it was.
        recipe: Its micro-batch must be large enough.
        device: Where the model is.

    Returns:
        1 or 2.

    Raises:
        RecipeError: If the micro-batch is smaller than that.
    """
    layer = next((n for n, m in model.named_modules() if isinstance(m, _BatchNorm)), None)
    if layer is None or _trains_on_one(workload, model, device):
        return 1
    if recipe.micro_batch < 2 and workload.num_examples > 1:
        raise RecipeError(
            f"The micro-batch is {recipe.micro_batch}, but layer {layer!r} is a BatchNorm, which "
            "needs at least 2 examples to see a variance. Use a micro-batch of 2 or more, or "
            "GroupNorm."
        )
    return 2


def _trains_on_one(workload: Workload, model: nn.Module, device: str | torch.device) -> bool:
    batch = to_device(workload.train_examples.batch(torch.tensor([0])), device)
    with preserved_state(model), torch.no_grad():
        try:
            workload.loss_sum(model, batch)
        except ValueError as error:
            return "more than 1 value per channel" not in str(error)
    return True


def checkpoint_activations(model: nn.Module) -> None:
    """Makes the model's blocks recompute their activations in the backward pass.

    Blocks are the children of its outermost `Sequential` and `ModuleList`s, or without any the
    model's own children. The state dict keeps its names.

    Args:
        model: Changed in place.
    """
    blocks = nested_blocks(model) or list(model.children())
    for block in blocks:
        block.forward = partial(_recomputed, block.forward, block)


def nested_blocks(model: nn.Module) -> list[nn.Module]:
    """The children of a model's outermost `Sequential`s and `ModuleList`s."""
    if isinstance(model, nn.Sequential | nn.ModuleList):
        return list(model)
    return [block for child in model.children() for block in nested_blocks(child)]


def _recomputed(forward: Any, block: nn.Module, *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(
        forward,
        *args,
        use_reentrant=False,
        context_fn=lambda: (nullcontext(), _buffers_kept(block)),
        **kwargs,
    )


@contextmanager
def _buffers_kept(block: nn.Module) -> Iterator[None]:
    """Running statistics are updated by the first forward pass, and not again by the second."""
    kept: list[tuple[Tensor, Tensor]] = [(b, b.detach().clone()) for b in block.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in kept:
                buffer.copy_(value)
