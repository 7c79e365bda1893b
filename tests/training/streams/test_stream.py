"""Training on streams: one loop, in order, lazily, with errors that name the example."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset

from rightbatch import OnlineLearner, Recipe, Workload, accuracy, train, train_stream
from rightbatch.errors import RecipeError, UsageError, WorkloadError
from rightbatch.training import Callback, Point, StepRecord
from rightbatch.training.streams.source import shuffled

N = 53
X = torch.randn(N, 4, generator=torch.Generator().manual_seed(0))
Y = (X[:, 0] > 0).long()
ROWS = list(zip(X, Y, strict=True))


class Stream:
    """An iterable without a length, which counts what is read of it."""

    def __init__(self, rows: Any = ROWS) -> None:
        self.rows = rows
        self.read = 0

    def __iter__(self) -> Iterator[Any]:
        for row in self.rows:
            self.read += 1
            yield row


def make(train_data: Any, **changes: Any) -> Workload:
    given: dict[str, Any] = {
        "name": "toy",
        "make_model": lambda: nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.2), nn.Linear(8, 2)),
        "train_data": train_data,
        "val_data": (X[:20], Y[:20]),
        "loss": F.cross_entropy,
        "metric": accuracy,
    }
    return Workload(**{**given, **changes})


def recipe(global_batch: int = 8, learning_rate: float = 0.05, **changes: Any) -> Recipe:
    return Recipe(global_batch=global_batch, learning_rate=learning_rate, **changes)


def weights(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


class Endless:
    def __iter__(self) -> Iterator[Any]:
        while True:
            yield from ROWS


# ------------------------------------------------------------------- what it computes


@pytest.mark.parametrize("batch", [1, 8, 60])
@pytest.mark.parametrize("last_batch", ["keep", "drop", "scale-lr"])
def test_it_is_the_learner_fed_by_hand(batch: int, last_batch: Any) -> None:
    how = recipe(batch, last_batch=last_batch, warmup_steps=3)
    run = train_stream(make(Stream()), how, seed=2)
    learner = OnlineLearner(make(None), how, seed=2).partial_fit(X, Y).flush()
    assert torch.equal(weights(run.model), weights(learner.model))
    full = N // batch * batch
    assert run.examples == learner.stats.examples == (full if last_batch == "drop" else N)
    assert run.epochs == 1.0


@pytest.mark.parametrize("batch", [5, 8])
def test_passes_are_the_epochs_of_training_in_order(
    monkeypatch: pytest.MonkeyPatch, batch: int
) -> None:
    monkeypatch.setattr(
        "rightbatch.training.data.windows.epoch_order", lambda n, **_: torch.arange(n)
    )
    how = recipe(batch, micro_batch=batch // 4, batch_ramp=((30, 2 * batch),), rate_rule="sqrt")
    wanted = train(make((X, Y)), how, epochs=3, seed=4)
    for data in (Stream(), (X, Y), ROWS):
        run = train_stream(make(data), how, passes=3, seed=4)
        assert torch.equal(weights(run.model), weights(wanted.model))
        assert (run.steps, run.epochs, run.examples) == (wanted.steps, 3.0, 3 * N)
        assert [(p.step, p.val_loss, p.train_loss) for p in run.history] == [
            (p.step, p.val_loss, p.train_loss) for p in wanted.history
        ]


def test_schedules_follow_steps_and_examples() -> None:
    rates: list[float] = []

    class Watching(Callback):
        def on_records(self, training: Any, records: Any) -> None:
            rates.extend(record.learning_rate for record in records)

    how = recipe(10, 1.0, schedule="step", decay_at=(0.5,))
    train_stream(make(Endless()), how, steps=4, callbacks=[Watching()])
    train_stream(make(Endless()), how, examples=40, callbacks=[Watching()])
    assert rates == pytest.approx([1, 1, 0.1, 0.1] * 2)
    with pytest.raises(RecipeError, match="whose length is not known"):
        train_stream(make(Stream()), how)


@given(st.integers(1, 12), st.integers(1, 120), st.integers(0, 70))
@settings(max_examples=25, deadline=None)
def test_no_more_is_read_than_is_used(batch: int, examples: int, buffer: int) -> None:
    stream = Stream(itertools.islice(itertools.cycle(ROWS), 200))
    run = train_stream(
        make(stream, val_data=None), recipe(batch), examples=examples, shuffle_buffer=buffer
    )
    assert run.examples == examples
    assert run.steps == math.ceil(examples / batch)
    assert stream.read == examples


@pytest.mark.parametrize("batch", [1, 7])
def test_steps_take_what_they_need_and_no_example_more(batch: int) -> None:
    stream = Stream()
    run = train_stream(make(stream), recipe(batch), steps=3)
    assert (stream.read, run.examples, run.epochs) == (3 * batch, 3 * batch, 0.0)


def test_a_generator_is_read_once() -> None:
    run = train_stream(make(row for row in ROWS), recipe(), passes=1)
    assert run.steps == 7
    with pytest.raises(WorkloadError, match="can be read only once"):
        train_stream(make(row for row in ROWS), recipe(), passes=2)
    with pytest.raises(WorkloadError, match="can be read only once"):
        train_stream(make(row for row in ROWS), recipe(), steps=100, passes=None)


def test_torch_datasets_and_their_loaders() -> None:
    class Rows(IterableDataset[Any]):
        def __iter__(self) -> Iterator[Any]:
            yield from [(x.numpy(), int(y)) for x, y in ROWS]

    def collate(items: list[Any]) -> Any:
        return torch.stack([2 * torch.as_tensor(x) for x, _ in items]), torch.tensor(
            [y for _, y in items]
        )

    plain = train_stream(make(Stream()), recipe())
    assert torch.equal(weights(train_stream(make(Rows()), recipe()).model), weights(plain.model))
    loaded = train_stream(make(DataLoader(Rows(), batch_size=3)), recipe())
    assert torch.equal(weights(loaded.model), weights(plain.model))
    doubled = train_stream(make(Stream([(2 * x, y) for x, y in ROWS])), recipe())
    for data in (DataLoader(Rows(), collate_fn=collate), DataLoader(Rows())):
        given = None if data.collate_fn is collate else collate
        run = train_stream(make(data, collate=given), recipe())
        assert torch.equal(weights(run.model), weights(doubled.model))


# ------------------------------------------------------------- evaluation, records, ends


def test_evaluations_come_every_so_often_and_at_the_end_of_passes() -> None:
    run = train_stream(make(Stream()), recipe(10), passes=2, evaluate_every=4)
    assert [point.step for point in run.history] == [4, 6, 8, 12]
    assert run.history[-1].epochs == 2.0
    # The end of a pass at an evaluation is one evaluation.
    run = train_stream(make(Stream(ROWS[:40])), recipe(10), passes=2, evaluate_every=4)
    assert [point.step for point in run.history] == [4, 8]


def test_callbacks_see_the_run() -> None:
    seen: list[Any] = []

    class Watching(Callback):
        def on_start(self, training: Any) -> None:
            seen.append("start")

        def on_records(self, training: Any, records: Any) -> None:
            seen.extend(records)

        def on_evaluation(self, training: Any, point: Point) -> None:
            seen.append(point)
            training.stop_requested = len(seen) > 8

        def on_end(self, training: Any, run: Any) -> None:
            seen.append(run)

    run = train_stream(
        make(Endless()), recipe(10), steps=100, evaluate_every=4, callbacks=[Watching()]
    )
    records = [item for item in seen if isinstance(item, StepRecord)]
    assert seen[0] == "start"
    assert seen[-1] is run
    assert [(r.step, r.examples, r.epochs) for r in records] == [
        (step, 10 * step, 0.0) for step in range(1, 9)
    ]
    assert run.steps == 8


def test_until_target_and_divergence_end_a_run() -> None:
    workload = make(Endless(), target="val_accuracy>=0.9")
    run = train_stream(workload, recipe(8, 0.5), steps=500, until_target=True, evaluate_every=5)
    assert run.reached_target
    assert run.steps == run.steps_to_target
    assert run.steps < 500
    bad = [*ROWS[:20], (X[0] * math.nan, Y[0]), *ROWS]
    run = train_stream(make(Stream(bad)), recipe(4))
    assert (run.diverged, run.steps) == (True, 6)


def test_a_constant_number_of_examples_is_alive() -> None:
    alive = [0, 0]

    class Counted(tuple):
        __slots__ = ()

        def __new__(cls, *parts: Any) -> Counted:
            alive[0] += 1
            alive[1] = max(alive)
            return super().__new__(cls, parts)

        def __del__(self) -> None:
            alive[0] -= 1

    def collate(items: list[Any]) -> Any:
        return torch.stack([x for x, _ in items]), torch.stack([y for _, y in items])

    def rows() -> Iterator[Any]:
        return (Counted(*ROWS[k % N]) for k in range(1000))

    train_stream(make(rows(), collate=collate), recipe(10), shuffle_buffer=20)
    assert alive[1] <= 10 + 20 + 3
    assert alive[0] <= 10


# -------------------------------------------------------------------------------- draws


@given(st.integers(1, 30), st.integers(0, 60), st.integers(0, 3))
def test_the_buffer_gives_every_example_once_and_none_too_early(
    size: int, length: int, seed: int
) -> None:
    order = list(shuffled(range(length), size, seed=seed, epoch=0))
    assert sorted(order) == list(range(length))
    assert all(example - place < size for place, example in enumerate(order))
    assert order == list(shuffled(range(length), size, seed=seed, epoch=0))


def test_the_buffer_shuffles_otherwise_in_each_pass_and_for_each_seed() -> None:
    orders = {
        tuple(shuffled(range(30), 30, seed=seed, epoch=epoch))
        for seed in range(3)
        for epoch in range(3)
    }
    assert len(orders) == 9
    # Pinned: another machine and version must draw the same.
    assert list(shuffled(range(8), 4, seed=0, epoch=0)) == [1, 3, 5, 0, 4, 7, 2, 6]
    assert list(shuffled(range(5), 1, seed=0, epoch=0)) == [0, 1, 2, 3, 4]


def test_each_pass_is_in_the_order_of_its_number() -> None:
    rows = [row for epoch in range(2) for row in shuffled(ROWS, 9, seed=5, epoch=epoch)]
    wanted = train_stream(make(Stream(rows)), recipe(N), seed=5)
    run = train_stream(make(Stream()), recipe(N), seed=5, passes=2, shuffle_buffer=9)
    assert torch.equal(weights(run.model), weights(wanted.model))


def test_a_full_buffer_shuffles_uniformly() -> None:
    counts = np.zeros((4, 4))
    for seed in range(2000):
        for place, example in enumerate(shuffled(range(4), 4, seed=seed, epoch=0)):
            counts[place, example] += 1
    assert np.abs(counts / 2000 - 0.25).max() < 0.05  # 5 standard errors


def test_what_the_stream_draws_is_decided_by_the_seed_at_every_batch_size() -> None:
    class Drawing:
        def __init__(self) -> None:
            self.drawn: list[Any] = []

        def __iter__(self) -> Iterator[Any]:
            while True:
                x = torch.rand(4) + random.random() + np.random.rand()
                self.drawn.append(x)
                yield x, (x[0] > 1).long()

    def drawn(batch: int, seed: int) -> Tensor:
        stream = Drawing()
        random.seed(batch)
        torch.manual_seed(batch)
        before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # pyright: ignore
        train_stream(make(stream), recipe(batch), examples=12, seed=seed)
        assert torch.equal(torch.get_rng_state(), before[0])
        assert random.getstate() == before[1]
        assert (np.random.get_state()[1] == before[2]).all()  # pyright: ignore
        return torch.stack(stream.drawn)

    assert torch.equal(drawn(1, 0), drawn(4, 0))
    assert not torch.equal(drawn(1, 0), drawn(1, 1))


# ------------------------------------------------------------------------------- errors


def test_a_stream_that_raises_names_the_example() -> None:
    def rows() -> Iterator[Any]:
        yield from ROWS[:13]
        raise OSError("the disk is gone")

    message = "raised OSError at example 14: the disk is gone"
    with pytest.raises(WorkloadError, match=message) as caught:
        train_stream(make(rows()), recipe(4))
    assert isinstance(caught.value.__cause__, OSError)


def test_a_stream_without_examples() -> None:
    with pytest.raises(WorkloadError, match="Pass 1 over the stream gave no example"):
        train_stream(make(Stream([])), recipe())

    exhausted = iter(ROWS)

    class Careless:
        def __iter__(self) -> Iterator[Any]:
            return exhausted

    with pytest.raises(WorkloadError, match="Pass 2 over the stream gave no example, after 53"):
        train_stream(make(Careless()), recipe(), passes=2)


@pytest.mark.parametrize(
    ("lengths", "wanted"), [({"steps": 8}, "8 updates"), ({"examples": 54}, "54 examples")]
)
def test_a_stream_that_ends_early(lengths: dict[str, Any], wanted: str) -> None:
    with pytest.raises(WorkloadError, match=f"ended after example 53, before the {wanted}"):
        train_stream(make(Stream()), recipe(), **lengths)
    again = train_stream(make(Stream()), recipe(), passes=None, **lengths)
    assert again.examples >= 53
    train_stream(make(Stream()), recipe(), steps=7)  # the last one smaller


def test_an_example_of_another_shape_is_named() -> None:
    with pytest.raises(WorkloadError, match=r"Up to example 56 of the stream, 8 examples"):
        train_stream(make(Stream([*ROWS, (X[0, :2], Y[0]), *ROWS])), recipe())


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        ({"steps": 3, "examples": 3}, "Give steps or examples, and not both"),
        ({"passes": None}, "Give steps or examples with it"),
        ({"steps": 0}, "steps is 0; it must be at least 1"),
        ({"examples": 0}, "examples is 0"),
        ({"passes": 0}, "passes is 0"),
        ({"shuffle_buffer": -1}, "shuffle_buffer is -1"),
    ],
)
def test_lengths_that_mean_nothing(lengths: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        train_stream(make(Stream()), recipe(), **lengths)


# --------------------------------------------------------------------------- from train


def test_train_goes_through_the_whole_of_a_long_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rightbatch.workload.data.STREAM_EXAMPLES", 20)
    run = train(make(Stream()), recipe(), epochs=2, seed=1)
    wanted = train_stream(make(Stream()), recipe(), passes=2, seed=1)
    assert torch.equal(weights(run.model), weights(wanted.model))
    assert (run.examples, run.epochs) == (106, 2.0)
    assert train(make(Endless()), recipe(), steps=10, seed=1).steps == 10
    assert train(make(Stream()), recipe(), steps=10, seed=1).steps == 10
    with pytest.raises(UsageError, match=r"epochs is 0\.5, but the data are a stream"):
        train(make(Stream()), recipe(), epochs=0.5)
    with pytest.raises(UsageError, match="workers is 2, but the data are a stream"):
        train(make(Stream()), recipe(), epochs=1, workers=2)


def test_train_shuffles_a_short_stream_as_before() -> None:
    run, tensors = (train(make(data), recipe(), epochs=1) for data in (Stream(), (X, Y)))
    assert torch.equal(weights(run.model), weights(tensors.model))
