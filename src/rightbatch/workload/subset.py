"""A workload on a part of its training examples."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch.utils.data import DataLoader, Subset

from rightbatch.errors import UsageError
from rightbatch.workload.data import DatasetExamples
from rightbatch.workload.workload import Workload


def with_examples(workload: Workload, num_examples: int, *, seed: int = 0) -> Workload:
    """The workload on some of its training examples, drawn at random; validation stays whole.

    For one seed a smaller part lies within every larger one, so that a sweep over the size is
    paired. All of them, and in the order they had, is the workload as it was.

    Args:
        workload: What to train.
        num_examples: How many, from 1 to N.
        seed: Decides which.

    Returns:
        Another workload, named such as `digits, 500 examples`.

    Raises:
        UsageError: If there are not so many.

    Example:
        >>> from rightbatch import load_workload
        >>> few = with_examples(load_workload("digits"), 500)
        >>> few.name, few.num_examples, len(few.val_data[0])
        ('digits, 500 examples', 500, 359)
    """
    examples = workload.train_examples
    N = examples.num_examples
    if not 1 <= num_examples <= N:
        raise UsageError(
            f"A part of {num_examples:,} examples was asked for, and {workload.name!r} has "
            f"{N:,}. Give a number from 1 to {N:,}."
        )
    order = torch.randperm(N, generator=torch.Generator().manual_seed(seed))
    chosen = order[:num_examples].sort().values
    if isinstance(examples, DatasetExamples):
        data: Any = Subset(examples.dataset, chosen.tolist())
        if isinstance(workload.train_data, DataLoader):
            data = DataLoader(data, collate_fn=examples.collate)
    else:
        data = examples.batch(chosen)
    name = f"{workload.name}, {num_examples:,} examples"
    return dataclasses.replace(workload, name=name, train_data=data)
