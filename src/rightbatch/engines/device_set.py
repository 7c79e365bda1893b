"""A set of examples on the device, once, however many copies read it."""

from __future__ import annotations

from dataclasses import dataclass

from jax import Array

from rightbatch.engines.lowering.dtypes import to_jax
from rightbatch.engines.whole_set import WholeSet, collate_all
from rightbatch.workload import Examples


@dataclass(frozen=True, kw_only=True, eq=False)
class DeviceSet:
    """A set of examples on the device.

    Attributes:
        whole: The same as torch tensors, to trace with.
        leaves: The device's arrays, each of shape (examples, …).
    """

    whole: WholeSet
    leaves: list[Array]

    @property
    def num_examples(self) -> int:
        """How many examples there are."""
        return self.whole.num_examples


def put_on_device(examples: Examples) -> DeviceSet:
    """Copies a set of examples to the device.

    Args:
        examples: The set.

    Returns:
        The set on the device.
    """
    whole = collate_all(examples)
    return DeviceSet(whole=whole, leaves=[to_jax(leaf) for leaf in whole.leaves])
