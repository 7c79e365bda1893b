"""The noise probe against closed forms, a naive loop, and itself; and that it leaves no trace."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pydantic import TypeAdapter
from torch import Tensor, nn

import rightbatch as rb
from rightbatch.errors import ProbeError, UsageError
from rightbatch.laws.estimate import Estimate
from rightbatch.probes import example_gradients
from rightbatch.probes.example_gradients import ExampleGradients, GradientSums
from rightbatch.probes.noise import (
    NoisePoint,
    NoiseRecord,
    find_gradient_form,
    measure_noise_at,
    measure_noise_scale,
)
from rightbatch.recipe import Recipe
from rightbatch.training import Training
from rightbatch.workload import Workload


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def half_mse(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.mse_loss(outputs, targets) / 2


def regression(n: int = 4000, d: int = 10, *, noise: float = 0.0, **changes: Any) -> Workload:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, d, generator=generator)
    y = x.sum(dim=1, keepdim=True) + noise * torch.randn(n, 1, generator=generator)
    settings: dict[str, Any] = {
        "name": "regression",
        "make_model": lambda: nn.Linear(d, 1, bias=False),
        "train_data": (x, y),
        "loss": half_mse,
    }
    return Workload(**(settings | changes))


def classes(
    n: int = 240, *, layers: Callable[[], nn.Module] | None = None, **changes: Any
) -> Workload:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, 6, generator=generator)
    settings: dict[str, Any] = {
        "name": "classes",
        "make_model": layers
        or (lambda: nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3))),
        "train_data": (x, x[:, :3].argmax(dim=1)),
        "loss": F.cross_entropy,
    }
    return Workload(**(settings | changes))


def with_batch_norm() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3))


def with_dropout() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 3))


def naive(workload: Workload, model: nn.Module) -> tuple[float, float]:
    """|G_N|² and S by one backward pass per example, in double precision."""
    rows = []
    counts = []
    for i in range(workload.num_examples):
        model.zero_grad()
        loss, count = workload.loss_sum(model, workload.train_examples.batch(torch.tensor([i])))
        loss.backward()
        rows.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
        counts.append(float(count))
    gradients = torch.stack(rows).double().numpy() / np.mean(counts)
    return float(np.sum(gradients.mean(axis=0) ** 2)), float(gradients.var(axis=0, ddof=1).sum())


def covers(estimate: Estimate | NoisePoint, truth: float) -> bool:
    return (estimate.low is None or estimate.low <= truth) and (
        estimate.high is None or truth <= estimate.high
    )


# --- closed forms -------------------------------------------------------------------------------


def test_isotropic_regression_is_d_plus_one_always() -> None:
    """science.md 6.3: C = I, s = 0, B_simple = d + 1 at every step."""
    for seed in range(3):
        record = measure_noise_scale(
            regression(20_000, 10), learning_rate=0.05, trajectory_steps=(0, 5, 20), seed=seed
        )
        assert [point.step for point in record.trajectory] == [0, 5, 20]
        for point in record.trajectory:
            assert point.low is not None and point.high is not None
            # The set's own 20,000 examples differ from the law by a few per cent.
            assert point.low < 11 * 1.05 and point.high > 11 * 0.95
            assert point.value == pytest.approx(11, rel=0.35)


class _Mean(nn.Module):
    def __init__(self, start: float) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.full((5,), start))

    def forward(self, x: Tensor) -> Tensor:
        return x - self.theta


def mean_estimation(start: float, n: int = 3000) -> Workload:
    x = torch.randn(n, 5, generator=torch.Generator().manual_seed(2))
    return Workload(
        name="mean",
        make_model=lambda: _Mean(start),
        train_data=(x, x),
        loss=lambda outputs, _: outputs.square().sum(dim=1).mean() / 2,
    )


@pytest.mark.parametrize("start", [1.0, 0.3])
def test_mean_estimation(start: float) -> None:
    """½|θ − x|²: G = θ − mean, Σ = cov(x)."""
    workload = mean_estimation(start)
    x = workload.train_data[0].double().numpy()
    truth = x.var(axis=0, ddof=1).sum() / np.sum((start - x.mean(axis=0)) ** 2)
    found = [
        measure_noise_scale(workload, trajectory_steps=(0,), seed=seed).noise_scale
        for seed in range(20)
    ]
    assert sum(covers(f, truth) for f in found) >= 17
    assert np.median([f.value for f in found if f.value is not None]) == pytest.approx(
        truth, rel=0.15
    )


def test_at_the_minimum_it_is_unresolved_with_a_lower_bound() -> None:
    workload = mean_estimation(0.0)
    record = measure_noise_scale(workload, trajectory_steps=(0,), max_examples=200)
    assert record.noise_scale.value is None and record.noise_scale.high is None
    assert record.noise_scale.low is not None and record.noise_scale.low > 20
    assert "Unresolved at the start: 200 examples" in record.notes[0]


def test_the_exact_minimum_of_the_whole_set_is_unresolved() -> None:
    """|G|² is then rounding: a noise scale of 1e14 would be no measurement."""
    x = torch.randn(100, 1, generator=torch.Generator().manual_seed(3))
    x = torch.cat([x, -x])
    workload = Workload(
        name="even",
        make_model=lambda: _Mean(0.0),
        train_data=(x.expand(-1, 5), x),
        loss=lambda outputs, _: outputs.square().sum(dim=1).mean() / 2,
    )
    assert not measure_noise_scale(workload, trajectory_steps=(0,)).noise_scale.resolved


# --- against a naive loop -------------------------------------------------------------------------


class _NoBatchingRule(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.tanh()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor:
        return grad_outputs[0] * (1 - ctx.saved_tensors[0].tanh() ** 2)


class _OddTanh(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return _NoBatchingRule.apply(x)  # pyright: ignore[reportReturnType]


FORMS = {
    "per-example": lambda: nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3)),
    "per-example, one by one": lambda: nn.Sequential(
        nn.Linear(6, 16), _OddTanh(), nn.Linear(16, 3)
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_the_whole_set_agrees_with_one_backward_per_example(form: str) -> None:
    workload = classes(layers=FORMS[form])
    record = measure_noise_scale(workload, trajectory_steps=(0,), max_examples=10_000)
    point = record.trajectory[0]
    norm_squared, trace = naive(workload, workload.build_model(0))
    if point.n < workload.num_examples:  # tight before all were used
        point = measure_whole(workload)
    assert point.method == form
    assert point.gradient_norm_squared.value == pytest.approx(norm_squared, rel=1e-5)
    assert point.trace.value == pytest.approx(trace, rel=1e-5)
    assert point.value == pytest.approx(trace / norm_squared, rel=1e-5)
    assert point.low == pytest.approx(point.value) == point.high


def measure_whole(workload: Workload) -> NoisePoint:
    from rightbatch.probes import noise

    width, noise.RELATIVE_HALF_WIDTH = noise.RELATIVE_HALF_WIDTH, 0.0
    try:
        return measure_noise_scale(workload, trajectory_steps=(0,)).trajectory[0]
    finally:
        noise.RELATIVE_HALF_WIDTH = width


def test_tokens_are_weighted_as_the_training_weights_them() -> None:
    """With compute_loss counting tokens, the mean over examples is the training gradient."""
    generator = torch.Generator().manual_seed(4)
    tokens = torch.randint(0, 7, (90, 9), generator=generator)
    mask = torch.arange(8) < torch.randint(1, 9, (90, 1), generator=generator)

    def compute_loss(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        logits = model(batch["tokens"][:, :-1])
        each = F.cross_entropy(
            logits.flatten(0, 1), batch["tokens"][:, 1:].flatten(), reduction="none"
        )
        return (each * batch["mask"].flatten()).sum(), batch["mask"].sum()

    workload = Workload(
        name="tokens",
        make_model=lambda: nn.Sequential(nn.Embedding(7, 5), nn.Linear(5, 7)),
        train_data={"tokens": tokens, "mask": mask},
        compute_loss=compute_loss,
    )
    point = measure_whole(workload)
    model = workload.build_model(0)
    loss, count = workload.loss_sum(model, workload.train_examples.batch(torch.arange(90)))
    full = torch.autograd.grad(loss / count, list(model.parameters()))
    assert point.method == "per-example"
    assert point.gradient_norm_squared.value == pytest.approx(
        sum(float(g.double().square().sum()) for g in full), rel=1e-5
    )
    assert point.trace.value == pytest.approx(naive(workload, model)[1], rel=1e-5)


def test_frozen_parameters_do_not_count() -> None:
    def frozen() -> nn.Module:
        model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3))
        model[0].requires_grad_(False)
        return model

    workload = classes(layers=frozen)
    point, (norm_squared, trace) = measure_whole(workload), naive(workload, workload.build_model(0))
    assert point.gradient_norm_squared.value == pytest.approx(norm_squared, rel=1e-5)
    assert point.trace.value == pytest.approx(trace, rel=1e-5)


def test_a_large_model_is_folded_without_changing_the_answer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    workload = classes(1000)
    exact = measure_noise_scale(workload, trajectory_steps=(0,), max_examples=300).trajectory[0]
    monkeypatch.setattr(example_gradients, "FOLD", 64)
    folded = measure_noise_scale(workload, trajectory_steps=(0,), max_examples=300).trajectory[0]
    assert folded.n == exact.n < 1000
    assert folded.value == pytest.approx(exact.value, rel=1e-9)
    assert folded.low == pytest.approx(exact.low, rel=0.2)
    assert folded.high == pytest.approx(exact.high, rel=0.2)


def test_merging_groups_changes_only_the_interval_and_only_a_little(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    workload = classes(3000)
    exact = measure_noise_scale(workload, trajectory_steps=(0,), max_examples=128).trajectory[0]
    monkeypatch.setattr(example_gradients, "MAX_GROUPS", 24)
    merged = measure_noise_scale(workload, trajectory_steps=(0,), max_examples=128).trajectory[0]
    assert merged.value == pytest.approx(exact.value, rel=1e-6)
    assert merged.low == pytest.approx(exact.low, rel=0.2)


def test_chunks_are_cut_so_that_memory_stays_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    workload = classes(300)
    whole = measure_whole(workload)
    monkeypatch.setattr(example_gradients, "WORKSPACE_BYTES", 12 * 163 * 5)
    seen = []
    taken = ExampleGradients._vmapped

    def watched(self: ExampleGradients, indices: Tensor) -> Any:
        seen.append(len(indices))
        return taken(self, indices)

    monkeypatch.setattr(ExampleGradients, "_vmapped", watched)
    assert measure_whole(workload).value == pytest.approx(whole.value, rel=1e-6)
    assert max(seen) == 5


def test_coverage_on_a_network() -> None:
    """science.md 6.11 on real gradients, drawn without replacement from a known whole."""
    workload = classes(1000)
    truth = measure_whole(workload).value
    assert truth is not None
    training = Training(workload, Recipe(global_batch=32, learning_rate=0.1))
    form = find_gradient_form(training)
    points = [
        measure_noise_at(training, seed=seed, form=form, max_examples=256) for seed in range(200)
    ]
    assert 0.91 <= np.mean([covers(point, truth) for point in points]) <= 0.99
    assert np.median([p.value for p in points if p.value is not None]) == pytest.approx(
        truth, rel=0.05
    )


# --- where single examples have no gradient -------------------------------------------------------


def test_batch_norm_is_measured_by_micro_batches() -> None:
    workload = classes(2000, layers=with_batch_norm)
    record = measure_noise_scale(workload, trajectory_steps=(0,), micro_batch=20)
    point = record.trajectory[0]
    assert "micro-batches of 20: BatchNorm1d in training mode" in point.method
    # The same by hand: many batches of 20, each normalised by itself.
    model, norms, rows = workload.build_model(0), [], []
    for indices in torch.randperm(2000, generator=torch.Generator().manual_seed(9)).split(20):
        loss, count = workload.loss_sum(model, workload.train_examples.batch(indices))
        gradient = torch.autograd.grad(loss / count, list(model.parameters()))
        rows.append(torch.cat([g.flatten() for g in gradient]).double())
        norms.append(float(rows[-1] @ rows[-1]))
    mean = torch.stack(rows).mean(dim=0)
    trace = 20 * (float(np.mean(norms)) - float(mean @ mean)) * 100 / 99
    assert covers(point.trace, trace)
    assert covers(point, trace / float(mean @ mean))
    assert point.value == pytest.approx(trace / float(mean @ mean), rel=0.35)


def test_batch_norm_in_evaluation_mode_has_examples_of_its_own() -> None:
    def frozen_statistics() -> nn.Module:
        class Frozen(nn.BatchNorm1d):
            def train(self, mode: bool = True) -> Frozen:
                return super().train(False)

        return nn.Sequential(nn.Linear(6, 16), Frozen(16), nn.Linear(16, 3))

    record = measure_noise_scale(classes(layers=frozen_statistics), trajectory_steps=(0,))
    assert record.noise_scale.method == "per-example"


def test_a_loss_over_the_batch_is_noticed() -> None:
    """Contrastive: each example against the others in its batch."""

    def contrastive(model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, int]:
        codes = F.normalize(model(batch[0]), dim=1)
        loss = F.cross_entropy(codes @ codes.T * 5, torch.arange(len(codes)))
        return loss * len(codes), len(codes)

    record = measure_noise_scale(
        classes(loss=None, compute_loss=contrastive), trajectory_steps=(0,)
    )
    assert "depends on the others in its batch" in record.noise_scale.method


def test_both_forms_agree() -> None:
    workload = classes(4000)
    single = measure_noise_scale(workload, trajectory_steps=(0,)).noise_scale
    model = workload.build_model(0)
    gradients = ExampleGradients(workload, model)
    form = gradients._micro_batches(False, "asked for", 0)
    training = Training(workload, Recipe(global_batch=32, learning_rate=0.1))
    batched = measure_noise_at(training, form=form)
    assert batched.method.startswith("micro-batches of 16: asked for")
    assert single.value is not None and batched.value is not None
    assert covers(batched, single.value) or covers(single, batched.value)


def test_dropout_is_noise_too() -> None:
    plain = measure_noise_scale(
        classes(layers=lambda: nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))),
        trajectory_steps=(0,),
    )
    noisy = measure_noise_scale(classes(layers=with_dropout), trajectory_steps=(0,))
    assert noisy.population is None and plain.population == 240
    assert "random draws" in noisy.noise_scale.method
    assert noisy.noise_scale.value is not None and plain.noise_scale.value is not None
    assert noisy.noise_scale.value > plain.noise_scale.value
    # Even all the examples do not make it exact.
    assert noisy.noise_scale.high is not None and noisy.noise_scale.low is not None
    assert noisy.noise_scale.high > noisy.noise_scale.low * 1.05


def test_dropout_is_drawn_anew_for_each_example() -> None:
    """Equal examples under one shared mask would have no noise at all."""
    workload = classes(layers=with_dropout)
    x, y = workload.train_data
    same = classes(layers=with_dropout, train_data=(x[:1].expand(200, -1), y[:1].expand(200)))
    record = measure_noise_scale(same, trajectory_steps=(0,), max_examples=128)
    trace, norm = record.trajectory[0].trace, record.trajectory[0].gradient_norm_squared
    model, rows = workload.build_model(0), []
    torch.manual_seed(0)
    for _ in range(500):
        loss = F.cross_entropy(model(x[:1]), y[:1])
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        rows.append(torch.cat([g.flatten() for g in gradients]))
    by_hand = torch.stack(rows)
    assert trace.value == pytest.approx(float(by_hand.var(dim=0).sum()), rel=0.2)
    assert norm.value == pytest.approx(float(by_hand.mean(dim=0).square().sum()), rel=0.3)


# --- course ---------------------------------------------------------------------------------------


def test_more_examples_are_used_where_the_noise_is_larger() -> None:
    easy = measure_noise_scale(mean_estimation(2.0), trajectory_steps=(0,))
    hard = measure_noise_scale(mean_estimation(0.3), trajectory_steps=(0,))
    assert easy.noise_scale.n < hard.noise_scale.n
    for scale in (easy.noise_scale, hard.noise_scale):
        assert scale.value is not None and scale.high is not None and scale.low is not None
        assert (scale.high - scale.low) / 2 <= 0.25 * scale.value


def test_the_cost_is_counted() -> None:
    record = measure_noise_scale(classes(), trajectory_steps=(0, 3), learning_rate=0.1)
    used = sum(point.n for point in record.trajectory)
    assert record.cost_examples == used + 3 * 32 + 11  # and four looks at 8 examples, forward only
    searched = measure_noise_scale(classes(), trajectory_steps=(0, 3))
    assert searched.cost_examples > record.cost_examples
    assert searched.learning_rate_source == "line search"


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
def test_the_searched_learning_rate_trains(optimizer: Any) -> None:
    workload = classes(2000, make_optimizer=lambda params, lr: optimizer(params, lr=lr))
    record = measure_noise_scale(workload, trajectory_steps=(0, 60))
    assert record.learning_rate is not None and record.notes == ()
    recipe = Recipe(global_batch=32, learning_rate=record.learning_rate)
    training = Training(workload, recipe)
    training.advance(60)
    assert not training.diverged
    assert training.recent_train_loss() < 1.0  # the first is ln 3 = 1.1


def test_a_warm_training_that_diverges_is_begun_again_with_less() -> None:
    record = measure_noise_scale(regression(500), learning_rate=8.0, trajectory_steps=(0, 60))
    assert "diverged at learning rate 8" in record.notes[0]
    assert record.learning_rate is not None and record.learning_rate < 1
    assert [point.step for point in record.trajectory] == [0, 60]


def test_tiny_sets() -> None:
    two = measure_noise_scale(classes(2), trajectory_steps=(0,)).noise_scale
    assert not two.resolved
    five = classes(5)
    norm_squared, trace = naive(five, five.build_model(0))
    assert measure_noise_scale(five, trajectory_steps=(0,)).noise_scale.value == pytest.approx(
        trace / norm_squared, rel=1e-5
    )


def test_a_stream_cut_short_is_not_a_population(monkeypatch: pytest.MonkeyPatch) -> None:
    workload = classes()
    monkeypatch.setattr(workload.train_examples, "truncated", True)
    record = measure_noise_scale(workload, trajectory_steps=(0,))
    assert record.population is None
    assert record.noise_scale.high != record.noise_scale.low


def test_the_answer_is_the_same_each_time_and_survives_json() -> None:
    first, second = (
        measure_noise_scale(classes(layers=with_dropout), trajectory_steps=(0, 2)) for _ in range(2)
    )
    assert first.trajectory == second.trajectory
    adapter = TypeAdapter(NoiseRecord)
    as_json = adapter.dump_python(first, mode="json")
    assert adapter.validate_python(as_json) == first
    assert {"value", "low", "high", "n", "method"} <= as_json["noise_scale"].keys()
    assert {"step", "value", "low", "high"} <= as_json["trajectory"][0].keys()


def test_progress_is_told() -> None:
    told: list[tuple[str, float]] = []
    measure_noise_scale(
        classes(), trajectory_steps=(0, 2), progress=lambda what, share: told.append((what, share))
    )
    assert told[0][1] == 0.0 and told[-1][1] == 1.0
    assert "after 2 updates" in " ".join(what for what, _ in told)


# --- invisible ------------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", [with_dropout, with_batch_norm])
def test_the_probe_leaves_no_trace(layers: Callable[[], nn.Module]) -> None:
    workload = classes(layers=layers)
    data = [t.clone() for t in workload.train_data]
    random.seed(5)
    np.random.seed(5)
    torch.manual_seed(5)
    before = (random.getstate(), repr(np.random.get_state()), torch.get_rng_state())
    with torch.no_grad():
        measure_noise_scale(workload, trajectory_steps=(0, 3))
        assert not torch.is_grad_enabled()
    assert torch.is_grad_enabled() and torch.get_num_threads() == 1
    assert random.getstate() == before[0]
    assert repr(np.random.get_state()) == before[1]
    assert torch.equal(torch.get_rng_state(), before[2])
    assert all(torch.equal(a, b) for a, b in zip(data, workload.train_data, strict=True))


@pytest.mark.parametrize("layers", [with_dropout, with_batch_norm])
def test_a_training_does_not_notice_that_it_was_measured(layers: Callable[[], nn.Module]) -> None:
    workload = classes(layers=layers)
    recipe = Recipe(global_batch=16, learning_rate=0.1)
    plain, watched = Training(workload, recipe, seed=3), Training(workload, recipe, seed=3)
    for _ in range(3):
        plain.advance(5)
        watched.advance(5)
        gradients = [p.grad.clone() for p in watched.model.parameters() if p.grad is not None]
        point = measure_noise_at(watched)
        assert point.step == watched.steps and watched.model.training
        after = [p.grad for p in watched.model.parameters() if p.grad is not None]
        assert all(torch.equal(a, b) for a, b in zip(gradients, after, strict=True))
    for (name, a), b in zip(
        plain.model.state_dict().items(), watched.model.state_dict().values(), strict=True
    ):
        assert torch.equal(a, b), name
    assert plain.examples == watched.examples


def test_a_training_is_measured_where_it_stands() -> None:
    workload = classes()
    training = Training(workload, Recipe(global_batch=16, learning_rate=0.2))
    training.advance(40)
    form = find_gradient_form(training)
    point = measure_noise_at(training, form=form, max_examples=240)
    norm_squared, trace = naive(workload, training.model)
    assert point.n == 240 and point.value == pytest.approx(trace / norm_squared, rel=1e-5)
    assert point.step == 40
    assert point.cost_examples == point.n  # nothing for finding the form again


def test_inside_inference_mode() -> None:
    with torch.inference_mode():
        record = measure_noise_scale(classes(), trajectory_steps=(0, 2))
    assert record.noise_scale.resolved


# --- refusals -------------------------------------------------------------------------------------


def test_wrong_arguments() -> None:
    with pytest.raises(UsageError, match="trajectory_steps holds -1"):
        measure_noise_scale(classes(), trajectory_steps=(-1,))
    with pytest.raises(UsageError, match="max_examples is 1"):
        measure_noise_scale(classes(), max_examples=1)


def test_a_gradient_that_is_not_a_number() -> None:
    workload = classes(loss=lambda outputs, targets: F.cross_entropy(outputs, targets) * torch.nan)
    with pytest.raises(ProbeError, match="not finite at step 0"):
        measure_noise_scale(workload)


def test_public_name() -> None:
    assert rb.measure_noise_scale is measure_noise_scale


def test_sums_of_unequal_micro_batches() -> None:
    rows = torch.randn(4, 3, generator=torch.Generator().manual_seed(6))
    sizes = torch.tensor([2, 5, 1, 4])
    sums = GradientSums(3, seed=0)
    sums.add(rows * sizes[:, None], sizes, None, 12)
    sample = sums.sample(None)
    np.testing.assert_allclose(sample.gram, (rows @ rows.T).numpy(), rtol=1e-5)
    assert sums.num_examples == 12 and sample.squared_sums is None
