"""The noise measured from accumulation, against problems whose noise is known exactly."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from rightbatch import Recipe, Workload
from rightbatch.errors import RecipeError
from rightbatch.laws.linear_regression import (
    LinearRegression,
    gradient_norm_squared,
    gradient_trace,
    simple_noise_scale,
)
from rightbatch.laws.noise import make_gradient_sample, micro_batch_moments
from rightbatch.laws.noise_sums import NoiseSums, group_moments
from rightbatch.training import Training, window_noise
from rightbatch.training.checkpoints.state import restore_training, training_state
from rightbatch.training.step import compute_gradients
from rightbatch.training.window_noise import DRAWS, PAUSE, Draw, WindowNoise

KNOWN = LinearRegression(
    eigenvalues=(3.0, 1.0, 0.5, 0.2), offsets=(0.5, -1.0, 1.0, 2.0), noise_variance=0.7
)


def draw_gradients(known: LinearRegression, sizes: Sequence[int], rng: Any) -> np.ndarray:
    """The mean gradient of one micro-batch of each size, shape (K, d)."""
    n, scale = sum(sizes), np.sqrt(known.eigenvalues)
    x = rng.standard_normal((n, known.dimension)) * scale
    errors = x @ known.offsets + math.sqrt(known.noise_variance) * rng.standard_normal(n)
    sums = np.add.reduceat(errors[:, None] * x, np.cumsum([0, *sizes[:-1]]))
    return sums / np.array(sizes)[:, None]


def moments_of(gradients: np.ndarray, sizes: Sequence[int]) -> tuple[float, float]:
    whole = np.average(gradients, axis=0, weights=sizes)
    return group_moments(sizes, np.square(gradients).sum(1).tolist(), float(whole @ whole))


# -------------------------------------------------------------------------- one draw


@pytest.mark.parametrize("sizes", [[8, 8, 8, 8], [16, 4], [1, 30, 7], [3, 3, 3, 1, 1]])
def test_a_draw_is_without_bias_whatever_the_cut(sizes: list[int]) -> None:
    """Means of 8000 draws within four standard errors of the closed form (science: 6.1)."""
    rng = np.random.default_rng(sum(sizes))
    draws = np.array([moments_of(draw_gradients(KNOWN, sizes, rng), sizes) for _ in range(8000)])
    truth = np.array([gradient_norm_squared(KNOWN), gradient_trace(KNOWN)])
    error = draws.std(axis=0) / math.sqrt(len(draws))
    assert np.all(np.abs(draws.mean(axis=0) - truth) < 4 * error)
    assert np.all(error < 0.05 * truth)


def test_the_same_as_from_the_gradients_themselves() -> None:
    rng = np.random.default_rng(0)
    for sizes in ([5, 5], [4, 9, 2]):
        gradients = draw_gradients(KNOWN, sizes, rng)
        expected = micro_batch_moments(make_gradient_sample(gradients, sizes=sizes))
        assert moments_of(gradients, sizes) == pytest.approx(expected, rel=1e-12)


def test_one_micro_batch_says_nothing() -> None:
    with pytest.raises(ValueError, match="One gradient says nothing about noise; give at least"):
        group_moments([4], [1.0], 1.0)


def test_running_estimates_cover_the_truth_as_often_as_they_say() -> None:
    """C = I, s = 0: B_simple = d + 1 (science: 6.3); 12 draws of 4 unequal micro-batches."""
    known = LinearRegression(eigenvalues=(1.0,) * 7, offsets=(1.0,) * 7)
    rng, sizes, covered, num = np.random.default_rng(4), (12, 12, 12, 5), 0, 600
    for _ in range(num):
        sums = NoiseSums()
        for _ in range(DRAWS):
            sums = sums.add(*moments_of(draw_gradients(known, sizes, rng), sizes))
        scale = sums.estimate().noise_scale
        assert scale.low is not None
        covered += scale.low <= 8 and (scale.high is None or scale.high >= 8)
    assert simple_noise_scale(known) == 8
    assert 0.91 <= covered / num <= 0.98


# -------------------------------------------------------- from the updates of a training


def regression(num_examples: int = 40_000, *, noise: float = 0.0, tokens: int = 1) -> Workload:
    """C = I in d = 7, w* = (1, …), from zero weights; `tokens` repeats each example's loss."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(num_examples, 7, dtype=torch.float64, generator=draw)
    y = x.sum(1) + noise * torch.randn(num_examples, dtype=torch.float64, generator=draw)

    def zero() -> nn.Module:
        model = nn.Linear(7, 1, bias=False, dtype=torch.float64)
        nn.init.zeros_(model.weight)
        return model

    def compute_loss(model: nn.Module, batch: Any) -> tuple[Tensor, int]:
        inputs, targets = batch
        squares = (model(inputs)[:, 0] - targets).square() / 2
        return tokens * squares.sum(), tokens * len(targets)

    return Workload(
        name="regression", make_model=zero, train_data=(x, y), compute_loss=compute_loss
    )


