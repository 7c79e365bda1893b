"""Two processes train as one: gradients, losses, decisions, noise and failures."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import cloudpickle
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rightbatch import Recipe, Workload, train
from rightbatch.errors import RecipeError, ReplicaOutOfMemoryError
from rightbatch.training import Training, window_noise
from rightbatch.training.checkpoints import saving
from rightbatch.training.ranks.distributed import join_ranks
from rightbatch.training.sinks import Sink, TensorBoardSink
from rightbatch.training.watching.callbacks import Callback, Point
from rightbatch.training.window_noise import PAUSE

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
                stream = self.processes[rank].stdout
                assert stream is not None
                answers[rank] = cloudpickle.load(stream)

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
            assert answer is not None, answers
            assert answer[0] == "returned", answer[-1]
        return [answer[1] for answer in answers]

    def both_raise(self, call: Callable[[], Any]) -> tuple[str, str]:
        """Type and message of what both ranks raised alike."""
        first, second = self.answers(call)
        assert first[0] == second[0] == "raised", (first, second)
        assert first[1:3] == second[1:3], (first, second)
        return first[1], first[2]

    @property
    def alive(self) -> bool:
        return all(process.poll() is None for process in self.processes)

    def stop(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()
            for stream in (process.stdin, process.stdout):
                with contextlib.suppress(OSError):
                    assert stream is not None
                    stream.close()


@pytest.fixture(scope="module")
def pairs() -> Iterator[list[Pair]]:
    held: list[Pair] = []
    yield held
    for both in held:
        both.stop()


@pytest.fixture
def pair(pairs: list[Pair]) -> Pair:
    """The same one for all tests, unless a test has broken it."""
    if not pairs or not pairs[-1].alive:
        pairs.append(Pair())
    return pairs[-1]


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


# ---------------------------------------------------------------------------- what ranks must share

X = torch.randn(48, 5, generator=torch.Generator().manual_seed(0))
Y = (X[:, 0] > 0).long()


def make(**changes: Any) -> Workload:
    given: dict[str, Any] = {
        "name": "toy",
        "make_model": lambda: nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 2)),
        "train_data": (X, Y),
        "val_data": (X, Y),
        "loss": F.cross_entropy,
    }
    return Workload(**{**given, **changes})


def two(global_batch: int = 8, **changes: Any) -> Recipe:
    return Recipe(global_batch=global_batch, replicas=2, **{"learning_rate": 0.1, **changes})


def rank_here() -> int:
    return int(os.environ.get("RANK", "0"))


@contextlib.contextmanager
def training(
    workload: Workload, recipe: Recipe, callbacks: Any = (), **options: Any
) -> Iterator[Training]:
    with join_ranks(recipe, **options) as ranks:
        device = options.get("device", "cpu")
        yield Training(workload, recipe, seed=3, ranks=ranks, callbacks=callbacks, device=device)


def test_each_example_is_seen_by_one_rank(pair: Pair) -> None:
    data = (X, torch.arange(48))
    recipe = two(13, replica_batches=(9, 4), micro_batch=4)

    def seen() -> list[int]:
        found: list[int] = []

        def compute_loss(model: nn.Module, batch: Any) -> tuple[Tensor, int]:
            found.extend(batch[1].tolist())
            return model(batch[0]).square().sum(), len(batch[1])

        workload = make(loss=None, compute_loss=compute_loss, train_data=data, val_data=None)
        train(workload, recipe, epochs=2, preflight=False)
        return found

    first, second = pair.both(seen)
    assert sorted(first + second) == sorted([*range(48)] * 2)
    assert len(first) > len(second) > 0


@pytest.mark.parametrize("where", ["loss", "weights"])
def test_a_rank_without_numbers_stops_all_at_the_same_update(pair: Pair, where: str) -> None:
    def steps_when(bad_rank: int, bad_step: int) -> tuple[int, bool]:
        calls = 0

        def compute_loss(model: nn.Module, batch: Any) -> tuple[Tensor, int]:
            nonlocal calls
            calls += 1
            loss = F.cross_entropy(model(batch[0]), batch[1], reduction="sum")
            if calls == bad_step and rank_here() == bad_rank:
                loss = loss * float("nan") if where == "loss" else loss + NanGradient.apply(loss)
            return loss, len(batch[1])

        workload = make(loss=None, compute_loss=compute_loss, val_data=None)
        with training(workload, two()) as run:
            run.advance(12)
            return run.steps, run.diverged

    for number in range(20):
        draw = random.Random(number)
        bad_rank, bad_step = draw.randrange(2), draw.randint(1, 11)
        first, second = pair.both(lambda r=bad_rank, s=bad_step: steps_when(r, s))
        # A gradient that is no number shows in the loss of the next update.
        expected = (bad_step + (where == "weights"), True)
        assert first == second == expected, f"case {number}: rank {bad_rank}, step {bad_step}"


class NanGradient(torch.autograd.Function):
    """Zero, whose derivative is no number."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.zeros_like(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0] * float("nan")


