"""Metrics that ship with rightbatch. A metric maps (outputs, targets) to a mean over examples."""

from __future__ import annotations

from torch import Tensor

from rightbatch.workload.count import IGNORED


def accuracy(outputs: Tensor, targets: Tensor) -> Tensor:
    """Share of examples whose largest output is the target class.

    Args:
        outputs: Scores, shape (examples, …, classes).
        targets: Class indices, shape (examples, …); those of -100 do not count.

    Returns:
        A scalar tensor between 0 and 1.

    Example:
        >>> import torch
        >>> accuracy(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 0])).item()
        0.5
    """
    right = (outputs.argmax(dim=-1) == targets).sum()
    return right / (targets != IGNORED).sum()
