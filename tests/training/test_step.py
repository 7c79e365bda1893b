"""One optimizer step: the gradient of a window is that of all its examples at once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from rightbatch.training.step import compute_gradients, optimizer_step
from rightbatch.workload import Workload

X = torch.randn(100, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
Y = torch.arange(100) % 3


def make(**changes: Any) -> Workload:
    given_: dict[str, Any] = {
        "name": "toy",
        "make_model": lambda: nn.Sequential(
            nn.Linear(5, 7, dtype=torch.float64), nn.Tanh(), nn.Linear(7, 3, dtype=torch.float64)
        ),
        "train_data": (X, Y),
        "loss": F.cross_entropy,
    }
    return Workload(**{**given_, **changes})


def gradient(workload: Workload, sizes: list[int]) -> tuple[Tensor, Tensor]:
    """Loss and flat gradient of the first examples, cut into micro-batches of these sizes."""
    model = workload.build_model(0)
    indices = torch.arange(sum(sizes)).split(sizes)
    window = [workload.train_examples.batch(part) for part in indices]
    loss = compute_gradients(workload, model, window, autocast=None)
    assert loss is not None
    return loss, flat_gradient(model)


def flat_gradient(model: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def same(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-14)


@given(st.lists(st.integers(1, 30), min_size=1, max_size=6).filter(lambda s: sum(s) <= 100))
@settings(deadline=None, max_examples=60)
def test_any_cut_gives_the_gradient_of_the_whole(sizes: list[int]) -> None:
    loss, parts = gradient(make(), sizes)
    whole_loss, whole = gradient(make(), [sum(sizes)])
    same(parts, whole)
    same(loss, whole_loss)


def test_the_gradient_is_autograd_of_the_mean() -> None:
    workload = make()
    model = workload.build_model(0)
    F.cross_entropy(model(X), Y).backward()
    expected = flat_gradient(model)
    same(gradient(workload, [64, 36])[1], expected)


def test_the_mean_of_means_would_be_wrong() -> None:
    """32 + 32 + 32 + 4: what averaging the micro-batches' means gives is another gradient."""
    workload = make()
    _, whole = gradient(workload, [100])
    parts: list[Tensor] = []
    for indices in torch.arange(100).split(32):
        model = workload.build_model(0)
        inputs, targets = workload.train_examples.batch(indices)
        F.cross_entropy(model(inputs), targets).backward()
        parts.append(
            torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        )
    error = (torch.stack(parts).mean(0) - whole).norm() / whole.norm()
    assert error > 0.1
    same(gradient(workload, [32, 32, 32, 4])[1], whole)


@given(st.integers(1, 11), st.integers(0, 2**32 - 1))
@settings(deadline=None, max_examples=40)
def test_masked_tokens_are_weighted_exactly(micro: int, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    inputs = torch.randn(12, 6, 5, dtype=torch.float64, generator=draw)
    targets = torch.randint(0, 3, (12, 6), generator=draw)
    targets[torch.rand(12, 6, generator=draw) < 0.6] = -100
    targets[:, 0] = 1  # a micro-batch without any token has no mean
    workload = make(
        train_data=(inputs, targets), loss=lambda o, t: F.cross_entropy(o.transpose(1, 2), t)
    )
    sizes = [micro] * (12 // micro) + ([12 % micro] if 12 % micro else [])
    same(gradient(workload, sizes)[1], gradient(workload, [12])[1])


def test_compute_loss_counts_are_summed_over_the_window() -> None:
    """Two micro-batches of 6 and 1 tokens: Σ losses / 7."""
    lengths = torch.tensor([4, 2, 1, 0])

    def compute_loss(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        x, n = batch
        return (model(x).square().sum(1) * n).sum(), n.sum()

    workload = make(train_data=(X[:4], lengths), loss=None, compute_loss=compute_loss)
    same(gradient(workload, [2, 2])[1], gradient(workload, [4])[1])


def test_batch_norm_must_differ() -> None:
    workload = make(
        make_model=lambda: nn.Sequential(
            nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)
        ).double()
    )
    parts, whole = gradient(workload, [32, 32])[1], gradient(workload, [64])[1]
    assert (parts - whole).norm() / whole.norm() > 1e-3


def test_one_step_of_sgd_is_lr_times_the_mean_gradient() -> None:
    workload = make()
    model = workload.build_model(0)
    before = torch.cat([p.detach().flatten() for p in model.parameters()])
    optimizer = workload.make_optimizer(model.parameters(), 0.3)
    for p in model.parameters():
        p.grad = torch.full_like(p, 1e9)  # what an earlier step left must not count
    window = [(X[:60], Y[:60]), (X[60:], Y[60:])]
    loss = optimizer_step(workload, model, optimizer, window).loss
    assert loss is not None
    after = torch.cat([p.detach().flatten() for p in model.parameters()])
    whole_loss, whole = gradient(workload, [100])
    same(after, before - 0.3 * whole)
    torch.testing.assert_close(loss, whole_loss)
    assert not loss.requires_grad


@pytest.mark.parametrize("sizes", [[64], [32, 32]])
def test_bfloat16_is_close_and_leaves_gradients_in_full_precision(sizes: list[int]) -> None:
    workload = make(
        make_model=lambda: nn.Linear(5, 3), train_data=(X.float(), Y), loss=F.cross_entropy
    )
    model = workload.build_model(0)
    window = [workload.train_examples.batch(i) for i in torch.arange(64).split(sizes)]
    compute_gradients(workload, model, window, autocast=torch.bfloat16)
    rough = flat_gradient(model)
    exact = gradient(workload, sizes)[1]
    assert rough.dtype == torch.float32
    assert 0 < (rough - exact).norm() / exact.norm() < 2e-2
