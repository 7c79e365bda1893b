"""Training survives kill -9 and signals at any time: T1, T2 and T12 of what it must survive.

A few of each run always; `make faults` runs the full counts. Seeds are printed.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

KILLING = Path(__file__).parent / "killing.py"
SIGNALLING = Path(__file__).parent / "signalling.py"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def reports(script: Path, *arguments: int | str) -> list[dict[str, Any]]:
    command = [sys.executable, str(script), *map(str, arguments)]
    done = subprocess.run(
        command, env=ENVIRONMENT, capture_output=True, text=True, check=False, timeout=1200
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def check_kills(first_seed: int, wanted: int, data: str = "tensors") -> None:
    whole, *trials = reports(KILLING, first_seed, wanted, data)
    print(f"seeds {first_seed} to {trials[-1]['seed']}")
    assert sum(trial["kills"] for trial in trials) >= wanted
    for trial in trials:
        assert trial["hash"] == whole["hash"], trial
        # At most one interval is done again.
        assert trial["redone"] <= 5, trial
    assert max(trial["redone"] for trial in trials) > 0


def test_a_killed_training_ends_as_if_it_had_not_been() -> None:
    check_kills(0, 40)


@pytest.mark.faults
@pytest.mark.timeout(1200)
def test_a_training_killed_200_times_ends_as_if_it_had_not_been() -> None:
    check_kills(1000, 200)


@pytest.mark.parametrize("data", ["stream", "stateful"])
def test_a_stream_that_was_killed_or_stopped_is_found_again(data: str) -> None:
    check_kills(0, 8, data)


@pytest.mark.faults
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("data", ["stream", "stateful"])
def test_a_stream_killed_or_stopped_200_times_is_found_again(data: str) -> None:
    check_kills(1000, 200, data)


# -------------------------------------------------------------------------------- from a cold start


def command_line(folder: Path, *options: str) -> list[str]:
    # The batch doubles in the middle of the second epoch.
    return [
        *(sys.executable, "-m", "rightbatch", "train", "max3", "--json", "-q"),
        *(options or ("--batch-size", "20", "--learning-rate", "0.3", "--epochs", "12")),
        *(() if options else ("--set", "batch_ramp=[[1500,40]]", "--checkpoint-every", "20")),
        *(() if options else ("--run", str(folder))),
    ]


def check_cold_kills(tmp_path: Path, seeds: range) -> None:
    def result(folder: Path, *options: str) -> dict[str, Any]:
        done = subprocess.run(
            command_line(folder, *options), env=ENVIRONMENT, capture_output=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    wanted = result(tmp_path / "whole")["parameters_sha256"]
    for seed in seeds:
        draw, folder = random.Random(seed), tmp_path / str(seed)
        workers = ("--workers", str(2 * (seed % 2)))
        process = subprocess.Popen(
            [*command_line(folder), *workers], env=ENVIRONMENT, stdout=subprocess.PIPE
        )
        until = time.monotonic() + 60
        while not list(folder.glob("checkpoints/*.checkpoint")) and time.monotonic() < until:
            if process.poll() is not None:
                break
            time.sleep(0.001)
        time.sleep(draw.uniform(0, 0.1))
        process.kill()
        process.communicate()
        resumed = result(folder, "--resume", str(folder), *workers)
        assert resumed["parameters_sha256"] == wanted, f"seed {seed}"
        assert (resumed["state"], resumed["epochs"]) == ("complete", 12.0)


def test_a_cold_start_goes_on_with_and_without_loader_workers(tmp_path: Path) -> None:
    check_cold_kills(tmp_path, range(2))


@pytest.mark.faults
@pytest.mark.timeout(1200)
def test_thirty_cold_starts(tmp_path: Path) -> None:
    check_cold_kills(tmp_path, range(100, 130))


STREAM = """
import random, torch, rightbatch as rb

class Stream:
    def __iter__(self):
        for _ in range(400):
            x = torch.randn(4) + random.random()
            yield x, (x[:1] > 0).float()

