"""The device's clock: seconds at a moment when the device has finished what it was given."""

from __future__ import annotations

import os
import time
from typing import Protocol

import torch


class Clock(Protocol):
    """Tells the time. Tests pass their own, so that a planted device can be measured."""

    def now(self) -> float:
        """Seconds since some fixed moment, all work given to the device so far included."""
        ...


class DeviceClock:
    """The wall clock, read when the device is idle.

    An accelerator runs behind the program that feeds it, so it is waited for at each reading.
    Reading it once per *block* of steps, not once per step, keeps the queue full as it is in
    training. Wall time is what training waits for, so it is read on every kind of device; the
    device's own event timers would leave out the host, which is the bottleneck of small steps.

    Args:
        device: Which device to wait for.

    Example:
        >>> clock = DeviceClock("cpu")
        >>> start = clock.now()
        >>> clock.now() >= start
        True
    """

    def __init__(self, device: str | torch.device = "cpu") -> None:
        self._device = torch.device(device)

    def now(self) -> float:
        """Seconds on the monotonic clock, after waiting for the device."""
        synchronise(self._device)
        return time.perf_counter()


class ThreadClock:
    """Processor time of the thread that reads it: what a step takes on an otherwise idle machine.

    On a machine that has more to do than processors, the wall clock times the other programs as
    well, and small steps most of all. What the thread waits for, such as a disk, is not counted.
    """

    def now(self) -> float:
        """Seconds of processor time."""
        return time.thread_time()


def is_busy() -> bool:
    """Whether more programs want to run than there are processors, by the last minute's load."""
    if not hasattr(os, "getloadavg"):
        return False
    return os.getloadavg()[0] > (os.cpu_count() or 1)


def synchronise(device: str | torch.device) -> None:
    """Waits until a device has finished all work given to it; returns at once for the CPU.

    Args:
        device: Which device.
    """
    if torch.device(device).type != "cpu":
        torch.accelerator.synchronize(torch.device(device))
