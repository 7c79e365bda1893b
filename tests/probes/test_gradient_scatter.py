"""The gradient picture: the known law on real models, true batches, and no trace left."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from rightbatch import Recipe, Workload
from rightbatch.errors import ProbeError, UsageError
from rightbatch.probes.example_gradients import ExampleGradients
from rightbatch.probes.gradient_scatter import GradientRecord, measure_gradient_scatter

N = 240


def plain() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3))


def with_batch_norm() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3))


def with_dropout() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 3))


def classes(layers: Callable[[], nn.Module] = plain, **changes: Any) -> Workload:
    x = torch.randn(N, 6, generator=torch.Generator().manual_seed(1))
    made = {"name": "classes", "make_model": layers, "loss": F.cross_entropy,
            "train_data": (x, x[:, :3].argmax(dim=1))}  # fmt: skip
    return Workload(**{**made, **changes})


def measure(workload: Workload, **options: Any) -> GradientRecord:
    return measure_gradient_scatter(workload, budget_seconds=30, **options)


def test_the_error_is_as_the_finite_set_says_and_the_slope_a_half() -> None:
    recipe = Recipe(global_batch=16, learning_rate=0.1)
    record = measure(classes(), recipe=recipe, steps=20, batch_sizes=[10])
    assert [point.step for point in record.points] == [0, 20]
    assert record.population == N and record.notes == ()
    rows = []
    workload = classes()
    model = workload.build_model(0)
    for i in range(N):
        loss, _ = workload.loss_sum(model, workload.train_examples.batch(torch.tensor([i])))
        rows.append(
            torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])
        )
    exact = torch.stack(rows).double()
    first = record.points[0].scatter
    assert first.gradient_norm == pytest.approx(float(exact.mean(0).norm()), rel=1e-5)
    trace = first.trace
    assert (trace.low or 0) <= float(exact.var(0).sum()) <= (trace.high or 0)
    for point in record.points:
        slope, sizes = point.scatter.slope, point.scatter.sizes
        assert (slope.low or 0) <= -0.5 <= (slope.high or -1) and (slope.high or 0) < -0.4
        assert [size.batch_size for size in sizes] == [1, 4, 10, 16, 64, N]
        assert sizes[-1].standard_error.value == pytest.approx(0, abs=1e-6)
        assert sizes[-1].cosine.value == pytest.approx(1)
        assert sizes[0].cosine_median < sizes[3].cosine_median


@pytest.mark.parametrize(
    ("layers", "said"), [(with_batch_norm, "BatchNorm1d"), (with_dropout, "random numbers")]
)
def test_what_is_not_a_plain_sum_of_examples_is_said(
    layers: Callable[[], nn.Module], said: str
) -> None:
    record = measure(classes(layers))
    assert said in record.notes[0]
    assert record.points[0].scatter.sizes[0].batch_size == (2 if layers is with_batch_norm else 1)


def test_a_batch_is_a_real_batch() -> None:
    workload = classes(with_batch_norm)
    model = workload.build_model(0)
    chosen = torch.arange(30)
    loss, count = workload.loss_sum(model, workload.train_examples.batch(chosen))
    expected = torch.cat([g.flatten() for g in torch.autograd.grad(loss / count,
                          list(model.parameters()))])  # fmt: skip
    found = ExampleGradients(workload, workload.build_model(0)).of_batch(chosen)
    assert torch.allclose(found.float(), expected, atol=1e-6)


@pytest.mark.parametrize("layers", [plain, with_dropout, with_batch_norm])
def test_it_leaves_no_trace(layers: Callable[[], nn.Module]) -> None:
    workload = classes(layers)
    assert isinstance(workload.train_data, tuple)
    data = [t.clone() for t in workload.train_data]
    random.seed(5)
    np.random.seed(5)
    torch.manual_seed(5)
    before = (random.getstate(), repr(np.random.get_state()), torch.get_rng_state())
    with torch.no_grad():
        measure(workload, recipe=Recipe(global_batch=16, learning_rate=0.1), steps=3)
        assert not torch.is_grad_enabled()
    assert random.getstate() == before[0] and repr(np.random.get_state()) == before[1]
    assert torch.equal(torch.get_rng_state(), before[2])
    assert all(torch.equal(a, b) for a, b in zip(data, workload.train_data, strict=True))


def test_what_cannot_be_measured_is_said() -> None:
    with pytest.raises(ProbeError, match=r"would take .* s and has 1e-06 s"):
        measure_gradient_scatter(classes(), budget_seconds=1e-6)
    flat = classes(loss=lambda outputs, targets: (0 * outputs).sum())
    with pytest.raises(ProbeError, match="norm of the full gradient is 0"):
        measure(flat)
    wild = measure(classes(), recipe=Recipe(global_batch=8, learning_rate=1e30), steps=5)
    assert len(wild.points) == 1 and "diverged" in wild.notes[0]
    with pytest.raises(UsageError, match="steps is 3"):
        measure(classes(), steps=3)
    with pytest.raises(UsageError, match="batch_sizes holds 0"):
        measure(classes(), batch_sizes=[0])
