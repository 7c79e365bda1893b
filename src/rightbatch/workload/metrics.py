"""Metrics that ship with rightbatch. A metric maps (outputs, targets) to a mean over examples."""

from __future__ import annotations

from torch import Tensor


def accuracy(outputs: Tensor, targets: Tensor) -> Tensor:
    """Share of examples whose largest output is the target class.

    Args:
        outputs: Scores, shape (examples, …, classes).
        targets: Class indices, shape (examples, …).

    Returns:
        A scalar tensor between 0 and 1.

    Example:
        >>> import torch
        >>> accuracy(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 0])).item()
        0.5
    """
    return (outputs.argmax(dim=-1) == targets).float().mean()
