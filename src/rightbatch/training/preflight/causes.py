"""Why the gradient of micro-batches is not that of the whole batch: found by trying."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from rightbatch.isolate import preserved_state
from rightbatch.recipe import Recipe
from rightbatch.training.ghost_norm import GHOST_KINDS, group_sizes
from rightbatch.training.preflight.split_gradients import Comparison, relative_difference
from rightbatch.workload.describe import tensors_in

_NAMED = 3
"""Layers that a warning names; the record has them all."""
_SAME_LOSS = 1e-3
_SAME_DRAWN_LOSS = 0.1
"""Relative, also where random draws move the loss: a sum of two losses is twice their mean."""


@dataclass(frozen=True, kw_only=True)
class Cause:
    """One reason for a difference.

    Attributes:
        names: What mixes the examples, such as `bn1 (BatchNorm1d)`.
        because: The second half of a sentence.
        remedy: A sentence.
    """

    names: tuple[str, ...]
    because: str
    remedy: str


def find_causes(
    comparison: Comparison, recipe: Recipe, *, tolerance: float, draws: bool
) -> list[Cause]:
    """Says what makes the gradients of a comparison differ.

    BatchNorm layers are known by their class. Whether they are the whole reason is tried: their
    statistics are frozen at those of the whole batch, which lets every example stand by itself
    without changing its scale, and the gradients are compared again. If a difference remains,
    outputs that differ accuse the model, and outputs that agree the loss.

    Args:
        comparison: What differed. BatchNorm layers of its model are left in evaluation mode.
        recipe: The split that was asked for.
        tolerance: Relative difference that counts as none.
        draws: Whether random numbers are drawn that could not be switched off.

    Returns:
        The causes, at least one.
    """
    norms = _mixing_norms(comparison)
    if not norms:
        return [_other_cause(comparison, tolerance=tolerance, draws=draws)]
    causes = [_norm_cause(norms, recipe)]
    _freeze(comparison, [norm for _, norm in norms])
    if comparison.difference() > tolerance:
        causes.append(_other_cause(comparison, tolerance=tolerance, draws=draws))
    return causes


def _mixing_norms(comparison: Comparison) -> list[tuple[str, _BatchNorm]]:
    """The layers whose statistics are others when the batch is cut, with their names."""
    sizes = comparison.cut.sizes
    return [
        (name, module)
        for name, module in comparison.model.named_modules()
        if isinstance(module, _BatchNorm)
        and (module.training or module.running_mean is None)
        and not (isinstance(module, GHOST_KINDS) and _same_groups(module.ghost_batch, sizes))
    ]


def _same_groups(ghost_batch: int, sizes: Sequence[int]) -> bool:
    parts = [group for size in sizes for group in group_sizes(size, ghost_batch)]
    return parts == group_sizes(sum(sizes), ghost_batch)


def _norm_cause(norms: Sequence[tuple[str, _BatchNorm]], recipe: Recipe) -> Cause:
    names = tuple(f"{name or 'model'} ({type(norm).__name__})" for name, norm in norms)
    if len(names) == 1:
        because = f"layer {names[0]} averages over the micro-batch"
    else:
        more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
        because = f"layers {', '.join(names[:_NAMED])}{more} average over the micro-batch"
    one = "one micro-batch" if recipe.replicas == 1 else "SyncBatchNorm without accumulation"
    if recipe.micro_batch == 1:
        remedy = f"Use larger micro-batches, {one} or GroupNorm."
    else:
        remedy = (
            f"Use {one}, GroupNorm, or ghost_batch={recipe.micro_batch} in the recipe, "
            "with which every size sees the same."
        )
    return Cause(names=names, because=because, remedy=remedy)


def _freeze(comparison: Comparison, norms: Sequence[_BatchNorm]) -> None:
    """Fixes the statistics at those of the whole batch: momentum 1 keeps the last seen."""
    like = next(comparison.model.parameters())
    for norm in norms:
        if norm.running_mean is None:
            norm.running_mean = torch.zeros(norm.num_features, device=like.device, dtype=like.dtype)
            norm.running_var = torch.ones_like(norm.running_mean)
            norm.num_batches_tracked = torch.zeros((), dtype=torch.long, device=like.device)
        norm.track_running_stats, norm.momentum = True, 1.0
        norm.training = True
    with preserved_state(), torch.no_grad():
        comparison.forward(comparison.cut.whole)
    for norm in norms:
        norm.training = False


def _other_cause(comparison: Comparison, *, tolerance: float, draws: bool) -> Cause:
    """What is at fault beside BatchNorm."""
    with_outputs = comparison.workload.loss is not None
    if comparison.split_error is None:
        reduction = _wrong_reduction(comparison, _SAME_DRAWN_LOSS if draws else _SAME_LOSS)
        if reduction is not None:
            return reduction
        agree = _outputs_agree(comparison, tolerance) if with_outputs and not draws else None
        if agree is not None:
            return _THE_LOSS if agree else _THE_MODEL
    return _EITHER


def _wrong_reduction(comparison: Comparison, tolerance: float) -> Cause | None:
    """A sum where a mean was promised, or the other way round, as the values of the loss show."""
    batches = [comparison.cut.whole, *comparison.cut.parts]
    (whole, whole_count), *parts = comparison.losses(batches)
    counts = [count for _, count in parts]
    if not whole or not whole_count or not all(counts):
        return None
    if comparison.workload.loss is not None:
        # loss_sum multiplies what should be a mean by the count.
        added = sum(loss / count for loss, count in parts)
        return _A_SUM if _near(whole / whole_count, added, tolerance) else None
    mean = sum(loss * count for loss, count in parts) / sum(counts)
    return _A_MEAN if _near(whole, mean, tolerance) else None


@torch.no_grad()
def _outputs_agree(comparison: Comparison, tolerance: float) -> bool | None:
    """Whether the examples come out of the model the same; None where that cannot be compared."""
    batches = [comparison.cut.whole, *comparison.cut.parts]
    whole, *parts = [[*tensors_in(output)] for output in comparison.outputs(batches)]
    if not whole or any(len(part) != len(whole) for part in parts):
        return None
    joined: list[Tensor] = []
    for tensor, *pieces in zip(whole, *parts, strict=True):
        if not all(piece.ndim and piece.shape[1:] == tensor.shape[1:] for piece in pieces):
            return None
        joined.append(torch.cat(pieces))
        if joined[-1].shape != tensor.shape:
            return None
    return relative_difference(joined, whole) <= tolerance


def _near(a: float, b: float, tolerance: float) -> bool:
    return abs(a - b) <= tolerance * abs(b)


_A_SUM = Cause(
    names=("the loss is a sum",),
    because="the loss is the sum over the examples of a batch and not their mean",
    remedy="Return the mean: reduction='mean'.",
)
_A_MEAN = Cause(
    names=("compute_loss returns a mean as its sum",),
    because="compute_loss returns a mean where the sum belongs",
    remedy="Return the sum: reduction='sum', or the mean times the count.",
)
_THE_LOSS = Cause(
    names=("the loss",),
    because=(
        "the loss of a batch is not the mean of its examples' losses, though the model's outputs "
        "are the same (a contrastive loss, class weights inside a mean, or padding that "
        "rightbatch does not know of)"
    ),
    remedy="Use one micro-batch, or a compute_loss that returns a sum over examples and its count.",
)
_THE_MODEL = Cause(
    names=("the model",),
    because="the model's output for an example depends on how the batch is cut",
    remedy="Use one micro-batch, or layers that treat every example by itself.",
)
_EITHER = Cause(
    names=("the model or the loss",),
    because="the model or the loss lets the examples of a micro-batch depend on each other",
    remedy="Use one micro-batch, or sum over examples that are treated each by itself.",
)
