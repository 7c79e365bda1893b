"""A run that is stopped and resumed is the run that was never stopped, bit for bit."""

from __future__ import annotations

import errno
import os
import random
import signal
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from rightbatch import Recipe, Run, Workload, accuracy, train
from rightbatch.errors import CorruptStateError, UsageError
from rightbatch.store import hash_tensors
from rightbatch.training import Callback, Training
from rightbatch.training.checkpoints.checkpoint import list_checkpoints
from rightbatch.training.checkpoints.saving import FOLDER, read_settings

N = 97
X = torch.randn(N, 4, generator=torch.Generator().manual_seed(0))
Y = (X[:, 0] > 0).long()


def adam(params: Iterable[nn.Parameter], lr: float) -> torch.optim.Optimizer:
    return torch.optim.Adam(params, lr=lr)


def network() -> nn.Module:
    # Dropout draws random numbers, BatchNorm keeps buffers: both are state of a run.
    return nn.Sequential(
        nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 2)
    )


class Augmented(torch.utils.data.Dataset[Any]):
    """A data set that draws: a resumed run must see the same examples."""

    def __len__(self) -> int:
        return N

    def __getitem__(self, index: int) -> Any:
        noise = 0.1 * torch.randn(4) + 0.1 * random.random()
        return X[index] + noise, Y[index]


def make(**changes: Any) -> Workload:
    given: dict[str, Any] = {
        "name": "toy",
        "make_model": network,
        "train_data": (X, Y),
        "val_data": (X[:30], Y[:30]),
        "loss": F.cross_entropy,
        "metric": accuracy,
        "make_optimizer": adam,
    }
    return Workload(**{**given, **changes})


def recipe(**changes: Any) -> Recipe:
    return Recipe(**{"global_batch": 16, "learning_rate": 0.01, **changes})


class StopAt(Callback):
    """Asks for a stop after an update."""

    def __init__(self, step: int) -> None:
        self._step = step

    def on_step(self, training: Training) -> None:
        if training.steps == self._step:
            training.stop_requested = True


def bits(run: Run) -> tuple[Any, ...]:
    return (
        hash_tensors(run.model.state_dict().items()),
        run.history,
        (run.steps, run.examples, run.epochs, run.train_loss, run.val_loss, run.val_metric),
    )


pytestmark = pytest.mark.filterwarnings("ignore:Accumulating:UserWarning")

RECIPES = {
    "plain": recipe(),
    "accumulation": recipe(micro_batch=4),
    "ramp": recipe(batch_ramp=((40, 24), (130, 31)), rate_rule="sqrt"),
    "adam-sde": recipe(batch_ramp=((70, 32),), rate_rule="adam-sde"),
    "cosine": recipe(schedule="cosine", warmup_steps=5, last_batch="scale-lr"),
    "step": recipe(schedule="step", decay_at=(0.4, 0.7), last_batch="pad"),
    "drop": recipe(last_batch="drop", clip_norm=0.5),
    "merge": recipe(last_batch="merge", reduction="sum", learning_rate=1e-3),
    "half": recipe(precision="float16"),
    "bfloat16": recipe(precision="bfloat16"),
    "follow": recipe(micro_batch=4, batch_policy="follow-noise", largest_batch=48),
}


