"""In place: every bit of global and given state is put back when the block ends."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn


@contextmanager
def preserved_state(*objects: nn.Module | Any) -> Iterator[None]:
    """Puts back, bit for bit, whatever the block changed.

    Global: the random states of Python, NumPy, torch and CUDA, the gradient mode, the thread
    count, the default dtype, deterministic mode and cuDNN's benchmark flag. Given modules:
    parameters, buffers, gradients, training mode and `requires_grad` of each. Given optimizers,
    schedulers and gradient scalers: their `state_dict`.

    Args:
        *objects: Modules, and anything with `state_dict` and `load_state_dict`.

    Yields:
        Nothing.
    """
    restore_globals = _save_globals()
    restore_objects = [
        _save_module(obj) if isinstance(obj, nn.Module) else _save_stateful(obj) for obj in objects
    ]
    try:
        yield
    finally:
        for restore in restore_objects:
            restore()
        restore_globals()


def _save_globals() -> Any:
    python, numpy = random.getstate(), np.random.get_state()
    cpu = torch.random.get_rng_state()
    # Asking for CUDA's state would create a CUDA context in a process that never used one.
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    gradients, threads = torch.is_grad_enabled(), torch.get_num_threads()
    dtype, deterministic = torch.get_default_dtype(), torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    benchmark = torch.backends.cudnn.benchmark

    def restore() -> None:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.random.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)
        torch.set_grad_enabled(gradients)
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
        torch.set_default_dtype(dtype)
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
        torch.backends.cudnn.benchmark = benchmark

    return restore


def _save_module(module: nn.Module) -> Any:
    modes = [(child, child.training) for child in module.modules()]
    tensors = [*module.parameters(), *module.buffers()]
    values = [tensor.detach().clone() for tensor in tensors]
    gradients = [
        (p, p.grad, None if p.grad is None else p.grad.clone(), p.requires_grad)
        for p in module.parameters()
    ]

    def restore() -> None:
        with torch.no_grad():
            for tensor, value in zip(tensors, values, strict=True):
                tensor.copy_(value)
            for parameter, gradient, value, requires_grad in gradients:
                parameter.requires_grad_(requires_grad)
                parameter.grad = gradient
                if gradient is not None and value is not None:
                    gradient.copy_(value)
        for child, training in modes:
            child.training = training

    return restore


def _save_stateful(obj: Any) -> Any:
    # A deep copy: state_dict hands out the live tensors, which the block may change in place.
    state = copy.deepcopy(obj.state_dict())
    return lambda: obj.load_state_dict(state)
