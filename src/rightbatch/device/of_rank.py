"""Which device one of several processes on a machine takes."""

from __future__ import annotations

import torch

from rightbatch.errors import UsageError


def take_device(device: str, local_rank: int) -> str:
    """The device of a rank, made the process's current one.

    Args:
        device: As asked for: `cuda` is one device for each rank; `cuda:1` and `cpu` are as said.
        local_rank: The process's number on this machine.

    Returns:
        Such as `cuda:3`.

    Raises:
        UsageError: If the machine has fewer devices.

    Example:
        >>> take_device("cpu", 3)
        'cpu'
    """
    asked = torch.device(device)
    if asked.type != "cuda":
        return device
    index = local_rank if asked.index is None else asked.index
    if index >= torch.cuda.device_count():
        raise UsageError(
            f"Process {local_rank} of this machine needs device cuda:{index}, but torch sees "
            f"{torch.cuda.device_count()}. Start no more processes than there are GPUs, or train "
            "on the CPU."
        )
    torch.cuda.set_device(index)
    return f"cuda:{index}"
