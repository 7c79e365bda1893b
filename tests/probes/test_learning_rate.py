import math
import random
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter
from torch import Tensor, nn

from rightbatch.errors import DivergedError, UsageError
from rightbatch.laws.estimate import Estimate
from rightbatch.probes.learning_rate import LearningRateRecord, find_learning_rate
from rightbatch.workload import Workload

CURVATURE = 10.0
EDGE = 2 / CURVATURE


def regression(*, num_examples: int = 256, **changes: Any) -> Workload:
    """½(wᵀx − y)² without label noise, C = λI: the full batch diverges above 2/λ."""
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(num_examples, 4, generator=generator, dtype=torch.float64)
    whitened = X @ torch.linalg.inv(torch.linalg.cholesky(X.T @ X / num_examples)).T
    whitened *= math.sqrt(CURVATURE)
    y = whitened @ torch.ones(4, 1, dtype=torch.float64)

    def make_model() -> nn.Module:
        return nn.Linear(4, 1, bias=False, dtype=torch.float64)

    fields: dict[str, Any] = {
        "name": "regression",
        "make_model": make_model,
        "train_data": (whitened, y),
        "loss": lambda outputs, targets: 0.5 * ((outputs - targets) ** 2).mean(),
    }
    return Workload(**{**fields, **changes})


def classifier() -> Workload:
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(256, 8, generator=generator)
    return Workload(
        name="classifier",
        make_model=lambda: nn.Sequential(
            nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 3)
        ),
        train_data=(X, X[:, :3].argmax(dim=1)),
        loss=nn.functional.cross_entropy,
        make_optimizer=lambda params, lr: torch.optim.Adam(params, lr=lr),
    )


def value(estimate: Estimate) -> float:
    assert estimate.value is not None
    return estimate.value


def test_the_edge_of_full_batch_descent_is_two_over_the_curvature() -> None:
    record = find_learning_rate(regression(), global_batch=256)
    step = (record.lr_max / record.lr_min) ** (1 / 99)
    assert abs(math.log(value(record.edge) / EDGE)) <= 1.01 * math.log(step)
    assert record.edge.low is not None and record.edge.high is not None
    assert record.edge.low < EDGE < record.edge.high
    assert value(record.minimum_div_10) == pytest.approx(EDGE / 10, rel=0.75)
    assert EDGE / 200 < value(record.steepest) < EDGE / 2
    assert EDGE / 500 < value(record.valley) < EDGE / 2
    assert all(curve.stopped_at is not None for curve in record.curves)


def test_the_edge_falls_with_the_batch_as_gaussian_regression_says() -> None:
    # C = λI, s = 0: 2η* = (2/λ)/(1 + (d + 1)/B) for Gaussian inputs.
    small = value(find_learning_rate(regression(), global_batch=4, seeds=5).edge)
    assert small == pytest.approx(EDGE / (1 + 5 / 4), rel=0.6)
    assert small < 0.8 * value(find_learning_rate(regression(), global_batch=256).edge)


def test_the_first_loss_is_the_untrained_one_and_rates_are_the_ramp() -> None:
    workload = regression()
    record = find_learning_rate(workload, global_batch=256, seeds=1, num_steps=50)
    model = workload.build_model(0)
    batch = workload.train_examples.batch(torch.arange(256))
    loss_sum, count = workload.loss_sum(model, batch)
    curve = record.curves[0]
    assert curve.losses[0] == pytest.approx(loss_sum.item() / count)
    expected = np.geomspace(1e-6, 10, 50)[: len(curve.learning_rates)]
    assert curve.learning_rates == pytest.approx(expected)
    # And each loss follows from the one before by the update at its rate, λ in all directions.
    for i in range(20):
        next_loss = curve.losses[i] * (1 - CURVATURE * curve.learning_rates[i]) ** 2
        assert curve.losses[i + 1] == pytest.approx(next_loss, rel=1e-6)