@pytest.mark.parametrize("name", RECIPES)
def test_a_resumed_run_is_the_run_itself(name: str, tmp_path: Path) -> None:
    """Stopped at three places, one of them in the middle of an epoch."""
    chosen = RECIPES[name]
    whole = train(make(), chosen, epochs=4, seed=3)
    folder = tmp_path / "run"
    stops = sorted(random.Random(name).sample(range(1, whole.steps), 3))
    for index, stop in enumerate(stops):
        stopped = train(
            make(),
            chosen,
            epochs=4,
            seed=3,
            run_directory=folder,
            resume=index > 0,
            callbacks=[StopAt(stop)],
        )
        assert (stopped.state, stopped.steps) == ("stopped", stop)
    resumed = train(make(), chosen, epochs=4, seed=3, run_directory=folder, resume=True)
    assert bits(resumed) == bits(whole), f"stopped at {stops}"
    assert resumed.state == "complete"
    # What is complete is not trained any further.
    again = train(make(), chosen, epochs=4, seed=3, run_directory=folder, resume=True)
    assert bits(again) == bits(whole)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_data_set_that_draws_gives_the_same_examples_when_resumed(
    workers: int, tmp_path: Path
) -> None:
    def run(**options: Any) -> Run:
        return train(
            make(train_data=Augmented()),
            recipe(batch_ramp=((60, 24),)),
            epochs=2,
            workers=workers,
            **options,
        )

    state = random.getstate(), torch.get_rng_state()
    whole = train(make(train_data=Augmented()), recipe(batch_ramp=((60, 24),)), epochs=2)
    run(run_directory=tmp_path, callbacks=[StopAt(6)])
    assert bits(run(run_directory=tmp_path, resume=True)) == bits(whole)
    assert random.getstate() == state[0]
    assert torch.equal(torch.get_rng_state(), state[1])


def test_checkpoints_are_written_as_often_as_asked_and_two_are_kept(tmp_path: Path) -> None:
    seen: list[list[str]] = []

    class Looking(Callback):
        def on_step(self, training: Training) -> None:
            seen.append([path.name[-13:-11] for path in list_checkpoints(tmp_path / FOLDER)])

    train(
        make(),
        recipe(),
        steps=12,
        run_directory=tmp_path,
        checkpoint_every=5,
        callbacks=[Looking()],
    )
    assert seen[:5] == [[]] * 5
    assert seen[5:10] == [["05"]] * 5
    assert seen[10:] == [["10", "05"]] * 2
    assert [path.name[-13:-11] for path in list_checkpoints(tmp_path / FOLDER)] == ["12", "10"]


def test_the_settings_of_a_run_are_found_again(tmp_path: Path) -> None:
    asked = recipe(batch_ramp=((40, 24),), clip_norm=1.0)
    train(make(), asked, epochs=1.5, seed=9, evaluate_every=3, run_directory=tmp_path)
    settings = read_settings(tmp_path)
    assert settings.recipe == asked
    assert (settings.workload, settings.seed, settings.epochs) == ("toy", 9, 1.5)
    assert (settings.num_examples, settings.steps, settings.evaluate_every) == (N, None, 3)


def test_a_run_does_not_overwrite_another(tmp_path: Path) -> None:
    train(make(), recipe(), steps=3, run_directory=tmp_path)
    with pytest.raises(UsageError, match=r"already holds checkpoints.*resume=True"):
        train(make(), recipe(), steps=3, run_directory=tmp_path)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": 1}, "seed differ"),
        ({"steps": 9}, "steps differ"),
        ({"workload": make(name="other")}, "workload differ"),
        ({"evaluate_every": 2}, "evaluate_every differ"),
    ],
)
def test_another_run_cannot_be_resumed(change: dict[str, Any], named: str, tmp_path: Path) -> None:
    begun: dict[str, Any] = {"workload": make(), "recipe": recipe(), "steps": 8, "seed": 0}
    train(**begun, run_directory=tmp_path, callbacks=[StopAt(4)])
    with pytest.raises(UsageError, match=f"other settings .*{named}"):
        train(**{**begun, **change}, run_directory=tmp_path, resume=True)


def test_another_model_cannot_be_resumed(tmp_path: Path) -> None:
    train(make(), recipe(), steps=8, run_directory=tmp_path, callbacks=[StopAt(4)])
    wider = make(make_model=lambda: nn.Linear(4, 2))
    with pytest.raises(UsageError, match="and the model has"):
        train(wider, recipe(), steps=8, run_directory=tmp_path, resume=True)
    with pytest.raises(UsageError, match=r"with learning_rate 0\.01 and the recipe has 0\.02"):
        train(make(), recipe(learning_rate=0.02), steps=8, run_directory=tmp_path, resume=True)


def test_a_changed_thread_count_warns_and_goes_on(tmp_path: Path) -> None:
    train(make(), recipe(), steps=8, run_directory=tmp_path, callbacks=[StopAt(4)])
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    try:
        with pytest.warns(UserWarning, match=f"threads {before} → {before + 1}.*not bit for bit"):
            run = train(make(), recipe(), steps=8, run_directory=tmp_path, resume=True)
    finally:
        torch.set_num_threads(before)
    assert run.steps == 8


