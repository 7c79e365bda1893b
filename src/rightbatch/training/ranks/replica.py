"""What a training asks of its part, when several ranks train together."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler

from rightbatch.errors import WorkloadError
from rightbatch.recipe import Recipe, Reduction
from rightbatch.store import hash_tensors
from rightbatch.training.data.windows import Window
from rightbatch.training.evaluate import Evaluation
from rightbatch.training.ranks.distributed import Ranks
from rightbatch.training.ranks.replicated import Replicated
from rightbatch.workload import Workload


class Replica(Protocol):
    """One rank's part. Each method is called on all ranks in the same order.

    Attributes:
        stopped: Whether some rank wanted to stop, as all of them know since the last update.
        paused: Whether some rank wanted to do something between updates, likewise.
    """

    stopped: bool
    paused: bool

    def begin(self, window: Window, *, steps: int, stop: bool, pause: bool) -> None:
        """Before an update: whether this rank wants it to be the last, or a pause after it."""

    def gradients(
        self,
        workload: Workload,
        model: nn.Module,
        batches: Sequence[Any],
        *,
        autocast: torch.dtype | None,
        scaler: GradScaler | None,
        reduction: Reduction,
        observe: Any,
    ) -> Tensor | None:
        """Leaves the gradient over all ranks in `.grad`; returns their mean loss."""

    def local(self, gradients: list[Tensor]) -> list[Tensor]:
        """The parts of some gradients that this rank holds, not copied."""
        ...

    def norms(self, gradients: list[Tensor]) -> list[Tensor]:
        """The norm of each whole gradient, from the parts that `local` gave."""
        ...

    def whole_model(self) -> nn.Module:
        """The model as a single process would hold it."""
        ...

    def whole_state(self, optimizer: torch.optim.Optimizer, random: list[Tensor]) -> dict[str, Any]:
        """Model, optimizer and the random states of all ranks, for a checkpoint of rank 0."""
        ...

    def load_whole_state(
        self, state: dict[str, Any], optimizer: torch.optim.Optimizer
    ) -> list[Tensor]:
        """Puts model and optimizer where `whole_state` was; returns this rank's random states."""
        ...

    def close(self) -> None:
        """Leaves the model alone from now on."""


def make_replica(
    ranks: Ranks, workload: Workload, recipe: Recipe, model: nn.Module, seed: int, smallest: int
) -> Replica:
    """Makes a model this rank's part of a common one.

    Args:
        ranks: Who trains.
        workload: What.
        recipe: How.
        model: This rank's model, as the same seed makes it on all ranks; shards change it in
            place, so that the optimizer must be made afterwards.
        seed: Of the run.
        smallest: Examples that the model needs at least in one pass.

    Returns:
        The part.

    Raises:
        WorkloadError: If a layer of the model would wait for other ranks in vain.
    """
    _check_waiting_layers(model, recipe)
    ranks.micro_batch = recipe.micro_batch
    task = {"workload": workload.name, "num_examples": workload.num_examples, "seed": seed}
    ranks.agree(task, "Start all processes with the same program and arguments.")
    ranks.agree(
        {"sha256 of the initial weights": hash_tensors(model.state_dict().items())},
        "make_model draws from something else than torch's generator: seed that as well.",
    )
    if recipe.sharding == "replicated":
        return Replicated(ranks, model)
    # Imported when it is needed: it takes a second.
    from rightbatch.training.ranks.sharded import Sharded

    return Sharded(ranks, workload, recipe, model, seed=seed, smallest=smallest)


def _check_waiting_layers(model: nn.Module, recipe: Recipe) -> None:
    """SyncBatchNorm waits for all ranks in every pass: all must have as many, in every update."""
    name = next((n for n, m in model.named_modules() if isinstance(m, nn.SyncBatchNorm)), None)
    one_each = recipe.accumulation == 1 and not recipe.changes_batch
    if name is not None and not (one_each and recipe.last_batch in ("drop", "pad")):
        raise WorkloadError(
            f"Layer {name!r} is a SyncBatchNorm, which waits for every rank in each forward pass, "
            "and ranks would not have the same number of them. Use accumulation=1 with "
            "last_batch='drop', or GroupNorm."
        )


def first_evaluation(evaluation: Evaluation, ranks: Ranks) -> Evaluation:
    """Rank 0's evaluation on all ranks: a target must be met on all of them or on none.

    Args:
        evaluation: This rank's.
        ranks: Who evaluated the same.

    Returns:
        That of rank 0.
    """
    metric = evaluation.metric
    loss, first = ranks.of_first([evaluation.loss, math.nan if metric is None else metric])
    return Evaluation(loss=loss, metric=None if metric is None else first)
