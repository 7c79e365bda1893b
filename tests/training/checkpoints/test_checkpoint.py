"""Checkpoints: what is loaded is what was saved, whatever happens to the disk and the process."""

from __future__ import annotations

import errno
import hashlib
import io
import itertools
import json
import os
import random
import signal
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from rightbatch.errors import CorruptStateError, UsageError
from rightbatch.training.checkpoints import checkpoint
from rightbatch.training.checkpoints.checkpoint import (
    LoadedCheckpoint,
    list_checkpoints,
    load_checkpoint,
    save_checkpoint,
)

CODES = [errno.ENOSPC, errno.EIO, errno.EACCES]


def make_state(steps: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(steps)
    weights = torch.randn(4, 5, generator=generator)
    return {
        "model": {"weight": weights, "tied": weights, "half": weights.bfloat16().mT},
        "optimizer": {"state": {0: {"step": torch.tensor(float(steps))}}, "betas": (0.9, 0.999)},
        "cursor": {"epoch": 1, "offset": steps, "best": float("inf")},
    }


def is_state(state: Any, steps: int) -> bool:
    wanted = make_state(steps)
    return (
        state["cursor"] == wanted["cursor"]
        and state["optimizer"]["betas"] == (0.9, 0.999)
        and all(torch.equal(state["model"][k], v) for k, v in wanted["model"].items())
    )


def load(folder: Path) -> LoadedCheckpoint:
    loaded = load_checkpoint(folder)
    assert loaded is not None
    assert is_state(loaded.state, loaded.steps)
    return loaded


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def name(steps: int) -> str:
    return f"step-{steps:012d}.checkpoint"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two generations, of steps 100 and 200."""
    folder = tmp_path / "run" / "checkpoints"
    for steps in (100, 200):
        save_checkpoint(folder, make_state(steps), steps=steps)
    return folder


# ------------------------------------------------------------------------------------ generations


def test_the_newest_is_loaded_and_the_newest_two_are_kept(tmp_path: Path) -> None:
    folder = tmp_path / "made" / "when missing"
    for steps in (0, 9, 10, 99_999_999):
        path = save_checkpoint(str(folder), make_state(steps), steps=steps)
        loaded = load(folder)
        assert (loaded.path, loaded.steps, loaded.skipped) == (path, steps, ())
    assert names(folder) == [name(10), name(99_999_999)]
    assert [path.name for path in list_checkpoints(folder)] == [name(99_999_999), name(10)]


def test_a_folder_without_checkpoints_has_none(tmp_path: Path) -> None:
    assert load_checkpoint(tmp_path / "missing") is None
    (tmp_path / "step-1.checkpoint").write_text("x")
    (tmp_path / (name(1) + ".damaged")).write_text("x")
    assert load_checkpoint(tmp_path) is None
    assert list_checkpoints(tmp_path) == ()


def test_saving_a_step_again_replaces_it(folder: Path) -> None:
    save_checkpoint(folder, {"changed": 1}, steps=200)
    loaded = load_checkpoint(folder)
    assert loaded is not None
    assert loaded.state == {"changed": 1}
    assert names(folder) == [name(100), name(200)]


def test_one_state_gives_one_file(folder: Path) -> None:
    before = (folder / name(200)).read_bytes()
    for _ in range(5):
        save_checkpoint(folder, load(folder).state, steps=200)
        assert (folder / name(200)).read_bytes() == before


def test_the_file_is_a_line_and_then_safetensors(folder: Path) -> None:
    header, payload = (folder / name(200)).read_bytes().split(b"\n", 1)
    schema, digest, length = header.decode().split(" ")
    assert schema == "rightbatch.checkpoint/1"
    assert digest == hashlib.sha256(payload).hexdigest()
    assert int(length) == len(payload)
    tensors = safetensors.torch.load(payload)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32, torch.bfloat16}
    assert len(tensors) == 3  # tied weights are stored once


def test_a_resumed_run_is_not_hidden_by_damaged_files_ahead_of_it(folder: Path) -> None:
    save_checkpoint(folder, make_state(300), steps=300)
    for steps in (200, 300):
        (folder / name(steps)).write_bytes(b"damaged")
    save_checkpoint(folder, make_state(50), steps=50)
    assert names(folder) == [name(50), *(name(n) + ending for n, ending in DAMAGED_AHEAD)]
    assert load(folder).skipped == ()
    for steps in (250, 350, 450):
        save_checkpoint(folder, make_state(steps), steps=steps)
        assert load(folder).steps == steps
    assert len(list_checkpoints(folder)) == 2


DAMAGED_AHEAD = [(200, ".damaged"), (300, ".damaged")]


def test_the_folder_of_another_run_is_not_written_to(folder: Path) -> None:
    with pytest.raises(UsageError, match=rf"{name(200)} is ahead of step 10: .*another folder"):
        save_checkpoint(folder, make_state(10), steps=10)
    assert names(folder) == [name(100), name(200)]


@pytest.mark.parametrize("steps", [-1, 10**12])
def test_steps_out_of_range(tmp_path: Path, steps: int) -> None:
    with pytest.raises(UsageError, match=rf"steps is {steps}; it must be from 0"):
        save_checkpoint(tmp_path, {}, steps=steps)


def test_a_state_that_cannot_be_saved_touches_nothing(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"optimizer\.state\.0\.closure is a function"):
        state = {"optimizer": {"state": {0: {"closure": lambda: None}}}}
        save_checkpoint(tmp_path / "new", state, steps=1)
    assert not (tmp_path / "new").exists()


def test_a_structure_too_long_to_be_read_back_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert checkpoint._MAX_METADATA_BYTES == 100_000_000
    monkeypatch.setattr(checkpoint, "_MAX_METADATA_BYTES", 1000)
    with pytest.raises(UsageError, match=r"[0-9,]+ characters .* lists of numbers into tensors"):
        save_checkpoint(tmp_path, list(range(400)), steps=1)
    save_checkpoint(tmp_path, torch.arange(400), steps=1)


# ------------------------------------------------------------------------------------- optimizers

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "amsgrad": lambda p: torch.optim.AdamW(p, lr=torch.tensor(0.01), amsgrad=True),
    "lbfgs": lambda p: torch.optim.LBFGS(p, lr=0.5, max_iter=3, line_search_fn="strong_wolfe"),
}


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
def test_an_optimizer_goes_on_bit_for_bit(
    tmp_path: Path, make: Callable[[Any], torch.optim.Optimizer]
) -> None:
    images = torch.randn(6, 2, 5, 5, generator=torch.Generator().manual_seed(1))

    def build() -> tuple[nn.Module, torch.optim.Optimizer]:
        convolution = nn.Conv2d(2, 3, 3, bias=False)
        model = nn.Sequential(convolution, nn.BatchNorm2d(3), nn.Tanh())
        optimizer = make(model.parameters())
        if not isinstance(optimizer, torch.optim.LBFGS):  # it flattens by views
            weight = convolution.weight
            weight.data = weight.detach().to(memory_format=torch.channels_last)
        return model, optimizer

    def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        def closure() -> float:
            optimizer.zero_grad()
            loss = (model(images) - 0.3).square().mean()
            loss.backward()
            return loss.item()

        optimizer.step(closure)

    model, optimizer = build()
    for _ in range(3):
        step(model, optimizer)
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    save_checkpoint(tmp_path, state, steps=3)
    loaded = load_checkpoint(tmp_path)
    assert loaded is not None

    other_model, other_optimizer = build()
    other_model.load_state_dict(loaded.state["model"])
    other_optimizer.load_state_dict(loaded.state["optimizer"])
    before = [p.detach().clone() for p in model.parameters()]
    for _ in range(2):
        step(model, optimizer)
        step(other_model, other_optimizer)
    for ours, theirs, old in zip(model.parameters(), other_model.parameters(), before, strict=True):
        assert torch.equal(ours, theirs)
        assert ours.stride() == theirs.stride()
        assert not torch.equal(ours, old)


# ----------------------------------------------------------------------------------------- damage


def test_of_700_flips_and_truncations_each_is_noticed_and_costs_one_generation(
    folder: Path,
) -> None:
    seed = 20260
    print(f"seed {seed}")
    draw, path = random.Random(seed), folder / name(200)
    whole = path.read_bytes()
    for number in range(700):
        damaged = bytearray(whole)
        if number % 4 == 0:
            del damaged[draw.randrange(len(whole)) :]
        else:
            damaged[draw.randrange(len(whole))] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        loaded = load(folder)
        assert loaded.steps == 100
        assert len(loaded.skipped) == 1
        assert name(200) in loaded.skipped[0]


def test_every_bit_and_every_length_of_the_first_line_counts(folder: Path) -> None:
    path = folder / name(200)
    whole = path.read_bytes()
    header = whole.index(b"\n") + 1
    for place, bit in itertools.product(range(header), range(8)):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << bit
        path.write_bytes(damaged)
        assert load(folder).steps == 100
    for length in range(header + 1):
        path.write_bytes(whole[:length])
        assert load(folder).steps == 100
    for damaged in (whole + b"\0", b"\n" + whole, whole[:header] + whole):
        path.write_bytes(damaged)
        assert load(folder).steps == 100


def test_when_none_is_sound_the_error_says_so_of_each(folder: Path) -> None:
    whole = (folder / name(100)).read_bytes()
    (folder / name(100)).write_bytes(whole[:-1])
    (folder / name(200)).write_bytes(whole.replace(b"checkpoint/1", b"checkpoint/2", 1))
    with pytest.raises(CorruptStateError) as caught:
        load_checkpoint(folder)
    message = str(caught.value)
    assert message.startswith(f"No checkpoint in {folder} can be used. {folder / name(200)} has")
    assert (
        "'rightbatch.checkpoint/2' and this rightbatch reads 'rightbatch.checkpoint/1'" in message
    )
    length = len(whole.split(b"\n", 1)[1])
    assert f"{name(100)} has {length - 1} bytes after its first line instead of {length}" in message
    assert message.endswith("Restore a copy of one, or delete them to start over.")


def test_a_renamed_checkpoint_is_not_taken_for_a_newer_one(folder: Path) -> None:
    (folder / name(100)).rename(folder / name(900))
    loaded = load(folder)
    assert loaded.steps == 200
    assert loaded.skipped == (f"{folder / name(900)} was renamed: it is of step 100.",)


# ----------------------------------------------------------------------------------- hostile files


def seal(path: Path, payload: bytes) -> None:
    """Writes what has a right first line, as who wants to harm would."""
    digest = hashlib.sha256(payload).hexdigest()
    path.write_bytes(f"rightbatch.checkpoint/1 {digest} {len(payload)}\n".encode() + payload)


def with_header(header: object, data: bytes = b"") -> bytes:
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    return struct.pack("<Q", len(text)) + text + data


def metadata(content: str) -> dict[str, str]:
    return {"rightbatch.checkpoint": content}


def with_structure(structure: str, **tensors: Tensor) -> bytes:
    return safetensors.torch.save(tensors, metadata(f'{{"steps": 200, "structure": {structure}}}'))


TENSOR = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
GOOD = metadata('{"steps": 200, "structure": 1}')
HOSTILE = {
    "empty": b"",
    "pickle": b"cos\nsystem\n(S'touch pwned'\ntR.",
    "zip": b"PK\x03\x04" + bytes(60),
    "huge header": struct.pack("<Q", 2**63) + b"{}",
    "longest header": b"\xff" * 16,
    "no json": with_header("{'__metadata__': 1}"),
    "deep header": with_header("[" * 200_000),
    "list": with_header([]),
    "no metadata": with_header({}),
    "metadata is text": with_header({"__metadata__": "steps"}),
    "other metadata": with_header({"__metadata__": {"format": "pt"}}),
    "content is no text": with_header({"__metadata__": {"rightbatch.checkpoint": [1]}}),
    "no structure": with_header({"__metadata__": metadata('{"steps": 200}')}),
    "other steps": with_header({"__metadata__": metadata('{"steps": 201, "structure": 1}')}),
    "steps in text": with_header({"__metadata__": metadata('{"steps": "200", "structure": 1}')}),
    "bad structure": with_structure("{"),
    "bare NaN": with_structure("NaN"),
    "deep structure": with_structure("[" * 200_000),
    "deep tuples": with_structure('{"tuple":[' * 80 + "]}" * 80),
    "many digits": with_structure("9" * 10_000),
    "unknown kind": with_structure('{"python/object/apply:os.system": ["touch pwned"]}'),
    "unknown tensor": with_structure('{"tensor": {"name": "7"}}'),
    "unknown dtype": with_structure(
        '{"tensor": {"name": "a", "dtype": "torch.load", "shape": [1]}}', a=torch.ones(1)
    ),
    "endless shape": with_header(
        {"__metadata__": GOOD, "a": {**TENSOR, "shape": [2**40, 2**40]}}, bytes(4)
    ),
    "negative shape": with_header({"__metadata__": GOOD, "a": {**TENSOR, "shape": [-1]}}, bytes(4)),
    "outside": with_header({"__metadata__": GOOD, "a": {**TENSOR, "data_offsets": [0, 2**62]}}),
    "overlap": with_header({"__metadata__": GOOD, "a": TENSOR, "b": TENSOR}, bytes(4)),
    "dtype of no torch": with_header(
        {"__metadata__": GOOD, "a": {**TENSOR, "dtype": "X"}}, bytes(4)
    ),
    "dtype not read": with_header(
        {"__metadata__": GOOD, "a": {**TENSOR, "dtype": "F8_E8M0", "shape": [4]}}, bytes(4)
    ),
}


@pytest.mark.parametrize("payload", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_hostile_file_is_refused_and_runs_nothing(
    folder: Path, payload: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "system", lambda command: pytest.fail(f"ran {command}"))
    seal(folder / name(200), payload)
    loaded = load(folder)
    assert loaded.steps == 100
    assert len(loaded.skipped[0]) < 500
    (folder / name(100)).unlink()
    with pytest.raises(CorruptStateError, match=rf"{name(200)} (has its checksum|was renamed)"):
        load_checkpoint(folder)


@pytest.mark.parametrize(
    "line", [b"x" * 10_000, b"rightbatch.checkpoint/1 " + b"0" * 64 + b" " + b"9" * 18 + b"\n"]
)
def test_a_false_first_line_takes_no_memory(folder: Path, line: bytes) -> None:
    (folder / name(200)).write_bytes(line)
    assert load(folder).steps == 100


def test_sealed_nonsense_is_refused_or_is_a_tree(folder: Path) -> None:
    payload = (folder / name(200)).read_bytes().split(b"\n", 1)[1]
    draw, refused = random.Random(7), 0
    (folder / name(100)).unlink()
    for _ in range(400):
        changed = bytearray(payload)
        for _ in range(draw.choice([1, 1, 4, 64])):
            changed[draw.randrange(len(changed))] = draw.randrange(256)
        seal(folder / name(200), bytes(changed))
        try:
            load_checkpoint(folder)
        except CorruptStateError:
            refused += 1
    assert 300 < refused < 400


# --------------------------------------------------------------------------------- failing devices


class Failing:
    """Makes the Nth system call fail; remembers which that was."""

    def __init__(self, fail_at: int, code: int) -> None:
        self.calls, self.fail_at, self.code, self.failed = 0, fail_at, code, ""

    def count(self, call: str) -> None:
        self.calls += 1
        if self.calls == self.fail_at:
            self.failed = call
            raise OSError(self.code, os.strerror(self.code))

    def wrap(self, call: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            self.count(f"{call} {args[0]}")
            return function(*args, **kwargs)

        return counted

    def open(self, *args: Any, **kwargs: Any) -> Any:
        self.count(f"open {args[0]}")
        return FailingFile(self.original_open(*args, **kwargs), self)

    def install(self, patch: pytest.MonkeyPatch) -> None:
        for call in ("open", "write", "fsync", "close", "replace", "unlink", "listdir", "fstat"):
            patch.setattr(os, call, self.wrap(call, getattr(os, call)))
        self.original_open = io.open
        patch.setattr(io, "open", self.open)


class FailingFile:
    def __init__(self, file: Any, failing: Failing) -> None:
        self.file, self.failing = file, failing

    def __enter__(self) -> FailingFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def fileno(self) -> int:
        return self.file.fileno()

    def read(self, *args: int) -> bytes:
        self.failing.count("read")
        return self.file.read(*args)

    def readline(self, *args: int) -> bytes:
        self.failing.count("readline")
        return self.file.readline(*args)


@pytest.mark.parametrize("code", CODES)
def test_whichever_call_of_a_save_fails_a_checkpoint_loads_and_the_path_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    failed: list[str] = []
    for fail_at in range(1, 100):
        folder = tmp_path / str(fail_at)
        for steps in (100, 200):
            save_checkpoint(folder, make_state(steps), steps=steps)
        (folder / name(900)).write_bytes(b"damaged")
        (folder / f".{name(200)}.00aa11bb22cc.tmp").write_bytes(b"left by a killed save")
        failing = Failing(fail_at, code)
        error = None
        with monkeypatch.context() as patch:
            failing.install(patch)
            try:
                save_checkpoint(folder, make_state(300), steps=300)
            except OSError as caught:
                error = caught
        if not failing.failed:
            assert error is None
            break
        failed.append(failing.failed.split()[0])
        if error is None:  # only the tidying up of a file that is gone already may fail unsaid
            assert failing.failed.startswith("unlink ")
            assert failing.failed.endswith(".tmp")
            assert load(folder).steps == 300
        else:
            assert error.errno == code
            assert str(folder) in str(error)
            assert "Could not" in str(error)
            assert load(folder).steps in (200, 300)
        # Whatever was tidied: two generations are there, and the next save goes through.
        sound = [path for path in list_checkpoints(folder) if path.name != name(900)]
        assert len(sound) >= 2
        save_checkpoint(folder, make_state(400), steps=400)
        assert load(folder).steps == 400
        assert not [entry for entry in names(folder) if entry.endswith(".tmp")]
    assert {*failed} == {
        *("open", "write", "fsync", "close", "replace", "unlink", "listdir", "read", "readline")
    }
    assert failed.count("fsync") == 2
    assert failed.count("replace") == 2


@pytest.mark.parametrize("code", CODES)
def test_whichever_call_of_a_load_fails_it_is_loud(
    folder: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    failed: list[str] = []
    for fail_at in range(1, 20):
        failing = Failing(fail_at, code)
        with monkeypatch.context() as patch:
            failing.install(patch)
            try:
                load_checkpoint(folder)
            except OSError as error:
                assert error.errno == code
                assert str(folder) in str(error)
                failed.append(failing.failed.split()[0])
            else:
                break
    assert failed == ["listdir", "open", "readline", "fstat", "read"]


@pytest.mark.parametrize(
    ("code", "kind"), [(errno.ENOENT, FileNotFoundError), (errno.EACCES, PermissionError)]
)
def test_a_file_that_vanished_or_is_closed_to_us_is_no_damage(
    folder: Path, monkeypatch: pytest.MonkeyPatch, code: int, kind: type[OSError]
) -> None:
    Failing(2, code).install(monkeypatch)  # the first call lists the folder
    with pytest.raises(kind, match=rf"Could not read: .*{name(200)}"):
        load_checkpoint(folder)


def test_a_folder_that_cannot_be_made_or_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(OSError, match=r"Could not make: .*file"):
        save_checkpoint(tmp_path / "file", {}, steps=1)
    with pytest.raises(NotADirectoryError, match=r"Could not read: .*file"):
        load_checkpoint(tmp_path / "file")


def test_nothing_older_is_deleted_for_a_save_that_the_device_did_not_keep(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = os.write
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda fd, data: write(fd, bytes(data).replace(b"\0", b"\1")))
        with pytest.raises(OSError, match=rf"read back is not what was written.*{name(300)}"):
            save_checkpoint(folder, make_state(300), steps=300)
    assert names(folder) == [name(100), name(200), name(300)]
    loaded = load(folder)
    assert (loaded.steps, len(loaded.skipped)) == (200, 1)


# ------------------------------------------------------------------------------------ killed saves

no_fork_warning = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")


def in_child(action: Callable[[], Any]) -> int:
    """Forks and runs; the process id. A child that gets to its end exits with 0."""
    child = os.fork()
    if child == 0:
        try:
            action()
            os._exit(0)
        finally:
            os._exit(1)
    return child


@no_fork_warning
@pytest.mark.parametrize(
    ("call", "number", "steps_left"),
    [
        ("write", 1, 200),
        ("fsync", 1, 200),
        ("close", 1, 200),
        ("replace", 1, 200),
        ("fsync", 2, 300),
        ("unlink", 1, 300),
        ("unlink", 2, 300),
    ],
)
def test_a_save_killed_inside_any_call_leaves_a_checkpoint(
    folder: Path, monkeypatch: pytest.MonkeyPatch, call: str, number: int, steps_left: int
) -> None:
    original, calls = getattr(os, call), itertools.count(1)

    def die_inside(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == number:
            if call == "write":
                original(args[0], bytes(args[1])[: len(args[1]) // 2])
            os._exit(9)
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(os, call, die_inside)
        child = in_child(lambda: save_checkpoint(folder, make_state(300), steps=300))
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    left = [entry for entry in names(folder) if entry.endswith(".tmp")]
    assert len(left) == (steps_left == 200)
    loaded = load(folder)
    assert (loaded.steps, loaded.skipped) == (steps_left, ())
    save_checkpoint(folder, make_state(400), steps=400)
    assert names(folder) == [name(steps_left), name(400)]


@no_fork_warning
def test_kill_9_at_any_time(tmp_path: Path) -> None:
    seed = 11
    print(f"seed {seed}")
    draw, steps = random.Random(seed), 0
    save_checkpoint(tmp_path, make_state(0), steps=0)

    def save_forever() -> None:
        for step in itertools.count(steps + 1):
            save_checkpoint(tmp_path, make_state(step), steps=step)

    for _ in range(40):
        child = in_child(save_forever)
        time.sleep(draw.uniform(0.005, 0.04))
        os.kill(child, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        loaded = load(tmp_path)
        assert loaded.skipped == ()
        assert loaded.steps >= steps
        steps = loaded.steps
    assert steps > 0
    save_checkpoint(tmp_path, make_state(steps + 1), steps=steps + 1)
    assert names(tmp_path) == [name(steps), name(steps + 1)]
