"""`digits` and `digits-cnn`: 1797 handwritten digits of 8×8 pixels, as scikit-learn ships them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from rightbatch.catalog.entries import target_of
from rightbatch.catalog.splits import split_fixed
from rightbatch.workload import Workload, accuracy

_BRIGHTEST = 16.0
"""Pixels count from 0 to 16."""


def _make_mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


def _make_cnn() -> nn.Module:
    # No BatchNorm: per-example gradients stay defined, and a last batch of one example is no trap.
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(64, 10),
    )


def _make_sgd(params: Iterable[nn.Parameter], lr: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=lr)


def _make_adam(params: Iterable[nn.Parameter], lr: float) -> torch.optim.Optimizer:
    return torch.optim.Adam(params, lr=lr)


def build(name: str) -> Workload:
    """Builds `digits` (MLP, SGD) or `digits-cnn` (Adam), on the same fixed 80/20 split."""
    from sklearn.datasets import load_digits

    data: Any = load_digits()
    convolutional = name == "digits-cnn"
    pixels = data.images[:, None] if convolutional else data.data
    train, val = split_fixed(pixels / _BRIGHTEST, data.target)
    return Workload(
        name=name,
        make_model=_make_cnn if convolutional else _make_mlp,
        train_data=train,
        val_data=val,
        loss=F.cross_entropy,
        make_optimizer=_make_adam if convolutional else _make_sgd,
        metric=accuracy,
        target=target_of(name),
    )
