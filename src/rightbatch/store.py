"""Records to disk and back: a schema, a checksum, writes that happen whole or not at all.

A record file is one JSON object: `schema` ("rightbatch.plan/1"), the record's own fields, and
`sha256`, the digest of the file without that line. It is readable by any JSON reader; here it is
read only when every byte is what was written. Reading builds records from data and runs no code.

A write goes to a temporary file beside the target, is flushed to the device, renamed over the
target, the folder is flushed, and the file is read back. Whatever step fails, the file that was
there before is still there or the new one is whole, and the error names the path.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import json
import os
import re
import secrets
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from rightbatch.errors import CorruptStateError, UsageError

if TYPE_CHECKING:  # hashing tensors needs no import; typing them does
    from torch import Tensor

T = TypeVar("T")

_SCHEMA = re.compile(r"rightbatch\.(?P<kind>[a-z][a-z0-9-]*)/(?P<version>[1-9][0-9]*)")
_RESERVED = ("schema", "sha256")


def dump_record(record: Any, *, schema: str) -> dict[str, Any]:
    """A record as plain JSON data, with its schema first.

    Args:
        record: A dataclass of plain data.
        schema: Such as `rightbatch.plan/1`.

    Returns:
        A dict of what JSON knows: numbers, strings, lists, dicts, booleans and None.

    Raises:
        ValueError: If the schema has another form, the record is no dataclass, or a field is
            called `schema` or `sha256`.
    """
    if _SCHEMA.fullmatch(schema) is None:
        raise ValueError(f"The schema is {schema!r}; write it like 'rightbatch.plan/1'.")
    if not dataclasses.is_dataclass(record) or isinstance(record, type):
        raise ValueError(f"A {type(record).__name__} is no record; pass a dataclass instance.")
    fields = TypeAdapter(type(record)).dump_python(record, mode="json")
    for name in _RESERVED:
        if name in fields:
            raise ValueError(f"The record has a field {name!r}, which its file needs. Rename it.")
    return {"schema": schema, **fields}


def encode(content: dict[str, Any]) -> bytes:
    """The one way in which content is written: indented JSON that ends with its own digest.

    Args:
        content: Plain JSON data without a key `sha256`.

    Returns:
        UTF-8 bytes.

    Raises:
        ValueError: If a number is NaN or infinite: JSON has neither.
    """
    digest = hashlib.sha256(_to_json(content)).hexdigest()
    return _to_json({**content, "sha256": digest})


def _to_json(content: dict[str, Any]) -> bytes:
    text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False)
    # Lone surrogates (file names that are not UTF-8) cannot be encoded: escape them alone.
    return (text + "\n").encode("utf-8", errors="backslashreplace")


def decode(data: bytes, *, source: str) -> dict[str, Any]:
    """The content of a record file, if every byte is what was written.

    Args:
        data: The bytes of the file.
        source: Its path, for messages.

    Returns:
        The content, without `sha256`.

    Raises:
        CorruptStateError: If anything in it differs from what was written.
    """
    remedy = "It was damaged, cut short or edited. Restore a copy, or make it again."
    try:
        content = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise CorruptStateError(f"{source} is not readable as JSON ({error}). {remedy}") from error
    if not isinstance(content, dict) or "sha256" not in content:
        raise CorruptStateError(f"{source} holds no checksum, so it is no record file. {remedy}")
    content = dict(content)
    stated = content.pop("sha256")
    # Compared as bytes: a change that JSON does not see (1e-05 to 1E-05) is a change as well.
    with contextlib.suppress(ValueError, RecursionError):
        if encode(content) == data:
            return content
    raise CorruptStateError(f"{source} does not match its checksum {str(stated)[:12]!r}. {remedy}")


def write_record(path: str | Path, record: Any, *, schema: str) -> str:
    """Writes a record to a file, whole or not at all.

    Args:
        path: The file; its folder must exist.
        record: A dataclass of plain data.
        schema: Such as `rightbatch.plan/1`.

    Returns:
        The SHA-256 of the file, in hexadecimal.

    Raises:
        OSError: If any step of the write fails; it names the path.
    """
    return write_atomically(path, encode(dump_record(record, schema=schema)))


def read_record(path: str | Path, record_type: type[T], *, schema: str) -> T:
    """Reads a record back, exactly as it was written.

    Args:
        path: The file.
        record_type: The dataclass that was written.
        schema: The schema that is expected.

    Returns:
        The record.

    Raises:
        CorruptStateError: If the file is not what was written, or does not hold such a record.
        UsageError: If the file holds another kind of record, or another version of it.
    """
    content = decode(Path(path).read_bytes(), source=str(path))
    _check_schema(str(content.pop("schema", None)), schema, str(path))
    return _validate(content, record_type, schema, path)


def _validate(content: Any, record_type: type[T], schema: str, path: str | Path) -> T:
    adapter = TypeAdapter(record_type)
    try:
        record = adapter.validate_python(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the record"
        raise CorruptStateError(
            f"{path} has its checksum but is no {schema}: {where}: {first['msg']}. It was written "
            "by another version of rightbatch. Make it again."
        ) from error
    # Unknown or silently converted fields would make the record another than the file.
    if not _includes(adapter.dump_python(record, mode="json"), content):
        raise CorruptStateError(
            f"{path} holds fields that {schema} does not have. It was written by another version "
            "of rightbatch. Make it again."
        )
    return record


def _includes(record: Any, content: Any) -> bool:
    """Whether all that a file says is in the record; what it leaves out has its default there."""
    if isinstance(record, dict) and isinstance(content, dict):
        return all(key in record and _includes(record[key], content[key]) for key in content)
    if isinstance(record, list) and isinstance(content, list):
        return len(record) == len(content) and all(map(_includes, record, content))
    return type(record) is type(content) and record == content


def read_part(path: str | Path, part: str, part_type: type[T], *, schema: str) -> T:
    """Reads one nested record of a record file, such as the recipe of a plan.

    Args:
        path: The file.
        part: The field that holds it.
        part_type: The dataclass of that field.
        schema: The schema that is expected of the whole file.

    Returns:
        The nested record.

    Raises:
        CorruptStateError: If the file is not what was written, or has no such field.
        UsageError: If the file holds another kind of record, or another version of it.
    """
    content = decode(Path(path).read_bytes(), source=str(path))
    _check_schema(str(content.pop("schema", None)), schema, str(path))
    if part not in content:
        raise CorruptStateError(f"{path} is a {schema} without {part!r}. Make it again.")
    return _validate(content[part], part_type, schema, path)


def _check_schema(found: str, wanted: str, path: str) -> None:
    if found == wanted:
        return
    kinds = [_SCHEMA.fullmatch(text) for text in (found, wanted)]
    if kinds[0] is None or kinds[1] is None or kinds[0]["kind"] != kinds[1]["kind"]:
        raise UsageError(f"{path} holds a {found!r}, not a {wanted!r}. Pass a file of that kind.")
    raise UsageError(
        f"{path} has the schema {found!r} and this rightbatch reads {wanted!r}. Use the version "
        "that wrote it, or make it again."
    )


def write_atomically(path: str | Path, data: bytes) -> str:
    """Replaces a file by new content, whole or not at all, and reads it back.

    Args:
        path: The file; its folder must exist.
        data: The content.

    Returns:
        The SHA-256 of the content, in hexadecimal.

    Raises:
        OSError: If any step fails; it names the path.
    """
    target = Path(path)
    temporary = target.with_name(f".{target.name[:80]}.{secrets.token_hex(6)}.tmp")
    try:
        _write_and_flush(temporary, data)
        os.replace(temporary, target)  # noqa: PTH105 (one seam for all system calls)
        _flush_folder(target.parent)
        if not _holds(target, data):
            raise OSError(errno.EIO, "what was read back is not what was written")
    except OSError as error:
        reason = error.strerror or str(error)
        raise OSError(
            error.errno or errno.EIO, f"Could not write: {reason}", str(target)
        ) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
    return hashlib.sha256(data).hexdigest()


def _write_and_flush(path: Path, data: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        view = memoryview(data)
        while view:
            view = view[os.write(descriptor, view) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _holds(path: Path, data: bytes) -> bool:
    """Whether a file is these bytes; read in pieces, since a second copy may not fit in memory."""
    position = 0
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            if piece != data[position : position + len(piece)]:
                return False
            position += len(piece)
    return position == len(data)


def _flush_folder(folder: Path) -> None:
    """Makes the rename itself survive a power cut."""
    if os.name == "nt":  # Windows cannot open a folder; its rename is journalled
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_run_directory(root: str | Path, name: str) -> Path:
    """Makes a new folder for the files of one run.

    Args:
        root: The folder that holds all runs, such as `runs`; made if missing.
        name: What was run; anything a path cannot or should not hold is replaced.

    Returns:
        The new, empty folder: `root/<UTC time>-<name>`, numbered where that exists.

    Raises:
        OSError: If it cannot be made; it names the path.
    """
    stamp = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
    base = Path(root) / f"{stamp}-{safe_name(name)}"
    base.parent.mkdir(parents=True, exist_ok=True)
    for number in range(1, 1000):
        folder = base if number == 1 else base.with_name(f"{base.name}-{number}")
        with contextlib.suppress(FileExistsError):
            folder.mkdir()
            return folder
    raise OSError(errno.EEXIST, "A thousand runs of this second and name exist", str(base))


def safe_name(name: str) -> str:
    """A name as one path component: no separators, dots in front, controls, or great length.

    Args:
        name: Any text.

    Returns:
        At most 48 of the letters a–z, A–Z, digits, dot, dash and underscore; never empty.

    Example:
        >>> safe_name("../My run: no. 1")
        'My-run-no.-1'
    """
    cleaned = re.sub(r"[^A-Za-z0-9._]+", "-", name)[:200].strip("-._")
    return cleaned[:48].strip("-._") or "run"


def hash_tensors(named: Iterable[tuple[str, Tensor]]) -> str:
    """A digest of tensors by name, dtype, shape and bits: equal if and only if all are.

    Args:
        named: Such as `model.state_dict().items()`.

    Returns:
        SHA-256 in hexadecimal; the order does not matter.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(named, key=lambda item: item[0]):
        values = tensor.detach().cpu().contiguous()
        header = json.dumps([name, str(values.dtype), list(values.shape)])
        digest.update(header.encode())
        # Viewed as bytes, since NumPy has no bfloat16.
        digest.update(values.flatten().view(_byte_type()).numpy().tobytes())
    return digest.hexdigest()


def _byte_type() -> Any:
    import torch

    return torch.uint8
