"""How much a batch holds: examples, and tokens beside them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

IGNORED = -100
"""The target that torch's cross_entropy leaves out by default: padding."""


def holds_tokens(targets: Any) -> bool:
    """Whether targets are sequences of classes: integers in two or more dimensions."""
    if not isinstance(targets, Tensor) or targets.ndim < 2:
        return False
    return not (targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool)


def count_terms(targets: Any) -> int:
    """How many terms a mean-reduced loss over these targets averages.

    Weighting each micro-batch's mean by this number makes accumulation exact where sequences are
    padded: the sum over micro-batches is the sum over all tokens.

    Args:
        targets: A batch's targets.

    Returns:
        The number of tokens that count, where targets are sequences; else of examples.

    Example:
        >>> count_terms(torch.tensor([[5, 7, -100], [2, -100, -100]]))
        3
        >>> count_terms(torch.tensor([1.0, 2.0]))
        2
    """
    if holds_tokens(targets):
        return int((targets != IGNORED).sum())
    return len(targets)


def count_tokens(batch: Any, count: Any, num_examples: int) -> int | None:
    """Tokens in a batch, or None where examples are not sequences.

    Args:
        batch: The batch.
        count: What the workload's `loss_sum` counted in it.
        num_examples: Examples in it.

    Returns:
        Where the targets are sequences, the targets that count; where `compute_loss` counts
        something else than examples, its count; otherwise None.

    Example:
        >>> count_tokens({"text": torch.zeros(2, 9)}, count=16, num_examples=2)
        16
    """
    if isinstance(batch, tuple | list) and len(batch) == 2 and holds_tokens(batch[1]):
        return count_terms(batch[1])
    return int(count) if float(count) != num_examples else None
