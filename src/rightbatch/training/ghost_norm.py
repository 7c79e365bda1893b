"""Ghost batch normalisation: BatchNorm over small groups, whatever the batch.

BatchNorm makes an example's output depend on the others in its micro-batch, so that training
changes with the batch in a second way, beside the number of updates. Normalising groups ("ghost
batches") of a fixed size g instead keeps what an example sees the same at every batch size, and
makes k micro-batches of g the same as one batch of k·g: exactly, not nearly.

In training, group j of the examples in their order is normalised by its own mean μ_j and variance
σ_j², and the running statistics go through the groups one after the other (momentum m):

    r ← (1 − m) r + m s_j for j = 1 … k, which is r ← (1 − m)^k r + Σ_j m (1 − m)^(k − j) s_j.

With `momentum=None` they are the plain mean over all groups seen. Evaluation is as always.

Hoffer, Hubara, Soudry: "Train longer, generalize better: closing the generalization gap in large
batch training of neural networks" (2017), Algorithm 1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from rightbatch.errors import UsageError

_Model = TypeVar("_Model", bound=nn.Module)


def use_ghost_norm(model: _Model, ghost_batch: int) -> _Model:
    """Lets every BatchNorm layer of a model normalise groups of `ghost_batch` examples.

    The layers are changed in place: parameters, buffers, hooks and the keys of the state dict stay
    as they are, so that an optimizer made before goes on working and the trained weights load into
    the plain model. A layer that is a ghost norm already gets the new `ghost_batch`. A model
    without BatchNorm is left as it is; calls of `torch.nn.functional.batch_norm` are not seen.

    Accumulation gives the gradient of the whole batch when `ghost_batch` divides the micro-batch.

    Args:
        model: The model.
        ghost_batch: Examples in a group, at least 2. How a batch is cut is told by `group_sizes`.

    Returns:
        The same model.

    Raises:
        UsageError: If `ghost_batch` is below 2, or a layer is a BatchNorm of another kind
            (SyncBatchNorm, a lazy layer, a class of the user's); then no layer is changed.

    Example:
        >>> model = use_ghost_norm(nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)), 32)
        >>> model[1]
        GhostBatchNorm1d(3, eps=1e-05, ..., ghost_batch=32)
    """
    if ghost_batch < 2:
        raise UsageError(
            f"ghost_batch is {ghost_batch}; it must be at least 2, because the variance of a "
            "single example is zero."
        )
    norms = [(name, m) for name, m in model.named_modules() if isinstance(m, _BatchNorm)]
    for name, norm in norms:
        if type(norm) not in _GHOSTS and not isinstance(norm, GHOST_KINDS):
            raise UsageError(
                f"Layer {name or 'model'!r} is a {type(norm).__name__}, which ghost batches cannot "
                "stand in for. Use BatchNorm1d, BatchNorm2d or BatchNorm3d there (a lazy layer "
                "becomes one at its first forward pass)."
            )
    for _, norm in norms:
        # Another class for the same object, as torch's own parametrisations do it: whoever holds
        # the layer, or its parameters, still holds the right one.
        norm.__class__ = _GHOSTS.get(type(norm), type(norm))
        norm.ghost_batch = ghost_batch  # pyright: ignore[reportArgumentType]
    return model


def group_sizes(num_examples: int, ghost_batch: int) -> list[int]:
    """How a batch is cut into groups, in the order of its examples.

    Full groups first. A rest forms a smaller group of its own, as a smaller last micro-batch would;
    but never a group of one, whose variance is zero: then the last two groups share their
    `ghost_batch + 1` examples evenly, and with pairs the last group has three.

    Args:
        num_examples: Examples in the batch.
        ghost_batch: Examples in a full group, at least 2.

    Returns:
        Sizes that add up to `num_examples`.

    Example:
        >>> group_sizes(128, 32), group_sizes(150, 64), group_sizes(129, 64), group_sizes(5, 2)
        ([32, 32, 32, 32], [64, 64, 22], [64, 33, 32], [2, 3])
    """
    num_full, rest = divmod(num_examples, ghost_batch)
    if rest != 1 or num_full == 0:
        return [ghost_batch] * num_full + [rest] * (rest > 0)
    shared = ghost_batch + 1
    last = [shared] if shared < 4 else [shared - shared // 2, shared // 2]
    return [ghost_batch] * (num_full - 1) + last


class GhostBatchNorm1d(nn.BatchNorm1d):
    """BatchNorm1d over groups of `ghost_batch` examples; made by `use_ghost_norm`."""

    ghost_batch: int

    def forward(self, input: Tensor) -> Tensor:
        """Normalises each group by its own statistics in training; as always in evaluation."""
        return _normalise(self, input, self.ghost_batch, super().forward)

    def extra_repr(self) -> str:
        """The settings, as `repr` shows them."""
        return f"{super().extra_repr()}, ghost_batch={self.ghost_batch}"


class GhostBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm2d over groups of `ghost_batch` examples; made by `use_ghost_norm`."""

    ghost_batch: int

    def forward(self, input: Tensor) -> Tensor:
        """Normalises each group by its own statistics in training; as always in evaluation."""
        return _normalise(self, input, self.ghost_batch, super().forward)

    def extra_repr(self) -> str:
        """The settings, as `repr` shows them."""
        return f"{super().extra_repr()}, ghost_batch={self.ghost_batch}"


