"""`max3`: which of three uniform numbers is the largest, with the notebook's 9-9-3 network."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rightbatch.catalog.entries import target_of
from rightbatch.workload import Workload, accuracy

NUM_EXAMPLES = 1000


def _make_model() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 9), nn.ReLU(), nn.Linear(9, 9), nn.ReLU(), nn.Linear(9, 3))


def _make_optimizer(params: Iterable[nn.Parameter], lr: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=lr)


def _draw(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.rand(NUM_EXAMPLES, 3, generator=generator)
    return inputs, inputs.argmax(dim=1)


def build(name: str) -> Workload:
    """Builds `max3`: 1000 training and 1000 validation examples from two fixed seeds."""
    return Workload(
        name=name,
        make_model=_make_model,
        train_data=_draw(seed=1),
        val_data=_draw(seed=2),
        loss=F.cross_entropy,
        make_optimizer=_make_optimizer,
        metric=accuracy,
        target=target_of(name),
    )
