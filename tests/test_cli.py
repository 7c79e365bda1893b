"""The command line as a user meets it: in a process of its own, and by its exit codes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import rightbatch
from rightbatch import Recipe, catalog, load_workload, train_stream
from rightbatch.cli import main
from rightbatch.errors import (
    CorruptStateError,
    DivergedError,
    NoBatchFitsError,
    ProbeError,
    UsageError,
)

Captured = pytest.CaptureFixture[str]
TRAIN = ["train", "max3", "--batch-size", "100", "--learning-rate", "0.3", "--epochs", "2"]


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs are kept in ./runs."""
    monkeypatch.chdir(tmp_path)


def start(*arguments: str, **changes: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "rightbatch", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **changes},
    )


# ---------------------------------------------------------------------------------- being quick


def test_help_imports_no_torch_and_is_instant() -> None:
    code = (
        "import sys; from rightbatch.cli import main; code = main(['--help']); "
        "heavy = {'torch', 'numpy', 'sklearn', 'scipy', 'jax', 'pydantic'} & set(sys.modules); "
        "print(heavy, file=sys.stderr); sys.exit(code or len(heavy))"
    )
    seconds: list[float] = []
    for _ in range(3):
        # Processor time: what it would take on a machine that does nothing else.
        begin = os.times()
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=False
        )
        end = os.times()
        user, system = end.children_user - begin.children_user, end.children_system
        seconds.append(user + system - begin.children_system)
        assert done.returncode == 0, done.stderr
        assert "Usage: rightbatch" in done.stdout
    assert min(seconds) < 0.4


@pytest.mark.parametrize("command", [["train"], ["plan"], ["probe", "memory"], ["workloads"]])
def test_every_command_explains_itself(command: list[str], capsys: Captured) -> None:
    assert main([*command, "--help"]) == 0
    out = capsys.readouterr().out
    assert "--json" in out
    assert "--quiet" in out
    assert max(len(line) for line in out.splitlines()) <= 80


# --------------------------------------------------------------------------------- the commands