def test_one_rank_that_wants_to_stop_stops_all(pair: Pair) -> None:
    def stopped_at(asking: int) -> tuple[int, bool]:
        with training(make(), two()) as run:
            run.advance(4)
            if rank_here() == asking:
                run.stop_requested = True
            run.advance(4)
            return run.steps, run.stop_requested

    for asking in (0, 1):
        assert pair.both(lambda a=asking: stopped_at(a)) == [(5, True)] * 2


class Asks(Callback):
    """Stops the run at its second evaluation, and counts its calls."""

    def __init__(self) -> None:
        self.calls = 0

    def on_evaluation(self, training: Training, point: Point) -> None:
        self.calls += 1
        training.stop_requested = self.calls == 2


def test_callbacks_are_called_on_rank_0_and_may_stop_the_run(pair: Pair) -> None:
    def call() -> tuple[int, int, list[Point]]:
        watcher = Asks()
        run = train(make(), two(), epochs=9, callbacks=[watcher])
        return watcher.calls, run.steps, run.history

    first, second = pair.both(call)
    assert (first[0], second[0]) == (2, 0)
    assert first[1:] == second[1:]
    assert first[1] == 13


def test_all_ranks_meet_the_target_at_the_same_evaluation(pair: Pair) -> None:
    def call() -> tuple[int | None, int]:
        run = train(make(target="val_loss<=0.4"), two(), epochs=60, until_target=True)
        return run.steps_to_target, run.steps

    first, second = pair.both(call)
    assert first == second
    assert first[0] is not None and first[0] == first[1]


def test_rank_0_draws_as_a_single_process_and_others_differently(pair: Pair) -> None:
    def draw() -> list[float]:
        with join_ranks(two()) as ranks:
            run = Training(make(), two(), seed=3, ranks=ranks)
            with run._random.swapped_in():
                return torch.rand(4).tolist()

    alone = draw()
    first, second = pair.both(draw)
    assert first == alone
    assert not set(first) & set(second)


def test_buffers_are_those_of_rank_0(pair: Pair) -> None:
    """BatchNorm, and a module that puts a new tensor in the place of a buffer."""

    def call() -> tuple[dict[str, Tensor], int]:
        workload = make(
            make_model=lambda: nn.Sequential(
                nn.Linear(5, 6), nn.BatchNorm1d(6), Follows(), nn.Linear(6, 2)
            )
        )
        with training(workload, two(9, replica_batches=(6, 3))) as run:
            run.advance(7)
            return run.model.state_dict(), run.steps

    (first, _), (second, _) = pair.both(call)
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []
    assert int(first["1.num_batches_tracked"]) == 7
    assert float(first["2.seen"]) == 6 * 6 + 3  # the 3 that end the epoch are too few for two


class Follows(nn.Module):
    """Counts the examples that it has seen in training, in a buffer made anew each time."""

    seen: Tensor
    table: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))
        self.register_buffer("table", torch.arange(5.0))

    def forward(self, x: Tensor) -> Tensor:
        if self.training and torch.is_grad_enabled():
            self.seen = self.seen + len(x)
        return x


class Branches(nn.Module):
    """Uses one layer for every rank, one for rank 1 alone, and one never."""

    def __init__(self) -> None:
        super().__init__()
        self.common, self.other, self.never = (nn.Linear(5, 2).double() for _ in range(3))

    def logits(self, x: Tensor, flags: Tensor) -> Tensor:
        result = self.common(x)
        return result + self.other(x) * flags[:, None] if bool(flags.any()) else result


