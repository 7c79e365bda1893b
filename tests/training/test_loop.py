"""The loop: epochs, seeds, continuation, warm-up, divergence, targets."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rightbatch import Recipe, Workload, accuracy, train
from rightbatch.errors import UsageError
from rightbatch.training import Training, epoch_order
from rightbatch.training.evaluate import evaluate

X = torch.randn(105, 4, generator=torch.Generator().manual_seed(0))
Y = (X[:, 0] > 0).long()


def make(**changes: Any) -> Workload:
    given: dict[str, Any] = {
        "name": "toy",
        "make_model": lambda: nn.Sequential(
            nn.Linear(4, 8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 2)
        ),
        "train_data": (X, Y),
        "val_data": (X[:33], Y[:33]),
        "loss": F.cross_entropy,
        "metric": accuracy,
    }
    return Workload(**{**given, **changes})


def recipe(global_batch: int = 10, learning_rate: float = 0.1, **changes: Any) -> Recipe:
    return Recipe(global_batch=global_batch, learning_rate=learning_rate, **changes)


def weights(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


# ------------------------------------------------------------------------------------ accounting


@pytest.mark.parametrize(
    ("global_batch", "steps"), [(105, 1), (100, 2), (50, 3), (10, 11), (21, 5), (1, 105)]
)
def test_an_epoch_has_ceil_n_over_b_steps(global_batch: int, steps: int) -> None:
    run = train(make(), recipe(global_batch), epochs=2)
    assert (run.steps, run.epochs, run.examples) == (2 * steps, 2.0, 210)
    assert [point.step for point in run.history] == [steps, 2 * steps]


def test_every_example_is_seen_once_an_epoch_the_last_window_smaller() -> None:
    seen: list[Tensor] = []

    def compute_loss(model: nn.Module, batch: Any) -> tuple[Tensor, int]:
        seen.append(batch[1])
        return model(batch[0]).sum(), len(batch[1])

    data = (X, torch.arange(105))
    workload = make(
        loss=None, compute_loss=compute_loss, train_data=data, val_data=None, metric=None
    )
    train(workload, recipe(50, micro_batch=25), epochs=1, preflight=False)
    assert [len(part) for part in seen] == [25, 25, 25, 25, 5]
    assert sorted(torch.cat(seen).tolist()) == list(range(105))
    assert torch.cat(seen).tolist() == epoch_order(105, seed=0, epoch=0).tolist()


def test_the_order_depends_on_seed_and_epoch_alone() -> None:
    orders = {
        tuple(epoch_order(50, seed=seed, epoch=epoch).tolist())
        for seed in range(4)
        for epoch in range(4)
    }
    assert len(orders) == 16
    assert all(sorted(order) == list(range(50)) for order in orders)
    # Pinned: a resumed run must find the same order on another machine and version.
    assert epoch_order(8, seed=0, epoch=0).tolist() == [2, 4, 3, 6, 5, 0, 1, 7]


def test_exactly_one_of_epochs_and_steps() -> None:
    with pytest.raises(UsageError, match="Give either epochs or steps, and not both"):
        train(make(), recipe())
    with pytest.raises(UsageError, match="Give either epochs or steps, and not both"):
        train(make(), recipe(), epochs=1, steps=1)


# -------------------------------------------------------------------------- seeds, continuation


def test_the_same_seed_gives_the_same_bits_another_seed_does_not() -> None:
    torch.manual_seed(5)
    first = train(make(), recipe(), epochs=2, seed=1)
    torch.rand(7)
    again, other = (train(make(), recipe(), epochs=2, seed=seed) for seed in (1, 2))
    assert torch.equal(weights(first.model), weights(again.model))
    assert first.history == again.history
    assert not torch.equal(weights(first.model), weights(other.model))


def test_the_callers_random_state_is_not_touched() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    train(make(), recipe(), epochs=1)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("pieces", [[1] * 30, [7, 23], [30]])
def test_a_run_in_pieces_is_the_run_in_one(pieces: list[int]) -> None:
    whole = Training(make(), recipe(), seed=3)
    whole.advance(30)
    cut = Training(make(), recipe(), seed=3)
    for piece in pieces:
        torch.rand(3)
        cut.advance(piece)
        cut.evaluate()
    assert torch.equal(weights(whole.model), weights(cut.model))
    assert cut.steps == 30


def test_two_trainings_side_by_side_do_not_disturb_each_other() -> None:
    alone = Training(make(), recipe(), seed=1)
    alone.advance(12)
    one, two = (Training(make(), recipe(), seed=seed) for seed in (1, 2))
    for _ in range(12):
        one.advance(1)
        two.advance(1)
    assert torch.equal(weights(one.model), weights(alone.model))


def test_accumulation_gives_the_same_training_without_dropout() -> None:
    workload = make(
        make_model=lambda: nn.Linear(4, 2, dtype=torch.float64),
        train_data=(X.double(), Y),
        val_data=None,
        metric=None,
    )
    whole = train(workload, recipe(32), epochs=3)
    cut = train(workload, recipe(32, micro_batch=8), epochs=3)
    torch.testing.assert_close(weights(cut.model), weights(whole.model), rtol=1e-12, atol=1e-14)


# -------------------------------------------------------------------------------------- warm-up


def test_warm_up_rises_linearly_and_stays() -> None:
    rates: list[float] = []

    class Recording(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            rates.append(self.param_groups[0]["lr"])
            return super().step(closure)

    workload = make(make_optimizer=lambda params, lr: Recording(params, lr=lr))
    train(workload, recipe(10, learning_rate=0.5, warmup_steps=4), steps=8)
    assert rates == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5, 0.5, 0.5, 0.5])
    rates.clear()
    train(workload, recipe(10, learning_rate=0.5), steps=2)
    assert rates == [0.5, 0.5]


# ----------------------------------------------------------------------------------- divergence


def test_a_loss_that_explodes_stops_the_run() -> None:
    workload = make(
        make_model=lambda: nn.Linear(4, 1),
        train_data=(X, X[:, :1]),
        val_data=None,
        metric=None,
        loss=F.mse_loss,
    )
    run = train(workload, recipe(learning_rate=100.0), epochs=50)
    assert run.diverged
    assert run.steps < 40
    assert not train(workload, recipe(learning_rate=0.01), epochs=2).diverged


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("at", [0, 1, 20])
def test_a_loss_that_is_no_number_stops_the_run(bad: float, at: int) -> None:
    calls = 0

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        value = F.cross_entropy(outputs, targets)
        return value * bad if calls == at + 1 else value

    run = train(make(loss=loss, val_data=None, metric=None), recipe(), epochs=50)
    assert run.diverged
    assert at < run.steps <= at + 16


# ----------------------------------------------------------------------------- evaluation, target


def test_until_target_stops_at_the_first_evaluation_that_meets_it() -> None:
    workload = make(target="val_accuracy>=0.9")
    run = train(workload, recipe(10, 0.5), epochs=50, until_target=True)
    assert run.reached_target
    assert run.steps == run.steps_to_target == run.history[-1].step
    assert run.val_metric is not None
    assert run.val_metric >= 0.9
    assert all(
        point.val_metric is not None and point.val_metric < 0.9 for point in run.history[:-1]
    )
    on = train(workload, recipe(10, 0.5), epochs=10)
    assert on.steps_to_target == run.steps_to_target
    assert on.steps == 110


def test_a_target_that_is_not_met() -> None:
    run = train(make(target="val_loss<=0.0001"), recipe(), epochs=1)
    assert run.reached_target is False
    assert run.steps_to_target is None
    assert train(make(), recipe(), epochs=1).reached_target is None


def test_evaluate_every() -> None:
    run = train(make(), recipe(), steps=10, evaluate_every=4)
    assert [point.step for point in run.history] == [4, 8, 10]
    assert [point.examples for point in run.history] == [40, 80, 100]


def test_without_validation_there_is_only_the_training_loss() -> None:
    run = train(make(val_data=None, metric=None), recipe(), epochs=1)
    assert run.val_loss is None
    assert run.val_metric is None
    assert math.isfinite(run.train_loss)


@pytest.mark.parametrize("max_batch", [1, 7, 33, 512])
def test_evaluation_is_exact_whatever_its_batch(max_batch: int) -> None:
    workload = make()
    model = workload.build_model(0)
    examples = workload.val_examples
    assert examples is not None
    result = evaluate(workload, model, examples, max_batch=max_batch)
    with torch.no_grad():
        outputs = model.eval()(X[:33])
    assert result.loss == pytest.approx(F.cross_entropy(outputs, Y[:33]).item(), rel=1e-5)
    assert result.metric == pytest.approx(accuracy(outputs, Y[:33]).item(), rel=1e-5)


@pytest.mark.parametrize("most", [0, 1, 5, 40])
def test_evaluation_makes_do_with_what_fits(most: int) -> None:
    sizes: list[int] = []

    class Small(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            if len(input) > most:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            sizes.append(len(input))
            return super().forward(input)

    workload = make(make_model=lambda: Small(4, 2))
    model, examples = workload.build_model(0), workload.val_examples
    assert examples is not None
    if most == 0:
        with pytest.raises(torch.OutOfMemoryError):
            evaluate(workload, model, examples)
        return
    found = evaluate(workload, model, examples)
    assert sum(sizes) == 33 and max(sizes) > most / 2
    weights = dict(model.named_parameters())
    outputs = F.linear(X[:33], weights["weight"], weights["bias"])
    assert found.loss == pytest.approx(F.cross_entropy(outputs, Y[:33]).item(), rel=1e-5)


def test_evaluation_of_masked_sequences_is_exact_whatever_its_batch() -> None:
    inputs, targets = X[:8].reshape(2, 4, 4), torch.tensor([[0, 1, 1, 0], [1, -100, -100, -100]])
    workload = make(
        make_model=lambda: nn.Linear(4, 2),
        val_data=(inputs, targets),
        loss=lambda o, t: F.cross_entropy(o.transpose(1, 2), t),
    )
    model, examples = workload.build_model(0), workload.val_examples
    assert examples is not None
    cut, whole = (evaluate(workload, model, examples, max_batch=size) for size in (1, 2))
    with torch.no_grad():
        outputs = model.eval()(inputs)
    counts = targets != -100
    losses = F.cross_entropy(outputs[counts], targets[counts], reduction="none")
    right = outputs.argmax(-1)[counts] == targets[counts]
    for found in (cut, whole):
        assert found.loss == pytest.approx(losses.mean().item(), rel=1e-5)
        assert found.metric == pytest.approx(right.sum().item() / 5)


def test_evaluation_passes_over_a_batch_of_padding_alone() -> None:
    inputs = X[:8].reshape(2, 4, 4)
    targets = torch.tensor([[0, 1, 1, 0], [-100] * 4])
    workload = make(
        make_model=lambda: nn.Linear(4, 2),
        val_data=(inputs, targets),
        loss=lambda o, t: F.cross_entropy(o.transpose(1, 2), t),
    )
    model, examples = workload.build_model(0), workload.val_examples
    assert examples is not None
    cut, whole = (evaluate(workload, model, examples, max_batch=size) for size in (1, 2))
    assert cut.loss == pytest.approx(whole.loss)
    assert cut.metric == pytest.approx(whole.metric)


def test_evaluation_puts_training_modes_back() -> None:
    workload = make()
    model = workload.build_model(0)
    frozen = next(module for module in model.modules() if isinstance(module, nn.Dropout)).eval()
    examples = workload.val_examples
    assert examples is not None
    evaluate(workload, model, examples)
    assert model.training
    assert not frozen.training


def test_the_training_loss_is_the_mean_since_the_last_evaluation() -> None:
    losses: list[float] = []

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        value = F.cross_entropy(outputs, targets)
        losses.append(value.item())
        return value

    run = train(make(loss=loss, val_data=None, metric=None), recipe(), steps=10, evaluate_every=5)
    assert run.history[0].train_loss == pytest.approx(sum(losses[:5]) / 5, rel=1e-5)
    assert run.history[1].train_loss == pytest.approx(sum(losses[5:]) / 5, rel=1e-5)


# ------------------------------------------------------------------------------------- pre-flight


def test_a_batch_norm_that_is_accumulated_is_warned_of_before_training() -> None:
    normed = make(make_model=lambda: nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8)))
    with pytest.warns(UserWarning, match=r"4 × 8 is not the same as 32.*BatchNorm1d"):
        train(normed, recipe(32, micro_batch=8), steps=1)
    # None for the whole batch, or where it was asked for not to look.
    train(normed, recipe(32), steps=1)
    train(normed, recipe(32, micro_batch=8), steps=1, preflight=False)
