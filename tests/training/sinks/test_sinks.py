"""Sinks: one contract for all of them; none can stop a training, slow it for long, or change it."""

from __future__ import annotations

import logging
import math
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rightbatch import Recipe, Run, Workload, accuracy, train
from rightbatch.errors import MissingExtraError, UsageError
from rightbatch.training.sinks import MlflowSink, Sink, TensorBoardSink, WandbSink
from rightbatch.training.sinks import sink as sink_module

X = torch.randn(105, 4, generator=torch.Generator().manual_seed(0))
Y = (X[:, 0] > 0).long()
RECIPE = Recipe(global_batch=10, learning_rate=0.1)
Points = list[tuple[dict[str, float], int]]


def make() -> Workload:
    return Workload(
        name="toy",
        make_model=lambda: nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.2), nn.Linear(8, 2)),
        train_data=(X, Y),
        val_data=(X[:33], Y[:33]),
        loss=F.cross_entropy,
        metric=accuracy,
    )


def flat(run: Run) -> Tensor:
    return torch.cat([p.detach().flatten() for p in run.model.parameters()])


class Backend:
    """Stands in for what a sink writes to: notes the points, and fails as it is told.

    Args:
        on_open: Called when the writer is made.
        on_write: Called with each point's step.
        on_close: Called at the end.
    """

    def __init__(
        self,
        on_open: Callable[[], Any] = lambda: None,
        on_write: Callable[[int], Any] = lambda _: None,
        on_close: Callable[[], Any] = lambda: None,
    ) -> None:
        self.open, self.on_write, self.on_close = on_open, on_write, on_close
        self.points: Points = []
        self.settings: dict[str, Any] = {}
        self.closed = False

    def write(self, values: Mapping[str, float], step: int) -> None:
        self.on_write(step)
        self.points.append((dict(values), step))

    def close(self) -> None:
        self.on_close()
        self.closed = True


class FakeSummaryWriter:
    def __init__(self, backend: Backend) -> None:
        backend.open()
        self._backend = backend

    def add_text(self, name: str, text: str) -> None:
        self._backend.settings = {"text": text}

    def add_scalar(self, name: str, value: float, step: int) -> None:
        backend = self._backend
        if backend.points and backend.points[-1][1] == step and name not in backend.points[-1][0]:
            backend.points[-1][0][name] = value
        else:
            backend.write({name: value}, step)

    def close(self) -> None:
        self._backend.close()


def fake_tensorboard(monkeypatch: pytest.MonkeyPatch, backend: Backend) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", ModuleType("tensorboard"))
    module: Any = ModuleType("torch.utils.tensorboard.writer")
    module.SummaryWriter = lambda folder: FakeSummaryWriter(backend)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", ModuleType("tensorboard"))
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard.writer", module)


def fake_mlflow(monkeypatch: pytest.MonkeyPatch, backend: Backend) -> None:
    class Client:
        def __init__(self, tracking_uri: str | None) -> None:
            backend.open()

        def get_experiment_by_name(self, name: str) -> None:
            return None

        def create_experiment(self, name: str) -> str:
            return "7"

        def create_run(self, experiment_id: str, run_name: str | None) -> Any:
            assert experiment_id == "7"
            return SimpleNamespace(info=SimpleNamespace(run_id="r"))

        def log_batch(self, run_id: str, metrics: Any = (), params: Any = ()) -> None:
            assert run_id == "r"
            if params:
                backend.settings = dict(params)
            if metrics:
                backend.write({key: value for key, value, _, _ in metrics}, metrics[0][3])

        def set_terminated(self, run_id: str) -> None:
            backend.close()

    mlflow, entities = ModuleType("mlflow"), ModuleType("mlflow.entities")
    vars(mlflow).update(MlflowClient=Client)
    vars(entities).update(Metric=lambda *fields: fields, Param=lambda *pair: pair)
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    monkeypatch.setitem(sys.modules, "mlflow.entities", entities)


def fake_wandb(monkeypatch: pytest.MonkeyPatch, backend: Backend) -> None:
    def init(project: str, config: dict[str, Any], **_: Any) -> Any:
        backend.open()
        backend.settings = config
        return SimpleNamespace(
            log=lambda values, step: backend.write(values, step), finish=backend.close
        )

    wandb = ModuleType("wandb")
    vars(wandb).update(init=init, Settings=lambda **_: None)
    monkeypatch.setitem(sys.modules, "wandb", wandb)


SINKS: dict[str, tuple[Callable[..., Sink], Callable[[pytest.MonkeyPatch, Backend], None]]] = {
    "TensorBoard": (lambda **o: TensorBoardSink("unused", **o), fake_tensorboard),
    "MLflow": (MlflowSink, fake_mlflow),
    "W&B": (WandbSink, fake_wandb),
}