def test_parameters_that_some_or_all_ranks_do_not_use(pair: Pair) -> None:
    """Called by another name than `forward`; what no rank used does not even decay."""
    flags = torch.zeros(48, dtype=torch.float64)
    flags[::7] = 1.0

    def compute_loss(model: Any, batch: Any) -> tuple[Tensor, int]:
        x, y, flags = batch
        return F.cross_entropy(model.logits(x, flags), y, reduction="sum"), len(y)

    def call() -> dict[str, Tensor]:
        workload = make(
            make_model=Branches,
            train_data={"x": X.double(), "y": Y, "f": flags},
            val_data=None,
            loss=None,
            compute_loss=lambda model, batch: compute_loss(model, (*batch.values(),)),
            make_optimizer=lambda p, lr: torch.optim.SGD(p, lr=lr, momentum=0.9, weight_decay=0.1),
        )
        with training(workload, two(4, micro_batch=1)) as run:
            run.advance(20)
            return run.model.state_dict()

    alone = call()
    first, second = pair.both(call)
    for name in alone:
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], alone[name], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_lower_precision(pair: Pair, precision: Any) -> None:
    recipe = two(precision=precision, clip_norm=1.0)

    def call() -> tuple[Tensor, float]:
        with training(make(), recipe) as run:
            run.advance(20)
            return weights(run.model), run.recent_train_loss()

    alone = call()
    first, second = pair.both(call)
    assert torch.equal(first[0], second[0])
    torch.testing.assert_close(first[0], alone[0], rtol=0.05, atol=0.02)


# --------------------------------------------------------------------------------------- the noise


def gaussian(num_examples: int = 4096) -> Workload:
    """Loss −θ·x: the gradient of an example is −x, so that |G|² = 2 and S = 8 · 4 = 32."""
    generator = torch.Generator().manual_seed(5)
    x = 2 * torch.randn(num_examples, 8, dtype=torch.float64, generator=generator)
    x -= x.mean(0)
    x += 0.5
    return make(
        make_model=lambda: nn.Linear(8, 1, bias=False, dtype=torch.float64),
        train_data=(x, torch.zeros(num_examples)),
        val_data=None,
        loss=None,
        compute_loss=lambda model, batch: (model(batch[0]).sum(), len(batch[1])),
    )


@pytest.mark.parametrize(("share", "micro"), [((24, 8), 24), ((16, 16), 16), ((24, 8), 8)])
def test_the_ranks_gradients_give_the_noise_scale(
    pair: Pair, share: tuple[int, int], micro: int
) -> None:
    recipe = two(
        32, replica_batches=share, micro_batch=micro, batch_policy="follow-noise",
        largest_batch=32, learning_rate=1e-3,
    )  # fmt: skip

    def call() -> Tensor:
        draws: list[Any] = []
        before, window_noise.PAUSE = window_noise.PAUSE, 1
        try:
            with training(gaussian(), recipe) as run:
                assert run.noise is not None
                add = run.noise.add

                def watched(draw: Any, num_examples: int) -> bool:
                    draws.append(draw.moments(num_examples))
                    return add(draw, num_examples)

                run.noise.add = watched
                run.advance(400)
        finally:
            window_noise.PAUSE = before
        return torch.tensor(draws, dtype=torch.float64)

    first, second = pair.both(call)
    assert torch.equal(first, second)
    assert len(first) == 400
    error = first.std(0) / 20
    assert bool(((first.mean(0) - torch.tensor([2.0, 32.0])).abs() < 4 * error).all()), first.mean(
        0
    )
    assert error[0] < 0.1
    assert error[1] < 1.5


def test_the_batch_follows_the_noise_alike_on_all_ranks(pair: Pair) -> None:
    """A quadratic: the gradient falls and its noise stays, so that the noise scale rises."""
    recipe = two(4, batch_policy="follow-noise", largest_batch=24, learning_rate=1e-3)
    x = 0.5 * torch.randn(600, 8, generator=torch.Generator().manual_seed(2)) + 3
    workload = make(
        make_model=lambda: nn.Linear(8, 1, bias=False),
        train_data=(x, torch.zeros(600)),
        val_data=None,
        loss=None,
        compute_loss=lambda model, batch: (
            (model.weight - batch[0]).square().sum() / 2,
            len(batch[1]),
        ),
    )

    def call() -> tuple[list[int], Tensor]:
        with training(workload, recipe) as run:
            sizes = []
            while run.steps < 60 * PAUSE:
                before = run.examples
                run.advance(7)
                sizes.append(run.examples - before)
            return sizes, weights(run.model)

    first, second = pair.both(call)
    assert first[0] == second[0]
    assert torch.equal(first[1], second[1])
    assert first[0][0] == 28 < max(first[0]) <= 7 * 24


