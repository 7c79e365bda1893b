"""The learner: the same training as a hand-written loop, prequential, constant, resumable."""

from __future__ import annotations

import gc
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import rightbatch as rb
from rightbatch import OnlineLearner, Recipe, Workload, accuracy
from rightbatch.errors import (
    CorruptStateError,
    DivergedError,
    RecipeError,
    UsageError,
    WorkloadError,
)
from rightbatch.training import Training
from rightbatch.training.checkpoints.checkpoint import save_checkpoint
from rightbatch.training.streams.batches import rows_of, stack
from rightbatch.training.streams.running_mean import RunningMean
from rightbatch.workload import open_examples

N = 53
X = torch.randn(N, 4, generator=torch.Generator().manual_seed(0))
Y = (X[:, 0] > 0).long()
ROWS = list(zip(X, Y, strict=True))


class Unread:
    """Training data that must not be touched."""

    def __iter__(self) -> Iterator[Any]:
        raise AssertionError("the training data were read")


def make(**changes: Any) -> Workload:
    given: dict[str, Any] = {
        "name": "toy",
        "make_model": lambda: nn.Sequential(
            nn.Linear(4, 8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 2)
        ),
        "train_data": Unread(),
        "loss": F.cross_entropy,
        "metric": accuracy,
        "make_optimizer": lambda params, lr: torch.optim.SGD(params, lr=lr, momentum=0.9),
    }
    return Workload(**{**given, **changes})


def recipe(global_batch: int = 1, learning_rate: float = 0.05, **changes: Any) -> Recipe:
    return Recipe(global_batch=global_batch, learning_rate=learning_rate, **changes)


