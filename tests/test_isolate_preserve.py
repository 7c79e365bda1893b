"""After the block every bit is what it was, whatever the block did, also when it failed."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from rightbatch.isolate import preserved_state


def _global_state() -> dict[str, Any]:
    name, keys, *rest = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (name, np.asarray(keys).tolist(), *rest),
        "torch": torch.get_rng_state().tolist(),
        "gradients": torch.is_grad_enabled(),
        "threads": torch.get_num_threads(),
        "dtype": torch.get_default_dtype(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "warn_only": torch.is_deterministic_algorithms_warn_only_enabled(),
        "benchmark": torch.backends.cudnn.benchmark,
    }


def _change_benchmark() -> None:
    torch.backends.cudnn.benchmark = not torch.backends.cudnn.benchmark


CHANGES: dict[str, Callable[[], Any]] = {
    "python": lambda: random.seed(99),
    "python draws": random.random,
    "numpy": lambda: np.random.seed(99),
    "numpy gaussian": lambda: np.random.standard_normal(3),
    "torch": lambda: torch.manual_seed(99),
    "torch draws": lambda: torch.rand(3),
    "gradients": lambda: torch.set_grad_enabled(False),
    "threads": lambda: torch.set_num_threads(torch.get_num_threads() + 1),
    "dtype": lambda: torch.set_default_dtype(torch.float64),
    "deterministic": lambda: torch.use_deterministic_algorithms(True, warn_only=True),
    "benchmark": _change_benchmark,
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("fails", [False, True])
def test_global_state_is_put_back(change: str, fails: bool) -> None:
    before = _global_state()
    try:
        with preserved_state():
            CHANGES[change]()
            assert _global_state() != before, "the test changes nothing"
            if fails:
                raise RuntimeError("planned")
    except RuntimeError as error:
        assert str(error) == "planned"
    assert _global_state() == before


class _Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(), nn.Linear(4, 1))
        self.net[0].requires_grad_(False)
        self.net[1].eval()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)


def _bits(model: nn.Module) -> dict[str, Any]:
    return {
        "state": {key: value.tolist() for key, value in model.state_dict().items()},
        "gradients": [None if p.grad is None else p.grad.tolist() for p in model.parameters()],
        "identities": [(id(p), id(p.grad)) for p in model.parameters()],
        "requires_grad": [p.requires_grad for p in model.parameters()],
        "training": [module.training for module in model.modules()],
    }


@pytest.mark.parametrize("with_gradients", [False, True])
@pytest.mark.parametrize("optimizer_type", [torch.optim.SGD, torch.optim.AdamW])
def test_a_training_in_the_block_leaves_no_trace(
    with_gradients: bool, optimizer_type: type[torch.optim.Optimizer]
) -> None:
    torch.manual_seed(0)
    model, x = _Net(), torch.randn(8, 3)
    optimizer = optimizer_type(model.parameters(), lr=0.1)  # pyright: ignore[reportCallIssue]
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1)
    model(x).sum().backward()
    optimizer.step()
    scheduler.step()
    if not with_gradients:
        optimizer.zero_grad(set_to_none=True)
    before = _bits(model), str(optimizer.state_dict()), str(scheduler.state_dict())
    random_state = torch.get_rng_state()
    with preserved_state(model, optimizer, scheduler):
        model.train().requires_grad_(True)
        for _ in range(3):
            optimizer.zero_grad()
            model(x).square().sum().backward()
            optimizer.step()
            scheduler.step()
        assert _bits(model) != before[0]
    assert _bits(model) == before[0]
    assert str(optimizer.state_dict()) == before[1]
    assert str(scheduler.state_dict()) == before[2]
    assert torch.equal(torch.get_rng_state(), random_state)


def test_the_training_after_the_block_is_the_one_without_it() -> None:
    def trained(probe: bool) -> dict[str, Any]:
        torch.manual_seed(0)
        model, x = nn.Sequential(nn.Linear(3, 4), nn.Dropout(), nn.Linear(4, 1)), torch.randn(8, 3)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
        for step in range(6):
            if probe and step == 3:
                with preserved_state(model, optimizer):
                    for _ in range(4):
                        model(torch.randn(8, 3)).sum().backward()
                        optimizer.step()
            optimizer.zero_grad()
            model(x).square().sum().backward()
            optimizer.step()
        return {key: value.tolist() for key, value in model.state_dict().items()}

    assert trained(probe=True) == trained(probe=False)


def test_gradients_changed_in_place_are_put_back() -> None:
    model = nn.Linear(2, 1)
    model(torch.ones(1, 2)).sum().backward()
    gradient = model.weight.grad
    assert gradient is not None
    with preserved_state(model):
        gradient.zero_()
        model.weight.grad = None
    assert model.weight.grad is gradient
    assert gradient.tolist() == [[1.0, 1.0]]