def test_adascale_with_one_micro_batch_a_rank(pair: Pair) -> None:
    """At batch 4: S/4 = 8 and |G|² = 2, so a batch of 16 is worth (8 + 2)/(8/4 + 2) = 2.5 steps."""
    recipe = two(4, batch_ramp=((1600, 16),), rate_rule="adascale")

    def call() -> tuple[float, float]:
        with training(gaussian(), recipe) as run:
            run.advance(600)
            return run.gained, run.optimizer.param_groups[0]["lr"]

    first, second = pair.both(call)
    assert first == second
    assert 0.2 < first[1] < 0.35


# ------------------------------------------------------------------------------------- one verdict


def fail_on(
    failing: int, step: int, error: Callable[[], BaseException], recipe: Recipe
) -> Callable[[], int]:
    """A training of which one rank raises something in one of its passes."""

    def call() -> int:
        calls = 0

        def compute_loss(model: nn.Module, batch: Any) -> tuple[Tensor, int]:
            nonlocal calls
            calls += 1
            loss = F.cross_entropy(model(batch[0]), batch[1], reduction="sum")
            if calls == step and rank_here() == failing:
                raise error()
            return loss, len(batch[1])

        workload = make(loss=None, compute_loss=compute_loss, val_data=None)
        return train(workload, recipe, steps=20, preflight=False).steps

    return call


@pytest.mark.parametrize("failing", [0, 1])
@pytest.mark.parametrize("step", [1, 2, 7])
def test_a_rank_out_of_memory_is_one_verdict(pair: Pair, failing: int, step: int) -> None:
    def error() -> BaseException:
        return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    start = time.monotonic()
    kind, message = pair.both_raise(fail_on(failing, step, error, two(8, micro_batch=2)))
    assert time.monotonic() - start < 5
    assert kind == "ReplicaOutOfMemoryError"
    assert f"Rank {failing} ran out of memory after update {(step - 1) // 2}" in message
    assert "micro-batches of 2 (CUDA out of memory. Tried to allocate 2.00 GiB)" in message
    assert "a smaller micro_batch" in message


def test_other_errors_keep_their_words(pair: Pair) -> None:
    kind, message = pair.both_raise(fail_on(1, 3, lambda: KeyError("no such row"), two()))
    assert kind == "ReplicaError"
    assert "Rank 1 failed after update 2 with KeyError: 'no such row'." in message
    kind, message = pair.both_raise(fail_on(0, 3, lambda: RecipeError("Not so."), two()))
    assert (kind, message) == ("RecipeError", "Rank 0: Not so.")


class RaggedData(torch.utils.data.Dataset[Any]):
    """Cannot read one of its examples."""

    def __len__(self) -> int:
        return 48

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if index == 17:
            raise OSError(5, "disk on fire")
        return X[index], Y[index]


class Raises(Callback):
    """A callback with a fault."""

    def on_evaluation(self, training: Training, point: Point) -> None:
        raise RuntimeError("callback on fire")


def test_a_failure_between_updates_is_one_verdict_too(pair: Pair) -> None:
    """While reading data, and in a callback of rank 0: the others wait in the next update."""
    kind, message = pair.both_raise(
        lambda: train(make(train_data=RaggedData()), two(), epochs=3).steps
    )
    assert kind == "ReplicaError"
    assert "OSError: [Errno 5] disk on fire" in message
    kind, message = pair.both_raise(
        lambda: train(make(), two(), epochs=3, callbacks=[Raises()]).steps
    )
    assert kind == "ReplicaError"
    assert "Rank 0 failed after update 5 with RuntimeError: callback on fire." in message


@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_rank_is_named_by_the_others(killed: int) -> None:
    check_killed(killed, 4)


def check_killed(killed: int, step: int) -> None:
    both = Pair()
    try:

        def die() -> BaseException:
            os.kill(os.getpid(), signal.SIGKILL)
            return RuntimeError()

        start = time.monotonic()
        answers = both.answers(fail_on(killed, step, die, two()))
        assert time.monotonic() - start < LIMIT_SECONDS
    finally:
        both.stop()
    assert answers[killed] is None
    raised, kind, message, _ = answers[1 - killed]
    assert (raised, kind) == ("raised", "ReplicaVanishedError")
    assert message.startswith(f"Rank {killed} vanished after update {step - 1} without a word")