def follow(global_batch: int = 40, micro_batch: int = 10, **changes: Any) -> Recipe:
    given: dict[str, Any] = {"learning_rate": 1e-7, "batch_policy": "follow-noise", **changes}
    return Recipe(global_batch=global_batch, micro_batch=micro_batch, **given)


@pytest.mark.parametrize(("batch", "micro", "last"), [(40, 10, "keep"), (45, 9, "merge")])
@pytest.mark.parametrize("tokens", [1, 32])
def test_a_training_measures_the_noise_scale_in_examples(
    batch: int, micro: int, last: Any, tokens: int
) -> None:
    training = Training(regression(tokens=tokens), follow(batch, micro, last_batch=last))
    training.advance(PAUSE * DRAWS * 2)
    noise = training.noise
    assert noise is not None
    assert noise.latest is not None
    scale = noise.latest.noise_scale
    assert scale.value is not None
    assert scale.low is not None
    assert scale.high is not None
    assert scale.low <= 8 <= scale.high
    assert scale.high - scale.low < 8
    assert noise.running_moments is not None
    norm_squared, trace = noise.running_moments
    assert norm_squared == pytest.approx(7, rel=0.3)
    assert trace == pytest.approx(8 * 7, rel=0.3)


def test_what_is_measured_changes_no_bit_of_the_training() -> None:
    plain = follow(batch_policy="fixed", learning_rate=0.05)
    runs = [Training(regression(2000), recipe) for recipe in (plain, follow(
        learning_rate=0.05, largest_batch=40))]  # fmt: skip
    for run in runs:
        run.advance(PAUSE * DRAWS + 5)
    assert runs[1].noise is not None
    assert runs[1].noise.latest is not None
    for one, other in zip(*(run.model.parameters() for run in runs), strict=True):
        assert torch.equal(one, other)


@pytest.fixture(scope="module")
def risen() -> Training:
    """Noise of variance 4, weights that near their best: B_simple = 8 + 28/|δ|² grows."""
    training = Training(regression(20_000, noise=2.0), follow(learning_rate=0.001))
    batches: list[int] = []
    for _ in range(64):
        training.advance(PAUSE)
        assert training.noise is not None
        batches.append(training.noise.batch or 40)
    training.batches = batches  # pyright: ignore[reportAttributeAccessIssue]
    return training


def test_the_batch_rises_with_the_root_of_the_noise_scale(risen: Training) -> None:
    batches: list[int] = risen.batches  # pyright: ignore[reportAttributeAccessIssue]
    assert batches == sorted(batches)
    assert batches[0] == 40
    w = next(risen.model.parameters()).detach()[0]
    left = float((w - 1).square().sum())
    now, then = 8 + 28 / left, 8 + 28 / 7
    # From noisy estimates, of which the largest counts.
    assert 0.7 < batches[-1] / (40 * math.sqrt(now / then)) < 1.8
    assert batches[-1] > 60


RISING = follow(20, 5, learning_rate=0.004, largest_batch=100)
HALF = PAUSE * DRAWS + 50


@pytest.fixture(scope="module")
def whole() -> Training:
    """Two estimates, of which the second lets the batch rise."""
    training = Training(regression(600, noise=1.0), RISING)
    training.advance(2 * HALF)
    assert training.noise is not None
    assert training.noise.batch is not None
    assert training.noise.batch > 20, "it never rose: nothing is tested"
    return training


