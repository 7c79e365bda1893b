"""Two processes train as one: gradients, losses, decisions, noise and failures."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cloudpickle
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rightbatch import Recipe, Workload, train
from rightbatch.errors import (
    RecipeError,
)
from rightbatch.training import Training
from rightbatch.training.callbacks import Callback, Point
from rightbatch.training.distributed import Ranks, join_ranks

cloudpickle.register_pickle_by_value(sys.modules[__name__])

LIMIT_SECONDS = 30
"""Within which every rank must have answered, whatever happens to the others."""


class Pair:
    """Two processes that call what they are sent, as two ranks."""

    def __init__(self) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.processes = [self._start(rank, port) for rank in range(2)]

    def _start(self, rank: int, port: int) -> subprocess.Popen[bytes]:
        settings = {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": "1",
        }
        script = Path(__file__).with_name("rank_worker.py")
        return subprocess.Popen(
            [sys.executable, "-W", "error", str(script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, **settings},
        )

    def answers(self, call: Callable[[], Any]) -> list[Any]:
        """What each rank answered: ("returned", value) or ("raised", type, message, traceback)."""
        for process in self.processes:
            assert process.stdin is not None
            cloudpickle.dump(call, process.stdin)
            process.stdin.flush()
        answers: list[Any] = [None, None]

        def read(rank: int) -> None:
            with contextlib.suppress(EOFError):
                answers[rank] = cloudpickle.load(self.processes[rank].stdout)

        readers = [threading.Thread(target=read, args=(r,), daemon=True) for r in range(2)]
        end = time.monotonic() + LIMIT_SECONDS
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join(max(end - time.monotonic(), 0))
        if any(reader.is_alive() for reader in readers):
            self.stop()
            pytest.fail(f"A rank did not answer within {LIMIT_SECONDS} s: {answers}")
        return answers

    def both(self, call: Callable[[], Any]) -> list[Any]:
        """What the call returned on each rank."""
        answers = self.answers(call)
        for answer in answers:
            assert answer is not None and answer[0] == "returned", answer[-1]
        return [answer[1] for answer in answers]

    def both_raise(self, call: Callable[[], Any]) -> tuple[str, str]:
        """Type and message of what both ranks raised alike."""
        first, second = self.answers(call)
        assert first[0] == second[0] == "raised", (first, second)
        assert first[1:3] == second[1:3], (first, second)
        return first[1], first[2]

    def stop(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()
            for stream in (process.stdin, process.stdout):
                with contextlib.suppress(OSError):
                    assert stream is not None
                    stream.close()


@pytest.fixture(scope="module")
def pair() -> Iterator[Pair]:
    both = Pair()
    yield both
    both.stop()


# ------------------------------------------------------------------------- two ranks, one process


def draw_case(number: int) -> tuple[Workload, Recipe, int]:
    """A workload and a recipe for two ranks, drawn from a seed."""
    draw = random.Random(number)
    N = draw.randint(5, 40)
    tokens = draw.random() < 0.4
    workload = _tokens(draw, N) if tokens else _examples(draw, N)
    batch = draw.randint(2, N)
    changes: dict[str, Any] = {}
    if draw.random() < 0.5:
        first = draw.randint(1, batch - 1)
        changes |= {"replica_batches": (first, batch - first)}
        changes["micro_batch"] = draw.randint(1, max(first, batch - first))
    else:
        batch -= batch % 2
        sizes = [n for n in range(1, batch // 2 + 1) if batch // 2 % n == 0]
        changes["micro_batch"] = draw.choice(sizes)
    if draw.random() < 0.4:
        changes["clip_norm"] = draw.choice([0.05, 0.5])
    changes["reduction"] = draw.choice(["mean", "mean", "sum"])
    changes["last_batch"] = draw.choice(["keep", "keep", "drop", "merge", "scale-lr", "pad"])
    if draw.random() < 0.3:
        ramp = ((N, draw.randint(1, N)), (2 * N, draw.randint(1, N)))
        changes |= {"batch_ramp": ramp, "rate_rule": draw.choice(["none", "sqrt"])}
    rate = 0.002 if changes["reduction"] == "sum" else 0.05
    recipe = Recipe(global_batch=batch, replicas=2, learning_rate=rate, **changes)
    return workload, recipe, draw.randint(3, 12)


def _examples(draw: random.Random, N: int) -> Workload:
    generator = torch.Generator().manual_seed(draw.randint(0, 10**6))
    X = torch.randn(N, 5, dtype=torch.float64, generator=generator)
    y = torch.randint(0, 3, (N,), generator=generator)
    momentum = draw.choice([0.0, 0.9])
    return Workload(
        name="examples",
        make_model=lambda: nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double(),
        train_data=(X, y),
        val_data=(X, y),
        loss=F.cross_entropy,
        make_optimizer=lambda p, lr: torch.optim.SGD(p, lr=lr, momentum=momentum),
    )


def _tokens(draw: random.Random, N: int) -> Workload:
    """Masked sequences, some of which are padding alone."""
    generator = torch.Generator().manual_seed(draw.randint(0, 10**6))
    X = torch.randn(N, 4, 5, dtype=torch.float64, generator=generator)
    y = torch.randint(0, 3, (N, 4), generator=generator)
    y[torch.rand(N, 4, generator=generator) < 0.7] = -100
    decay = draw.choice([0.0, 0.1])
    return Workload(
        name="tokens",
        make_model=lambda: nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double(),
        train_data=(X, y),
        loss=lambda o, t: F.cross_entropy(o.transpose(1, 2), t),
        make_optimizer=lambda p, lr: torch.optim.SGD(p, lr=lr, momentum=0.9, weight_decay=decay),
    )


def weights(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def run_case(workload: Workload, recipe: Recipe, steps: int) -> dict[str, Any]:
    run = train(workload, recipe, steps=steps, seed=3)
    last = run.history[-1]
    return {
        "weights": weights(run.model),
        "losses": [point.train_loss for point in run.history],
        "place": (run.steps, run.epochs, run.examples, run.diverged, last.step),
    }


def check_case(pair: Pair, number: int) -> None:
    workload, recipe, steps = draw_case(number)
    print(f"case {number}: {workload.name}, N={workload.num_examples}, {steps} steps, {recipe}")
    alone = run_case(workload, recipe, steps)
    first, second = pair.both(lambda: run_case(workload, recipe, steps))
    assert torch.equal(first["weights"], second["weights"])
    assert first["place"] == second["place"] == alone["place"]
    torch.testing.assert_close(first["weights"], alone["weights"], rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(
        first["losses"], alone["losses"], rtol=1e-12, atol=1e-14, equal_nan=True
    )


@pytest.mark.parametrize("block", range(5))
def test_two_ranks_are_one_process(pair: Pair, block: int) -> None:
    for number in range(10 * block, 10 * block + 10):
        check_case(pair, number)
