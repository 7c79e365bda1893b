"""From a name on the command line to a workload: the catalog, a file, or a module."""

from __future__ import annotations

import difflib
import hashlib
import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from rightbatch.catalog.entries import find_entry, names
from rightbatch.errors import RightbatchError, WorkloadError

if TYPE_CHECKING:  # importing it for real would import torch, which listing the catalog need not
    from rightbatch.workload import Workload


def get(name: str) -> Workload:
    """Builds a built-in workload.

    Args:
        name: One of `names()`.

    Returns:
        The workload.

    Raises:
        WorkloadError: If there is none of that name.

    Example:
        >>> get("max3").num_examples
        1000
    """
    entry = find_entry(name)
    if entry is None:
        raise WorkloadError(f"There is no built-in workload {name!r}. {_near(name, names())}")
    return importlib.import_module(f"rightbatch.catalog.{entry.module}").build(name)


def load_workload(reference: str) -> Workload:
    """Finds a workload by what a person types.

    Args:
        reference: A catalog name, `path/to/file.py:name` or `package.module:name`. The name is
            that of a `Workload` or of a function without arguments that returns one.

    Returns:
        The workload. What a file defines reaches child processes by value.

    Raises:
        WorkloadError: If nothing is found there, the file fails, or it is no workload.
    """
    source, colon, name = reference.rpartition(":")
    if not colon:
        return get(_without_colon(reference))
    if not source or not name:
        raise WorkloadError(
            f"{reference!r} names no workload. Write path/to/file.py:name or package.module:name."
        )
    module = _load_file(source) if source.endswith(".py") else _load_module(source)
    return _take(module, name, reference)


def _without_colon(reference: str) -> str:
    """The reference, unless it looks like a file or a module whose `:name` was forgotten."""
    path = Path(reference)
    if find_entry(reference) is None and (path.suffix == ".py" or path.exists()):
        raise WorkloadError(
            f"{reference!r} does not say which workload of the file is meant. Write "
            f"{reference}:name, with the name of a Workload in it."
        )
    return reference


def _load_file(source: str) -> ModuleType:
    path = Path(source).resolve()
    if not path.is_file():
        there = sorted(p.name for p in path.parent.glob("*.py")) if path.parent.is_dir() else []
        raise WorkloadError(f"There is no file {source!r}. {_near(path.name, there)}".rstrip())
    # The digest keeps two files of one name apart.
    digest = hashlib.sha256(str(path).encode()).hexdigest()[:8]
    module_name = f"{path.stem}_{digest}"
    spec = importlib.util.spec_from_file_location(module_name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # As when Python runs the file: it may import its neighbours. They stay importable, since
    # functions of the workload may import late, and child processes inherit the path.
    if str(path.parent) not in sys.path:
        sys.path.insert(0, str(path.parent))
    sys.modules[module_name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException as error:
        del sys.modules[module_name]
        raise _failed(source, error) from error
    _send_by_value(module)
    return module


def _load_module(source: str) -> ModuleType:
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        return importlib.import_module(source)
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if source != missing and not source.startswith(f"{missing}."):
            raise _failed(source, error) from error
        raise WorkloadError(
            f"There is no module {source!r}. Run from the folder that holds it, install it, or "
            "write path/to/file.py:name."
        ) from error
    except BaseException as error:
        raise _failed(source, error) from error


def _failed(source: str, error: BaseException) -> BaseException:
    """What to raise when a file or module fails while it is imported."""
    if isinstance(error, RightbatchError | KeyboardInterrupt | GeneratorExit):
        return error
    return WorkloadError(
        f"{source!r} failed while it was imported, with {type(error).__name__}: {error}. Run it "
        "with Python alone to see where."
    )


def _send_by_value(module: ModuleType) -> None:
    """Lets child processes have what a file defines: they cannot import it by its name."""
    import cloudpickle

    cloudpickle.register_pickle_by_value(module)


def _take(module: ModuleType, name: str, reference: str) -> Workload:
    from rightbatch.workload import Workload

    found = _attribute(module, name, reference)
    if callable(found) and not isinstance(found, Workload):
        found = _call(found, name, reference)
    if not isinstance(found, Workload):
        raise WorkloadError(
            f"{reference!r} is a {type(found).__name__}, not a Workload. Name a "
            "rightbatch.Workload, or a function without arguments that returns one."
        )
    return found


def _attribute(module: ModuleType, name: str, reference: str) -> Any:
    from rightbatch.workload import Workload

    if not hasattr(module, name):
        workloads = [key for key, value in vars(module).items() if isinstance(value, Workload)]
        public = [key for key in vars(module) if not key.startswith("_")]
        raise WorkloadError(
            f"{reference!r} names {name!r}, which is not defined there. "
            f"{_near(name, workloads or public)}".rstrip()
        )
    return getattr(module, name)


def _call(function: Any, name: str, reference: str) -> Any:
    try:
        return function()
    except RightbatchError:
        raise
    except Exception as error:
        raise WorkloadError(
            f"{name!r} in {reference!r} failed with {type(error).__name__}: {error}. It is called "
            "without arguments and must return a Workload."
        ) from error


def _near(name: str, candidates: list[str]) -> str:
    """A sentence with the near matches of a name, or with all that there are."""
    if not candidates:
        return ""
    close = difflib.get_close_matches(name, candidates, n=3, cutoff=0.5)
    if close:
        return f"Did you mean {' or '.join(close)}?"
    return f"There are: {', '.join(candidates[:12])}."
