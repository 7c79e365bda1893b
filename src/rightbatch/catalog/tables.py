"""`breast-cancer` (classification) and `diabetes` (regression): two small tables.

Their columns are scaled to the range 0 to 1. Standardised, they would be learnt within an epoch or
two, and luck would tell which batch size is first.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from rightbatch.catalog.entries import target_of
from rightbatch.catalog.splits import scale_to_unit, split_fixed, standardise
from rightbatch.workload import Workload, accuracy


def _make_classifier() -> nn.Module:
    return nn.Sequential(nn.Linear(30, 16), nn.ReLU(), nn.Linear(16, 2))


def _make_regressor() -> nn.Module:
    # The last layer drops its axis of length 1: outputs and targets must have the same shape.
    return nn.Sequential(nn.Linear(10, 16), nn.Tanh(), nn.Linear(16, 1), nn.Flatten(0))


def _make_momentum(params: Iterable[nn.Parameter], lr: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=lr, momentum=0.9)


def _make_sgd(params: Iterable[nn.Parameter], lr: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=lr)


def build(name: str) -> Workload:
    """Builds `breast-cancer` (SGD with momentum) or `diabetes` (SGD on the squared error)."""
    return _build_breast_cancer(name) if name == "breast-cancer" else _build_diabetes(name)


def _build_breast_cancer(name: str) -> Workload:
    from sklearn.datasets import load_breast_cancer

    data: Any = load_breast_cancer()
    (x, y), (x_val, y_val) = split_fixed(data.data, data.target)
    x, x_val = scale_to_unit(x, x_val)
    return Workload(
        name=name,
        make_model=_make_classifier,
        train_data=(x, y),
        val_data=(x_val, y_val),
        loss=F.cross_entropy,
        make_optimizer=_make_momentum,
        metric=accuracy,
        target=target_of(name),
    )


def _build_diabetes(name: str) -> Workload:
    from sklearn.datasets import load_diabetes

    data: Any = load_diabetes()
    (x, y), (x_val, y_val) = split_fixed(data.data, data.target)
    x, x_val = scale_to_unit(x, x_val)
    y, y_val = standardise(y, y_val)
    return Workload(
        name=name,
        make_model=_make_regressor,
        train_data=(x, y),
        val_data=(x_val, y_val),
        loss=F.mse_loss,
        make_optimizer=_make_sgd,
        target=target_of(name),
    )
