"""Activation checkpointing: what the backward pass needs is computed a second time, not kept.

A model is cut into segments. Of each only the input is kept; the backward pass runs the segment
again, with the same dropout masks, and goes back through it (Chen et al. 2016, "Training Deep Nets
with Sublinear Memory Cost"). √n segments of n layers keep the least. Nothing in a state dict
changes: only the `forward` of some modules is replaced, on the instance.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def checkpoint_activations(model: nn.Module) -> None:
    """Makes a model recompute its activations in the backward pass.

    Segments are the blocks of its outermost `Sequential` and `ModuleList`s; where a `Sequential`
    holds plain layers, about √n runs of them; where there is neither, the model's own children.

    Args:
        model: Changed in place.
    """
    containers = list(_containers(model))
    for container in containers:
        blocks = [child for child in container if next(child.children(), None) is not None]
        if isinstance(container, nn.Sequential) and not blocks:
            _replace_forward(container, partial(_run_in_segments, container))
            continue
        for block in blocks if isinstance(container, nn.Sequential) else container:
            _wrap(block)
    if not containers:
        for child in model.children():
            _wrap(child)


def keep_activations(model: nn.Module) -> None:
    """Undoes `checkpoint_activations`.

    Args:
        model: Changed in place.
    """
    for module in model.modules():
        replaced = module.__dict__.get("forward")
        if isinstance(replaced, partial) and replaced.func in (_run_in_segments, _run_block):
            del module.__dict__["forward"]
            if replaced.func is _run_block and replaced.args[1] is not None:
                _replace_forward(module, replaced.args[1])


def segments_of(layers: nn.Sequential) -> list[tuple[int, int]]:
    """Cuts a chain of layers into about √n runs.

    A layer that changes its input in place stays with the layer before: a segment whose input is
    not what it was cannot be computed again.

    Args:
        layers: The chain.

    Returns:
        First and end index of each.

    Example:
        >>> segments_of(nn.Sequential(*(nn.Linear(2, 2) for _ in range(7))))
        [(0, 3), (3, 6), (6, 7)]
    """
    length = max(round(math.sqrt(len(layers))), 1)
    cuts, since = [0], 0
    for index, layer in enumerate(layers):
        if index - since >= length and not getattr(layer, "inplace", False):
            cuts.append(index)
            since = index
    return list(pairwise([*cuts, len(layers)]))


def _containers(module: nn.Module) -> Iterator[nn.Sequential | nn.ModuleList]:
    """The outermost ones."""
    if isinstance(module, nn.Sequential | nn.ModuleList):
        yield module
        return
    for child in module.children():
        yield from _containers(child)


def _wrap(block: nn.Module) -> None:
    """An instance may have a `forward` of its own, which is then the one to run."""
    _replace_forward(block, partial(_run_block, block, block.__dict__.get("forward")))


def _replace_forward(module: nn.Module, forward: Callable[..., Any]) -> None:
    module.__dict__["forward"] = forward


# Never compiled: the second pass would draw other dropout masks (torch 2.13).
@torch.compiler.disable()
def _run_block(block: nn.Module, own: Callable[..., Any] | None, *args: Any, **kwargs: Any) -> Any:
    forward = own or partial(type(block).forward, block)
    return _recomputed(forward, list(block.buffers()), *args, **kwargs)


@torch.compiler.disable()
def _run_in_segments(layers: nn.Sequential, inputs: Any) -> Any:
    for first, end in segments_of(layers):
        run = list(layers)[first:end]
        buffers = [buffer for layer in run for buffer in layer.buffers()]
        inputs = _recomputed(partial(_chain, run), buffers, inputs)
    return inputs


def _chain(layers: list[nn.Module], inputs: Any) -> Any:
    for layer in layers:
        inputs = layer(inputs)
    return inputs


def _recomputed(
    forward: Callable[..., Any], buffers: list[Tensor], *args: Any, **kwargs: Any
) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(
        forward,
        *args,
        use_reentrant=False,
        context_fn=lambda: (nullcontext(), _kept(buffers)),
        **kwargs,
    )


@contextmanager
def _kept(buffers: list[Tensor]) -> Iterator[None]:
    """Running statistics are updated by the first forward pass, and not again by the second."""
    values = [buffer.detach().clone() for buffer in buffers]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in zip(buffers, values, strict=True):
                buffer.copy_(value)
