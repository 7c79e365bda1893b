"""Objects between a parent and its child: cloudpickle, with arrays sent as they lie in memory.

Large arrays and tensors travel beside the pickle instead of inside it, so that sending a data set
does not make the sender grow by its size. Classes and functions of modules that a fresh
interpreter could not import (a script run by path, a test, a notebook) travel by value.
"""

from __future__ import annotations

import importlib.machinery
import io
import os
import pickle
import struct
import sys
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import cloudpickle
import numpy as np
import torch

from rightbatch.errors import WorkloadError

_OUT_OF_BAND_BYTES = 1 << 16
_CHUNK_BYTES = 1 << 20

Parts = Sequence[bytes | bytearray | memoryview]


def dump(obj: Any) -> list[bytes | memoryview]:
    """Serialises an object.

    Args:
        obj: Anything cloudpickle can take: lambdas and classes of the main module included.

    Returns:
        The pickle, followed by the large buffers it refers to, which are not copied.

    Raises:
        WorkloadError: If something inside cannot be pickled.

    Example:
        >>> load(dump({"twice": lambda x: 2 * x}))["twice"](21)
        42
    """
    buffers: list[memoryview] = []

    def keep_apart(buffer: pickle.PickleBuffer) -> bool:
        view = buffer.raw()
        if view.nbytes < _OUT_OF_BAND_BYTES:
            return True  # small: inside the pickle
        buffers.append(view)
        return False

    stream = io.BytesIO()
    try:
        with _unimportable_modules_by_value():
            _Pickler(stream, protocol=5, buffer_callback=keep_apart).dump(obj)
    except (pickle.PicklingError, TypeError, AttributeError, ValueError, RecursionError) as error:
        raise WorkloadError(
            f"This cannot be sent to a child process: {error}. Open files, locks, sockets, "
            "database connections and running generators inside the function that needs them, "
            "instead of capturing them from outside."
        ) from error
    return [stream.getvalue(), *buffers]


def load(parts: Parts) -> Any:
    """The object that `dump` serialised; its arrays are writable and use the given buffers.

    Only for what this program's own processes sent each other.

    Args:
        parts: As `dump` returned or `read_message` read them.

    Returns:
        The object.
    """
    return pickle.loads(parts[0], buffers=parts[1:])


def write_message(fd: int, parts: Parts) -> None:
    """Writes parts to a pipe, each preceded by its length.

    Args:
        fd: File descriptor.
        parts: As `dump` returned them.
    """
    sizes = [memoryview(part).nbytes for part in parts]
    _write(fd, struct.pack(f"<{len(sizes) + 1}Q", len(sizes), *sizes))
    for part in parts:
        _write(fd, memoryview(part).cast("B"))


def read_message(fd: int) -> list[bytearray] | None:
    """Reads parts that `write_message` wrote.

    Args:
        fd: File descriptor.

    Returns:
        The parts, or None when the other end has closed the pipe, even halfway through.
    """
    head = _read(fd, 8)
    if head is None:
        return None
    (count,) = struct.unpack("<Q", head)
    sizes = _read(fd, 8 * count)
    if sizes is None:
        return None
    parts: list[bytearray] = []
    for size in struct.unpack(f"<{count}Q", sizes):
        part = _read(fd, size)
        if part is None:
            return None
        parts.append(part)
    return parts


def _write(fd: int, data: bytes | memoryview) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view[:_CHUNK_BYTES]) :]


def _read(fd: int, size: int) -> bytearray | None:
    data = bytearray(size)
    view = memoryview(data)
    while view:
        num_read = os.readv(fd, [view[:_CHUNK_BYTES]]) if hasattr(os, "readv") else 0
        if not hasattr(os, "readv"):
            chunk = os.read(fd, min(len(view), _CHUNK_BYTES))
            num_read = len(chunk)
            view[:num_read] = chunk
        if num_read == 0:
            return None
        view = view[num_read:]
    return data


class _Pickler(cloudpickle.Pickler):
    """cloudpickle, with plain host tensors handed over as buffers.

    torch's own reduction copies the whole storage into the pickle, and again for each view of it.
    """

    def reducer_override(self, obj: Any) -> Any:
        if type(obj) is torch.Tensor and _is_plain(obj):
            flat = obj.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
            return _rebuild_tensor, (
                pickle.PickleBuffer(cast("Any", flat)),
                obj.dtype,
                tuple(obj.shape),
            )
        return cast("Any", super().reducer_override(obj))


def _is_plain(tensor: torch.Tensor) -> bool:
    return (
        tensor.device.type == "cpu"
        and tensor.layout is torch.strided
        and not tensor.requires_grad
        and not tensor.is_quantized
        and not tensor.is_conj()
        and not tensor.is_neg()
        and tensor.numel() > 0
        # Attributes hung onto a tensor would be lost.
        and not getattr(tensor, "__dict__", None)
    )


def _rebuild_tensor(buffer: Any, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    view = memoryview(buffer)
    # What travelled inside the pickle comes back read-only.
    data = np.frombuffer(bytearray(view) if view.readonly else view, dtype=np.uint8)
    return torch.from_numpy(data).view(dtype).reshape(shape)


@contextmanager
def _unimportable_modules_by_value() -> Iterator[None]:
    modules = [module for name, module in _own_modules() if not _can_be_imported(name, module)]
    registered: list[ModuleType] = []
    already = cloudpickle.list_registry_pickle_by_value()
    try:
        for module in modules:
            if module.__name__ not in already:
                cloudpickle.register_pickle_by_value(module)
                registered.append(module)
        yield
    finally:
        for module in registered:
            cloudpickle.unregister_pickle_by_value(module)


def _own_modules() -> Iterator[tuple[str, ModuleType]]:
    """Loaded modules from files outside the interpreter's and its packages' folders."""
    paths = sysconfig.get_paths()
    installed = tuple(
        os.path.join(paths[key], "")  # noqa: PTH118 - compared as text, thousands of times
        for key in ("stdlib", "platstdlib", "purelib", "platlib")
    )
    package = str(Path(__file__).parents[1])
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if (
            isinstance(file, str)
            and name != "__main__"  # cloudpickle's own case
            and getattr(module, "__name__", None) == name
            and not file.startswith(installed)
            and not file.startswith(package)
        ):
            yield name, module


def _can_be_imported(name: str, module: ModuleType) -> bool:
    """Whether importing `name` afresh would find the same file; nothing is imported to see."""
    find: Callable[..., Any] = importlib.machinery.PathFinder.find_spec
    path: Any = None
    spec = None
    parent = ""
    for part in name.split("."):
        parent = f"{parent}.{part}" if parent else part
        spec = find(parent, path)
        if spec is None:
            return False
        path = spec.submodule_search_locations
    origin = getattr(spec, "origin", None)
    file = module.__file__
    return origin is not None and file is not None and Path(origin).samefile(file)
