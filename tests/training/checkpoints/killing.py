"""Trains in child processes that are killed, and reports what was left; run by test_kills.py.

One process imports torch, then forks a child for every training: a start costs milliseconds, and
hundreds of kills are affordable. Prints one JSON object a trial.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from rightbatch import Recipe, Workload, train, train_stream
from rightbatch.store import hash_tensors
from rightbatch.training import Callback, Training

EVERY = 5
"""Updates between checkpoints."""
STEPS = 60
X = torch.randn(97, 4, generator=torch.Generator().manual_seed(0))
Y = (X[:, 0] > 0).long()
RECIPE = Recipe(
    global_batch=8,
    micro_batch=4,
    learning_rate=0.01,
    # Changes in the middle of the first epoch and of the third.
    batch_ramp=((50, 12), (250, 16)),
    rate_rule="sqrt",
    warmup_steps=7,
    last_batch="merge",
)


def adam(params: Iterable[nn.Parameter], lr: float) -> torch.optim.Optimizer:
    return torch.optim.Adam(params, lr=lr)


WORKLOAD = Workload(
    name="toy",
    make_model=lambda: nn.Sequential(
        nn.Linear(4, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 2)
    ),
    train_data=(X, Y),
    val_data=(X[:30], Y[:30]),
    loss=F.cross_entropy,
    make_optimizer=adam,
)


class Stream:
    """Examples of unknown number, augmented by what is drawn."""

    def __iter__(self) -> Iterator[Any]:
        for index in torch.randperm(len(X)).tolist():
            yield X[index] + random.random() * torch.rand(4), Y[index]


class StatefulStream(Stream):
    """One that knows its place."""

    place = 0

    def __iter__(self) -> Iterator[Any]:
        while self.place < len(X):
            self.place += 1
            yield X[self.place - 1] + random.random() * torch.rand(4), Y[self.place - 1]
        self.place = 0

    def state_dict(self) -> dict[str, Any]:
        return {"place": self.place}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.place = state["place"]


class Telling(Callback):
    """Writes where the training is to a pipe that survives it."""

    def __init__(self, pipe: int) -> None:
        self._pipe = pipe

    def _tell(self, word: str, steps: int) -> None:
        os.write(self._pipe, f"{word} {steps}\n".encode())

    def on_start(self, training: Training) -> None:
        self._tell("start", training.steps)

    def on_step(self, training: Training) -> None:
        self._tell("step", training.steps)
        time.sleep(0.001)  # else the kills fall into starts and saves alone


def run(folder: Path | None, pipe: int, data: str) -> str:
    """Trains to the end and returns the hash of everything that counts."""
    options: dict[str, Any] = {
        "steps": STEPS,
        "seed": 1,
        "callbacks": [Telling(pipe)],
        "run_directory": folder,
        "checkpoint_every": None if folder is None else EVERY,
        "resume": folder is not None,
    }
    if data == "tensors":
        finished = train(WORKLOAD, RECIPE, **options)
    else:
        stream = Stream() if data == "stream" else StatefulStream()
        finished = train_stream(
            replace(WORKLOAD, train_data=stream),
            RECIPE.replace(last_batch="scale-lr"),
            passes=None,
            shuffle_buffer=7 if data == "stream" else 0,
            **options,
        )
    weights = hash_tensors(finished.model.state_dict().items())
    points = [(p.step, p.train_loss.hex(), (p.val_loss or 0.0).hex()) for p in finished.history]
    return f"{weights} {points}"


def die_in_a_save(draw: random.Random) -> Callable[[], None]:
    """Arms the child: it kills itself at some system call of some save."""
    name, countdown = draw.choice(["write", "fsync", "replace", "open"]), draw.randrange(1, 16)
    real = getattr(os, name)

    def armed(*args: Any, **kwargs: Any) -> Any:
        nonlocal countdown
        # The pipe is written to as well; a file's descriptor or path is what counts.
        if not (name == "write" and args[0] == PIPE[1]):
            countdown -= 1
        if countdown == 0:
            if name == "write":  # torn: half of it arrives
                real(args[0], bytes(args[1])[: len(args[1]) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)

    return lambda: setattr(os, name, armed)


PIPE = [0, 0]
SIGNALS = [signal.SIGINT, signal.SIGTERM]


def one_life(
    folder: Path, draw: random.Random, mode: str, data: str
) -> tuple[int, int, str | None]:
    """A child that trains until it ends or is killed: its first and last step, and its hash."""
    PIPE[:] = os.pipe()
    arm = die_in_a_save(draw) if mode == "save" else None
    child = os.fork()
    if child == 0:
        os.close(PIPE[0])
        # In the background of a shell, SIGINT is ignored.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if arm is not None:
            arm()
        try:
            result = run(folder, PIPE[1], data)
        except KeyboardInterrupt:
            os._exit(130)
        os.write(PIPE[1], f"hash {result}\n".encode())
        os._exit(0)
    os.close(PIPE[1])
    if mode in ("time", "signal"):
        time.sleep(draw.uniform(0.0, 0.15))
        os.kill(child, draw.choice(SIGNALS) if mode == "signal" else signal.SIGKILL)
    told = b"".join(iter(lambda: os.read(PIPE[0], 65536), b""))
    os.close(PIPE[0])
    os.waitpid(child, 0)
    first = last = -1
    digest = None
    for line in told.decode().splitlines():
        word, _, rest = line.partition(" ")
        if word == "start":
            first = int(rest)
        elif word == "step":
            last = int(rest)
        else:
            digest = rest
    return first, last, digest


def trial(seed: int, data: str) -> dict[str, Any]:
    """Kills a training one to three times, then lets it end."""
    draw = random.Random(seed)
    folder = Path(tempfile.mkdtemp())
    lives: list[tuple[int, int]] = []
    kills, digest, worst = 0, None, 0
    try:
        for _ in range(draw.randint(1, 3)):
            mode = "save" if draw.random() < 1 / 3 else "time"
            if data != "tensors" and draw.random() < 1 / 4:
                mode = "signal"
            first, last, digest = one_life(folder, draw, mode, data)
            kills += digest is None
            lives.append((first, last))
            if digest is not None:
                break
        while digest is None:
            first, last, digest = one_life(folder, draw, "end", data)
            lives.append((first, last))
    finally:
        shutil.rmtree(folder)
    reached = 0
    for first, last in lives:
        if first >= 0:  # a life that was killed before it began resumed nothing
            worst = max(worst, reached - first)
        reached = max(reached, last)
    return {"seed": seed, "kills": kills, "redone": worst, "hash": digest, "lives": lives}


def main() -> None:
    """Arguments: first seed, number of kills, tensors or a kind of stream."""
    first_seed, wanted, data = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    null = os.open(os.devnull, os.O_WRONLY)
    print(json.dumps({"hash": run(None, null, data)}), flush=True)
    kills, seed = 0, first_seed
    while kills < wanted:
        result = trial(seed, data)
        kills, seed = kills + result["kills"], seed + 1
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
