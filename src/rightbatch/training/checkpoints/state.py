"""The state of a training, as plain values and tensors that a checkpoint holds."""

from __future__ import annotations

from dataclasses import asdict, fields
from typing import Any

from torch import nn

from rightbatch.errors import CorruptStateError, UsageError
from rightbatch.recipe import Recipe
from rightbatch.training.loop import Training

_COUNTERS = ("steps", "examples", "consumed", "seconds", "diverged", "first_loss", "gained")


def training_state(training: Training) -> dict[str, Any]:
    """Everything that the next update depends on, beside workload, recipe and seed.

    Args:
        training: Between two advances.

    Returns:
        A tree for `save_checkpoint`. Tensors share the training's memory. Of several ranks, all
        must call this, and what rank 0 gets is to be saved.
    """
    noise, scaler, feed = training.noise, training.scaler, training.feed
    return {
        **_tensors_of(training),
        "scaler": None if scaler is None else scaler.state_dict(),
        "noise": None if noise is None else noise.state_dict(),
        "counters": {name: getattr(training, name) for name in _COUNTERS},
        "interval": list(training.interval),
        "feed": None if feed is None else feed.state_dict(),
    }


def _tensors_of(training: Training) -> dict[str, Any]:
    if training.replica is not None:
        return training.replica.whole_state(training.optimizer, training.random_states)
    return {
        "model": training.model.state_dict(),
        "optimizer": training.optimizer.state_dict(),
        "random": training.random_states,
    }


def restore_training(training: Training, state: dict[str, Any]) -> None:
    """Puts a training where another one of the same workload, recipe and seed was.

    Args:
        training: Freshly made; changed in place.
        state: What `training_state` gave.
    """
    if training.replica is None:
        training.model.load_state_dict(state["model"])
        training.optimizer.load_state_dict(state["optimizer"])
        training.random_states = state["random"]
    else:
        training.random_states = training.replica.load_whole_state(state, training.optimizer)
    if training.scaler is not None:
        training.scaler.load_state_dict(state["scaler"])
    if training.noise is not None:
        training.noise.load_state_dict(state["noise"])
    for name in _COUNTERS:
        setattr(training, name, state["counters"][name])
    loss_sum, loss_count = state["interval"]
    training.interval = (loss_sum, loss_count)
    training.go_on_from_here()
    if training.feed is not None:
        training.feed.load_state_dict(state["feed"])


def describe_run(training: Training) -> dict[str, Any]:
    """What a checkpoint must have in common with the run that goes on from it.

    Args:
        training: The run.

    Returns:
        Recipe, optimizer and shapes of the parameters.
    """
    return {
        "recipe": asdict(training.recipe),
        "optimizer": type(training.optimizer).__name__,
        "model": describe_model(training.model),
    }


def describe_model(model: nn.Module) -> dict[str, Any]:
    """Parameters and buffers by name: dtype and shape."""
    return {
        name: [str(value.dtype), *value.shape]
        for name, value in model.state_dict(keep_vars=True).items()
        if hasattr(value, "shape")
    }


def check_same_run(saved: Any, training: Training, where: object) -> None:
    """Refuses a checkpoint of another run, before anything of it is used.

    Args:
        saved: What `describe_run` gave when the checkpoint was written.
        training: The run that is to go on.
        where: The checkpoint's path, for the message.

    Raises:
        UsageError: If recipe, optimizer or parameters differ; it names the first difference.
        CorruptStateError: If the checkpoint does not say.
    """
    here = describe_run(training)
    if not isinstance(saved, dict) or saved.keys() != here.keys():
        raise CorruptStateError(f"{where} does not say which run it is of.")
    recipe, mine = saved["recipe"], here["recipe"]
    for name in [field.name for field in fields(Recipe)]:
        if recipe.get(name, mine[name]) != mine[name]:
            raise UsageError(
                f"{where} was written with {name} {recipe[name]!r} and the recipe has "
                f"{mine[name]!r}. Continue with the recipe it was begun with, or start anew."
            )
    if saved["optimizer"] != here["optimizer"]:
        raise UsageError(
            f"{where} holds the state of {saved['optimizer']} and make_optimizer gives "
            f"{here['optimizer']}. Continue with the workload it was begun with."
        )
    _check_parameters(saved["model"], here["model"], where)


def _check_parameters(saved: dict[str, Any], here: dict[str, Any], where: object) -> None:
    for name in [*saved, *here]:
        if saved.get(name) != here.get(name):
            raise UsageError(
                f"{where} has {_shape(saved.get(name))} for {name!r} and the model has "
                f"{_shape(here.get(name))}. Continue with the workload it was begun with."
            )


def _shape(entry: list[Any] | None) -> str:
    if entry is None:
        return "nothing"
    dtype, *shape = entry
    return f"{dtype.removeprefix('torch.')} {tuple(shape)}"