def test_groups_keep_their_proportion_and_a_disproportion_is_told() -> None:
    seen: list[tuple[float, float]] = []

    class Recording(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            seen.append((self.param_groups[0]["lr"], self.param_groups[1]["lr"]))
            return super().step(closure)

    def two_groups(params: Any, lr: float) -> torch.optim.Optimizer:
        weight, bias = params
        return Recording([{"params": [weight], "lr": lr}, {"params": [bias], "lr": lr * 0.1}])

    def model() -> nn.Module:
        return nn.Linear(4, 1, dtype=torch.float64)

    workload = regression(make_model=model, make_optimizer=two_groups)
    record = find_learning_rate(workload, global_batch=64, seeds=1, num_steps=30)
    assert record.notes == ()
    assert all(bias == pytest.approx(0.1 * weight) for weight, bias in seen)
    assert [weight for weight, _ in seen] == pytest.approx(
        list(np.geomspace(1e-6, 10, 30)[: len(seen)])
    )

    def capped(params: Any, lr: float) -> torch.optim.Optimizer:
        return torch.optim.SGD(params, lr=min(lr, 0.01))

    record = find_learning_rate(
        regression(make_optimizer=capped), global_batch=64, seeds=1, num_steps=30
    )
    assert "does not set learning rates in proportion" in record.notes[0]
    assert record.edge.value is not None  # the ramp went beyond the cap


def test_a_range_that_ends_before_the_edge_leaves_it_open() -> None:
    record = find_learning_rate(regression(), global_batch=256, lr_max=EDGE / 4)
    assert record.edge.value is None
    assert record.edge.low == pytest.approx(EDGE / 4)
    assert all(curve.stopped_at is None for curve in record.curves)


def test_a_loss_that_is_only_noise_gives_no_suggestion() -> None:
    X = torch.randn(256, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    workload = regression(
        train_data=(X, torch.randn(256, 1, dtype=torch.float64)),
        make_model=lambda: _Zero(),
    )
    record = find_learning_rate(workload, global_batch=8, lr_max=1e-3)
    for estimate in (record.steepest, record.minimum_div_10, record.valley):
        assert not estimate.resolved and estimate.n == 3


class _Zero(nn.Linear):
    def __init__(self) -> None:
        super().__init__(4, 1, bias=False, dtype=torch.float64)
        nn.init.zeros_(self.weight)


def test_more_examples_than_allowed_are_never_used() -> None:
    record = find_learning_rate(regression(), global_batch=32, max_examples=4000)
    assert record.cost_examples <= 4000
    assert len(record.curves) == 3 and record.num_steps == 41
    assert (
        "To keep to 4000 examples, 3 ramp(s) of 41 steps were run instead of 3 of 100"
        in record.notes[0]
    )
    fewer = find_learning_rate(regression(), global_batch=64, max_examples=2600)
    assert len(fewer.curves) == 2 and fewer.num_steps == 20
    with pytest.raises(UsageError, match="one ramp of 20 steps at global batch 256 takes 5120"):
        find_learning_rate(regression(), global_batch=256, max_examples=1000)


def test_the_cost_is_what_was_run() -> None:
    record = find_learning_rate(
        regression(), global_batch=64, lr_max=EDGE / 4, num_steps=30, seeds=2
    )
    assert record.cost_examples == 2 * 30 * 64
    assert record.cost_seconds > 0


def test_accumulation_gives_the_same_ramp() -> None:
    whole = find_learning_rate(regression(), global_batch=64, seeds=1)
    pieces = find_learning_rate(regression(), global_batch=64, seeds=1, max_micro_batch=20)
    assert pieces.curves[0].losses[:60] == pytest.approx(whole.curves[0].losses[:60], rel=1e-6)
    assert value(pieces.edge) == pytest.approx(value(whole.edge))


def test_the_same_arguments_give_the_same_answer_and_it_survives_json() -> None:
    def find() -> LearningRateRecord:
        return find_learning_rate(classifier(), global_batch=32, seeds=2, num_steps=40)

    first = find()
    random.seed(99)
    torch.manual_seed(99)
    second = find()
    assert first.curves == second.curves and first.steepest == second.steepest
    assert first.curves[0].losses != first.curves[1].losses
    adapter = TypeAdapter(LearningRateRecord)
    assert adapter.validate_json(adapter.dump_json(first)) == first


def test_a_loss_that_becomes_nan_ends_the_ramp_and_stays_out_of_the_record() -> None:
    def overflowing(outputs: Tensor, targets: Tensor) -> Tensor:
        loss = 0.5 * ((outputs - targets) ** 2).mean()
        return loss if float(loss.detach()) < 1e4 else loss * math.nan

    record = find_learning_rate(regression(loss=overflowing), global_batch=256)
    assert value(record.edge) == pytest.approx(EDGE, rel=0.3)
    assert all(math.isfinite(loss) for curve in record.curves for loss in curve.losses)
    with pytest.raises(DivergedError, match="'regression' is nan at the first step, before any"):
        find_learning_rate(regression(loss=lambda o, t: (o * math.nan).mean()), global_batch=8)


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(UsageError, match="global_batch is 257; it must be between 1 and the 256"):
        find_learning_rate(regression(), global_batch=257)
    with pytest.raises(UsageError, match="seeds is 0; it must be at least 1"):
        find_learning_rate(regression(), global_batch=8, seeds=0)
    with pytest.raises(UsageError, match=r"it needs 0 < lr_min < lr_max"):
        find_learning_rate(regression(), global_batch=8, lr_min=1, lr_max=0.1)


def test_progress_is_told_and_rises_to_one() -> None:
    told: list[tuple[str, float]] = []
    find_learning_rate(
        regression(),
        global_batch=64,
        seeds=2,
        num_steps=20,
        progress=lambda what, share: told.append((what, share)),
    )
    shares = [share for _, share in told]
    assert shares == sorted(shares) and shares[-1] == 1
    assert told[0][0] == "Learning-rate ramp 1 of 2 at global batch 64"


def test_the_probe_is_invisible() -> None:
    workload = classifier()
    model = workload.build_model(0)
    optimizer = workload.make_optimizer(model.parameters(), 0.1)
    workload.loss_sum(model, workload.train_examples.batch(torch.arange(8)))[0].backward()
    optimizer.step()
    model.eval()
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)

    def everything() -> list[Any]:
        numpy_state: Any = np.random.get_state()
        return [
            random.getstate(),
            [getattr(part, "tolist", lambda part=part: part)() for part in numpy_state],
            torch.random.get_rng_state().tolist(),
            [tensor.tolist() for tensor in model.state_dict().values()],
            [p.grad.tolist() for p in model.parameters() if p.grad is not None],
            str(optimizer.state_dict()),
            [group["lr"] for group in optimizer.param_groups],
            [module.training for module in model.modules()],
            [part.tolist() for part in workload.train_data],
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
            torch.get_num_threads(),
            torch.get_default_dtype(),
            torch.are_deterministic_algorithms_enabled(),
        ]

    def find() -> None:
        find_learning_rate(workload, global_batch=32, seeds=1, num_steps=20)

    before = everything()
    find()
    assert everything() == before
    with torch.no_grad():
        find()
        assert not torch.is_grad_enabled()
    with torch.inference_mode():
        find()
        assert torch.is_inference_mode_enabled()
    assert everything() == before


def test_even_a_failing_probe_leaves_no_trace() -> None:
    torch.manual_seed(1)
    before = torch.random.get_rng_state()

    def fail(outputs: Tensor, targets: Tensor) -> Tensor:
        torch.rand(1)
        raise RuntimeError("the user's own error")

    with pytest.raises(RuntimeError, match="the user's own error"):
        find_learning_rate(regression(loss=fail), global_batch=8)
    assert torch.equal(torch.random.get_rng_state(), before)
