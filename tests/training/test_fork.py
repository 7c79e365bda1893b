"""A fork is the run itself, going on under another recipe; the run it left is not touched."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rightbatch import Recipe, Workload
from rightbatch.training import Training, epoch_order

N = 96
X = torch.randn(N, 4, generator=torch.Generator().manual_seed(0))
Y = (X[:, 0] > 0).long()
Optimizer = Callable[..., torch.optim.Optimizer]


def sgd(params: Iterable[nn.Parameter], lr: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=lr)


def momentum(params: Iterable[nn.Parameter], lr: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=lr, momentum=0.9)


def adam(params: Iterable[nn.Parameter], lr: float) -> torch.optim.Optimizer:
    return torch.optim.Adam(params, lr=lr)


def two_rates(params: Iterable[nn.Parameter], lr: float) -> torch.optim.Optimizer:
    weights = list(params)
    groups: list[dict[str, Any]] = [
        {"params": weights[:1], "lr": lr},
        {"params": weights[1:], "lr": 0.1 * lr},
    ]
    return torch.optim.Adam(groups, lr=lr)


def network() -> nn.Module:
    # Dropout draws random numbers, BatchNorm keeps buffers: both are state of a run.
    return nn.Sequential(
        nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 2)
    )


def make(**changes: Any) -> Workload:
    given: dict[str, Any] = {
        "name": "toy",
        "make_model": network,
        "train_data": (X, Y),
        "val_data": (X[:30], Y[:30]),
        "loss": F.cross_entropy,
        "make_optimizer": sgd,
    }
    return Workload(**{**given, **changes})


def recipe(global_batch: int = 16, learning_rate: float = 0.05, **changes: Any) -> Recipe:
    return Recipe(global_batch=global_batch, learning_rate=learning_rate, **changes)


def state(training: Training) -> dict[str, Any]:
    """Everything that decides how a training goes on, copied."""
    optimizer = training.optimizer.state_dict()
    return {
        "model": {k: v.clone() for k, v in training.model.state_dict().items()},
        "groups": [dict(group) for group in optimizer["param_groups"]],
        "optimizer": {
            (i, k): v.clone() if isinstance(v, Tensor) else v
            for i, entry in optimizer["state"].items()
            for k, v in entry.items()
        },
        "counts": (training.steps, training.examples, training.epochs, training.diverged),
    }


def assert_same(one: Any, other: Any) -> None:
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, Tensor):
        assert torch.equal(one, other)
    else:
        assert one == other


def recording() -> tuple[Workload, list[list[int]]]:
    """A workload that writes down which examples it was trained on."""
    seen: list[list[int]] = []

    def compute_loss(model: nn.Module, batch: Any) -> tuple[Tensor, int]:
        inputs, names = batch
        if torch.is_grad_enabled():
            seen.append(names.tolist())
        return model(inputs).square().sum(), len(names)

    data = (X, torch.arange(N))
    workload = make(
        make_model=lambda: nn.Linear(4, 1),
        train_data=data,
        val_data=None,
        loss=None,
        compute_loss=compute_loss,
    )
    return workload, seen


# ------------------------------------------------------------------------------------ going on


@pytest.mark.parametrize("make_optimizer", [sgd, momentum, adam, two_rates])
@pytest.mark.parametrize("at", [0, 1, 5, 6, 7, 12])
def test_a_fork_under_the_same_recipe_is_the_run_itself(make_optimizer: Optimizer, at: int) -> None:
    """Bit for bit: weights, buffers, optimizer, dropout, data; 6 and 12 steps end an epoch."""
    whole = Training(make(make_optimizer=make_optimizer), recipe(), seed=3)
    whole.advance(at)
    copied = whole.fork(whole.recipe)
    for training in (whole, copied):
        torch.rand(5)  # what the caller draws meanwhile does not matter
        training.advance(9)
    assert not copied.diverged
    assert_same(state(copied), state(whole))


@pytest.mark.parametrize("global_batch", [N, N // 2, N // 3])
def test_a_fork_at_the_end_of_an_epoch_begins_the_next(global_batch: int) -> None:
    """No empty window in between, which has no mean loss: it would pass for a divergence."""
    parent = Training(make(), recipe(global_batch))
    parent.advance(2 * N // global_batch)
    assert parent.epochs == 2.0
    copied = parent.fork(recipe(24))
    copied.advance(4)
    assert not copied.diverged
    assert copied.epochs == 3.0
    assert copied.steps == parent.steps + 4


def test_a_fork_of_a_fork_of_a_fork() -> None:
    whole = Training(make(make_optimizer=adam), recipe(), seed=1)
    link = Training(make(make_optimizer=adam), recipe(), seed=1)
    for _ in range(4):
        link.advance(3)
        link = link.fork(link.recipe)
    whole.advance(12)
    assert_same(state(link), state(whole))


def test_the_divergence_check_goes_on_from_the_first_loss_of_the_run() -> None:
    parent = Training(make(make_model=lambda: nn.Linear(4, 2)), recipe())
    parent.advance(3)
    wild = parent.fork(recipe(16, 1e30))
    wild.advance(40)
    assert wild.diverged
    assert wild.first_loss == parent.first_loss
    assert not parent.diverged


# ---------------------------------------------------------------------- the parent is untouched


@pytest.mark.parametrize("make_optimizer", [sgd, momentum, adam])
def test_what_a_fork_does_leaves_its_parent_alone(make_optimizer: Optimizer) -> None:
    parent = Training(make(make_optimizer=make_optimizer), recipe(), seed=2)
    alone = Training(make(make_optimizer=make_optimizer), recipe(), seed=2)
    for training in (parent, alone):
        training.advance(5)
    before = state(parent)
    fork = parent.fork(recipe(32, 0.5))
    fork.advance(20)
    fork.evaluate()
    assert_same(state(parent), before)
    for training in (parent, alone):
        training.advance(8)
    assert_same(state(parent), state(alone))
    assert parent.recent_train_loss() == alone.recent_train_loss()


def test_what_a_parent_does_leaves_its_fork_alone() -> None:
    parent = Training(make(make_optimizer=adam), recipe(), seed=2)
    parent.advance(5)
    early, late = (parent.fork(parent.recipe) for _ in range(2))
    early.advance(7)
    parent.advance(11)
    late.advance(7)
    assert_same(state(late), state(early))


def test_a_fork_shares_no_memory_with_its_parent() -> None:
    parent = Training(make(make_optimizer=adam), recipe())
    parent.advance(2)
    fork = parent.fork(parent.recipe)

    def addresses(training: Training) -> set[int]:
        tensors = list(training.model.state_dict().values())
        for entry in training.optimizer.state.values():
            tensors += [v for v in entry.values() if isinstance(v, Tensor)]
        return {t.data_ptr() for t in tensors}

    assert not addresses(parent) & addresses(fork)
    ours = {id(p) for group in fork.optimizer.param_groups for p in group["params"]}
    assert ours == {id(p) for p in fork.model.parameters()}, "the fork's optimizer updates others"


def test_the_callers_random_state_is_not_touched() -> None:
    parent = Training(make(), recipe())
    parent.advance(2)
    torch.manual_seed(8)
    before = torch.get_rng_state()
    parent.fork(recipe(32)).advance(3)
    assert torch.equal(torch.get_rng_state(), before)


# --------------------------------------------------------------------- another recipe takes effect


def test_the_learning_rate_is_the_recipes() -> None:
    """One step of plain SGD from the same weights, on the same examples: Δw ∝ lr."""
    workload = make(make_model=lambda: nn.Linear(4, 2, dtype=torch.float64))
    workload = make(
        make_model=workload.make_model, train_data=(X.double(), Y), val_data=(X.double(), Y)
    )
    parent = Training(workload, recipe())
    parent.advance(4)
    start = torch.cat([p.detach().flatten() for p in parent.model.parameters()])

    def moved(learning_rate: float) -> Tensor:
        fork = parent.fork(recipe(16, learning_rate))
        fork.advance(1)
        return torch.cat([p.detach().flatten() for p in fork.model.parameters()]) - start

    torch.testing.assert_close(moved(0.3), 6 * moved(0.05), rtol=1e-12, atol=1e-15)


def test_every_group_keeps_its_own_share_of_the_rate() -> None:
    parent = Training(make(make_optimizer=two_rates), recipe(16, 0.05))
    parent.advance(3)
    fork = parent.fork(recipe(16, 0.2))
    assert [group["lr"] for group in fork.optimizer.param_groups] == [0.2, 0.1 * 0.2]
    fork.advance(2)
    assert [group["lr"] for group in fork.optimizer.param_groups] == [0.2, 0.1 * 0.2]
    assert [group["lr"] for group in parent.optimizer.param_groups] == [0.05, 0.1 * 0.05]


@pytest.mark.parametrize(
    ("make_optimizer", "name"), [(momentum, "momentum_buffer"), (adam, "exp_avg")]
)
def test_optimizer_state_is_carried(make_optimizer: Optimizer, name: str) -> None:
    parent = Training(make(make_optimizer=make_optimizer), recipe())
    parent.advance(5)
    fork = parent.fork(recipe(64, 0.2))
    pairs = list(zip(parent.model.parameters(), fork.model.parameters(), strict=True))
    assert pairs
    for theirs, ours in pairs:
        held = parent.optimizer.state[theirs][name]
        assert held.abs().sum() > 0
        assert torch.equal(fork.optimizer.state[ours][name], held)
    # And it acts: without momentum the next step would be another one.
    fresh = Training(make(make_optimizer=make_optimizer), recipe(64, 0.2))
    fresh.model.load_state_dict(parent.model.state_dict())
    fork.advance(1)
    fresh.advance(1)
    assert not torch.equal(next(fork.model.parameters()), next(fresh.model.parameters()))


def test_warm_up_is_not_begun_again() -> None:
    parent = Training(make(), recipe(16, 0.08, warmup_steps=3))
    parent.advance(10)
    fork = parent.fork(recipe(16, 0.2, warmup_steps=3))
    fork.advance(1)
    assert fork.optimizer.param_groups[0]["lr"] == 0.2


# ------------------------------------------------------------------------- the place in the data


@pytest.mark.parametrize("steps", [1, 4, 6, 7, 13])
@pytest.mark.parametrize("other", [1, 7, 32, N])
def test_the_data_go_on_where_they_stood_at_any_batch(steps: int, other: int) -> None:
    """Across the end of an epoch too: every example once an epoch, in the epoch's order."""
    workload, seen = recording()
    parent = Training(workload, recipe(16, 0.001), seed=5)
    parent.advance(steps)
    fork = parent.fork(recipe(other, 0.001))
    fork.advance(60)
    order = [epoch_order(N, seed=5, epoch=epoch).tolist() for epoch in range(65)]
    flat = [example for epoch in order for example in epoch]
    trained = [example for window in seen for example in window]
    assert trained == flat[: len(trained)]
    assert fork.examples == len(trained)
    windows = seen[steps:]
    rest = N - 16 * steps % N
    assert len(windows[0]) == min(other, rest)
    assert max(map(len, windows)) == other


def test_the_fork_accumulates_as_its_recipe_says() -> None:
    workload, seen = recording()
    parent = Training(workload, recipe(16, 0.001))
    parent.advance(2)
    fork = parent.fork(recipe(32, 0.001, micro_batch=8))
    fork.advance(2)
    assert [len(window) for window in seen] == [16, 16, *([8] * 8)]
    assert fork.steps == 4


@pytest.mark.parametrize("off", [torch.no_grad, torch.inference_mode])
def test_training_goes_on_where_the_caller_has_switched_gradients_off(off: Any) -> None:
    """A notebook cell under no_grad, a callback of an evaluation: the same run, the mode kept."""
    usual = Training(make(), recipe())
    usual.advance(5)
    usual = usual.fork(usual.recipe)
    usual.advance(5)
    with off():
        other = Training(make(), recipe())
        other.advance(5)
        other = other.fork(other.recipe)
        other.advance(5)
        other.evaluate()
        assert not torch.is_grad_enabled()
    assert_same(state(other), state(usual))
