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
"""Examples fetched a second time, to see that a batch is made of the same rows."""


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
    probe = torch.arange(min(_COMPARED, count))
    with torch.random.fork_rng():
        few, spec = _flatten(examples.batch(probe))
        total_bytes = sum(t.nbytes for t in few) * count // len(probe)
        if total_bytes > MAX_SET_BYTES:
            raise Unsupported(
                f"the data take about {total_bytes / 2**20:.0f} MiB and the compiled engine "
                f"keeps at most {MAX_SET_BYTES // 2**20} MiB on the device"
            )
        leaves, all_spec = _flatten(examples.batch(torch.arange(count)))
        again, _ = _flatten(examples.batch(probe))
    rows_match = all_spec == spec and all(
        whole.ndim > 0 and whole.shape[0] == count and _same(whole[: len(probe)], a, b)
        for whole, a, b in zip(leaves, few, again, strict=True)
    )
    if not rows_match:
        raise Unsupported("the batches are not rows of fixed tensors (padded or random examples)")
    return WholeSet(leaves=tuple(leaves), spec=spec, num_examples=count)


def _flatten(batch: Any) -> tuple[list[Tensor], Any]:
    leaves, spec = pytree.tree_flatten(batch)
    other = next((leaf for leaf in leaves if not isinstance(leaf, Tensor)), None)
    if other is not None:
        raise Unsupported(f"a batch holds a {type(other).__name__}, which is not a tensor")
    return [leaf.detach() for leaf in leaves], spec


def _same(whole: Tensor, *others: Tensor) -> bool:
    return all(
        whole.shape == other.shape and torch.allclose(whole, other, rtol=0, atol=0, equal_nan=True)
        for other in others
    )
