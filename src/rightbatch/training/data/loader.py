"""Fetches the micro-batches of each update, in this process or ahead of it in workers."""

from __future__ import annotations

import pickle
import sys
from collections import deque
from collections.abc import Callable, Generator, Iterator
from typing import Any

import cloudpickle
import torch
from torch.utils.data import DataLoader, Dataset

from rightbatch.training.data.rows_ahead import RowsAhead
from rightbatch.training.data.share import Share
from rightbatch.training.data.windows import Window
from rightbatch.training.evaluate import to_device
from rightbatch.training.random_state import drawing_from
from rightbatch.workload import Examples
from rightbatch.workload.data import TensorExamples

_Key = tuple[list[list[int]], tuple[int, ...]]
"""What a worker is asked for: the micro-batches' indices, and what its draws depend on."""


def load_windows(
    source: Examples,
    windows: Iterator[Window],
    *,
    share: Share,
    seed: int,
    device: str | torch.device,
    workers: int = 0,
) -> Generator[tuple[Window, list[Any]]]:
    """Windows with their micro-batches, on the device.

    Args:
        source: The training set.
        windows: What each update sees.
        share: This process's part of it.
        seed: Seed of the run: augmentations drawn by the data set are decided by it and the place.
        device: Where batches are put.
        workers: Processes that fetch ahead; 0 fetches here.

    Yields:
        A window and its micro-batches.
    """
    moved = torch.device(device).type != "cpu"
    if workers == 0:
        fetch = _fetch_here(source, share, seed)
        for window in windows:
            batches = fetch(window)
            yield window, to_device(batches, device) if moved else batches
        return
    planned: deque[Window] = deque()

    def ahead() -> Iterator[_Key]:
        for window in windows:
            planned.append(window)
            yield [part.tolist() for part in share.cut(window)], share.place_of(window)

    loader: DataLoader[Any] = DataLoader(
        _Fetching(source, seed),
        sampler=ahead(),  # pyright: ignore[reportArgumentType] (any iterable of keys will do)
        batch_size=None,
        collate_fn=_as_it_is,
        num_workers=workers,
        multiprocessing_context=_how_to_start_workers(),
        generator=torch.Generator(),  # else it draws a number from the global one
    )
    for batches in loader:
        yield planned.popleft(), to_device(batches, device)


def _fetch_here(source: Examples, share: Share, seed: int) -> Callable[[Window], list[Any]]:
    """What fetches a window's micro-batches in this process."""
    if isinstance(source, TensorExamples):  # rows of tensors are drawn from nothing
        rows = RowsAhead(source, share)
        return rows.batches
    return lambda window: _fetch(source, share.cut(window), seed, share.place_of(window))


def _fetch(
    source: Examples, parts: list[torch.Tensor], seed: int, place: tuple[int, ...]
) -> list[Any]:
    with drawing_from(seed, *place):
        return [source.batch(indices) for indices in parts]


def _how_to_start_workers() -> str | None:
    """By forking, torch's default, unless JAX is there: its threads may hold locks meanwhile."""
    return "spawn" if "jax" in sys.modules else None


class _Fetching(Dataset[Any]):
    """What a worker does: the micro-batches of one window."""

    def __init__(self, source: Examples, seed: int) -> None:
        self._source = source
        self._seed = seed

    def __reduce__(self) -> tuple[Any, ...]:
        """Crosses to a worker that was not forked with whatever the data set is made of."""
        return _remade, (cloudpickle.dumps((self._source, self._seed)),)

    def __getitem__(self, key: _Key) -> list[Any]:
        parts, place = key
        return _fetch(self._source, [torch.tensor(part) for part in parts], self._seed, place)


def _remade(pickled: bytes) -> _Fetching:
    return _Fetching(*pickle.loads(pickled))


def _as_it_is(batches: list[Any]) -> list[Any]:
    return batches
