"""The rows that train in a loop of their own: hand-written, ours, and ours with watching."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rightbatch.recipe import Recipe
from rightbatch.training import Training
from rightbatch.training.watching.watch import Watch
from rightbatch.training.watching.watched_weight import weight_name
from rightbatch.workload import Workload

LEARNING_RATE = 1e-3
"""Small enough for every batch; what a step costs does not depend on it."""

Advance = Callable[[int], None]
"""Does a number of updates."""


class SkippedRowError(Exception):
    """A row that cannot run here; the message is the reason."""


def make_hand_written(workload: Workload, global_batch: int) -> Advance:
    """What a good engineer writes for this workload, and nothing else.

    Args:
        workload: `digits` or `source-lm`.
        global_batch: Examples per update.

    Returns:
        Does a number of updates; goes on where it stopped.
    """
    torch.manual_seed(0)
    model = workload.make_model()
    optimizer = workload.make_optimizer(model.parameters(), LEARNING_RATE)
    write = {"digits": _write_digits, "source-lm": _write_source_lm}[workload.name]
    steps = write(model, optimizer, workload.train_data, global_batch)

    def advance(num_steps: int) -> None:
        for _ in range(num_steps):
            next(steps)

    return advance


def _write_digits(
    model: nn.Module, optimizer: torch.optim.Optimizer, data: Any, global_batch: int
) -> Iterator[None]:
    inputs, targets = data
    while True:
        for indices in torch.randperm(len(inputs)).split(global_batch):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(inputs[indices]), targets[indices])
            loss.backward()
            optimizer.step()
            yield


def _write_source_lm(
    model: nn.Module, optimizer: torch.optim.Optimizer, data: Any, global_batch: int
) -> Iterator[None]:
    while True:
        for indices in torch.randperm(len(data)).split(global_batch):
            windows_BL = data[indices].long()
            optimizer.zero_grad()
            loss = mean_over_bytes(model(windows_BL[:, :-1]), windows_BL[:, 1:])
            loss.backward()
            optimizer.step()
            yield


def mean_over_bytes(scores_BLV: Tensor, following_BL: Tensor) -> Tensor:
    """The loss of `source-lm`, as a mean."""
    return F.cross_entropy(scores_BLV.flatten(0, 1), following_BL.flatten())


def make_ours(workload: Workload, global_batch: int) -> Advance:
    """Our training loop, as `rightbatch.train` uses it.

    Args:
        workload: Any.
        global_batch: Examples per update.

    Returns:
        Does a number of updates; goes on where it stopped.
    """
    return Training(workload, _recipe(global_batch), seed=0).advance


def make_watching(workload: Workload, global_batch: int) -> Advance:
    """Our training loop with the records and the path of one weight of the last layer.

    Args:
        workload: Any.
        global_batch: Examples per update.

    Returns:
        Does a number of updates; goes on where it stopped.
    """
    name, parameter = list(workload.build_model(0).named_parameters())[-1]
    watch = Watch(weights=[weight_name(name, [0] * parameter.ndim)])
    training = Training(workload, _recipe(global_batch), seed=0, callbacks=[watch])
    watch.on_start(training)
    return training.advance


def _recipe(global_batch: int) -> Recipe:
    return Recipe(global_batch=global_batch, learning_rate=LEARNING_RATE)