def same_training(one: Training, other: Training) -> None:
    assert one.consumed == other.consumed
    assert one.noise is not None
    assert other.noise is not None
    assert one.noise.state_dict() == other.noise.state_dict()
    for ours, theirs in zip(one.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_resumed_from_its_state_it_goes_on_as_it_would_have(whole: Training) -> None:
    """Stopped between the two estimates: what the second refers to is kept."""
    first, second = (Training(whole.workload, RISING) for _ in range(2))
    first.advance(HALF)
    restore_training(second, training_state(first))
    second.advance(HALF)
    same_training(second, whole)


def test_workers_that_fetch_ahead_see_the_rise(whole: Training) -> None:
    fetched = Training(whole.workload, RISING, workers=1)
    fetched.advance(2 * HALF)
    same_training(fetched, whole)


def test_the_batch_stops_at_the_largest_and_never_falls() -> None:
    noise = WindowNoise(32, 100)
    batches: list[int | None] = []
    for trace in (10.0, 40.0, 20.0, 1e6, 1.0):
        for _ in range(DRAWS):
            noise.add(Fixed(1.0, trace), 1)
        batches.append(noise.batch)
    assert batches == [32, 64, 64, 100, 100]


class Fixed(Draw):
    """A draw of given moments."""

    def __init__(self, norm_squared: float, trace: float) -> None:
        super().__init__([])
        self._given = norm_squared, trace

    def moments(self, num_examples: int) -> tuple[float, float]:
        return self._given


def test_unresolved_noise_leaves_the_batch() -> None:
    noise = WindowNoise(32, 1000)
    for _ in range(3):
        for index in range(DRAWS):
            noise.add(Fixed(1.0 if index % 2 else -1.0, 50.0), 1)
    assert noise.latest is not None
    assert noise.latest.noise_scale.value is None
    assert noise.batch is None


# ----------------------------------------------------------------- gradients as they come


def observed(workload: Workload, model: nn.Module, sizes: list[int], **options: Any) -> Draw:
    draw = Draw(model.parameters())
    window = [workload.train_examples.batch(p) for p in torch.arange(sum(sizes)).split(sizes)]
    compute_gradients(workload, model, window, autocast=None, observe=draw, **options)
    return draw


def test_a_parameter_that_only_some_micro_batches_use() -> None:
    """As in a mixture of experts: without a gradient it has a gradient of zero."""

    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList(nn.Linear(7, 1, dtype=torch.float64) for _ in range(2))

        def forward(self, inputs: Tensor) -> Tensor:
            return self.experts[int(inputs[0, 0] > 0)](inputs)

    workload = regression(60)
    order = workload.train_examples.batch(torch.arange(60))[0][:, 0].sign().argsort()
    workload = Workload(
        name="experts",
        make_model=Experts,
        train_data=tuple(t[order] for t in workload.train_data),
        compute_loss=workload.compute_loss,
    )
    model, sizes = workload.build_model(0), [10] * 6
    moments = observed(workload, model, sizes).moments(60)
    rows: list[Tensor] = []
    for part in torch.arange(60).split(sizes):
        model.zero_grad()
        compute_gradients(workload, model, [workload.train_examples.batch(part)], autocast=None)
        rows.append(
            torch.cat([
                (torch.zeros_like(p) if p.grad is None else p.grad).flatten()
                for p in model.parameters()
            ])
        )  # fmt: skip
    gradients = torch.stack(rows).numpy()
    assert (gradients == 0).any()
    assert moments == pytest.approx(moments_of(gradients, sizes), rel=1e-9)


def test_a_scaled_loss_gives_the_same_noise() -> None:
    workload = regression(60)
    plain = observed(workload, workload.build_model(0), [20, 20, 20]).moments(60)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaled = observed(workload, workload.build_model(0), [20, 20, 20], scaler=scaler).moments(60)
    assert scaled == pytest.approx(plain, rel=1e-9)


def test_a_gradient_that_is_no_number_is_no_draw() -> None:
    workload = regression(60)
    model, noise = workload.build_model(0), WindowNoise(60, None)
    noise.add(observed(workload, model, [20, 40]), 60)
    before = noise.running_moments
    model.zero_grad()
    with torch.no_grad():
        next(model.parameters()).fill_(math.inf)
    assert not noise.add(observed(workload, model, [20, 40]), 60)
    assert noise.running_moments == before


def test_one_update_in_24_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[int] = []
    whole = window_noise.WindowNoise.observer

    def watched(self: WindowNoise, steps: int, optimizer: Any) -> Any:
        found = whole(self, steps, optimizer)
        looked.extend([steps] if found else [])
        return found

    monkeypatch.setattr(window_noise.WindowNoise, "observer", watched)
    Training(regression(4000), follow()).advance(40)
    assert looked == [0, 24]


# ------------------------------------------------------------------- what cannot be measured


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"batch_policy": "follow-noise"},
            r"batch_policy is 'follow-noise', but an update of 64 is one micro-batch on one "
            r"replica, .* Give a micro_batch of at most 32",
        ),
        (
            {"rate_rule": "adascale"},
            r"rate_rule is 'adascale', but the batch is 64 all the way, .* Give a batch_ramp",
        ),
        (
            {"rate_rule": "adascale", "batch_ramp": ((100, 32),)},
            r"rate_rule is 'adascale', but an update of 64 is one micro-batch",
        ),
        (
            {"batch_policy": "follow-noise", "micro_batch": 8, "batch_ramp": ((100, 128),)},
            r"batch_ramp is \(\(100, 128\),\) and batch_policy 'follow-noise'; both decide .* one",
        ),
    ],
)
def test_a_noise_that_nothing_measures_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Recipe(global_batch=64, learning_rate=0.1, **changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"batch_policy": "follow-noise", "micro_batch": 32},
        {"batch_policy": "follow-noise", "replicas": 2},
        {"rate_rule": "adascale", "batch_ramp": ((100, 128),)},
        {"rate_rule": "adascale", "batch_policy": "follow-noise", "micro_batch": 16},
    ],
)
def test_what_can_be_measured_is_not(changes: dict[str, Any]) -> None:
    assert Recipe(global_batch=64, learning_rate=0.1, **changes).changes_batch
