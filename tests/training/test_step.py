"""One optimizer step: the gradient of a window is that of all its examples at once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from rightbatch.recipe import Reduction
from rightbatch.training.arithmetic import autocast_dtype, make_scaler
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


# ------------------------------------------------- accumulation = the whole batch, in every form

TOLERANCE = {"float64": 1e-12, "float32": 1e-5, "bfloat16": 2e-2}
"""Largest error of an update, relative to its norm."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One update of some examples, whole and cut."""

    precision: str
    kind: str
    cuts: tuple[int, ...]
    reduction: Reduction
    clip_norm: float | None
    masked: float
    blank: frozenset[int]
    seed: int


cases = st.builds(
    Case,
    precision=st.sampled_from(["float64", "float64", "float32", "bfloat16"]),
    kind=st.sampled_from(["examples", "tokens", "own counts"]),
    cuts=st.lists(st.integers(1, 9), min_size=1, max_size=7).map(tuple),
    reduction=st.sampled_from(["mean", "sum"]),
    clip_norm=st.sampled_from([None, 1e-3, 0.3, 1e6]),
    masked=st.sampled_from([0.0, 0.5, 0.9]),
    blank=st.frozensets(st.integers(0, 6), max_size=3),
    seed=st.integers(0, 2**32 - 1),
)


def update_of(case: Case, cuts: Sequence[int]) -> tuple[Tensor | None, Tensor]:
    """Loss, and what one step of SGD at learning rate 1 did to the weights."""
    draw = torch.Generator().manual_seed(case.seed)
    dtype = torch.float64 if case.precision == "float64" else torch.float32
    num, shape = sum(case.cuts), (4,) if case.kind == "tokens" else ()
    inputs = torch.randn(num, *shape, 5, dtype=dtype, generator=draw)
    targets = torch.randint(0, 3, (num, *shape), generator=draw)
    counts = torch.rand(num, generator=draw, dtype=dtype)
    if case.kind == "tokens":
        targets[torch.rand(num, 4, generator=draw) < case.masked] = -100
        parts = torch.arange(num).split(case.cuts)
        for index in case.blank & set(range(len(parts))):
            targets[parts[index]] = -100  # a micro-batch without a single token
    workload = make(
        make_model=lambda: nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).to(dtype),
        train_data=(inputs, targets, counts) if case.kind == "own counts" else (inputs, targets),
        **(
            {"loss": None, "compute_loss": weighted_loss}
            if case.kind == "own counts"
            else {"loss": lambda o, t: F.cross_entropy(o.flatten(0, -2), t.flatten())}
        ),
    )
    model = workload.build_model(0)
    before = nn.utils.parameters_to_vector(model.parameters()).detach()
    result = optimizer_step(
        workload,
        model,
        torch.optim.SGD(model.parameters(), lr=1.0),
        [workload.train_examples.batch(part) for part in torch.arange(num).split(list(cuts))],
        autocast=torch.bfloat16 if case.precision == "bfloat16" else None,
        reduction=case.reduction,
        clip_norm=case.clip_norm,
    )
    return result.loss, nn.utils.parameters_to_vector(model.parameters()).detach() - before