def test_ranks_that_were_given_different_things_say_so(pair: Pair) -> None:
    def by_rank(workload: Workload, recipe: Recipe, seed: int = 0) -> int:
        return train(workload, recipe, steps=2, seed=seed).steps

    def other(**changes: Any) -> Recipe:
        return two(**changes) if rank_here() else two()

    kind, message = pair.both_raise(lambda: by_rank(make(), other(learning_rate=0.2)))
    assert kind == "UsageError"
    assert "recipe.learning_rate is 0.1 on rank 0 and 0.2 on rank 1. Give all" in message
    kind, message = pair.both_raise(lambda: by_rank(make(), two(), seed=rank_here()))
    assert "seed is 0 on rank 0 and 1 on rank 1. Start all" in message
    data = lambda: (X[: 48 - rank_here()], Y[: 48 - rank_here()])  # noqa: E731
    _, message = pair.both_raise(lambda: by_rank(make(train_data=data()), two()))
    assert "num_examples is 48 on rank 0 and 47 on rank 1" in message

    def unseeded() -> nn.Module:
        model = nn.Linear(5, 2)
        nn.init.constant_(model.bias, rank_here())
        return model

    _, message = pair.both_raise(lambda: by_rank(make(make_model=unseeded), two()))
    assert "make_model draws from something else" in message


def test_replicas_must_be_the_number_of_processes(pair: Pair) -> None:
    kind, message = pair.both_raise(
        lambda: train(make(), Recipe(global_batch=8, learning_rate=0.1), steps=1).steps
    )
    assert kind == "RecipeError"
    assert message == (
        "recipe.replicas is 1, but 2 processes train. Use recipe.replace(replicas=2) "
        "(--set replicas=2), or start 1 (torchrun --nproc-per-node 1)."
    )


# ------------------------------------------------------------------------------------------ shards


def shardable(**changes: Any) -> Workload:
    """Blocks, parameters outside them, momentum, and numbers in which 1e-12 can be seen."""
    return make(
        train_data=(X.double(), Y),
        val_data=(X.double(), Y),
        make_model=lambda: nn.Sequential(
            nn.Linear(5, 7), nn.Tanh(), nn.Sequential(nn.Linear(7, 6), nn.Tanh()), nn.Linear(6, 2)
        ).double(),
        make_optimizer=lambda p, lr: torch.optim.SGD(p, lr=lr, momentum=0.9),
        **changes,
    )


@pytest.mark.parametrize("sharding", ["fsdp", "replicated"])
@pytest.mark.parametrize(
    "changes",
    [
        {"global_batch": 8, "clip_norm": 0.1},
        {"global_batch": 9, "replica_batches": (7, 2), "micro_batch": 2},
        {"global_batch": 7, "replica_batches": (6, 1), "micro_batch": 3, "last_batch": "pad"},
        {"global_batch": 46, "micro_batch": 23, "activation_checkpointing": True},
        {"global_batch": 8, "micro_batch": 1, "reduction": "sum", "learning_rate": 0.01},
        {"global_batch": 47, "replica_batches": (40, 7), "micro_batch": 9},
    ],
)
def test_shards_are_one_process(pair: Pair, sharding: Any, changes: dict[str, Any]) -> None:
    recipe = two(sharding=sharding, **changes)
    alone = run_case(shardable(), recipe, 9)
    first, second = pair.both(lambda: run_case(shardable(), recipe, 9))
    assert torch.equal(first["weights"], second["weights"])
    assert first["place"] == alone["place"]
    torch.testing.assert_close(first["weights"], alone["weights"], rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(first["losses"], alone["losses"], rtol=1e-12, atol=1e-14)


def test_a_rank_that_makes_up_passes_leaves_no_trace(pair: Pair) -> None:
    """Masked examples whose loss is no number; a passing rank draws no numbers for dropout."""
    targets = torch.full((48, 3), -100)
    targets[24:] = 1

    def call() -> tuple[Tensor, bool, list[float]]:
        workload = make(
            make_model=lambda: nn.Sequential(nn.Linear(5, 2), nn.Dropout(0.5), nn.Tanh()),
            train_data=(X[:, None].repeat(1, 3, 1), targets),
            val_data=None,
            loss=lambda o, t: F.cross_entropy(o.transpose(1, 2), t),
        )
        recipe = two(3, replica_batches=(1, 2), micro_batch=1, sharding="fsdp")
        with training(workload, recipe) as run:
            run.advance(40)
            with run._random.swapped_in():
                drawn = torch.rand(2).tolist()
            return weights(run.whole_model()), run.diverged, drawn

    first, second = pair.both(call)
    assert torch.equal(first[0], second[0])
    assert bool(first[0].isfinite().all())
    assert not first[1]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"precision": "float16"}, "float16"),
        ({"compile": "eager"}, "compile"),
        ({"batch_policy": "follow-noise", "rate_rule": "adascale"}, "follow-noise' and rate_rule"),
    ],
)
def test_what_shards_cannot_do_is_refused(pair: Pair, changes: dict[str, Any], named: str) -> None:
    recipe = two(sharding="fsdp", **changes)
    kind, message = pair.both_raise(lambda: train(make(), recipe, steps=1).steps)
    assert kind == "RecipeError"
    assert named in message