@pytest.fixture(params=SINKS)
def connect(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., Sink]]:
    """Makes the sink of each kind, in front of a fake of its package."""
    make_sink, fake = SINKS[request.param]

    def made(backend: Backend, **options: Any) -> Sink:
        fake(monkeypatch, backend)
        return make_sink(**options)

    yield made
    for thread in threading.enumerate():
        if thread.name.endswith(" sink"):  # before the fake packages are taken away
            thread.join(10)


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Iterator[Callable[[], list[str]]]:
    """What was said on the log."""
    with caplog.at_level(logging.WARNING, logger="rightbatch"):
        yield lambda: [record.getMessage() for record in caplog.records]


def fail(*_: Any) -> None:
    raise ConnectionError("the network is down\nTraceback: much more")


@pytest.fixture(scope="module")
def plain() -> Run:
    return train(make(), RECIPE, epochs=4)


# -------------------------------------------------------------------------------------- contract


def test_every_point_arrives_in_order(connect: Any, said: Any, plain: Run) -> None:
    backend = Backend()
    sink = connect(backend, every=4)
    run = train(make(), RECIPE, epochs=4, callbacks=[sink])
    assert torch.equal(flat(run), flat(plain))
    records = [(values, step) for values, step in backend.points if "train/loss" in values]
    points = [(values, step) for values, step in backend.points if "evaluation/val_loss" in values]
    assert [step for _, step in records] == [4, 8, 12, 16, 20, 24, 28, 32, 36, 40, 44]
    assert [values["evaluation/val_loss"] for values, _ in points] == [
        point.val_loss for point in plain.history
    ]
    assert [step for _, step in points] == [11, 22, 33, 44]
    steps = [step for _, step in backend.points]
    assert steps == sorted(steps)
    assert {"train/gradient_norm", "train/learning_rate", "train/seconds"} <= set(records[0][0])
    assert backend.closed
    assert "toy" in str(backend.settings) and "global_batch" in str(backend.settings)
    assert said() == [] and (sink.dropped, sink.switched_off) == (0, False)


def test_a_writer_that_cannot_be_opened_is_one_sentence(
    connect: Any, said: Any, plain: Run
) -> None:
    sink = connect(Backend(on_open=fail))
    run = train(make(), RECIPE, epochs=4, callbacks=[sink])
    assert torch.equal(flat(run), flat(plain)) and run.history == plain.history
    (sentence,) = said()
    assert sentence == (
        f"The {sink.name} sink could not be opened (ConnectionError: the network is down) and is "
        "switched off. The training goes on."
    )
    assert sink.switched_off


def test_a_writer_that_wants_to_end_the_process_does_not(connect: Any, said: Any) -> None:
    def leave() -> None:
        raise SystemExit(1)

    assert train(make(), RECIPE, epochs=1, callbacks=[connect(Backend(on_open=leave))]).steps == 11
    assert "SystemExit: 1" in said()[0]


def test_failures_in_a_row_switch_the_sink_off(connect: Any, said: Any, plain: Run) -> None:
    tried: list[int] = []

    def write(step: int) -> None:
        tried.append(step)
        fail()

    sink = connect(Backend(on_write=write), every=1)
    run = train(make(), RECIPE, epochs=4, callbacks=[sink])
    assert torch.equal(flat(run), flat(plain)) and run.history == plain.history
    assert len(tried) == 3
    (sentence,) = said()
    assert f"The {sink.name} sink failed 3 times in a row (ConnectionError: the net" in sentence
    assert sink.switched_off


def test_a_failure_now_and_then_does_not(connect: Any, said: Any) -> None:
    calls = iter(range(10_000))

    def write(_: int) -> None:
        if next(calls) % 3:
            fail()

    backend = Backend(on_write=write)
    train(make(), RECIPE, epochs=4, callbacks=[connect(backend, every=1)])
    assert said() == []
    assert backend.closed
    assert len(backend.points) >= 15


def test_a_hung_writer_is_waited_for_a_moment_only(connect: Any, said: Any, plain: Run) -> None:
    release = threading.Event()
    sink = connect(Backend(on_write=lambda _: release.wait(30)), every=1, patience_seconds=0.05)
    start = time.perf_counter()
    run = train(make(), RECIPE, epochs=4, callbacks=[sink])
    took = time.perf_counter() - start
    hung = [thread for thread in threading.enumerate() if thread.name.endswith(" sink")]
    assert hung and all(thread.daemon for thread in hung)  # else the process could not end
    release.set()
    assert took < 5
    assert torch.equal(flat(run), flat(plain)) and run.history == plain.history
    assert any("was not done 0.05 s after the run" in sentence for sentence in said())
    assert sink.dropped == 47  # of 44 records and 4 evaluations, all but the one that hangs
    assert any("47 points were dropped" in sentence for sentence in said())