workload = rb.Workload(
    name="stream",
    make_model=lambda: torch.nn.Linear(4, 1),
    train_data=Stream(),
    loss=torch.nn.functional.mse_loss,
)
"""


def test_the_command_line_goes_on_with_a_stream(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(STREAM)
    # Where a stream counts as long, so that the command need not read 16,384 examples of it first.
    start = (
        "import sys, rightbatch.workload.data as data; data.STREAM_EXAMPLES = 50; "
        "from rightbatch.cli import run_and_exit; run_and_exit()"
    )
    whole, folder = tmp_path / "whole", tmp_path / "run"
    command = [sys.executable, "-c", start, "train", "mine.py:workload", "--json", "-q"]
    begin = ["--batch-size", "8", "--learning-rate", "0.01", "--steps", "600"]
    every = ["--checkpoint-every", "20", "--run"]

    def outcome(*options: str) -> dict[str, Any]:
        done = subprocess.run(
            [*command, *options], env=ENVIRONMENT, cwd=tmp_path, capture_output=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    wanted = outcome(*begin, "--run", str(whole))
    with subprocess.Popen(
        [*command, *begin, *every, str(folder)],
        env=ENVIRONMENT,
        cwd=tmp_path,
        stdout=subprocess.PIPE,
    ) as process:
        until = time.monotonic() + 60
        while len(list(folder.glob("checkpoints/*.checkpoint"))) < 2 and time.monotonic() < until:
            time.sleep(0.002)
        process.terminate()
        assert process.wait(timeout=20) == 143
    resumed = outcome("--resume", str(folder))
    assert resumed["state"] == "complete"
    assert resumed["parameters_sha256"] == wanted["parameters_sha256"]


# ------------------------------------------------------------------------------------------ signals


def check_signals(first_seed: int, wanted: int) -> None:
    whole, *trials = reports(SIGNALLING, first_seed, wanted)
    print(f"seeds {first_seed} to {first_seed + wanted - 1}")
    assert len(trials) == wanted
    for trial in trials:
        expected = {signal.SIGINT: 130, signal.SIGTERM: 143}[trial["signal"]]
        # A signal that comes after the last update finds a run that is complete.
        assert trial["code"] == expected or (trial["code"] == 0 and trial["complete"]), trial
        assert trial["resumed"] == whole["hash"], trial
        assert trial["seconds"] < 2, trial
    assert sum(trial["code"] != 0 for trial in trials) > wanted / 2
    assert all(trial["steps"] > 0 for trial in trials if trial["code"] != 0)


def test_signals_stop_a_training_and_it_goes_on() -> None:
    check_signals(0, 12)


@pytest.mark.faults
@pytest.mark.timeout(1200)
def test_sixty_signals() -> None:
    check_signals(500, 60)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_second_signal_ends_it_at_once(number: signal.Signals, code: int, tmp_path: Path) -> None:
    """In an update that takes ten seconds, the first signal waits; the second does not."""
    script = tmp_path / "slow.py"
    script.write_text(
        "import time, torch, rightbatch as rb\n"
        "def loss(outputs, targets):\n"
        "    print('in', flush=True)\n"
        "    time.sleep(10)\n"
        "    return (outputs - targets).square().mean()\n"
        "data = (torch.ones(8, 1), torch.ones(8, 1))\n"
        "workload = rb.Workload(\n"
        "    name='slow', make_model=lambda: torch.nn.Linear(1, 1), train_data=data, loss=loss)\n"
        "recipe = rb.Recipe(global_batch=8, learning_rate=0.1)\n"
        f"rb.train(workload, recipe, steps=9, run_directory={str(tmp_path / 'run')!r})\n"
    )
    with subprocess.Popen(
        [sys.executable, str(script)], env=ENVIRONMENT, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "in\n"
        process.send_signal(number)
        # Python sees a signal between two of its instructions; the sleep goes on.
        time.sleep(0.3)
        assert process.poll() is None
        start = time.monotonic()
        process.send_signal(number)
        assert process.wait(timeout=5) == code
        assert time.monotonic() - start < 2
