"""A run over a stream that was stopped goes on to the same bits, or says why it cannot."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset

from rightbatch import Recipe, Workload, train, train_stream
from rightbatch.errors import UsageError, WorkloadError
from rightbatch.training import Callback, Run
from rightbatch.training.random_state import drawing_from, global_draws, set_global_draws
from rightbatch.training.streams.fingerprint import EVERY, FIRST, Fingerprint

N = 53
X = torch.randn(N, 4, generator=torch.Generator().manual_seed(0))
Y = (X[:, 0] > 0).long()
ROWS = list(zip(X, Y, strict=True))


class Drawing:
    """Every example is augmented by what all three generators draw, in an order that is drawn."""

    def __iter__(self) -> Iterator[Any]:
        for index in torch.randperm(N).tolist():
            noise = torch.rand(4) + random.random() + random.gauss(0, 1) + np.random.randn()
            yield X[index] + 0.1 * noise, Y[index]


class Endless:
    def __iter__(self) -> Iterator[Any]:
        while True:
            yield from Drawing()


class Empty:
    def __iter__(self) -> Iterator[Any]:
        return iter(())


class Stateful:
    """Knows its place; to be read from its start is an error."""

    def __init__(self, length: int = N) -> None:
        self.length, self.place, self.starts = length, 0, 0

    def __iter__(self) -> Iterator[Any]:
        self.starts += self.place == 0
        while self.place < self.length:
            self.place += 1
            yield X[self.place % N] + random.random(), Y[self.place % N]
        self.place = 0

    def state_dict(self) -> dict[str, Any]:
        return {"place": self.place}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.place = state["place"]


class StatefulIterator:
    """The iterator knows its place, and the stream does not."""

    def __init__(self) -> None:
        self.place = 0

    def __iter__(self) -> StatefulIterator:
        return self

    def __next__(self) -> Any:
        if self.place == N:
            raise StopIteration
        self.place += 1
        return ROWS[self.place - 1]

    def state_dict(self) -> dict[str, Any]:
        return {"place": self.place}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.place = state["place"]


class MakesIterators:
    def __iter__(self) -> StatefulIterator:
        return StatefulIterator()


class Rows(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        yield from Drawing()


def make(train_data: Any, **changes: Any) -> Workload:
    given: dict[str, Any] = {
        "name": "toy",
        "make_model": lambda: nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.2), nn.Linear(8, 2)),
        "train_data": train_data,
        "val_data": (X[:20], Y[:20]),
        "loss": F.cross_entropy,
        "make_optimizer": lambda params, lr: torch.optim.SGD(params, lr=lr, momentum=0.9),
    }
    return Workload(**{**given, **changes})


RAMPED = Recipe(
    global_batch=6,
    micro_batch=3,
    learning_rate=0.05,
    batch_ramp=((40, 11), (90, 16)),
    rate_rule="sqrt",
    warmup_steps=4,
)


class StopAt(Callback):
    """Asks for the end after so many updates."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step(self, training: Any) -> None:
        training.stop_requested = training.steps == self.step


def same(run: Run, wanted: Run) -> bool:
    def told(run: Run) -> Any:
        points = [(p.step, p.examples, p.train_loss, p.val_loss, p.epochs) for p in run.history]
        return points, run.steps, run.examples, run.epochs, run.state

    weights = [
        torch.cat([p.detach().flatten() for p in each.model.parameters()]) for each in (run, wanted)
    ]
    return torch.equal(*weights) and told(run) == told(wanted)


def stopped_and_resumed(
    make_data: Callable[[], Any], recipe: Recipe, folder: Path, stops: list[int], **how: Any
) -> Run:
    """A run that is stopped after these updates, each time on a new stream."""
    for step in stops:
        options = {"run_directory": folder, "resume": True, **how}
        run = train_stream(make(make_data()), recipe, callbacks=[StopAt(step)], **options)
        assert run.steps == step
        random.seed(step)
        torch.manual_seed(step)
    return train_stream(make(make_data()), recipe, run_directory=folder, resume=True, **how)


# -------------------------------------------------------------------------- the same bits


@pytest.mark.parametrize(
    "make_data",
    [
        Drawing,
        Rows,
        lambda: DataLoader(Rows(), batch_size=3),
        Stateful,
        MakesIterators,
        lambda: (X, Y),
    ],
)
@pytest.mark.parametrize("buffer", [0, 10])
def test_a_run_of_passes_goes_on_to_the_same_bits(
    make_data: Callable[[], Any], buffer: int, tmp_path: Path
) -> None:
    how: dict[str, Any] = {"passes": 3, "shuffle_buffer": buffer, "seed": 3}
    wanted = train_stream(make(make_data()), RAMPED, **how)
    # In the first pass; where it ends with a whole update and the second with a smaller one; and
    # twice in the last.
    run = stopped_and_resumed(make_data, RAMPED, tmp_path, [2, 8, 13, 14, 16], **how)
    assert run.steps == 17
    assert same(run, wanted)
    assert [point.epochs for point in run.history] == [1.0, 2.0, 3.0]