def test_a_layer_that_waits_for_ranks_by_itself_is_refused(pair: Pair) -> None:
    workload = make(
        make_model=lambda: nn.Sequential(nn.Linear(5, 6), nn.SyncBatchNorm(6), nn.Linear(6, 2))
    )
    kind, message = pair.both_raise(lambda: train(workload, two(), steps=1, preflight=False).steps)
    assert kind == "WorkloadError"
    assert "Layer '1' is a SyncBatchNorm" in message


def test_a_failing_rank_of_shards_is_one_verdict() -> None:
    """Shards keep their connections until the process ends, as it does after an error."""
    fail = fail_on(1, 3, MemoryError, two(sharding="fsdp"))

    def call() -> int:
        try:
            return fail()
        except ReplicaOutOfMemoryError as error:
            if rank_here() == 1:
                raise SystemExit from error
            raise

    both = Pair()
    try:
        answers = both.answers(call)
    finally:
        both.stop()
    assert answers[1] is None
    assert answers[0][:2] == ("raised", "ReplicaOutOfMemoryError")
    assert "Rank 1 ran out of memory after update 2" in answers[0][2]


# ------------------------------------------------------------------------------------ checkpoints


def droppy() -> Workload:
    """What a checkpoint must hold of every rank: dropout, buffers, Adam's moments."""
    return make(
        make_model=lambda: nn.Sequential(
            nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.3)),
            nn.Linear(6, 2),
        ),
        make_optimizer=lambda p, lr: torch.optim.Adam(p, lr=lr),
    )  # fmt: skip