def weighted_loss(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
    """Examples that count by weights of their own, no whole numbers."""
    inputs, targets, weights = batch
    losses = F.cross_entropy(model(inputs), targets, reduction="none")
    return (losses * weights).sum(), weights.sum()


@given(cases)
@settings(deadline=None, max_examples=500)
def test_accumulation_is_the_whole_batch(case: Case) -> None:
    (loss, cut), (whole_loss, whole) = update_of(case, case.cuts), update_of(case, [sum(case.cuts)])
    if whole_loss is None or loss is None:
        assert loss is whole_loss, "padding alone is no update, in whichever form"
        assert not cut.any()
        assert not whole.any()
        return
    # Of the weights, the update is the difference of numbers near 1.
    floor = {"float64": 1e-14, "float32": 3e-7, "bfloat16": 3e-7}[case.precision]
    error = float((cut - whole).norm())
    assert error <= TOLERANCE[case.precision] * float(whole.norm()) + floor
    assert float(loss) == pytest.approx(float(whole_loss), rel=TOLERANCE[case.precision])
    if case.clip_norm is not None:
        assert float(whole.norm()) <= case.clip_norm * (1 + 1e-5) + floor


def check_that_4_times_64_is_256(precision: str = "float64") -> None:
    case = Case(precision=precision, kind="examples", cuts=(64,) * 4, reduction="mean",
                clip_norm=None, masked=0.0, blank=frozenset(), seed=0)  # fmt: skip
    cut, whole = update_of(case, case.cuts)[1], update_of(case, [256])[1]
    assert (cut - whole).norm() <= TOLERANCE[precision] * whole.norm()


@pytest.mark.parametrize("precision", TOLERANCE)
def test_4_times_64_is_256(precision: str) -> None:
    check_that_4_times_64_is_256(precision)


def check_that_a_ragged_window_is_its_examples_mean() -> None:
    """32 + 32 + 32 + 4, and masked tokens, against autograd of the mean itself."""
    same(gradient(make(), [32, 32, 32, 4])[1], gradient(make(), [100])[1])
    model = make().build_model(0)
    F.cross_entropy(model(X), Y).backward()
    same(gradient(make(), [32, 32, 32, 4])[1], flat_gradient(model))


def check_that_tokens_weigh_alike() -> None:
    inputs = torch.randn(6, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    targets = torch.arange(24).reshape(6, 4) % 3
    targets[:2, 1:] = -100
    targets[4] = -100
    workload = make(
        train_data=(inputs, targets), loss=lambda o, t: F.cross_entropy(o.transpose(1, 2), t)
    )
    model = workload.build_model(0)
    counted = targets != -100
    F.cross_entropy(model(inputs)[counted], targets[counted]).backward()
    for sizes in ([6], [2, 2, 2], [1, 3, 1, 1]):
        same(gradient(workload, sizes)[1], flat_gradient(model))


def test_a_ragged_window_is_its_examples_mean() -> None:
    check_that_a_ragged_window_is_its_examples_mean()


def test_tokens_weigh_alike() -> None:
    check_that_tokens_weigh_alike()


def check_that_clipping_comes_after_the_sum(clip_norm: float = 0.05) -> None:
    """As torch's own clipping does it to the gradient of the whole window."""
    workload = make()
    model, reference = workload.build_model(0), workload.build_model(0)
    window = [(X[:60], Y[:60]), (X[60:90], Y[60:90]), (X[90:], Y[90:])]
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    result = optimizer_step(
        workload, model, optimizer, window, clip_norm=clip_norm, want_norms=True
    )
    F.cross_entropy(reference(X), Y).backward()
    norm = nn.utils.clip_grad_norm_(reference.parameters(), clip_norm)
    with torch.no_grad():
        for p in reference.parameters():
            assert p.grad is not None
            p -= p.grad
    for ours, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)
    assert result.gradient_norms is not None
    assert math.hypot(*map(float, result.gradient_norms)) == pytest.approx(float(norm), rel=1e-12)


@pytest.mark.parametrize("clip_norm", [1e-3, 0.05, 1e3])
def test_clipping_comes_after_the_sum(clip_norm: float) -> None:
    check_that_clipping_comes_after_the_sum(clip_norm)


def test_clipping_a_gradient_of_zero_leaves_zero() -> None:
    workload = make(loss=lambda o, t: 0.0 * o.sum())
    model = workload.build_model(0)
    before = nn.utils.parameters_to_vector(model.parameters())
    optimizer_step(
        workload, model, workload.make_optimizer(model.parameters(), 1.0), [(X, Y)], clip_norm=1.0
    )
    assert torch.equal(nn.utils.parameters_to_vector(model.parameters()), before)


@pytest.mark.parametrize("sizes", [[100], [32, 32, 32, 4]])
def test_the_sum_form_is_the_mean_form_times_the_count(sizes: list[int]) -> None:
    """The same training at lr / B; the loss told is the mean in both."""
    workload = make()
    mean_loss, mean = gradient(workload, sizes)
    model = workload.build_model(0)
    window = [workload.train_examples.batch(part) for part in torch.arange(100).split(sizes)]
    loss = compute_gradients(workload, model, window, autocast=None, reduction="sum")
    assert loss is not None
    same(flat_gradient(model), 100 * mean)
    same(loss, mean_loss)


@pytest.mark.parametrize("cuts", [(96,), (72, 24), (32, 32, 32)])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_half_precision_with_a_scaler_takes_the_first_step(
    cuts: tuple[int, ...], reduction: Reduction
) -> None:
    """On the CPU: the same gradient, unscaled, also where a sum of losses would overflow."""
    inputs, targets = 0.5 * X[:96].float(), (X[:96, 0] > 0).long()
    workload = make(make_model=lambda: nn.Linear(5, 3), train_data=(inputs, targets))
    window = [workload.train_examples.batch(part) for part in torch.arange(96).split(cuts)]
    exact = workload.build_model(0)
    compute_gradients(workload, exact, window, autocast=None, reduction=reduction)
    model = workload.build_model(0)
    before = nn.utils.parameters_to_vector(model.parameters()).detach()
    scaler = make_scaler("float16", "cpu")
    assert scaler is not None
    optimizer_step(
        workload,
        model,
        torch.optim.SGD(model.parameters(), lr=1.0),
        window,
        autocast=autocast_dtype("float16"),
        scaler=scaler,
        reduction=reduction,
    )
    moved = before - nn.utils.parameters_to_vector(model.parameters()).detach()
    assert moved.norm() > 0, "the step was left out"
    assert (moved - flat_gradient(exact)).norm() <= 2e-2 * moved.norm()
    assert scaler.get_scale() == 65536


def test_a_gradient_that_overflows_is_left_out_and_the_scale_falls() -> None:
    workload = make(
        make_model=lambda: nn.Linear(5, 3),
        train_data=(X[:8].float(), Y[:8]),
        loss=lambda o, t: 1e5 * F.cross_entropy(o, t),
    )
    model = workload.build_model(0)
    optimizer, scaler = torch.optim.SGD(model.parameters(), lr=1e-9), make_scaler("float16", "cpu")
    assert scaler is not None
    before, window = (
        nn.utils.parameters_to_vector(model.parameters()).clone(),
        [(X[:8].float(), Y[:8])],
    )
    moved: list[bool] = []
    for _ in range(30):
        optimizer_step(
            workload, model, optimizer, window,
            autocast=torch.float16, scaler=scaler, clip_norm=1.0, want_norms=True,
        )  # fmt: skip
        now = nn.utils.parameters_to_vector(model.parameters())
        assert torch.isfinite(now).all()
        moved.append(not torch.equal(now, before))
        before = now.clone()
    assert not moved[0]
    assert moved[-1]
    assert scaler.get_scale() < 65536