class GhostBatchNorm3d(nn.BatchNorm3d):
    """BatchNorm3d over groups of `ghost_batch` examples; made by `use_ghost_norm`."""

    ghost_batch: int

    def forward(self, input: Tensor) -> Tensor:
        """Normalises each group by its own statistics in training; as always in evaluation."""
        return _normalise(self, input, self.ghost_batch, super().forward)

    def extra_repr(self) -> str:
        """The settings, as `repr` shows them."""
        return f"{super().extra_repr()}, ghost_batch={self.ghost_batch}"


_GHOSTS: dict[type[_BatchNorm], type[_BatchNorm]] = {
    nn.BatchNorm1d: GhostBatchNorm1d,
    nn.BatchNorm2d: GhostBatchNorm2d,
    nn.BatchNorm3d: GhostBatchNorm3d,
}
GHOST_KINDS = (GhostBatchNorm1d, GhostBatchNorm2d, GhostBatchNorm3d)
"""What a ghost norm is, for `isinstance`."""


def _normalise(
    norm: _BatchNorm, input: Tensor, ghost_batch: int, plain: Callable[[Tensor], Tensor]
) -> Tensor:
    """The equal groups at once, then what is left over, group by group (at most two)."""
    if not norm.training or len(input) <= ghost_batch:
        return plain(input)
    sizes = group_sizes(len(input), ghost_batch)
    num_full = sizes.count(ghost_batch)
    head = input[: num_full * ghost_batch]
    outputs = [_normalise_equal_groups(norm, head, num_full)] if num_full else []
    if len(head) < len(input):
        outputs += [plain(group) for group in input[len(head) :].split(sizes[num_full:])]
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def _normalise_equal_groups(norm: _BatchNorm, input: Tensor, num_groups: int) -> Tensor:
    """Every group gets channels of its own, (1, k·C, g·…), so that one call normalises them all."""
    norm._check_input_dim(input)
    channels = input.shape[1]
    mean = var = None
    # Statistics that start at zero and are updated with momentum 1 come back as the groups' own.
    if norm.running_mean is not None and norm.running_var is not None:
        mean = norm.running_mean.new_zeros(num_groups * channels)
        var = norm.running_var.new_zeros(num_groups * channels)
    grouped = input.unflatten(0, (num_groups, -1)).transpose(1, 2)
    output = F.batch_norm(
        grouped.reshape(1, num_groups * channels, -1),
        mean,
        var,
        None if norm.weight is None else norm.weight.repeat(num_groups),
        None if norm.bias is None else norm.bias.repeat(num_groups),
        training=True,
        momentum=1.0,
        eps=norm.eps,
    )
    if norm.track_running_stats and mean is not None and var is not None:
        _update_running_statistics(norm, mean.view(num_groups, -1), var.view(num_groups, -1))
    return output.reshape(grouped.shape).transpose(1, 2).flatten(0, 1)


@torch.no_grad()
def _update_running_statistics(norm: _BatchNorm, means: Tensor, variances: Tensor) -> None:
    """As if the groups had come one after the other; `means` and `variances` are (groups, C)."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    assert norm.num_batches_tracked is not None
    num_groups = len(means)
    if norm.momentum is None:
        seen = norm.num_batches_tracked.to(means.dtype)
        kept = seen / (seen + num_groups)
        shares = ((1 - kept) / num_groups).expand(num_groups)
    else:
        decay = 1 - norm.momentum
        kept = decay**num_groups
        since = torch.arange(num_groups - 1, -1, -1, device=means.device, dtype=means.dtype)
        shares = norm.momentum * decay**since
    norm.running_mean.mul_(kept).add_(shares @ means)
    norm.running_var.mul_(kept).add_(shares @ variances)
    norm.num_batches_tracked.add_(num_groups)
