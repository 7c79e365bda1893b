"""The sharpness probe against closed forms, dense Hessians and an oracle; and its invisibility."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rightbatch as rb
from rightbatch.errors import DivergedError, ProbeError, UsageError
from rightbatch.laws.estimate import Estimate
from rightbatch.probes.sharpness import (
    SharpnessPoint,
    SharpnessRecord,
    keskar,
    measure_sharpness,
    measure_sharpness_at,
)
from rightbatch.probes.sharpness.fixed_loss import FixedLoss
from rightbatch.probes.sharpness.hutchinson import estimate_hessian_trace
from rightbatch.probes.sharpness.keskar import measure_keskar
from rightbatch.probes.sharpness.lanczos import estimate_largest_eigenvalue
from rightbatch.probes.sharpness.sam import measure_sam_rise
from rightbatch.store import dump_record
from rightbatch.training import Training
from rightbatch.workload import Workload


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


QUICK: dict[str, Any] = {"num_starts": 1, "epsilons": (1e-3,)}


def draw(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Weights(nn.Module):
    """A vector; the loss does the rest."""

    def __init__(self, values: Tensor) -> None:
        super().__init__()
        self.w = nn.Parameter(values.clone())

    def forward(self, inputs: Tensor) -> Tensor:
        return self.w.expand(len(inputs), -1)


def quadratic(hessian: Tensor, at: Tensor | None = None) -> Workload:
    """½wᵀHw, the same for each of four examples."""
    n = len(hessian)
    return Workload(
        name="quadratic",
        make_model=lambda: Weights(torch.zeros(n, dtype=hessian.dtype) if at is None else at),
        train_data=(torch.zeros(4, 1), torch.zeros(4)),
        loss=lambda w, _: 0.5 * ((w @ hessian) * w).sum(dim=1).mean(),
    )


def mlp(activation: Callable[[], nn.Module] = nn.Tanh) -> nn.Module:
    return nn.Sequential(nn.Linear(3, 5), activation(), nn.Linear(5, 4)).double()


def classes(n: int = 60, layers: Callable[[], nn.Module] = mlp, **changes: Any) -> Workload:
    generator = draw(1)
    x = torch.randn(n, 3, generator=generator, dtype=torch.float64)
    y = torch.randint(4, (n,), generator=generator)
    settings: dict[str, Any] = {
        "name": "classes",
        "make_model": layers,
        "train_data": (x, y),
        "loss": F.cross_entropy,
    }
    return Workload(**(settings | changes))


def fixed_loss(workload: Workload, micro_batch: int | None = None) -> FixedLoss:
    return FixedLoss(
        workload,
        workload.build_model(0),
        device="cpu",
        indices=torch.arange(workload.num_examples),
        micro_batch=micro_batch,
        seed=0,
    )


def dense_hessian(workload: Workload) -> Tensor:
    """The whole matrix, from the loss of all examples at once."""
    model = workload.build_model(0).eval()
    names = [name for name, _ in model.named_parameters()]
    shapes = [p.shape for p in model.parameters()]
    start = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    batch = workload.train_examples.batch(torch.arange(workload.num_examples))

    def mean_loss(flat: Tensor) -> Tensor:
        parts = flat.split([math.prod(shape) for shape in shapes])
        values = {n: p.view(s) for n, p, s in zip(names, parts, shapes, strict=True)}

        class Called(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return torch.func.functional_call(model, values, (x,))

        total, count = workload.loss_sum(Called(), batch)
        return total / count

    found = torch.autograd.functional.hessian(mean_loss, start)
    assert isinstance(found, Tensor)
    return found


def value(estimate: Estimate) -> float:
    assert estimate.value is not None
    return estimate.value


# --- closed forms --------------------------------------------------------------------------------


@pytest.mark.parametrize("epsilon", [1e-3, 5e-4])
def test_keskar_of_a_diagonal_quadratic(epsilon: float) -> None:
    """science.md 6.9: φ = 50 ε² Σ h_i at the minimum of ½yᵀHy, H diagonal and ≥ 0."""
    h = torch.tensor([3.0, 0.5, 100.0, 0.0, 1e-3, 7.0], dtype=torch.float64)
    record = measure_sharpness(quadratic(torch.diag(h)))
    phi = record.points[0].phi("all", epsilon)
    assert value(phi) == pytest.approx(50 * epsilon**2 * float(h.sum()), rel=1e-6)
    assert phi.low == phi.value and phi.high is None and phi.n == 3
    starts = next(k for k in record.points[0].keskar if k.epsilon == epsilon).starts
    assert max(starts) == phi.value and len(starts) == 3


def test_keskar_away_from_zero_uses_the_larger_box() -> None:
    """f = 1ᵀw at w: the corner is Σ ε(|w_i| + 1) above."""
    w = torch.tensor([0.0, -3.0, 8.0], dtype=torch.float64)
    workload = Workload(
        name="plane",
        make_model=lambda: Weights(w),
        train_data=(torch.zeros(2, 1), torch.zeros(2)),
        loss=lambda out, _: out.sum(dim=1).mean(),
    )
    point = measure_sharpness(workload).points[0]
    assert value(point.phi()) == pytest.approx(100 * 1e-3 * (1 + 4 + 9) / (1 + 5))
    assert value(point.largest_eigenvalue) == 0.0 and value(point.trace) == 0.0
    assert value(point.sam_rise) == pytest.approx(0.05 * math.sqrt(3))


def test_keskar_in_a_subspace_is_that_of_the_projected_quadratic() -> None:
    """In few dimensions the corners can all be tried."""
    h = torch.diag(torch.tensor([1.0, 2.0, 30.0], dtype=torch.float64))
    matrix = torch.randn(3, 3, generator=draw(7))
    fixed = fixed_loss(quadratic(h))
    original = keskar._draw_subspace
    keskar._draw_subspace = lambda *_: matrix
    try:
        found = measure_keskar(
            fixed, 0.0, epsilon=1e-3, directions="random", num_starts=20, generator=draw()
        )
    finally:
        keskar._draw_subspace = original
    corners = torch.cartesian_prod(*[torch.tensor([-1e-3, 1e-3])] * 3).double() @ matrix.double().T
    best = float((0.5 * (corners @ h) * corners).sum(dim=1).max())
    assert max(found.starts) == pytest.approx(100 * best, rel=1e-4)
    assert found.phi.n == 20 and found.dimension == 3
    assert found.phi.value == pytest.approx(np.mean(found.starts))


def test_linear_regression() -> None:
    """H = 2XᵀX/N whatever the weights."""
    x = torch.randn(500, 8, generator=draw(2), dtype=torch.float64) * torch.arange(1, 9)
    workload = Workload(
        name="regression",
        make_model=lambda: nn.Linear(8, 1, bias=False).double(),
        train_data=(x, x.sum(dim=1, keepdim=True)),
        loss=F.mse_loss,
    )
    values = torch.linalg.eigvalsh(2 * x.T @ x / 500)
    point = measure_sharpness(workload).points[0]
    assert value(point.largest_eigenvalue) == pytest.approx(float(values[-1]), rel=1e-2)
    assert point.largest_eigenvalue.low is not None and point.largest_eigenvalue.high is not None
    assert point.largest_eigenvalue.low <= float(values[-1]) <= point.largest_eigenvalue.high
    assert value(point.trace) == pytest.approx(float(values.sum()), rel=0.1)
    assert point.converged and point.num_weights == 8 and point.num_examples == 500


def test_sam_rise_of_a_quadratic() -> None:
    """Along g = Hw: ρ|g| + ½ρ²gᵀHg/|g|²."""
    h = torch.diag(torch.tensor([1.0, 4.0], dtype=torch.float64))
    w = torch.tensor([1.0, 1.0], dtype=torch.float64)
    fixed = fixed_loss(quadratic(h, w))
    loss, gradient = fixed.loss_and_gradient()
    g = h @ w
    expected = 0.05 * g.norm() + 0.5 * 0.05**2 * (g @ h @ g) / (g @ g)
    rise = measure_sam_rise(fixed, loss, gradient)
    assert value(rise) == pytest.approx(float(expected), rel=1e-9)
    assert torch.equal(fixed.weights, w)


def test_at_the_very_minimum_there_is_no_sam_rise() -> None:
    rise = measure_sharpness(quadratic(torch.eye(3))).points[0].sam_rise
    assert not rise.resolved and "the gradient is 0" in rise.method


# --- the function and its derivatives -------------------------------------------------------------


@pytest.mark.parametrize("micro_batch", [None, 7, 60])
def test_products_are_those_of_the_dense_hessian(micro_batch: int | None) -> None:
    workload = classes()
    fixed, hessian = fixed_loss(workload, micro_batch), dense_hessian(workload)
    for seed in range(3):
        v = torch.randn(fixed.num_weights, generator=draw(seed), dtype=torch.float64)
        torch.testing.assert_close(fixed.hessian_product(v), hessian @ v, rtol=1e-10, atol=1e-12)
    assert fixed.cost == 3 * 3 * 60


def test_tokens_weigh_as_the_workload_counts_them() -> None:
    """Padded sequences: a mean over tokens, however they are cut."""
    tokens = torch.randint(4, (12, 5), generator=draw(3))
    targets = tokens.roll(1, dims=1)
    targets[:6, 1:] = -100
    targets[11] = -100  # padding alone

    def loss(scores: Tensor, wanted: Tensor) -> Tensor:
        return F.cross_entropy(scores.flatten(0, 1), wanted.flatten())

    def layers() -> nn.Module:
        return nn.Sequential(nn.Embedding(4, 3), nn.Linear(3, 4)).double()

    workload = classes(layers=layers, train_data=(tokens, targets), loss=loss)
    whole, one_by_one = fixed_loss(workload, 12), fixed_loss(workload, 1)
    v = torch.randn(whole.num_weights, generator=draw(4), dtype=torch.float64)
    torch.testing.assert_close(whole.hessian_product(v), one_by_one.hessian_product(v))
    torch.testing.assert_close(whole.hessian_product(v), dense_hessian(workload) @ v)
    assert whole.loss() == pytest.approx(one_by_one.loss(), rel=1e-12)
    with pytest.raises(ProbeError, match="counts no term"):
        padding = classes(
            layers=layers, train_data=(tokens, torch.full_like(tokens, -100)), loss=loss
        )
        measure_sharpness(padding)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.into, self.out = nn.Linear(3, 24), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.into(x).view(len(x), 1, 3, 8).unbind(2)
        q, k, v = (part[:, None] for part in (q, k, v))
        return self.out(F.scaled_dot_product_attention(q, k, v)[:, 0, 0])


class Recurrence(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.out = nn.LSTM(3, 6, batch_first=True), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.lstm(x[:, None])[0][:, -1])


@pytest.mark.parametrize("layers", [Attention, Recurrence])
def test_layers_whose_fused_kernels_have_no_second_derivative(layers: type[nn.Module]) -> None:
    x, y = classes().train_data
    workload = classes(layers=layers, train_data=(x.float(), y))
    point = measure_sharpness(workload, **QUICK).points[0]
    assert point.largest_eigenvalue.resolved


def test_dropout_and_batch_norm_are_in_evaluation_mode() -> None:
    def layers() -> nn.Module:
        return nn.Sequential(
            nn.Linear(3, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(0.5), nn.Linear(6, 4)
        ).double()

    fixed = fixed_loss(classes(layers=layers), 16)
    assert fixed.loss() == fixed.loss()
    assert fixed.loss() == pytest.approx(fixed_loss(classes(layers=layers), 60).loss(), rel=1e-12)


def test_frozen_weights_take_no_part() -> None:
    def layers() -> nn.Module:
        model = mlp()
        next(model.parameters()).requires_grad_(False)
        return model

    assert measure_sharpness(classes(layers=layers), **QUICK).points[0].num_weights == 5 + 20 + 4


def test_too_large_micro_batches_are_halved(monkeypatch: pytest.MonkeyPatch) -> None:
    workload = classes()

    def hungry(scores: Tensor, wanted: Tensor) -> Tensor:
        if len(scores) > 10:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return F.cross_entropy(scores, wanted)

    fixed = fixed_loss(classes(loss=hungry), 60)
    assert fixed.loss() == pytest.approx(fixed_loss(workload).loss(), rel=1e-12)
    assert len(fixed._batches) == math.ceil(60 / 7)


def test_micro_batches_follow_from_what_one_example_keeps() -> None:
    def wide() -> nn.Module:
        return nn.Sequential(nn.Linear(3, 2**17), nn.Tanh(), nn.Linear(2**17, 4)).double()

    # The output of tanh, kept by it and by the next layer: 2 × 2¹⁷ × 8 bytes, with the inputs.
    assert 100 < fixed_loss(classes(layers=wide))._micro_batch <= 128
    assert fixed_loss(classes())._micro_batch == 1024


# --- λ_max and trace -----------------------------------------------------------------------------


def test_a_small_network_against_its_dense_hessian() -> None:
    workload = classes()
    values = torch.linalg.eigvalsh(dense_hessian(workload))
    point = measure_sharpness(workload).points[0]
    top, trace = point.largest_eigenvalue, point.trace
    assert value(top) == pytest.approx(float(values[-1]), rel=0.01)
    assert top.low is not None and top.high is not None
    assert top.low <= float(values[-1]) <= top.high
    assert trace.low is not None and trace.high is not None
    assert trace.low <= float(values.sum()) <= trace.high
    assert point.residual < 0.1 * value(top)


def eigen(values: Tensor, **options: Any) -> Any:
    q, _ = torch.linalg.qr(torch.randn(len(values), len(values), generator=draw(9)).double())
    matrix = (q * values) @ q.T
    return matrix, estimate_largest_eigenvalue(
        lambda v: matrix @ v, len(values), **({"generator": draw(), "epsilon": 1e-16} | options)
    )


@pytest.mark.parametrize(
    "values",
    [
        torch.cat([torch.tensor([-100.0, -90.0]), torch.linspace(-1, 2, 48)]).double(),
        torch.cat([torch.linspace(-1, 1, 40), 3 - 1e-6 * torch.arange(10)]).double(),
        torch.tensor([2.0] * 20 + [-3.0] * 20 + [0.0] * 10).double(),
        -torch.linspace(0.5, 1, 50).double(),
        torch.zeros(50).double(),
    ],
    ids=["indefinite", "clustered", "degenerate", "negative definite", "zero"],
)
def test_the_algebraically_largest_eigenvalue(values: Tensor) -> None:
    _, found = eigen(values)
    top = float(values.max())
    assert value(found.estimate) == pytest.approx(top, rel=0.01, abs=1e-12)
    assert found.estimate.low <= top + 1e-12 and top - 1e-12 <= found.estimate.high
    assert found.converged
    gram = found.basis @ found.basis.T
    torch.testing.assert_close(gram, torch.eye(len(gram)).double(), atol=1e-10, rtol=0)


def test_what_does_not_converge_says_so() -> None:
    values = torch.linspace(-1, 1, 200).double()
    _, found = eigen(values, max_iterations=4)
    assert not found.converged and found.iterations == 4
    assert found.estimate.low <= 1.0 <= found.estimate.high
    assert found.estimate.high - found.estimate.low > 0.1


def test_products_in_single_precision_are_covered() -> None:
    values = torch.cat([torch.linspace(-1, 1, 60), torch.tensor([500.0])]).double()
    q, _ = torch.linalg.qr(torch.randn(61, 61, generator=draw(9)).double())
    matrix = ((q * values) @ q.T).float()
    found = estimate_largest_eigenvalue(
        lambda v: (matrix @ v.float()).double(),
        61,
        generator=draw(),
        epsilon=torch.finfo(torch.float32).eps,
        tolerance=1e-9,
    )
    low, high = found.estimate.low, found.estimate.high
    assert low is not None and high is not None and low <= 500.0 <= high
    assert high - low < 0.01


@pytest.mark.parametrize(
    "values",
    [torch.logspace(1, -2, 100), torch.cat([torch.tensor([80.0, 30.0]), torch.rand(98) - 0.3])],
    ids=["decaying", "two outliers, indefinite"],
)
@pytest.mark.parametrize("iterations", [1, 12])
def test_the_interval_of_the_trace_covers_it(values: Tensor, iterations: int) -> None:
    """91–98 % of 200 draws, Lanczos included."""
    values = values.double()
    q, _ = torch.linalg.qr(torch.randn(100, 100, generator=draw(5)).double())
    matrix, inside, draws = (q * values) @ q.T, 0, 200
    for seed in range(draws):
        generator = draw(seed)
        top = estimate_largest_eigenvalue(
            lambda v: matrix @ v, 100, generator=generator, epsilon=1e-16, max_iterations=iterations
        )
        found = estimate_hessian_trace(
            lambda v: matrix @ v, top.basis, top.trace_in_basis, generator=generator
        )
        assert found.low is not None and found.high is not None
        inside += found.low <= float(values.sum()) <= found.high
    assert 0.91 <= inside / draws <= 0.985


def test_no_probe_is_needed_where_the_basis_is_everything() -> None:
    matrix, top = eigen(torch.linspace(1, 2, 6).double(), tolerance=0.0)
    found = estimate_hessian_trace(
        lambda v: matrix @ v, top.basis, top.trace_in_basis, generator=draw()
    )
    assert found.n == 0 and found.value == pytest.approx(9.0) and found.low == found.high


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
def test_curvlinops_agrees() -> None:
    """An independent library, on all training examples of a network with ReLU."""
    import curvlinops

    workload = classes(layers=lambda: mlp(nn.ReLU))
    model = workload.build_model(0)
    x, y = workload.train_data
    operator: Any = curvlinops.HessianLinearOperator(
        model, nn.CrossEntropyLoss(), list(model.parameters()), [(x[:37], y[:37]), (x[37:], y[37:])]
    )
    dense = operator @ torch.eye(operator.shape[1], dtype=torch.float64)
    values = torch.linalg.eigvalsh((dense + dense.T) / 2)
    point = measure_sharpness(workload, model=model, **QUICK).points[0]
    assert value(point.largest_eigenvalue) == pytest.approx(float(values[-1]), rel=0.01)
    trace = point.trace
    assert trace.low is not None and trace.high is not None
    assert trace.low <= float(torch.trace(dense)) <= trace.high
    torch.manual_seed(0)
    theirs = float(curvlinops.hutchpp_trace(operator, num_matvecs=30))
    assert value(trace) == pytest.approx(theirs, rel=0.1)


# --- caveats -------------------------------------------------------------------------------------


def test_a_rescaled_relu_network_is_the_same_function_with_another_sharpness() -> None:
    """Dinh et al. 2017: weights into a layer × 5, weights out of it / 5."""
    workload = classes(layers=lambda: mlp(nn.ReLU))
    model = workload.build_model(0)
    rescaled = copy.deepcopy(model)
    with torch.no_grad():
        for p in rescaled[0].parameters():  # pyright: ignore
            p.mul_(5.0)
        rescaled[2].weight.div_(5.0)  # pyright: ignore
    x = workload.train_data[0]
    torch.testing.assert_close(rescaled(x), model(x))
    before = measure_sharpness(workload, model=model).points[0]
    after = measure_sharpness(workload, model=rescaled).points[0]
    assert after.loss == pytest.approx(before.loss, rel=1e-12)
    assert value(after.largest_eigenvalue) > 3 * value(before.largest_eigenvalue)
    assert value(after.trace) > 3 * value(before.trace)
    assert value(after.phi()) > 1.2 * value(before.phi())
    assert abs(value(after.sam_rise) / value(before.sam_rise) - 1) > 0.2


def test_what_is_within_rounding_is_not_resolved() -> None:
    """ε² h of a float32 loss of 1."""

    def loss(w: Tensor, _: Tensor) -> Tensor:
        return 1 + 1e-3 * (w**2).sum(dim=1).mean()

    workload = Workload(
        name="flat",
        make_model=lambda: Weights(torch.zeros(3)),
        train_data=(torch.zeros(2, 1), torch.zeros(2)),
        loss=loss,
    )
    record = measure_sharpness(workload)
    assert not record.points[0].phi().resolved
    assert any("the rise is within rounding" in note for note in record.notes)


def test_losses_below_minus_one_have_no_phi() -> None:
    def loss(w: Tensor, _: Tensor) -> Tensor:
        return (w**2).sum(dim=1).mean() - 5

    workload = Workload(
        name="below",
        make_model=lambda: Weights(torch.ones(3)),
        train_data=(torch.zeros(2, 1), torch.zeros(2)),
        loss=loss,
    )
    record = measure_sharpness(workload)
    assert record.points[0].phi().value is None
    assert any("not above −1" in note for note in record.notes)


def test_a_matrix_that_would_not_fit_is_not_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keskar, "_MOST_BYTES", 1000)
    phi = measure_sharpness(classes()).points[0].phi("random")
    assert not phi.resolved and "A would take" in phi.method


def test_a_slope_is_called_a_slope_and_examples_are_counted() -> None:
    w = torch.tensor([3.0, 1.0], dtype=torch.float64)
    notes = measure_sharpness(quadratic(torch.eye(2).double(), w), max_examples=3).notes
    assert any("a slope and no minimum" in note for note in notes)
    assert any("3 of 4 training examples" in note for note in notes)


def test_fewer_examples_are_used_where_they_hold_many_tokens() -> None:
    tokens = torch.randint(4, (50, 512), generator=draw(3))
    workload = classes(
        layers=lambda: nn.Sequential(nn.Embedding(4, 3), nn.Linear(3, 4)),
        train_data=(tokens, tokens),
        loss=lambda scores, wanted: F.cross_entropy(scores.flatten(0, 1), wanted.flatten()),
    )
    assert measure_sharpness(workload, **QUICK).points[0].num_examples == 8


# --- whose weights --------------------------------------------------------------------------------


def test_initial_given_and_loaded_weights_are_the_same_place() -> None:
    workload = classes()
    model = workload.build_model(0)
    records = [
        measure_sharpness(workload, **QUICK),
        measure_sharpness(workload, model=model, **QUICK),
        measure_sharpness(workload, state=model.state_dict(), **QUICK),
    ]
    assert [r.weights for r in records] == ["initial", "given", "given"]
    assert [r.points[0].step for r in records] == [0, None, None]
    assert len({r.points[0].largest_eigenvalue.value for r in records}) == 1
    assert len({r.points[0].loss for r in records}) == 1


def test_along_a_training() -> None:
    workload, recipe = classes(), rb.Recipe(global_batch=10, learning_rate=0.1)
    told: list[tuple[str, float]] = []
    record = measure_sharpness(
        workload,
        recipe=recipe,
        trajectory_steps=(40, 0),
        seed=3,
        progress=lambda what, share: told.append((what, share)),
    )
    assert [point.step for point in record.points] == [0, 40] and record.weights == "trained"
    run = rb.train(workload, recipe, steps=40, seed=3)
    same = measure_sharpness(workload, model=run.model, seed=3).points[0]
    assert record.points[1].largest_eigenvalue == same.largest_eigenvalue
    assert value(record.points[1].phi()) == pytest.approx(value(same.phi()), rel=1e-4)
    assert record.cost_examples == sum(p.cost_examples for p in record.points) + 400
    shares = [share for _, share in told]
    assert shares == sorted(shares) and shares[-1] == 1.0
    assert dump_record(record, schema="rightbatch.sharpness/1")["recipe"]["global_batch"] == 10


def test_the_same_seed_gives_the_same_numbers() -> None:
    def points(seed: int) -> SharpnessPoint:
        return measure_sharpness(classes(), model=classes().build_model(0), seed=seed).points[0]

    one, again = points(1), points(1)
    assert (one.largest_eigenvalue, one.trace) == (again.largest_eigenvalue, again.trace)
    # SciPy's arithmetic depends on where its arrays lie.
    assert value(one.phi()) == pytest.approx(value(again.phi()), rel=1e-4)
    assert value(one.phi("random")) == pytest.approx(value(again.phi("random")), rel=1e-4)
    assert value(one.phi("random")) != pytest.approx(value(points(2).phi("random")), rel=1e-4)


# --- invisible -----------------------------------------------------------------------------------


def with_dropout() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 6), nn.Dropout(0.5), nn.Linear(6, 4)).double()


def with_batch_norm() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 4)).double()


@pytest.mark.parametrize("layers", [with_dropout, with_batch_norm])
def test_the_probe_leaves_no_trace(layers: Callable[[], nn.Module]) -> None:
    workload = classes(layers=layers)
    model = workload.build_model(0)
    workload.loss_sum(model, workload.train_data)[0].backward()
    model[1].eval()  # pyright: ignore
    random.seed(5)
    np.random.seed(5)
    torch.manual_seed(5)

    def everything() -> list[Any]:
        return [
            random.getstate(),
            repr(np.random.get_state()),
            torch.get_rng_state().tolist(),
            [t.tolist() for t in model.state_dict().values()],
            [p.grad.tolist() for p in model.parameters() if p.grad is not None],
            [p.requires_grad for p in model.parameters()],
            [module.training for module in model.modules()],
            [t.tolist() for t in workload.train_data],
            torch.is_grad_enabled(),
            torch.get_num_threads(),
            torch.backends.cuda.flash_sdp_enabled(),
            torch.backends.cudnn.enabled,
        ]

    before = everything()
    measure_sharpness(workload, model=model, **QUICK)
    measure_sharpness(workload, recipe=rb.Recipe(global_batch=8, learning_rate=0.1), **QUICK)
    assert everything() == before
    with torch.inference_mode():
        measure_sharpness(workload, model=model, **QUICK)
        assert torch.is_inference_mode_enabled()
    assert everything() == before


@pytest.mark.parametrize("layers", [with_dropout, with_batch_norm])
def test_a_training_does_not_notice_that_it_was_measured(layers: Callable[[], nn.Module]) -> None:
    workload, recipe = classes(layers=layers), rb.Recipe(global_batch=16, learning_rate=0.1)
    plain, watched = Training(workload, recipe, seed=3), Training(workload, recipe, seed=3)
    for _ in range(2):
        plain.advance(5)
        watched.advance(5)
        assert measure_sharpness_at(watched, **QUICK).step == watched.steps
    for a, b in zip(
        plain.model.state_dict().values(), watched.model.state_dict().values(), strict=True
    ):
        assert torch.equal(a, b)


# --- refusals ------------------------------------------------------------------------------------


def test_wrong_arguments() -> None:
    workload, recipe = classes(), rb.Recipe(global_batch=8, learning_rate=0.1)
    model = workload.build_model(0)
    with pytest.raises(UsageError, match="model and recipe are given; each says whose"):
        measure_sharpness(workload, model=model, recipe=recipe)
    with pytest.raises(UsageError, match=r"trajectory_steps is \[-1\]"):
        measure_sharpness(workload, recipe=recipe, trajectory_steps=(-1,))
    with pytest.raises(UsageError, match=r"trajectory_steps is \[5\] without a recipe"):
        measure_sharpness(workload, trajectory_steps=(5,))
    with pytest.raises(UsageError, match="max_examples is 0; it must be at least 1"):
        measure_sharpness(workload, max_examples=0)
    with pytest.raises(UsageError, match="num_probes is 1; an interval needs at least 2"):
        measure_sharpness(workload, num_probes=1)
    with pytest.raises(UsageError, match=r"epsilons is \(0.0,\); give positive numbers"):
        measure_sharpness(workload, epsilons=(0.0,))
    with pytest.raises(UsageError, match="The state does not fit the model of workload 'classes'"):
        measure_sharpness(workload, state={})
    with pytest.raises(KeyError, match="was not measured"):
        measure_sharpness(workload).points[0].phi("all", 0.5)


def test_places_without_a_loss() -> None:
    with pytest.raises(ProbeError, match="The loss is nan and its gradient is not finite"):
        measure_sharpness(classes(loss=lambda o, t: F.cross_entropy(o, t) * torch.nan))
    roots = Workload(
        name="roots",
        make_model=lambda: Weights(torch.zeros(3)),
        train_data=(torch.zeros(2, 1), torch.zeros(2)),
        loss=lambda w, _: (w**2).sqrt().sum(dim=1).mean(),
    )
    with pytest.raises(ProbeError, match="its gradient is not finite"):
        measure_sharpness(roots)
    bends = Workload(
        name="bends",
        make_model=lambda: Weights(torch.zeros(3)),
        train_data=(torch.zeros(2, 1), torch.zeros(2)),
        loss=lambda w, _: (w.abs() ** 1.5).sum(dim=1).mean(),
    )
    with pytest.raises(ProbeError, match="A Hessian-vector product is not finite"):
        measure_sharpness(bends)


def test_a_training_that_diverges() -> None:
    with pytest.raises(DivergedError, match="diverged by update"):
        measure_sharpness(
            quadratic(torch.eye(2), torch.ones(2)),
            recipe=rb.Recipe(global_batch=1, learning_rate=50.0),
            trajectory_steps=(100,),
        )


def test_public_names() -> None:
    assert rb.measure_sharpness is measure_sharpness
    assert isinstance(measure_sharpness(classes(), **QUICK), SharpnessRecord)