def weights(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def facts(learner: OnlineLearner) -> dict[str, Any]:
    """What must agree between two learners; not how fast they were."""
    found = {k: v for k, v in vars(learner.stats).items() if k != "examples_per_second"}
    return {k: repr(v) for k, v in found.items()}  # NaN is not equal to itself


def assert_same(one: OnlineLearner, two: OnlineLearner) -> None:
    assert facts(one) == facts(two)
    assert torch.equal(weights(one.model), weights(two.model))


# ------------------------------------------------------------------- what it computes


def linear64(**changes: Any) -> Workload:
    return make(make_model=lambda: nn.Linear(4, 2, dtype=torch.float64), **changes)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("clip_norm", [None, 0.3])
@pytest.mark.parametrize(("batch", "micro"), [(1, 1), (7, 7), (8, 2), (7, 1)])
def test_it_is_the_hand_written_loop(
    batch: int, micro: int, clip_norm: float | None, reduction: Any
) -> None:
    workload = linear64()
    model = workload.build_model(3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    losses: list[float] = []
    right = 0
    for inputs, targets in zip(X.double().split(batch), Y.split(batch), strict=True):
        outputs = model(inputs)
        losses += F.cross_entropy(outputs, targets, reduction="none").tolist()
        right += int((outputs.argmax(1) == targets).sum())
        optimizer.zero_grad()
        F.cross_entropy(outputs, targets, reduction=reduction).backward()
        if clip_norm is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
        optimizer.step()
    how = recipe(batch, micro_batch=micro, clip_norm=clip_norm, reduction=reduction)
    learner = OnlineLearner(workload, how, seed=3)
    learner.partial_fit(X.double(), Y).flush()
    # The norm that clips is computed in float32.
    rtol = 1e-12 if clip_norm is None else 1e-6
    torch.testing.assert_close(weights(learner.model), weights(model), rtol=rtol, atol=rtol / 100)
    stats = learner.stats
    assert (stats.examples, stats.steps, stats.waiting) == (N, math.ceil(N / batch), 0)
    assert stats.mean_loss == pytest.approx(sum(losses) / N, rel=rtol)
    assert stats.mean_metric == pytest.approx(right / N)


def test_a_learner_tells_where_it_is() -> None:
    learner = OnlineLearner(make(), recipe(8))
    name = repr(make().name)
    assert repr(learner) == f"OnlineLearner({name}, 0 examples, 0 updates)"
    learner.partial_fit(X[:20], Y[:20])
    loss = learner.stats.running_loss
    assert repr(learner) == (
        f"OnlineLearner({name}, 16 examples, 2 updates, running loss {loss:.4g})"
    )


@pytest.mark.parametrize("batch", [1, 8])
def test_it_is_the_training_over_the_same_order(
    monkeypatch: pytest.MonkeyPatch, batch: int
) -> None:
    monkeypatch.setattr(
        "rightbatch.training.data.windows.epoch_order", lambda n, **_: torch.arange(n)
    )
    how = recipe(batch, micro_batch=max(batch // 2, 1), warmup_steps=5, clip_norm=1.0)
    training = Training(make(train_data=(X, Y)), how, seed=1)
    training.advance(to_epoch=1)
    learner = OnlineLearner(make(), how, seed=1, prequential=False).partial_fit(X, Y).flush()
    # The same bits, dropout included.
    assert torch.equal(weights(learner.model), weights(training.model))
    assert learner.stats.steps == training.steps


@given(
    st.integers(1, 9),
    st.lists(st.integers(1, 12), min_size=1, max_size=8),
    st.booleans(),
    st.sampled_from([(), ((5, 2), (20, 6))]),
)
@settings(max_examples=15, deadline=None)
def test_any_cutting_of_the_stream_gives_the_same_bits(
    batch: int, cuts: list[int], prequential: bool, ramp: tuple[tuple[int, int], ...]
) -> None:
    how = recipe(batch, micro_batch=3 if batch % 3 == 0 else batch, batch_ramp=ramp)
    one, two = (OnlineLearner(make(), how, prequential=prequential) for _ in range(2))
    end = 0
    for cut in cuts:
        if end < N:
            one.partial_fit(X[end : end + cut], Y[end : end + cut])
        end = min(end + cut, N)
    for row in ROWS[:end]:
        torch.rand(3)
        two.learn_one(row)
    assert_same(one, two)
    assert_same(one.flush(), two.flush())
    assert one.stats.waiting == 0


def test_b_updates_of_one_differ_from_one_update_of_b() -> None:
    online, batch = (OnlineLearner(make(), recipe(b)).partial_fit(X, Y) for b in (1, N))
    assert (online.stats.steps, batch.stats.steps) == (N, 1)
    assert not torch.allclose(weights(online.model), weights(batch.model))


def test_warm_up_and_ramp_follow_the_stream() -> None:
    rates: list[float] = []

    class Recording(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            rates.append(self.param_groups[0]["lr"])
            return super().step(closure)

    workload = make(make_optimizer=lambda params, lr: Recording(params, lr=lr))
    how = recipe(2, 0.4, warmup_steps=4, batch_ramp=((12, 8),), rate_rule="linear")
    learner = OnlineLearner(workload, how).partial_fit(X[:28], Y[:28])
    assert rates == pytest.approx([0.08, 0.16, 0.24, 0.32, 0.4, 0.4, 1.6, 1.6])
    assert (learner.stats.steps, learner.stats.waiting) == (8, 0)


def test_a_schedule_that_needs_an_end_is_refused() -> None:
    with pytest.raises(RecipeError, match="runs over the whole training, whose length is not"):
        OnlineLearner(make(), recipe(schedule="cosine"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"global_batch": 2, "replicas": 2}, "a stream is read by one process"),
        ({"global_batch": 2, "last_batch": "merge"}, "Use 'keep', 'drop' or 'scale-lr'"),
        ({"last_batch": "pad", "batch_ramp": ((5, 2),)}, "Use 'keep', 'drop' or 'scale-lr'"),
        (
            {"global_batch": 2, "micro_batch": 1, "batch_policy": "follow-noise"},
            "Give largest_batch",
        ),
    ],
)
def test_what_a_stream_cannot_give_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        OnlineLearner(make(), recipe(**changes))


# ------------------------------------------------------------------------- the last batch


@pytest.mark.parametrize("last_batch", ["keep", "drop", "scale-lr"])
def test_flush_follows_the_last_batch_policy(last_batch: Any) -> None:
    workload = linear64(make_optimizer=lambda params, lr: torch.optim.SGD(params, lr=lr))
    learner = OnlineLearner(workload, recipe(8, last_batch=last_batch))
    learner.partial_fit(X[:8].double(), Y[:8])
    before = weights(learner.model).clone()
    learner.partial_fit(X[8:10].double(), Y[8:10])
    assert torch.equal(weights(learner.model), before)
    learner.flush()
    moved = weights(learner.model) - before
    kept = OnlineLearner(workload, recipe(8)).partial_fit(X[:10].double(), Y[:10]).flush()
    factor = {"keep": 1.0, "drop": 0.0, "scale-lr": 0.25}[last_batch]
    torch.testing.assert_close(moved, factor * (weights(kept.model) - before))
    assert learner.stats.waiting == 0
    assert learner.stats.steps == (1 if last_batch == "drop" else 2)


def test_flushing_nothing_does_nothing_and_learning_goes_on() -> None:
    learner = OnlineLearner(make(), recipe(4)).flush().partial_fit(X[:3], Y[:3]).flush().flush()
    learner.partial_fit(X[3:6], Y[3:6])  # a flush that lingered would cut here
    assert (learner.stats.steps, learner.stats.waiting) == (1, 3)


def normed() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))


def test_batch_norm_needs_two_examples_and_says_so() -> None:
    workload = make(make_model=normed)
    with pytest.raises(RecipeError, match="needs at least 2 examples"):
        OnlineLearner(workload, recipe(1)).learn_one(ROWS[0])
    learner = OnlineLearner(workload, recipe(4)).partial_fit(X[:5], Y[:5]).flush()
    assert (learner.stats.steps, learner.stats.examples, learner.stats.waiting) == (1, 4, 0)


# -------------------------------------------------------------------------- prequential


def test_each_example_is_predicted_before_it_is_learned_in_evaluation_mode() -> None:
    learner = OnlineLearner(make(), recipe(), half_life=5.0)
    losses: list[float] = []
    for row in ROWS[:20]:
        outputs = learner.predict(row[0][None])
        losses.append(F.cross_entropy(outputs, row[1][None]).item())
        learner.learn_one(row)
        age = [0.5 ** (k / 5.0) for k in reversed(range(len(losses)))]
        expected = sum(w * v for w, v in zip(age, losses, strict=True)) / sum(age)
        assert learner.stats.running_loss == pytest.approx(expected, rel=1e-5)
        assert learner.stats.mean_loss == pytest.approx(sum(losses) / len(losses), rel=1e-5)


def test_predicting_and_testing_change_nothing() -> None:
    with_test, without = (OnlineLearner(make(), recipe(), prequential=p) for p in (True, False))
    for row in ROWS:
        with_test.learn_one(row).predict(X)
        without.learn_one(row)
    assert torch.equal(weights(with_test.model), weights(without.model))
    assert all(module.training for module in with_test.model.modules())


def test_without_the_test_the_updates_losses_count() -> None:
    workload = linear64()
    plain, tested = (
        OnlineLearner(workload, recipe(4), prequential=p).partial_fit(X.double(), Y).flush()
        for p in (False, True)
    )
    # Without dropout the loss before an update is the test's.
    assert plain.stats.mean_loss == pytest.approx(tested.stats.mean_loss, rel=1e-12)
    assert plain.stats.running_loss == pytest.approx(tested.stats.running_loss, rel=1e-12)
    assert plain.stats.running_metric is None
    assert tested.stats.running_metric is not None


@pytest.mark.parametrize("metric", [accuracy, None])
def test_masked_sequences_are_weighted_by_their_tokens(metric: Any) -> None:
    inputs = X[:12].reshape(3, 4, 4)
    targets = torch.tensor([[0, 1, 1, 0], [1, -100, -100, -100], [-100] * 4])
    workload = make(
        make_model=lambda: nn.Linear(4, 2),
        loss=lambda o, t: F.cross_entropy(o.transpose(1, 2), t),
        metric=metric,
    )
    learner = OnlineLearner(workload, recipe(1, 1e-9))
    learner.partial_fit(inputs, targets)
    outputs = learner.predict(inputs)
    counted = targets != -100
    assert learner.stats.mean_loss == pytest.approx(
        F.cross_entropy(outputs[counted], targets[counted]).item(), rel=1e-5
    )


def test_before_the_first_example_there_is_no_mean() -> None:
    stats = OnlineLearner(make(), recipe()).stats
    assert math.isnan(stats.running_loss)
    assert (stats.examples, stats.steps, stats.examples_per_second) == (0, 0, 0.0)


@given(st.lists(st.floats(-10, 10), min_size=1, max_size=30), st.floats(0.5, 100))
def test_the_running_mean_is_its_definition(values: list[float], half_life: float) -> None:
    mean = RunningMean(half_life)
    for value in values:
        mean.add(value, 1, 1)
    age = [2.0 ** (-k / half_life) for k in reversed(range(len(values)))]
    expected = sum(w * v for w, v in zip(age, values, strict=True)) / sum(age)
    assert mean.recent == pytest.approx(expected, abs=1e-9)
    assert mean.whole == pytest.approx(sum(values) / len(values), abs=1e-9)


def test_the_half_life_is_in_examples_whatever_the_update() -> None:
    mean = RunningMean(6.0)
    mean.add(8.0, 2, 3)
    mean.add(1.0, 4, 6)
    assert mean.recent == pytest.approx((0.5 * 8 + 1) / (0.5 * 2 + 4))
    assert mean.whole == pytest.approx(9 / 6)


@pytest.mark.parametrize("half_life", [0.0, -1.0, math.nan, math.inf])
def test_a_half_life_must_be_positive(half_life: float) -> None:
    with pytest.raises(UsageError, match="must be a positive number of examples"):
        OnlineLearner(make(), recipe(), half_life=half_life)


# --------------------------------------------------------------------------- divergence


def test_divergence_names_the_example_and_keeps_the_state() -> None:
    learner = OnlineLearner(make(), recipe())
    learner.partial_fit(X[:20], Y[:20])
    bad = X.clone()
    bad[25] = math.nan
    with pytest.raises(DivergedError, match="at example 26 of the stream"):
        learner.partial_fit(bad[20:], Y[20:])
    assert learner.stats.diverged
    assert (learner.stats.steps, learner.stats.examples) == (26, 26)
    with pytest.raises(DivergedError, match="at example 26"):
        learner.learn_one(ROWS[0])


def test_an_explosion_is_seen() -> None:
    workload = make(make_model=lambda: nn.Linear(4, 1), loss=F.mse_loss, metric=None)
    learner = OnlineLearner(workload, recipe(1, 10.0))
    with pytest.raises(DivergedError, match="left the numbers"):
        for _ in range(4):
            learner.partial_fit(X, X[:, :1])


def test_a_first_example_that_is_known_by_chance_is_no_explosion_later() -> None:
    workload = make(make_model=lambda: nn.Linear(4, 1), loss=F.mse_loss, metric=None)
    learner = OnlineLearner(workload, recipe(1, 1e-4))
    learner.learn_one((X[0], learner.predict(X[:1])[0] + 1e-4))
    learner.partial_fit(X[1:], X[1:, :1] + 30)
    assert not learner.stats.diverged


# ------------------------------------------------------------------------- what it accepts


def test_numpy_lists_of_examples_and_doubles_are_accepted() -> None:
    arrays = X.double().numpy(), Y.numpy()
    plain = OnlineLearner(make(), recipe(3)).partial_fit(X, Y)
    for given_as in ((arrays,), arrays, ([*zip(*arrays, strict=True)],)):
        learner = OnlineLearner(make(), recipe(3))
        assert learner.partial_fit(*given_as) is learner
        assert_same(learner, plain)
    one = OnlineLearner(make(), recipe(3))
    for example in zip(*arrays, strict=True):
        assert one.learn_one(example) is one
    assert_same(one, plain)
    assert plain.predict(arrays[0][:5]).shape == (5, 2)
    assert plain.predict(arrays[0][:5]).dtype is torch.float32


def test_a_double_model_is_given_doubles() -> None:
    seen: set[torch.dtype] = set()

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        seen.add(outputs.dtype)
        return F.cross_entropy(outputs, targets)

    OnlineLearner(linear64(loss=loss), recipe()).partial_fit(X.double().numpy(), Y.numpy())
    assert seen == {torch.float64}


def test_dicts_and_other_batches_go_to_compute_loss() -> None:
    def compute_loss(model: nn.Module, batch: Any) -> tuple[Tensor, int]:
        return F.cross_entropy(model(batch["x"]), batch["y"], reduction="sum"), len(batch["y"])

    pairs = OnlineLearner(make(metric=None), recipe(4)).partial_fit(X, Y)
    workload = make(loss=None, compute_loss=compute_loss, metric=None)
    named = OnlineLearner(workload, recipe(4)).partial_fit({"x": X, "y": Y})
    singly = OnlineLearner(workload, recipe(4))
    for x, y in ROWS:
        singly.learn_one({"x": x, "y": y})
    assert_same(named, singly)
    torch.testing.assert_close(weights(named.model), weights(pairs.model))


def test_what_waits_does_not_change_when_its_owner_writes_over_it() -> None:
    calm, shared = (OnlineLearner(make(), recipe(4)) for _ in range(2))
    inputs, target = torch.empty(4), np.empty((), dtype=np.int64)
    for x, y in ROWS[:10]:
        inputs.copy_(x)
        target[...] = int(y)
        shared.learn_one((inputs, target))
        calm.learn_one((x, y))
    assert_same(calm, shared)
    block = X[10:13].clone()
    shared.partial_fit(block, Y[10:13])
    block.zero_()
    calm.partial_fit(X[10:13], Y[10:13])
    assert_same(shared.flush(), calm.flush())


def test_the_workloads_collate_is_used() -> None:
    def collate(items: list[Any]) -> Any:
        return torch.stack([x[:4] for x, _ in items]), torch.tensor([y for _, y in items])

    wide = [(torch.cat([x, x]), int(y)) for x, y in ROWS]
    learner = OnlineLearner(make(collate=collate), recipe(3)).partial_fit(wide)
    assert_same(learner, OnlineLearner(make(), recipe(3)).partial_fit(X, Y))


def test_examples_that_do_not_stack_are_named_and_left_behind() -> None:
    learner = OnlineLearner(make(), recipe(2)).partial_fit(X[:4], Y[:4])
    learner.learn_one(ROWS[4])
    with pytest.raises(WorkloadError, match="Up to example 6 of the stream, 2 examples could"):
        learner.learn_one((X[5, :3], Y[5]))
    learner.partial_fit(X[6:8], Y[6:8])
    assert (learner.stats.steps, learner.stats.waiting) == (3, 0)


def test_two_lists_are_refused_as_columns() -> None:
    with pytest.raises(UsageError, match="Give two arrays whose first dimension"):
        OnlineLearner(make(), recipe()).partial_fit({"x": X}, Y)


@pytest.mark.parametrize("data", [X, (X, Y), {"x": X, "y": Y}, ROWS])
def test_rows_are_the_batch_taken_apart(data: Any) -> None:
    examples = open_examples(data)
    rows = list(rows_of(examples))
    assert len(rows) == N
    wanted, found = examples.batch(torch.arange(N)), stack(rows)
    torch.testing.assert_close(found, type(found)(wanted) if type(found) is tuple else wanted)


# ---------------------------------------------------------------------- constant memory


def size_of(value: Any, seen: set[int]) -> int:
    """Python objects reachable from a value, tensors counted as one."""
    if id(value) in seen or isinstance(value, type | type(sys)):
        return 0
    seen.add(id(value))
    if isinstance(value, Tensor):
        return 1
    parts: list[Any] = []
    if isinstance(value, dict):
        parts = list(value.values())
    elif isinstance(value, list | tuple | set):
        parts = list(value)
    elif hasattr(value, "__dict__"):
        parts = list(vars(value).values())
    return 1 + sum(size_of(part, seen) for part in parts)


def test_nothing_grows_over_twenty_thousand_examples() -> None:
    workload = make(make_model=lambda: nn.Linear(2, 2), make_optimizer=torch.optim.SGD)
    learner = OnlineLearner(workload, recipe(4, 0.01))
    example = torch.randn(2), torch.tensor(1)
    seen: list[tuple[int, int]] = []
    for count in range(1, 20_001):
        learner.learn_one(example)
        if count in (1_000, 20_000):
            gc.collect()
            seen.append((size_of(learner, set()), sys.getallocatedblocks()))
    (size, blocks), (last_size, last_blocks) = seen
    assert abs(last_size - size) < 10  # numbers that happen to be one object count once
    assert last_blocks - blocks < 1_000  # one per nineteen examples would show


# -------------------------------------------------------------------------- checkpoints


@given(st.integers(1, 7), st.lists(st.integers(0, N), max_size=3).map(sorted), st.booleans())
@settings(max_examples=12, deadline=None)
def test_killed_anywhere_it_goes_on_to_the_same_bits(
    tmp_path_factory: pytest.TempPathFactory, batch: int, kills: list[int], prequential: bool
) -> None:
    folder = tmp_path_factory.mktemp("learner")
    workload = make(make_optimizer=torch.optim.Adam)
    how = recipe(batch, 0.01, warmup_steps=6, batch_ramp=((20, batch + 2),))
    whole = OnlineLearner(workload, how, seed=5, prequential=prequential, half_life=9.0)
    whole.partial_fit(X, Y)
    learner = OnlineLearner(workload, how, seed=5, prequential=prequential, half_life=9.0)
    done = 0
    for kill in kills:
        learner.partial_fit(X[done:kill], Y[done:kill]) if kill > done else None
        learner.save(folder)
        learner.partial_fit(X[kill:], Y[kill:]) if kill < N else None  # lost in the kill
        learner, done = OnlineLearner.load(folder, workload, how), kill
    for row in ROWS[done:]:
        learner.learn_one(row)
    assert_same(learner.flush(), whole.flush())


def test_half_precision_is_resumed(tmp_path: Path) -> None:
    how = recipe(4, precision="float16")
    whole = OnlineLearner(make(), how).partial_fit(X, Y)
    OnlineLearner(make(), how).partial_fit(X[:31], Y[:31]).save(tmp_path)
    resumed = OnlineLearner.load(tmp_path, make(), how)
    assert_same(resumed.partial_fit(X[31:], Y[31:]), whole)


def test_a_batch_that_follows_the_noise_is_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rightbatch.training.window_noise.PAUSE", 8)
    # Far from the minimum the gradient is clear, near it there is noise alone.
    workload = make(
        make_model=lambda: nn.Linear(4, 1),
        loss=F.mse_loss,
        metric=None,
        make_optimizer=torch.optim.SGD,
    )
    inputs = 0.1 * X.repeat(50, 1)
    targets = 10 + 30 * inputs[:, 1:2]
    how = recipe(4, 1e-3, micro_batch=1, batch_policy="follow-noise", largest_batch=8)
    whole = OnlineLearner(workload, how).partial_fit(inputs, targets)
    assert whole.stats.steps < len(inputs) // 4  # the batch did rise
    OnlineLearner(workload, how).partial_fit(inputs[:701], targets[:701]).save(tmp_path)
    resumed = OnlineLearner.load(tmp_path, workload, how)
    assert_same(resumed.partial_fit(inputs[701:], targets[701:]), whole)


@pytest.mark.parametrize(
    ("workload", "how", "message"),
    [
        (make(), recipe(2), "global_batch 1 and the recipe has 2"),
        (make(), recipe(1, 0.1), "learning_rate 0.05 and the recipe has 0.1"),
        (
            make(make_model=lambda: nn.Linear(4, 2)),
            recipe(),
            r"float32 \(8, 4\) for '0.weight' and the model has nothing",
        ),
        (
            make(make_optimizer=torch.optim.Adam),
            recipe(),
            "holds the state of SGD and make_optimizer gives Adam",
        ),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(
    tmp_path: Path, workload: Workload, how: Recipe, message: str
) -> None:
    OnlineLearner(make(), recipe()).partial_fit(X[:5], Y[:5]).save(tmp_path)
    with pytest.raises(UsageError, match=message):
        OnlineLearner.load(tmp_path, workload, how)


def test_what_is_no_learner_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="holds no checkpoint"):
        OnlineLearner.load(tmp_path, make(), recipe())
    save_checkpoint(tmp_path, {"model": 1}, steps=1)
    with pytest.raises(UsageError, match="is not of an OnlineLearner"):
        OnlineLearner.load(tmp_path, make(), recipe())
    save_checkpoint(tmp_path, {"form": "rightbatch.online/2", "seed": 0}, steps=2)
    with pytest.raises(CorruptStateError, match="does not hold a learner's state"):
        OnlineLearner.load(tmp_path, make(), recipe())


def test_damage_to_the_file_is_seen(tmp_path: Path) -> None:
    path = OnlineLearner(make(), recipe()).partial_fit(X[:5], Y[:5]).save(tmp_path)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(CorruptStateError, match="does not match its checksum"):
        OnlineLearner.load(tmp_path, make(), recipe())


# ----------------------------------------------------------------------------- manners


def test_the_callers_random_state_and_gradient_mode_are_not_touched() -> None:
    learner = OnlineLearner(make(), recipe())
    state = torch.get_rng_state()
    with torch.no_grad():
        learner.partial_fit(X, Y).predict(X)
    with torch.inference_mode():
        learner.learn_one(ROWS[0])
    assert torch.equal(torch.get_rng_state(), state)
    assert learner.stats.steps == N + 1


def test_it_learns() -> None:
    workload = rb.load_workload("max3")
    learner = OnlineLearner(workload, recipe(1, 0.1), half_life=200)
    for _ in range(3):
        learner.partial_fit(*workload.train_data)
    assert learner.stats.running_metric is not None
    assert learner.stats.mean_metric is not None
    assert learner.stats.running_metric > 0.85 > learner.stats.mean_metric