def test_workloads_as_text_and_json(capsys: Captured) -> None:
    assert main(["workloads"]) == 0
    text = capsys.readouterr().out
    assert main(["workloads", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["schema"] == "rightbatch.workloads/1"
    assert [w["name"] for w in data["workloads"]] == catalog.names()
    for line in data["workloads"]:
        assert line["name"] in text
        assert line["description"] in text, "the table cuts a description"
    assert max(len(line) for line in text.splitlines()) <= 80


def test_train_json_has_the_documented_fields(capsys: Captured) -> None:
    assert main([*TRAIN, "--json", "--seed", "3"]) == 0
    captured = capsys.readouterr()
    data = json.loads(captured.out)
    assert data["schema"] == "rightbatch.train/1"
    documented = (
        "recipe steps epochs examples seconds train_loss val_loss val_metric diverged "
        "parameters_sha256"
    )
    assert set(documented.split()) <= set(data)
    assert data["recipe"]["global_batch"] == 100
    assert (data["steps"], data["epochs"], data["examples"]) == (20, 2.0, 2000)
    assert data["seed"] == 3
    for line in captured.err.splitlines():
        assert {"progress", "seconds"} <= set(json.loads(line))


def test_train_is_repeatable_and_agrees_with_the_library(capsys: Captured) -> None:
    digests: list[str] = []
    for seed in ("0", "0", "1"):
        assert main([*TRAIN, "--json", "--quiet", "--seed", seed]) == 0
        digests.append(json.loads(capsys.readouterr().out)["parameters_sha256"])
    assert digests[0] == digests[1] != digests[2]
    recipe = rightbatch.Recipe(global_batch=100, learning_rate=0.3)
    run = rightbatch.train(rightbatch.load_workload("max3"), recipe, epochs=2)
    from rightbatch.store import hash_tensors

    assert hash_tensors(run.model.state_dict().items()) == digests[0]


def test_train_as_text_opens_with_the_answer(capsys: Captured) -> None:
    assert main([*TRAIN, "--quiet"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    assert captured.out.startswith("Trained max3 with batch 100 for 2 epochs in ")
    assert "the target val_loss<=0.12 was not met." in " ".join(captured.out.split())
    assert max(len(line) for line in captured.out.splitlines()) <= 80


def test_train_stops_at_the_target(capsys: Captured) -> None:
    arguments = ["train", "quadratic", "--batch-size", "128", "--learning-rate", "0.2"]
    assert main([*arguments, "--epochs", "30", "--until-target", "--json", "-q"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["reached_target"]
    assert data["steps"] == data["steps_to_target"] < 30 * 8
    assert data["val_loss"] <= 2.01


def test_train_full_batch(capsys: Captured) -> None:
    arguments = ["train", "max3", "--batch-size", "full", "--learning-rate", "0.1"]
    assert main([*arguments, "--epochs", "3", "--json", "-q"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["recipe"]["global_batch"] == 1000
    assert data["steps"] == 3


def test_train_that_diverges_prints_what_it_has_and_exits_4(capsys: Captured) -> None:
    arguments = ["train", "diabetes", "--batch-size", "8", "--learning-rate", "1e6", "--json", "-q"]
    assert main(arguments) == 4
    data = json.loads(capsys.readouterr().out)
    assert data["diverged"]
    assert main([a for a in arguments if a != "--json"]) == 4
    assert capsys.readouterr().out.startswith("Training diabetes with batch 8 diverged after")


def test_train_a_workload_of_a_file(tmp_path: Path, capsys: Captured) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "import torch\nfrom rightbatch import Workload\n"
        "toy = Workload(name='to\\u202ey', make_model=lambda: torch.nn.Linear(2, 1),\n"
        "    train_data=(torch.ones(8, 2), torch.ones(8, 1)),\n"
        "    loss=torch.nn.functional.mse_loss)\n"
    )
    arguments = ["--batch-size", "4", "--learning-rate", "0.1", "-q", "--json"]
    assert main(["train", f"{file}:toy", *arguments]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["val_loss"] is None
    assert data["target"] is None


def test_a_run_of_train_stream_with_lengths_of_its_own_is_not_resumed_by_the_command(
    tmp_path: Path, capsys: Captured
) -> None:
    recipe = Recipe(global_batch=10, learning_rate=0.1)
    train_stream(load_workload("max3"), recipe, steps=3, run_directory=tmp_path)
    assert main(["train", "max3", "--resume", str(tmp_path), "-q"]) == 2
    assert "was begun by train_stream, with lengths that `train` does" in capsys.readouterr().err


PROBES: dict[str, tuple[list[str], dict[str, str]]] = {
    "throughput": (
        ["--budget", "0.3s"],
        {"law": "alpha_seconds beta_seconds knee", "sizes": "micro_batch seconds low high n"},
    ),
    "noise": ([], {"noise_scale": "value low high n method", "trajectory": "step value low high"}),
    "memory": (
        [],
        {
            "ceiling": "micro_batch headroom_bytes",
            "parts": (
                "parameters_bytes gradients_bytes optimizer_bytes activation_bytes_per_example"
            ),
            "trials": "micro_batch verdict peak_bytes",
        },
    ),
    "learning-rate": (["--batch-size", "64"], {"steepest": "value low high n"}),
}
"""Options that make each probe quick, and the fields that are promised of its JSON."""


@pytest.mark.parametrize("kind", PROBES)
def test_probes_as_json_have_the_documented_fields(kind: str, capsys: Captured) -> None:
    options, promised = PROBES[kind]
    assert main(["probe", kind, "quadratic", "--json", *options]) == 0
    captured = capsys.readouterr()
    data = json.loads(captured.out)
    assert data["schema"] == f"rightbatch.probe-{kind}/1"
    for part, fields in promised.items():
        found = data[part][0] if isinstance(data[part], list) else data[part]
        assert set(fields.split()) <= set(found)
    assert json.loads(captured.err.splitlines()[0])["progress"] == "Checking quadratic"


@pytest.mark.parametrize("kind", PROBES)
def test_probes_as_text_open_with_the_answer(kind: str, capsys: Captured) -> None:
    assert main(["probe", kind, "quadratic", "--quiet", *PROBES[kind][0]]) == 0
    captured = capsys.readouterr()
    first, *_, last = captured.out.rstrip().splitlines()
    assert first.startswith("quadratic")
    assert "Cost: " in captured.out
    assert last.endswith(".")
    assert max(len(line) for line in captured.out.splitlines()) <= 80
    assert captured.err == ""


def test_a_plan_is_kept_replayed_and_trained_with(tmp_path: Path, capsys: Captured) -> None:
    out = tmp_path / "plan.json"
    arguments = ["plan", "max3", "--effort", "probe", "--memory", "1GiB", "--out", str(out)]
    assert main([*arguments, "--json", "--quiet"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["schema"] == "rightbatch.plan/1"
    promised = "workload goal effort recipe near_best reasons evidence cost warnings"
    assert set(promised.split()) <= set(printed)
    kept = json.loads(out.read_text(encoding="utf-8"))
    kept.pop("sha256")
    assert kept == printed
    assert main(["plan", "--replay", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["recipe"] == printed["recipe"]
    assert main(["train", "max3", "--plan", str(out), "--epochs", "1", "--json", "-q"]) == 0
    assert json.loads(capsys.readouterr().out)["recipe"] == printed["recipe"]
    damaged = bytearray(out.read_bytes())
    damaged[len(damaged) // 2] ^= 4
    out.write_bytes(damaged)
    assert main(["plan", "--replay", str(out)]) == 5
    assert "plan.json" in capsys.readouterr().err


# ----------------------------------------------------------------------------------- exit codes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian"], "No such command 'trian'"),
        (["train"], "Missing argument"),
        (["train", "digit", *TRAIN[2:]], "Did you mean digits or digits-cnn?"),
        (["train", "max3"], "The recipe is not complete. Give --plan plan.json, or both"),
        (["train", "max3", "--batch-size", "0", "--learning-rate", "1"], "--batch-size is '0'"),
        (["train", "max3", "--batch-size", "1001", "--learning-rate", "1"], "from 1 to 1000"),
        (["train", "max3", "--batch-size", "²", "--learning-rate", "1"], "--batch-size is '²'"),
        (["train", "max3", "--batch-size", "8", "--learning-rate", "-1"], "positive finite"),
        (["train", "max3", "--plan", "no.json"], "does not exist"),
        ([*TRAIN, "--plan", __file__], "--plan already says batch size"),
        ([*TRAIN, "--device", "quantum"], "device 'quantum' cannot be used"),
        (["probe", "memory", "max3", "--memory", "much"], "memory size 'much' cannot be read"),
        (["probe", "throughput", "max3", "--budget", "0s"], "budget '0s' is no duration"),
        (["plan"], "Name a WORKLOAD, or pass --replay plan.json"),
        (["plan", "max3", "--goal", "speed"], "speed"),
        (["plan", "max3", "--out", "no/such/plan.json"], "There is no folder 'no/such'"),
    ],
)
def test_mistakes_of_use_exit_2(arguments: list[str], message: str, capsys: Captured) -> None:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert message in " ".join(captured.err.split())
    assert captured.out == ""


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ProbeError("it failed"), 1),
        (OSError(28, "No space left on device", "/x/plan.json"), 1),
        (UsageError("it failed"), 2),
        (NoBatchFitsError("it failed"), 3),
        (DivergedError("it failed"), 4),
        (CorruptStateError("it failed"), 5),
        (KeyboardInterrupt(), 130),
    ],
)
def test_each_error_has_its_exit_code(
    error: BaseException, code: int, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr("rightbatch.cli.run_train.train", fail)
    assert main(TRAIN) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines()[-1].startswith("rightbatch: ")


def test_a_damaged_plan_exits_5(tmp_path: Path, capsys: Captured) -> None:
    damaged = tmp_path / "plan.json"
    damaged.write_text('{"schema": "rightbatch.plan/1", "recipe": {}, "sha256": "00"}')
    assert main(["train", "max3", "--plan", str(damaged)]) == 5
    assert "plan.json does not match its checksum" in capsys.readouterr().err


def test_training_with_the_recipe_of_a_plan(tmp_path: Path, capsys: Captured) -> None:
    from rightbatch.store import encode

    recipe = {
        "global_batch": 100,
        "micro_batch": 50,
        "accumulation": 2,
        "replicas": 1,
        "learning_rate": 0.3,
        "warmup_steps": 0,
        "precision": "float32",
    }
    plan = tmp_path / "plan.json"
    plan.write_bytes(encode({"schema": "rightbatch.plan/1", "recipe": recipe, "goal": "time"}))
    assert main(["train", "max3", "--plan", str(plan), "--epochs", "1", "-q", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["recipe"].items() >= recipe.items()
    plan.write_bytes(encode({"schema": "rightbatch.study/1"}))
    assert main(["train", "max3", "--plan", str(plan)]) == 2
    assert "holds a 'rightbatch.study/1', not a 'rightbatch.plan/1'" in capsys.readouterr().err


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_end_it_within_a_second(number: signal.Signals, code: int) -> None:
    process = start(
        *("train", "digits", "--batch-size", "1", "--learning-rate", "0.01", "--epochs", "1000"),
        "--no-run",
    )
    assert process.stderr is not None
    for line in process.stderr:
        if "Training" in line:
            break
    time.sleep(0.3)
    begin = time.perf_counter()
    process.send_signal(number)
    out, err = process.communicate(timeout=10)
    # A second, and another because other tests keep the machine busy.
    assert time.perf_counter() - begin < 2
    assert process.returncode == code
    assert out == ""
    assert "Traceback" not in err
    assert err.endswith("rightbatch: Interrupted.\n")


def test_a_reader_that_leaves_is_no_error() -> None:
    process = start("workloads")
    assert process.stdout is not None
    process.stdout.close()
    process.stdout = None
    _, err = process.communicate(timeout=10)
    assert process.returncode == 0, err
    assert err == ""


def test_handlers_are_put_back(capsys: Captured) -> None:
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    assert main(["workloads"]) == 0
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_a_terminal_gets_a_live_line_without_colour_if_asked() -> None:
    import pty

    primary, secondary = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "rightbatch", *TRAIN],
        stdout=subprocess.PIPE,
        stderr=secondary,
        env={**os.environ, "OMP_NUM_THREADS": "1", "NO_COLOR": "1", "TERM": "xterm"},
    )
    os.close(secondary)
    shown = bytearray()
    while True:
        try:
            piece = os.read(primary, 4096)
        except OSError:
            break
        if not piece:
            break
        shown += piece
    os.close(primary)
    out = process.communicate(timeout=10)[0]
    assert process.returncode == 0
    assert out.startswith(b"Trained max3")
    text = shown.decode(errors="replace")
    assert "Training max3" in text
    assert '{"progress"' not in text
    assert "\x1b[3" not in text, "colour although NO_COLOR is set"