class StopsAt(Callback):
    """Asks rank 0 to stop after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step(self, training: Training) -> None:
        training.stop_requested = training.steps >= self.step


@pytest.mark.parametrize("sharding", ["replicated", "fsdp"])
def test_a_resumed_run_on_ranks_has_the_same_bits(
    pair: Pair, sharding: Any, tmp_path: Path
) -> None:
    recipe = two(9, replica_batches=(6, 3), learning_rate=0.01, sharding=sharding)
    options: dict[str, Any] = {"epochs": 4, "seed": 3, "preflight": False}

    def whole() -> tuple[Tensor, list[Point]]:
        run = train(droppy(), recipe, **options)
        return weights(run.model), run.history

    def begun() -> tuple[str, int, str]:
        run = train(droppy(), recipe, callbacks=[StopsAt(8)], run_directory=tmp_path, **options)
        return run.state, run.steps, str(run.checkpoint)

    def resumed() -> tuple[Tensor, list[Point]]:
        run = train(droppy(), recipe, run_directory=tmp_path, resume=True, **options)
        return weights(run.model), run.history

    expected = pair.both(whole)
    first, second = pair.both(begun)
    assert first == second
    assert first[:2] == ("stopped", 9)  # the ninth is the update in which all learn of it
    actual = pair.both(resumed)
    for rank in range(2):
        assert torch.equal(actual[rank][0], expected[rank][0])
        assert actual[rank][1] == expected[rank][1]


def test_a_checkpoint_by_the_clock_is_of_one_step(pair: Pair, tmp_path: Path) -> None:
    """Clocks of ranks differ; they save together, where the first of them finds it is time."""

    def call() -> tuple[str, int, Tensor]:
        running: Any = importlib.import_module("rightbatch.training.run")
        saver = saving.Saver
        seconds = 0.05 if rank_here() else 0.5
        running.Saver = partial(saver, seconds_between=seconds)
        try:
            run = train(make(), two(), steps=400, seed=3, run_directory=tmp_path / "run")
        finally:
            running.Saver = saver
        return str(run.checkpoint), run.steps, weights(run.model)

    first, second = pair.both(call)
    assert first[:2] == second[:2]
    assert first[0].endswith("step-000000000400.checkpoint")
    alone = train(make(), two(), steps=400, seed=3)
    torch.testing.assert_close(first[2], weights(alone.model), rtol=1e-4, atol=1e-5)


def test_a_folder_of_another_run_is_refused_by_all(pair: Pair, tmp_path: Path) -> None:
    def call() -> int:
        return train(make(), two(), steps=3, run_directory=tmp_path).steps

    assert pair.both(call) == [3, 3]
    kind, message = pair.both_raise(call)
    assert kind == "UsageError"
    assert "already holds checkpoints" in message


# ------------------------------------------------------------------------------------------- sinks


class FileSink(Sink):
    """Writes to a file of its rank, as long as it is well."""

    name, package, extra = "file", "torch", "file"

    def __init__(self, folder: Path, ill: str = "", **thinning: Any) -> None:
        super().__init__(every=1, patience_seconds=0.3, **thinning)
        self.folder, self.ill = folder, ill

    def open_writer(self, settings: Any) -> Any:
        self.fall_ill("open")
        self.path = self.folder / f"rank-{rank_here()}.jsonl"
        self.path.touch()
        return self

    def fall_ill(self, where: str) -> None:
        if self.ill == where:
            raise OSError("the disk is gone")
        if self.ill == f"hang in {where}":
            time.sleep(20)

    def write(self, values: Any, step: int) -> None:
        self.fall_ill("write")
        with self.path.open("a") as file:
            file.write(json.dumps([step, values]) + "\n")


def sunk(sharding: Any, make_sink: Callable[[], list[Callback]]) -> tuple[Tensor, int, Any]:
    """A run with a sink, on this rank."""
    recipe = two(9, replica_batches=(6, 3), sharding=sharding)
    run = train(shardable(), recipe, epochs=3, seed=3, callbacks=make_sink(), preflight=False)
    points = [(p.step, p.train_loss, p.val_loss) for p in run.history]
    return weights(run.model), run.steps, points


@pytest.mark.parametrize("sharding", ["replicated", "fsdp"])
@pytest.mark.parametrize("ill", ["", "open", "write", "hang in open", "hang in write"])
def test_a_sink_is_rank_0s_and_stops_nobody(
    pair: Pair, sharding: Any, ill: str, tmp_path: Path
) -> None:
    plain = pair.both(lambda: sunk(sharding, list))
    start = time.monotonic()
    answers = pair.both(lambda: sunk(sharding, lambda: [FileSink(tmp_path, ill)]))
    assert time.monotonic() - start < 15
    for answer, wanted in zip(answers, plain, strict=True):
        assert torch.equal(answer[0], wanted[0])
        assert answer[1:] == wanted[1:]
    files = {file.name: file.read_text().splitlines() for file in tmp_path.iterdir()}
    assert set(files) <= {"rank-0.jsonl"}
    if not ill:
        records = [json.loads(line) for line in files["rank-0.jsonl"]]
        steps = [step for step, values in records if "train/loss" in values]
        assert steps == list(range(1, plain[0][1] + 1))
        norms = [values["train/gradient_norm"] for _, values in records if "train/loss" in values]
        assert all(norm > 0 for norm in norms)


@pytest.mark.parametrize("sharding", ["replicated", "fsdp"])
def test_a_sink_that_only_rank_0_was_given(pair: Pair, sharding: Any, tmp_path: Path) -> None:
    """As programs do that ask for their rank themselves."""

    def here() -> list[Callback]:
        return [FileSink(tmp_path)] if rank_here() == 0 else []

    plain = pair.both(lambda: sunk(sharding, list))
    answers = pair.both(lambda: sunk(sharding, here))
    for answer, wanted in zip(answers, plain, strict=True):
        assert torch.equal(answer[0], wanted[0])
    assert len((tmp_path / "rank-0.jsonl").read_text().splitlines()) > plain[0][1]


@pytest.mark.filterwarnings("ignore")
def test_tensorboard_on_two_ranks(pair: Pair, tmp_path: Path) -> None:
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", exc_type=ImportError
    )

    def sinks() -> list[Callback]:
        warnings.simplefilter("ignore")  # TensorBoard's own
        return [TensorBoardSink(tmp_path, every=1)]

    first, second = pair.both(lambda: sunk("replicated", sinks))
    assert torch.equal(first[0], second[0])
    assert len(list(tmp_path.iterdir())) == 1
    events = accumulator.EventAccumulator(str(tmp_path)).Reload()
    steps = [event.step for event in events.Scalars("train/loss")]
    assert steps == list(range(1, first[1] + 1))


# --------------------------------------------------------------------------------------- torchrun

SCRIPT = """
import os, signal, sys
import torch
from torch import nn
from torch.nn import functional as F
from rightbatch import Recipe, Workload, train

X = torch.randn(48, 5, generator=torch.Generator().manual_seed(0))
Y = (X[:, 0] > 0).long()
calls = 0