def test_the_same_seed_gives_the_same_bits_five_times() -> None:
    runs = {bits(train(make(), recipe(), epochs=3, seed=7))[0] for _ in range(5)}
    assert len(runs) == 1


def test_a_damaged_checkpoint_is_told_and_the_one_before_is_used(tmp_path: Path) -> None:
    options: dict[str, Any] = {"steps": 20, "checkpoint_every": 5, "run_directory": tmp_path}
    whole = train(make(), recipe(), steps=20)
    train(make(), recipe(), **options, callbacks=[StopAt(10)])
    newest, older = list_checkpoints(tmp_path / FOLDER)
    data = bytearray(newest.read_bytes())
    data[len(data) // 2] ^= 1
    newest.write_bytes(data)
    with pytest.warns(UserWarning, match=f"{newest.name}.*Going on from {older.name}"):
        resumed = train(make(), recipe(), **options, resume=True)
    assert bits(resumed) == bits(whole)
    for path in list_checkpoints(tmp_path / FOLDER):
        path.write_bytes(b"nothing")
    with pytest.raises(CorruptStateError, match="No checkpoint in"):
        train(make(), recipe(), **options, resume=True)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EACCES])
@pytest.mark.parametrize("call", ["write", "fsync", "replace"])
def test_a_failing_disk_is_loud_and_keeps_the_last_good_checkpoint(
    call: str, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train(make(), recipe(), steps=20)
    real, calls = getattr(os, call), 0

    def failing(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > 3:  # the first checkpoint is whole; write, fsync of file and folder, replace
            raise OSError(code, os.strerror(code))
        return real(*args, **kwargs)

    options: dict[str, Any] = {"steps": 20, "checkpoint_every": 4, "run_directory": tmp_path}
    with monkeypatch.context() as patch:
        patch.setattr(os, call, failing)
        with pytest.raises(OSError, match="Could not") as caught:
            train(make(), recipe(), **options)
    assert str(tmp_path) in str(caught.value)
    assert list_checkpoints(tmp_path / FOLDER)
    resumed = train(make(), recipe(), **options, resume=True)
    assert bits(resumed) == bits(whole)


def test_a_run_that_diverges_keeps_the_last_good_checkpoint(tmp_path: Path) -> None:
    calls = 0

    def loss(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += torch.is_grad_enabled()
        value = F.cross_entropy(outputs, targets)
        return value * float("nan") if calls > 12 else value

    run = train(make(loss=loss), recipe(), steps=40, run_directory=tmp_path, checkpoint_every=5)
    # The 13th loss is one of step 12, whose 17 examples take two passes.
    assert (run.state, run.diverged, run.steps) == ("diverged", True, 12)
    assert run.checkpoint is not None
    assert run.checkpoint.name.endswith("10.checkpoint")
    assert read_settings(tmp_path).steps == 40


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_update_saves_and_takes_effect(
    number: signal.Signals, tmp_path: Path
) -> None:
    received: list[int] = []
    before = signal.signal(number, lambda n, _: received.append(n))

    class Signalling(Callback):
        def on_step(self, training: Training) -> None:
            if training.steps == 7:
                signal.raise_signal(number)
                assert not received

    try:
        run = train(make(), recipe(), steps=20, run_directory=tmp_path, callbacks=[Signalling()])
        assert received == [number]
        assert signal.getsignal(number) is not before
    finally:
        signal.signal(number, before)
    assert (run.state, run.steps) == ("stopped", 7)
    whole = train(make(), recipe(), steps=20)
    resumed = train(make(), recipe(), steps=20, run_directory=tmp_path, resume=True)
    assert bits(resumed) == bits(whole)


def test_what_needs_a_run_directory_says_so() -> None:
    with pytest.raises(UsageError, match="need a run_directory"):
        train(make(), recipe(), steps=1, resume=True)
    with pytest.raises(UsageError, match="need a run_directory"):
        train(make(), recipe(), steps=1, checkpoint_every=5)
