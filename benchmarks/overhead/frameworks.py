"""The rows of other libraries: the same model, data, loss and optimizer, trained by theirs.

Each `fit` begins with work that is done once. It is taken out by fitting two lengths, so what is
left is the cost of a step and, where a block is longer than an epoch, of the epochs in it. Nothing
they offer is switched on: no logging, progress, checkpoints, validation or scoring.
"""

from __future__ import annotations

import importlib
import logging
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from rightbatch.workload import Workload

from .rows import LEARNING_RATE, SkippedRowError, mean_over_bytes

Fit = Callable[[], None]
MakeFit = Callable[[int], Fit]
"""Prepares a fit of so many steps, from new weights; only what it returns is timed."""


def pairs_of(workload: Workload) -> tuple[Tensor, Tensor]:
    """Inputs and targets of the training set, as these libraries want them."""
    data: Any = workload.train_data
    if workload.name == "source-lm":
        windows_BL = data.long()
        return windows_BL[:, :-1].contiguous(), windows_BL[:, 1:].contiguous()
    return data


def loss_of(workload: Workload) -> Callable[[Tensor, Tensor], Tensor]:
    """The mean loss of the workload."""
    return mean_over_bytes if workload.name == "source-lm" else F.cross_entropy


def split_epochs(num_steps: int, global_batch: int, num_examples: int) -> tuple[int, int]:
    """How to do a number of steps in whole epochs, for libraries that count those.

    Args:
        num_steps: Within one epoch, or a multiple of one.
        global_batch: Examples per update.
        num_examples: Size of the training set.

    Returns:
        Epochs, and the examples that each goes over.

    Example:
        >>> split_epochs(12, 256, 1438), split_epochs(100, 1, 1438)
        ((2, 1438), (1, 100))
    """
    per_epoch = math.ceil(num_examples / global_batch)
    if num_steps < per_epoch:
        return 1, num_steps * global_batch
    return num_steps // per_epoch, num_examples


def make_lightning(workload: Workload, global_batch: int) -> MakeFit:
    """Lightning: a minimal module, a `DataLoader` of tensors, everything optional off."""
    lightning = _import("lightning")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    loss_function = loss_of(workload)
    data = TensorDataset(*pairs_of(workload))

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = workload.make_model()

        def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
            inputs, targets = batch
            return loss_function(self.model(inputs), targets)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return workload.make_optimizer(self.parameters(), LEARNING_RATE)

    def prepare(num_steps: int) -> Fit:
        trainer = lightning.Trainer(
            max_steps=num_steps,
            max_epochs=-1,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        module, loader = Module(), DataLoader(data, global_batch, shuffle=True)
        return lambda: trainer.fit(module, loader)

    return prepare


def make_skorch(workload: Workload, global_batch: int) -> MakeFit:
    """Skorch: a `NeuralNet` without a validation split and without printing."""
    skorch = _import("skorch")
    loss_function = loss_of(workload)
    inputs, targets = pairs_of(workload)

    class Criterion(nn.Module):
        def forward(self, outputs: Tensor, wanted: Tensor) -> Tensor:
            return loss_function(outputs, wanted)

    def prepare(num_steps: int) -> Fit:
        epochs, num_examples = split_epochs(num_steps, global_batch, len(inputs))
        net = skorch.NeuralNet(
            workload.make_model(),
            criterion=Criterion,
            optimizer=workload.make_optimizer,
            lr=LEARNING_RATE,
            batch_size=global_batch,
            train_split=None,
            iterator_train__shuffle=True,
            callbacks__print_log=None,
        ).initialize()
        some, wanted = inputs[:num_examples], targets[:num_examples]
        return lambda: net.partial_fit(some, wanted, epochs=epochs)

    return prepare


def make_keras(workload: Workload, global_batch: int) -> MakeFit:
    """Keras on torch: the same architecture, from Keras's own layers and with its own SGD."""
    if workload.name != "digits":
        raise SkippedRowError(
            "the transformer would have to be rebuilt from Keras's layers, whose arithmetic is "
            "another: the ratio would not be overhead"
        )
    keras = _import("keras")
    if keras.backend.backend() != "torch":
        raise SkippedRowError(
            f"the Keras backend is {keras.backend.backend()}; set KERAS_BACKEND=torch"
        )
    inputs, targets = pairs_of(workload)

    def prepare(num_steps: int) -> Fit:
        epochs, num_examples = split_epochs(num_steps, global_batch, len(inputs))
        dense = keras.layers.Dense
        model = keras.Sequential([keras.Input((64,)), dense(64, activation="relu"), dense(10)])
        model.compile(
            optimizer=keras.optimizers.SGD(LEARNING_RATE),
            loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        )
        some, wanted = inputs[:num_examples], targets[:num_examples]
        return lambda: model.fit(
            some, wanted, batch_size=global_batch, epochs=epochs, shuffle=True, verbose=0
        )

    return prepare


def _import(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise SkippedRowError(
            f"{name} is not installed ({error}): pip install '.[bench]'"
        ) from error
