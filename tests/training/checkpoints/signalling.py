"""Trains by the command line in child processes that get signals; run by test_kills.py.

One process imports everything, then forks a child for every training. Prints one JSON object a
trial.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rightbatch.cli import main as command
from rightbatch.training.checkpoints.checkpoint import load_checkpoint
from rightbatch.training.checkpoints.saving import FOLDER

TRAIN = ["train", "max3", "--json", "-q"]
BEGIN = ["--batch-size", "10", "--learning-rate", "0.1", "--epochs", "15"]


def answer(arguments: list[str]) -> dict[str, Any]:
    """What the command prints, run in this process."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        code = command([*TRAIN, *arguments])
    assert code == 0, printed.getvalue()
    return json.loads(printed.getvalue())


def trial(seed: int) -> dict[str, Any]:
    """One training that gets a signal and is resumed."""
    draw = random.Random(seed)
    number = draw.choice([signal.SIGINT, signal.SIGTERM])
    base = Path(tempfile.mkdtemp())
    folder = base / "run"
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        os._exit(command([*TRAIN, *BEGIN, "--run", str(folder), "--checkpoint-every", "50"]))
    try:
        until = time.monotonic() + 30
        while not list(folder.glob("checkpoints/*.checkpoint")) and time.monotonic() < until:
            time.sleep(0.002)
        time.sleep(draw.uniform(0, 0.25))
        start = time.monotonic()
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, number)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        seconds = time.monotonic() - start
        loaded = load_checkpoint(folder / FOLDER)
        complete = (folder / "model.safetensors").exists()
        return {
            "seed": seed,
            "signal": int(number),
            "code": code,
            "seconds": seconds,
            "steps": 0 if loaded is None else loaded.steps,
            "complete": complete,
            "resumed": answer(["--resume", str(folder)])["parameters_sha256"],
        }
    finally:
        shutil.rmtree(base)


def main() -> None:
    """Arguments: first seed, number of trials."""
    print(json.dumps({"hash": answer([*BEGIN, "--no-run"])["parameters_sha256"]}), flush=True)
    for seed in range(int(sys.argv[1]), int(sys.argv[1]) + int(sys.argv[2])):
        print(json.dumps(trial(seed)), flush=True)


if __name__ == "__main__":
    main()
