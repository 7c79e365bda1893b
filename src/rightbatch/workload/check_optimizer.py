"""What make_optimizer returns: an optimizer, of all parameters, at the learning rate asked for."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from rightbatch.errors import WorkloadError
from rightbatch.workload.workload import Workload

_RATES = (1e-3, 2e-3)


def check_optimizer(workload: Workload, model: nn.Module) -> None:
    """Makes the optimizer at two learning rates, looks at it, and does one step.

    Args:
        workload: The workload.
        model: A throw-away model with gradients; its parameters move.

    Raises:
        WorkloadError: If it is no optimizer, ignores the learning rate, misses parameters or
            cannot step.
    """
    low, high = (_make(workload, model, rate) for rate in _RATES)
    _check_parameters(workload, model, low)
    rates = [[float(group["lr"]) for group in made.param_groups] for made in (low, high)]
    if rates[0] == rates[1]:
        raise WorkloadError(
            f"make_optimizer of workload {workload.name!r} gives the learning rate {rates[0][0]:g} "
            f"whether it is asked for {_RATES[0]:g} or {_RATES[1]:g}. Pass it on: "
            "make_optimizer=lambda params, lr: torch.optim.SGD(params, lr=lr)."
        )
    try:
        low.step()
    except Exception as error:
        raise WorkloadError(
            f"The optimizer {type(low).__name__} of workload {workload.name!r} failed at its first "
            f"step with {type(error).__name__}: {error}. Use one whose step() needs no arguments; "
            "LBFGS and others that call a closure are not supported."
        ) from error


def _make(workload: Workload, model: nn.Module, rate: float) -> torch.optim.Optimizer:
    try:
        made: Any = workload.make_optimizer(model.parameters(), rate)
    except Exception as error:
        raise WorkloadError(
            f"make_optimizer of workload {workload.name!r} failed with {type(error).__name__}: "
            f"{error}. It is called as make_optimizer(params, lr); params is an iterator, so make "
            "a list of it before going through it twice."
        ) from error
    if not isinstance(made, torch.optim.Optimizer):
        raise WorkloadError(
            f"make_optimizer of workload {workload.name!r} returned a {type(made).__name__}, not a "
            "torch.optim.Optimizer. Return the optimizer itself."
        )
    return made


def _check_parameters(
    workload: Workload, model: nn.Module, optimizer: torch.optim.Optimizer
) -> None:
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    missing = [name for name, p in trainable.items() if id(p) not in held]
    if missing:
        raise WorkloadError(
            f"The optimizer of workload {workload.name!r} holds {len(trainable) - len(missing)} of "
            f"the {len(trainable)} trainable parameters ({missing[0]!r} is missing). Pass it the "
            "params it is given (an iterator: make a list to go through it twice), and freeze "
            "parameters with requires_grad_(False) in make_model."
        )