def loss(model, batch):
    global calls
    calls += 1
    if calls == 5 and os.environ["RANK"] == "1":
        if sys.argv[1] == "memory":
            raise MemoryError
        if sys.argv[1] == "signal":
            os.kill(os.getppid(), signal.SIGTERM)
    return F.cross_entropy(model(batch[0]), batch[1], reduction="sum"), len(batch[1])

workload = Workload(
    name="toy", make_model=lambda: nn.Linear(5, 2), train_data=(X, Y), compute_loss=loss
)
recipe = Recipe(global_batch=8, replicas=2, learning_rate=0.1)
run = train(workload, recipe, steps=12 if sys.argv[1] in ("plain", "memory") else 600, seed=3,
            run_directory=sys.argv[2], resume=sys.argv[1] == "resume")
# In one write: two ranks share the pipe.
sys.stdout.write(f"done {run.steps} {run.train_loss!r}\\n")
sys.stdout.flush()
"""


def torchrun(tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, "2", str(script), *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        env=environment,
        check=False,
    )


def test_torchrun(tmp_path: Path) -> None:
    ended = torchrun(tmp_path, "plain", str(tmp_path / "run"))
    assert ended.returncode == 0, ended.stderr
    lines = [line for line in ended.stdout.splitlines() if line.startswith("done")]
    assert len(lines) == 2
    assert len(set(lines)) == 1
    assert lines[0].startswith("done 12 ")


def test_torchrun_with_a_rank_out_of_memory(tmp_path: Path) -> None:
    ended = torchrun(tmp_path, "memory", str(tmp_path / "run"))
    assert ended.returncode == 1
    assert "ReplicaOutOfMemoryError: Rank 1 ran out of memory after update 4" in ended.stderr


@pytest.mark.slow
def test_torchrun_that_is_terminated_saves_and_goes_on(tmp_path: Path) -> None:
    ended = torchrun(tmp_path, "signal", str(tmp_path / "run"))
    assert ended.returncode != 0
    [saved] = [*(tmp_path / "run" / "checkpoints").glob("step-*.checkpoint")]
    assert 0 < int(saved.stem.removeprefix("step-")) < 600
    resumed = torchrun(tmp_path, "resume", str(tmp_path / "run"))
    assert resumed.returncode == 0, resumed.stderr
    uncut = torchrun(tmp_path, "whole", str(tmp_path / "other"))
    lines = {line for line in (resumed.stdout + uncut.stdout).splitlines() if "done" in line}
    assert len(lines) == 1


@pytest.mark.slow
@pytest.mark.parametrize("block", range(10))
def test_verdicts_in_many_places(pair: Pair, block: int) -> None:
    """T13 and T17: a rank without numbers, or out of memory, at a drawn update."""
    for number in range(4 * block, 4 * block + 4):
        draw = random.Random(number)
        failing, step = draw.randrange(2), draw.randint(1, 20)
        micro = draw.choice([1, 2, 4])
        passes = 4 // micro
        print(f"case {number}: rank {failing}, pass {step}, micro-batches of {micro}")
        error = draw.choice([MemoryError, torch.OutOfMemoryError])
        kind, message = pair.both_raise(
            fail_on(failing, step, lambda e=error: e("CUDA out of memory."), two(micro_batch=micro))
        )
        assert kind == "ReplicaOutOfMemoryError"
        assert f"Rank {failing} ran out of memory after update {(step - 1) // passes}" in message


@pytest.mark.slow
@pytest.mark.parametrize("case", range(20))
def test_killed_in_many_places(case: int) -> None:
    draw = random.Random(case)
    killed, step = draw.randrange(2), draw.randint(1, 15)
    check_killed(killed, step)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("sharding", ["replicated", "fsdp"])
def test_two_ranks_on_one_gpu(pair: Pair, sharding: Any) -> None:
    """Over gloo, since NCCL refuses two ranks on one device."""
    recipe = two(9, replica_batches=(6, 3), micro_batch=2, sharding=sharding)

    def call() -> tuple[Tensor, int]:
        with training(shardable(), recipe, device="cuda:0", backend="gloo") as run:
            run.advance(40)
            return weights(run.whole_model()).cpu(), run.steps

    alone = Training(shardable(), recipe, seed=3, device="cuda:0")
    alone.advance(40)
    first, second = pair.both(call)
    assert torch.equal(first[0], second[0])
    torch.testing.assert_close(first[0], weights(alone.model).cpu(), rtol=1e-10, atol=1e-12)
