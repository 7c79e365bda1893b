"""Checkpoints: the state of a training in one file, found again only if it is what was written.

A checkpoint is a line of text, then a safetensors file:

    rightbatch.checkpoint/1 <SHA-256 of the rest> <length of the rest in bytes>

The metadata of the safetensors part have one entry, JSON with the count of steps and the structure
of the state (see `state_tree`); its tensors are the tensors of the state. Nothing in it is code,
and reading it runs none. The same state gives the same bytes.

The newest two are kept, so that damage to one costs an interval and not the run. One process at a
time may save into a folder.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch

from rightbatch.errors import CorruptStateError, UsageError
from rightbatch.store import write_atomically
from rightbatch.training.checkpoints.state_tree import flatten, unflatten

SCHEMA = "rightbatch.checkpoint/1"

_NAME = re.compile(r"step-([0-9]{12})\.checkpoint")
_TEMPORARY = re.compile(r"\.step-[0-9]{12}\.checkpoint\.[0-9a-f]+\.tmp")
"""What `write_atomically` leaves behind when the process is killed inside it."""
_HEADER = re.compile(
    rb"(?P<schema>rightbatch\.checkpoint/[1-9][0-9]*) "
    rb"(?P<digest>[0-9a-f]{64}) (?P<length>0|[1-9][0-9]{0,18})\n"
)
_ENTRY = "rightbatch.checkpoint"
_MAX_HEADER_BYTES = 256
_MAX_METADATA_BYTES = 100_000_000  # safetensors reads no more, but would write it


@dataclass(frozen=True, kw_only=True)
class LoadedCheckpoint:
    """A checkpoint that was read.

    Attributes:
        path: Its file.
        steps: Updates done when it was written.
        state: What was saved.
        skipped: Why newer ones were not used, a sentence each, newest first.
    """

    path: Path
    steps: int
    state: Any = field(repr=False)
    skipped: tuple[str, ...] = ()


def save_checkpoint(folder: str | Path, state: Any, *, steps: int) -> Path:
    """Writes a checkpoint, whole or not at all, and keeps the one before it.

    What killed saves left behind is deleted first, older checkpoints after the new one was read
    back. A damaged file ahead of `steps` is then renamed to `*.damaged`, out of the way.

    Args:
        folder: Where the checkpoints of this run are; made if missing.
        state: A tree of dict (keys str or int), OrderedDict, list, tuple, None, bool, int, float,
            str and Tensor. Types and values come back exactly; tensors come back on the CPU,
            without gradient.
        steps: Updates done. A checkpoint of the same step is replaced.

    Returns:
        The file.

    Raises:
        UsageError: If the state holds something else, `steps` is out of range, or the folder has
            a sound checkpoint of a later step, which is another run's.
        OSError: If any step of the write fails; it names the path. The checkpoint of the step
            before still loads.
    """
    if not 0 <= steps < 10**12:
        raise UsageError(f"steps is {steps}; it must be from 0 to {10**12 - 1}.")
    folder = Path(folder)
    data = _pack(state, steps)
    with _naming(folder, "make"):
        folder.mkdir(parents=True, exist_ok=True)
    damaged = _find_damaged_ahead(folder, steps)
    _delete_temporaries(folder)  # before the write, which may need their space
    path = folder / f"step-{steps:012d}.checkpoint"
    write_atomically(path, data)
    for other in damaged:
        with _naming(other, "rename"):
            os.replace(other, f"{other}.damaged")  # noqa: PTH105 (one seam for all system calls)
    older = [other for other in list_checkpoints(folder) if _steps_of(other) < steps]
    for other in older[1:]:
        _delete(other)
    return path


def load_checkpoint(folder: str | Path) -> LoadedCheckpoint | None:
    """Reads the newest checkpoint that is exactly what was written.

    Args:
        folder: Where the checkpoints of the run are.

    Returns:
        The checkpoint, or None if the folder has none or does not exist.

    Raises:
        CorruptStateError: If there are checkpoints, and each of them is damaged.
        OSError: If one cannot be read, or vanished meanwhile; it names the path.
    """
    skipped: list[str] = []
    for path in list_checkpoints(folder):
        try:
            state = _read(path)
        except CorruptStateError as error:
            skipped.append(str(error))
        else:
            steps, reasons = _steps_of(path), tuple(skipped)
            return LoadedCheckpoint(path=path, steps=steps, state=state, skipped=reasons)
    if skipped:
        raise CorruptStateError(
            f"No checkpoint in {folder} can be used. {' '.join(skipped)} Restore a copy of one, or "
            "delete them to start over."
        )
    return None


def list_checkpoints(folder: str | Path) -> tuple[Path, ...]:
    """The checkpoints of a folder by name, whether sound or not.

    Args:
        folder: Where the checkpoints of a run are.

    Returns:
        Their paths, newest first; none if the folder does not exist.

    Raises:
        OSError: If the folder cannot be read; it names the path.
    """
    try:
        with _naming(Path(folder), "read"):
            found = [path for path in Path(folder).iterdir() if _NAME.fullmatch(path.name)]
    except FileNotFoundError:
        return ()
    return tuple(sorted(found, key=_steps_of, reverse=True))


def _steps_of(path: Path) -> int:
    return int(path.name[len("step-") : -len(".checkpoint")])


# ---------------------------------------------------------------------------------------- writing


def _pack(state: Any, steps: int) -> bytes:
    structure, tensors = flatten(state)
    content = {"steps": steps, "structure": structure}
    text = json.dumps(content, allow_nan=False, separators=(",", ":"))
    # In one entry: safetensors writes several in an order of its own each time.
    payload = safetensors.torch.save(tensors, {_ENTRY: text})
    if int.from_bytes(payload[:8], "little") > _MAX_METADATA_BYTES:
        raise UsageError(
            f"The state has {len(text):,} characters beside its tensors, more than a "
            "checkpoint holds. Put long lists of numbers into tensors."
        )
    digest = hashlib.sha256(payload).hexdigest()
    return b"".join((f"{SCHEMA} {digest} {len(payload)}\n".encode(), payload))


def _find_damaged_ahead(folder: Path, steps: int) -> list[Path]:
    """The damaged files of later steps, because of which this run resumed before them."""
    damaged: list[Path] = []
    for path in list_checkpoints(folder):
        if _steps_of(path) > steps:
            try:
                _read(path)
            except CorruptStateError:
                damaged.append(path)
            else:  # it would be loaded instead of what is saved now
                raise UsageError(
                    f"{path} is ahead of step {steps}: it belongs to another run. Continue from "
                    "it, save into another folder, or delete it."
                )
    return damaged


def _delete_temporaries(folder: Path) -> None:
    with _naming(folder, "read"):
        leftovers = [path for path in folder.iterdir() if _TEMPORARY.fullmatch(path.name)]
    for path in leftovers:
        _delete(path)


def _delete(path: Path) -> None:
    with _naming(path, "delete"):
        path.unlink(missing_ok=True)


# ---------------------------------------------------------------------------------------- reading


def _read(path: Path) -> Any:
    """The state in a file, or a CorruptStateError of one sentence that names the path."""
    payload = _read_payload(path)
    try:
        content = _read_content(payload)
        steps = content["steps"]
        state = unflatten(content["structure"], safetensors.torch.load(payload))
    except MemoryError:  # says nothing about the file
        raise
    # The file has its checksum, so someone made it so: whatever the parsers meet is its fault.
    except Exception as error:
        raise CorruptStateError(
            f"{path} has its checksum but is no {SCHEMA} ({type(error).__name__}: "
            f"{str(error)[:200]})."
        ) from error
    if steps != _steps_of(path):
        raise CorruptStateError(f"{path} was renamed: it is of step {str(steps)[:20]}.")
    return state


def _read_payload(path: Path) -> bytes:
    with _naming(path, "read"), path.open("rb") as file:
        header = file.readline(_MAX_HEADER_BYTES)
        match = _HEADER.fullmatch(header)
        if match is None:
            raise CorruptStateError(f"{path} does not begin as a checkpoint does.")
        if match["schema"] != SCHEMA.encode():
            raise CorruptStateError(
                f"{path} has the schema {match['schema'].decode()!r} and this rightbatch reads "
                f"{SCHEMA!r}."
            )
        # Compared before reading: a false length must not decide how much memory is taken.
        length = os.fstat(file.fileno()).st_size - len(header)
        if length != int(match["length"]):
            raise CorruptStateError(
                f"{path} has {length} bytes after its first line instead of "
                f"{int(match['length'])}: it was cut short or appended to."
            )
        payload = file.read()
    if hashlib.sha256(payload).hexdigest() != match["digest"].decode():
        raise CorruptStateError(f"{path} does not match its checksum.")
    return payload


def _read_content(payload: bytes) -> dict[str, Any]:
    # A safetensors file is a length, then JSON; the library gives metadata of paths only.
    length = int.from_bytes(payload[:8], "little")
    metadata = json.loads(payload[8 : 8 + length])["__metadata__"]
    return json.loads(metadata[_ENTRY], parse_constant=_refuse_constant)


def _refuse_constant(constant: str) -> None:
    raise ValueError(f"it holds the bare number {constant}")


@contextlib.contextmanager
def _naming(path: Path, action: str) -> Iterator[None]:
    """Makes an OSError name the path: those of reading from an open file do not."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise OSError(
            error.errno or errno.EIO, f"Could not {action}: {reason}", str(path)
        ) from error