def test_a_writer_that_hangs_when_it_is_opened(connect: Any, said: Any, plain: Run) -> None:
    release = threading.Event()
    sink = connect(Backend(on_open=lambda: release.wait(30)), patience_seconds=0.05)
    run = train(make(), RECIPE, epochs=4, callbacks=[sink])
    release.set()
    assert torch.equal(flat(run), flat(plain))
    assert "is not ready after 0.05 s" in said()[0]


def test_a_full_queue_drops_and_counts(
    connect: Any, said: Any, plain: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sink_module, "QUEUE_LENGTH", 5)
    release = threading.Event()
    backend = Backend(on_write=lambda _: release.wait(30))
    sink = connect(backend, every=1)
    threading.Timer(0.5, release.set).start()
    run = train(make(), RECIPE, epochs=4, callbacks=[sink])
    assert torch.equal(flat(run), flat(plain)) and run.history == plain.history
    assert len(backend.points) + sink.dropped == 48
    assert sink.dropped >= 40 and backend.closed
    assert said() == [f"The {sink.name} sink did not keep up: {sink.dropped} points were dropped."]


def test_what_closing_raises_is_said(connect: Any, said: Any) -> None:
    assert train(make(), RECIPE, epochs=1, callbacks=[connect(Backend(on_close=fail))]).steps == 11
    assert "could not be closed (ConnectionError: the network is down)." in said()[0]


def test_warnings_that_are_errors_stop_nothing(connect: Any) -> None:
    # The tests run with warnings as errors: the sentences must not be warnings.
    train(make(), RECIPE, epochs=1, callbacks=[connect(Backend(on_open=fail))])


def test_a_run_that_ends_with_an_error_is_closed_at_exit(
    connect: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_exit: list[Callable[[], None]] = []
    monkeypatch.setattr(sink_module.atexit, "register", at_exit.append)
    backend = Backend()
    sink = connect(backend)
    workload = make()

    class Raise(sink_module.Callback):
        def on_evaluation(self, training: Any, point: Any) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(workload, RECIPE, epochs=1, callbacks=[sink, Raise()])
    assert not backend.closed
    (close,) = at_exit
    close()
    assert backend.closed
    assert any("evaluation/val_loss" in values for values, _ in backend.points)


def test_a_thread_that_cannot_be_started(
    connect: Any, said: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    sink = connect(Backend())
    monkeypatch.setattr(threading.Thread, "start", start)
    assert train(make(), RECIPE, epochs=1, callbacks=[sink]).steps == 11
    assert "could not be started (RuntimeError: can't start new thread)" in said()[0]


@pytest.mark.parametrize(
    ("options", "message"), [({"every": 0}, "every is 0"), ({"per_second": 0}, "per_second is 0")]
)
def test_options_out_of_range(connect: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        connect(Backend(), **options)


def test_points_are_thinned_by_the_seconds_of_the_updates(connect: Any) -> None:
    from rightbatch.training import StepRecord, StepRecords, Training

    backend = Backend()
    sink = connect(backend, per_second=2)
    training = Training(make(), RECIPE)
    sink.on_start(training)
    rows = [StepRecord(step, 0.0, step, 1, 0.1, 1.0, 1.0, 0.1) for step in range(1, 31)]
    for first in range(0, 30, 16):
        columns = list(zip(*rows[first : first + 16], strict=True))
        sink.on_records(training, StepRecords(columns))
    sink.close()
    # The first at once, then one each half second: 0.1 s an update.
    assert [step for _, step in backend.points] == [1, 6, 11, 16, 21, 26]
    assert backend.points[-1][0]["train/seconds"] == pytest.approx(2.6)


def test_a_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sink_module, "is_installed", lambda _: False)
    for make_sink, extra in (
        (lambda: TensorBoardSink("x"), "tensorboard"),
        (MlflowSink, "mlflow"),
        (WandbSink, "wandb"),
    ):
        with pytest.raises(MissingExtraError, match=rf"pip install 'rightbatch\[{extra}\]'"):
            make_sink()


def test_what_is_not_installed_is_seen_without_importing_it() -> None:
    assert not sink_module.is_installed("no_such_package_as_this")
    assert sink_module.is_installed("antigravity") and "antigravity" not in sys.modules


@pytest.mark.filterwarnings("ignore")
def test_tensorboard_itself(tmp_path: Path) -> None:
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", exc_type=ImportError
    )
    run = train(make(), RECIPE, epochs=2, callbacks=[TensorBoardSink(tmp_path, every=2)])
    events = accumulator.EventAccumulator(str(tmp_path)).Reload()
    losses = events.Scalars("train/loss")
    assert [event.step for event in losses] == list(range(2, 23, 2))
    assert all(math.isfinite(event.value) for event in losses)
    val = [event.value for event in events.Scalars("evaluation/val_loss")]
    assert val == pytest.approx([point.val_loss for point in run.history])