@pytest.mark.parametrize("stop", range(1, 15))
def test_wherever_it_was_stopped(stop: int, tmp_path: Path) -> None:
    recipe = RAMPED.replace(last_batch=["keep", "drop", "scale-lr"][stop % 3])
    how: dict[str, Any] = {"steps": 16, "passes": None, "evaluate_every": 3}
    wanted = train_stream(make(Drawing()), recipe, **how)
    run = stopped_and_resumed(
        Drawing, recipe, tmp_path, [stop], checkpoint_every=1 + stop % 4, **how
    )
    assert same(run, wanted)


@pytest.mark.parametrize("batch", [1, 6])
def test_schedules_examples_noise_and_endless_streams(batch: int, tmp_path: Path) -> None:
    recipe = Recipe(
        global_batch=batch,
        micro_batch=max(batch // 2, 1),
        learning_rate=0.05,
        schedule="cosine",
        batch_policy="fixed" if batch == 1 else "follow-noise",
        largest_batch=None if batch == 1 else 24,
    )
    how: dict[str, Any] = {"examples": 140, "seed": 1, "evaluate_every": 5}
    wanted = train_stream(make(Endless()), recipe, **how)
    assert wanted.examples == 140
    assert same(stopped_and_resumed(Endless, recipe, tmp_path, [3, 7], **how), wanted)


def test_saving_does_not_change_a_run(tmp_path: Path) -> None:
    wanted = train_stream(make(Drawing()), RAMPED, passes=2)
    for every in (1, 2, 5):
        folder = tmp_path / str(every)
        options: dict[str, Any] = {"run_directory": folder, "checkpoint_every": every}
        run = train_stream(make(Drawing()), RAMPED, passes=2, **options)
        assert same(run, wanted)
        # What is complete needs no stream any more.
        done = train_stream(make(Empty()), RAMPED, passes=2, **options, resume=True)
        assert same(done, wanted)


def test_a_generator_that_is_made_anew(tmp_path: Path) -> None:
    def rows() -> Iterator[Any]:
        yield from Drawing()

    wanted = train_stream(make(rows()), RAMPED)
    assert same(stopped_and_resumed(rows, RAMPED, tmp_path, [3]), wanted)


def test_train_of_a_long_stream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rightbatch.workload.data.STREAM_EXAMPLES", 20)
    lengths: list[dict[str, Any]] = [{"epochs": 3}, {"steps": 14}]
    for length in lengths:
        folder = tmp_path / str(length)
        wanted = train(make(Drawing()), RAMPED, **length)
        options: dict[str, Any] = {**length, "run_directory": folder, "resume": True}
        run = train(make(Drawing()), RAMPED, callbacks=[StopAt(10)], **options)
        assert (run.state, run.steps) == ("stopped", 10)
        assert same(train(make(Drawing()), RAMPED, **options), wanted)
        with pytest.raises(UsageError, match=r"other settings \(seed differ\)"):
            train(make(Drawing()), RAMPED, seed=5, **options)
        with pytest.raises(UsageError, match="already holds checkpoints"):
            train(make(Drawing()), RAMPED, **length, run_directory=folder)
    with pytest.raises(UsageError, match="need a run_directory"):
        train_stream(make(Drawing()), RAMPED, resume=True)


def test_a_stateful_stream_is_not_read_again(tmp_path: Path) -> None:
    streams = [Stateful(), Stateful()]
    train_stream(make(streams[0]), RAMPED, passes=2, callbacks=[StopAt(4)], run_directory=tmp_path)
    train_stream(make(streams[1]), RAMPED, passes=2, run_directory=tmp_path, resume=True)
    assert [stream.starts for stream in streams] == [1, 1]  # the second's second pass
    # One used up in this process is sent back.
    how: dict[str, Any] = {"run_directory": tmp_path / "used"}
    used = StatefulIterator()
    train_stream(make(used), RAMPED, callbacks=[StopAt(4)], **how)
    wanted = train_stream(make(StatefulIterator()), RAMPED)
    list(used)
    assert same(train_stream(make(used), RAMPED, resume=True, **how), wanted)


# ------------------------------------------------------------------------------- refusals


def begun(folder: Path, data: Any, step: int = 4, **how: Any) -> dict[str, Any]:
    """The options with which a run over these data, stopped at a step, is resumed."""
    options: dict[str, Any] = {"run_directory": folder, **how}
    train_stream(make(data), RAMPED, callbacks=[StopAt(step)], **options)
    return {**options, "resume": True}


def test_what_cannot_be_read_again_is_refused(tmp_path: Path) -> None:
    rows = iter(ROWS)
    options = begun(tmp_path, rows)
    # What is left of it is long enough, but not its beginning.
    with pytest.raises(WorkloadError, match="a list_iterator, which is then not at its"):
        train_stream(make(rows), RAMPED, **options)
    list(rows)
    for data in (rows, ROWS[:10]):
        message = r"had taken 24 examples of pass 1 over the stream, which now gives (0|10)\."
        with pytest.raises(WorkloadError, match=message):
            train_stream(make(data), RAMPED, **options)
    # The checkpoint is as it was.
    wanted = train_stream(make(ROWS), RAMPED)
    assert same(train_stream(make(ROWS), RAMPED, **options), wanted)


def test_a_stream_that_lost_its_state(tmp_path: Path) -> None:
    options = begun(tmp_path, Stateful(), passes=2)
    with pytest.raises(WorkloadError, match="a Drawing without load_state_dict"):
        train_stream(make(Drawing()), RAMPED, **options)


def test_a_stream_that_raises_while_it_is_read_again(tmp_path: Path) -> None:
    class Broken:
        def __iter__(self) -> Iterator[Any]:
            yield from ROWS[:3]
            raise OSError("the disk is gone")

    options = begun(tmp_path, ROWS)
    with pytest.raises(WorkloadError, match="raised OSError at example 4: the disk is gone"):
        train_stream(make(Broken()), RAMPED, **options)


@pytest.mark.parametrize(
    "changed",
    [
        lambda: ROWS[::-1],
        lambda: ROWS[1:],
        lambda: [ROWS[7], *ROWS],
        lambda: [(x.double(), y) for x, y in ROWS],
        lambda: [*ROWS[:2], (X[2] + 1e-6, Y[2]), *ROWS[3:]],
    ],
)
def test_other_examples_are_told_loudly(changed: Callable[[], Any], tmp_path: Path) -> None:
    options = begun(tmp_path, ROWS)
    with pytest.warns(UserWarning, match="has changed: the first 24 examples of pass 1"):
        run = train_stream(make(changed()), RAMPED, **options)
    assert run.state == "complete"


def test_a_stream_whose_passes_differ_by_its_own_memory(tmp_path: Path) -> None:
    class Counting:
        def __init__(self) -> None:
            self.passes = 0

        def __iter__(self) -> Iterator[Any]:
            self.passes += 1
            yield from [(x + self.passes, y) for x, y in ROWS]

    options = begun(tmp_path, Counting(), step=9, passes=2)
    with pytest.warns(UserWarning, match="examples of pass 2 over the stream"):
        train_stream(make(Counting()), RAMPED, **options)


# ---------------------------------------------------------------------------------- parts


def digest(examples: Any) -> str:
    found = Fingerprint()
    for place, example in enumerate(examples):
        found.see(place, example)
    return found.digest


def test_the_fingerprint_is_of_values() -> None:
    for first, second in [
        (1, 2),
        (1, 1.0),
        ("a", b"a"),
        ([1, 2], [12]),
        ([[1], 2], [1, [2]]),
        ((1,), [1]),
        ({"a": 1}, {"b": 1}),
        (np.float32(1), np.float32(2)),
        (np.zeros(2), np.ones(2)),
        (torch.zeros(4), torch.zeros(2, 2)),
        (torch.zeros(2), torch.zeros(2, dtype=torch.int32)),
        (torch.zeros(2, dtype=torch.bfloat16), torch.ones(2, dtype=torch.bfloat16)),
        (torch.tensor(1.0), torch.tensor(2.0)),
    ]:
        assert digest([first]) != digest([second]), (first, second)
    example = {"x": X[:4].T, "names": ["é", b"\0"], "nothing": (None, np.arange(3), 1j)}
    assert digest([example]) == digest([{**example, "x": X[:4].T.contiguous()}])
    assert digest([object()]) == digest([object()])  # of which nothing is known


def test_the_fingerprint_sees_a_shift_within_a_stretch() -> None:
    examples = list(range(1000))
    for place in (0, FIRST, 100, 800):
        assert digest(examples) != digest([*examples[:place], -1, *examples[place:]])
    assert digest(examples[: 5 * EVERY]) == digest([*examples[: 5 * EVERY - 1], -1])


def test_the_global_generators_come_back() -> None:
    def drawn() -> list[Any]:
        return [random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn()]

    with drawing_from(0):
        drawn()  # leaves half of a pair of normal numbers
        saved = global_draws()
        wanted = [drawn() for _ in range(5)]
        set_global_draws(saved)
        assert [drawn() for _ in range(5)] == wanted
        assert all(isinstance(part, Tensor) for part in (saved["python"][1], saved["numpy"][1]))
