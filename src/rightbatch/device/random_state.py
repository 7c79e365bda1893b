"""The state of a device's random generator."""

from __future__ import annotations

import torch
from torch import Tensor


def get_random_states(device: str | torch.device) -> list[Tensor]:
    """States of torch's CPU generator and, on CUDA, of the device's own.

    Args:
        device: Where a training runs.

    Returns:
        One or two states; dropout on CUDA draws from the second.
    """
    states = [torch.default_generator.get_state()]
    if device != "cpu" and torch.device(device).type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return states


def set_random_states(states: list[Tensor], device: str | torch.device) -> None:
    """Puts states back that `get_random_states` gave for the same kind of device.

    Args:
        states: What it returned.
        device: Where a training runs.
    """
    torch.default_generator.set_state(states[0])
    if len(states) > 1:
        torch.cuda.set_rng_state(states[1], device)


def seeded_random_states(seed: int, device: str | torch.device) -> list[Tensor]:
    """States as `get_random_states` gives them, decided by a seed; no generator is touched.

    Args:
        seed: Decides them.
        device: Where a training runs.

    Returns:
        One or two states.
    """
    kinds = ["cpu", device] if torch.device(device).type == "cuda" else ["cpu"]
    return [torch.Generator(kind).manual_seed(seed).get_state() for kind in kinds]
