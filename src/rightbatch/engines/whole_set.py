"""A whole set of examples as tensors, so that it can lie on the device once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from rightbatch.engines.unsupported import Unsupported
from rightbatch.workload import Examples

MAX_SET_BYTES = 512 * 2**20
"""A larger set is not copied to the device."""
_COMPARED = 5
"""Examples fetched a second time, alone, to see that a batch is made of the same rows."""


@dataclass(frozen=True, kw_only=True, eq=False)
class WholeSet:
    """Every example of a set, collated.

    Attributes:
        leaves: The tensors of the batch of all examples, each of shape (examples, …).
        spec: The container they came in.
        num_examples: How many there are.
    """

    leaves: tuple[Tensor, ...]
    spec: Any
    num_examples: int

    def rows(self, num_rows: int) -> list[Tensor]:
        """The first `num_rows` rows of every tensor, to trace with."""
        return [leaf[:num_rows].clone() for leaf in self.leaves]

    def container(self, leaves: list[Tensor]) -> Any:
        """Tensors in the container the workload's batches come in."""
        return pytree.tree_unflatten(leaves, self.spec)


def collate_all(examples: Examples) -> WholeSet:
    """Collates every example of a set into one batch.

    Args:
        examples: The set.

    Returns:
        Its tensors.

    Raises:
        Unsupported: If the set is too large, or its batches are not rows of fixed tensors
            (padding to the longest of a batch, random augmentation).
    """
    count = examples.num_examples
    compared = torch.linspace(0, count - 1, min(_COMPARED, count)).long()
    with torch.random.fork_rng():
        # One by one, because padding shows where a batch is shorter than the longest example.
        singles = [_flatten(examples.batch(index.reshape(1))) for index in compared]
        total_bytes = count * max(sum(t.nbytes for t in leaves) for leaves, _ in singles)
        if total_bytes > MAX_SET_BYTES:
            raise Unsupported(
                f"the data take about {total_bytes / 2**20:.0f} MiB and an engine "
                f"puts at most {MAX_SET_BYTES // 2**20} MiB on the device"
            )
        leaves, spec = _flatten(examples.batch(torch.arange(count)))
    for index, (single, single_spec) in zip(compared.tolist(), singles, strict=True):
        rows = [whole[index : index + 1] for whole in leaves if whole.shape[:1] == (count,)]
        same = single_spec == spec and len(rows) == len(single) == len(leaves)
        if not same or not all(map(_equal, rows, single)):
            raise Unsupported(
                "the batches are not rows of fixed tensors (padded or random examples)"
            )
    return WholeSet(leaves=tuple(leaves), spec=spec, num_examples=count)


def _flatten(batch: Any) -> tuple[list[Tensor], Any]:
    leaves, spec = pytree.tree_flatten(batch)
    other = next((leaf for leaf in leaves if not isinstance(leaf, Tensor)), None)
    if other is not None:
        raise Unsupported(f"a batch holds a {type(other).__name__}, which is not a tensor")
    return [leaf.detach() for leaf in leaves], spec


def _equal(x: Tensor, y: Tensor) -> bool:
    return (
        x.shape == y.shape
        and x.dtype == y.dtype
        and torch.allclose(x, y, rtol=0, atol=0, equal_nan=x.is_floating_point())
    )
