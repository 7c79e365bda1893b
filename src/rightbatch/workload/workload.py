"""Workload: what to train."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from rightbatch.errors import WorkloadError
from rightbatch.workload.count import count_terms
from rightbatch.workload.data import Examples, open_examples
from rightbatch.workload.target import Target, parse_target


def _default_optimizer(params: Iterable[nn.Parameter], lr: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=lr)


@dataclass(frozen=True, kw_only=True, eq=False)
class Workload:
    """What to train, as factories, so that it can be built afresh and cross processes.

    Attributes:
        name: A short name for reports.
        make_model: Returns a fresh, randomly initialised `nn.Module` at each call.
        train_data: Tensors, a map-style dataset, a DataLoader or an iterable of examples.
        val_data: The same for validation; optional.
        loss: `loss(outputs, targets)`, the mean over the examples of a batch
            `(inputs, targets)` (over the tokens, where targets are integers of shape
            (examples, tokens); those of -100 do not count, as in torch's cross_entropy).
        compute_loss: Instead of `loss`, for any other batch: `compute_loss(model, batch)`
            returns `(loss_sum, count)`: a scalar tensor summed over examples (or tokens) and how
            many were summed.
        make_optimizer: `make_optimizer(params, lr)`. Default: plain SGD.
        metric: `metric(outputs, targets)`, a mean over the same terms as the loss, reported as
            `val_<its name>`; only with `(inputs, targets)` batches.
        target: Such as `"val_loss<=0.15"`; optional.
        collate: Turns a list of dataset items into a batch. Default: torch's.

    Raises:
        WorkloadError: If the description is incomplete or contradicts itself.
    """

    name: str
    make_model: Callable[[], nn.Module]
    train_data: Any
    val_data: Any = None
    loss: Callable[[Any, Any], Tensor] | None = None
    compute_loss: Callable[[nn.Module, Any], tuple[Tensor, Any]] | None = None
    make_optimizer: Callable[..., torch.optim.Optimizer] = field(default=_default_optimizer)
    metric: Callable[[Any, Any], Any] | None = None
    target: str | None = None
    collate: Callable[[list[Any]], Any] | None = None

    def __post_init__(self) -> None:
        if (self.loss is None) == (self.compute_loss is None):
            given = "neither" if self.loss is None else "both"
            raise WorkloadError(
                f"Workload {self.name!r} has {given} of `loss` and `compute_loss`. Give exactly "
                "one: loss(outputs, targets) for (inputs, targets) batches, or "
                "compute_loss(model, batch) -> (loss_sum, count) for any other."
            )
        for role in ("make_model", "make_optimizer"):
            if not callable(getattr(self, role)):
                raise WorkloadError(
                    f"{role} is a {type(getattr(self, role)).__name__}, not a function. Pass a "
                    f"factory, for example {role}=lambda: Net()."
                )
        if self.target is not None:
            self._check_target(parse_target(self.target))

    def _check_target(self, target: Target) -> None:
        known = ["train_loss"]
        if self.val_data is not None:
            known.append("val_loss")
            if self.metric is not None:
                known.append(self.metric_name)
        if target.quantity not in known:
            raise WorkloadError(
                f"The target {self.target!r} of workload {self.name!r} names "
                f"{target.quantity!r}, but this workload evaluates only {', '.join(known)}. "
                "Pass val_data and a metric of that name, or change the target."
            )

    @property
    def metric_name(self) -> str:
        """The name under which the metric is reported, such as `val_accuracy`."""
        name = getattr(self.metric, "__name__", type(self.metric).__name__)
        return f"val_{name}"

    @property
    def parsed_target(self) -> Target | None:
        """The target as a record, or None."""
        return None if self.target is None else parse_target(self.target)

    @cached_property
    def train_examples(self) -> Examples:
        """Random access to the training set (opened once)."""
        return open_examples(self.train_data, self.collate)

    @cached_property
    def val_examples(self) -> Examples | None:
        """Random access to the validation set, or None (opened once)."""
        return None if self.val_data is None else open_examples(self.val_data, self.collate)

    @property
    def num_examples(self) -> int:
        """Number of training examples N."""
        return self.train_examples.num_examples

    def __getstate__(self) -> dict[str, Any]:
        """Leaves the opened views out: the other process opens its own."""
        state = dict(self.__dict__)
        state.pop("train_examples", None)
        state.pop("val_examples", None)
        return state

    def build_model(self, seed: int, device: str | torch.device = "cpu") -> nn.Module:
        """A fresh model in training mode, with initial weights decided by `seed` alone.

        The caller's random state is left as it was. The same seed gives the same initial weights
        at every batch size and learning rate.

        Args:
            seed: Seed of the initial weights.
            device: Where the model is put after it was made.

        Returns:
            The model.

        Raises:
            WorkloadError: If `make_model` does not return an `nn.Module` with parameters.
        """
        with torch.random.fork_rng(enabled=True):
            torch.manual_seed(seed)
            model = self.make_model()
        if not isinstance(model, nn.Module):
            raise WorkloadError(
                f"make_model of workload {self.name!r} returned a {type(model).__name__}, not a "
                "torch.nn.Module. Return the model itself."
            )
        if not any(p.requires_grad for p in model.parameters()):
            raise WorkloadError(
                f"The model of workload {self.name!r} has no trainable parameters. Return a "
                "module with at least one parameter that requires a gradient."
            )
        return model.to(device).train()

    def loss_sum(self, model: nn.Module, batch: Any) -> tuple[Tensor, Any]:
        """The loss summed over a batch, and the count it was summed over.

        Args:
            model: The model to evaluate.
            batch: A batch as `train_examples.batch` returns it, on the model's device.

        Returns:
            `(loss_sum, count)`: scalar tensor; number of examples, or of tokens where the
            targets are sequences or `compute_loss` counts tokens.
        """
        if self.compute_loss is not None:
            return self.compute_loss(model, batch)
        assert self.loss is not None  # by __post_init__
        inputs, targets = batch
        count = count_terms(targets)
        return self.loss(model(inputs), targets) * count, count

    def loss_mean(self, model: nn.Module, batch: Any) -> tuple[Tensor, Any]:
        """The mean loss of a batch, and the count it is a mean over.

        Args:
            model: The model to evaluate.
            batch: A batch as `train_examples.batch` returns it, on the model's device.

        Returns:
            `(loss, count)`; where the count is 0, the loss is no number.
        """
        if self.compute_loss is not None:
            loss_sum, count = self.compute_loss(model, batch)
            return loss_sum / count, count
        assert self.loss is not None  # by __post_init__
        inputs, targets = batch
        return self.loss(model(inputs), targets), count_terms(targets)
