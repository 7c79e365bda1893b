"""Validation of all copies in one compiled call: one copy after the other, batch by batch.

A batch of evaluation is large, so copies gain nothing from being computed at once, and one at a
time bounds the memory.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from rightbatch.engines.device_set import DeviceSet
from rightbatch.engines.lowering import lower
from rightbatch.engines.lowering.graph import Lowered
from rightbatch.engines.trace import Layout, trace_evaluation
from rightbatch.training.evaluate import EVALUATION_BATCH
from rightbatch.workload import Workload


class Evaluator:
    """Evaluates copies on the validation set; one per workload.

    Args:
        workload: Says how loss and metric are computed. It is not kept.
        layout: Which tensors are trained.
        data: The validation set on the device.

    Raises:
        Unsupported: If the evaluation cannot be traced or lowered.
    """

    def __init__(self, workload: Workload, layout: Layout, data: DeviceSet) -> None:
        self.has_metric = workload.loss is not None and workload.metric is not None
        self.num_examples = data.num_examples
        self._leaves = data.leaves
        self._size = min(EVALUATION_BATCH, data.num_examples)
        self._full_batches, rest = divmod(data.num_examples, self._size)

        def trace(rows: int) -> Lowered:
            model = workload.build_model(0)
            return lower(trace_evaluation(workload, model, layout, data.whole, rows))

        self._full = trace(self._size)
        self._rest = trace(rest) if rest else None
        self._run = jax.jit(self._evaluate_copies)

    def __call__(
        self, trained: list[Array], carried: list[Array], num_copies: int
    ) -> list[np.ndarray[Any, Any]]:
        """Loss sums, counts and, where there is one, metric sums over the validation set.

        Args:
            trained: Trained tensors, each with a leading copies axis.
            carried: All other tensors, likewise.
            num_copies: Copies to evaluate, from the first.

        Returns:
            Arrays of shape (num_copies,), float64.
        """
        sums = self._run(trained, carried, jnp.asarray(num_copies), self._leaves)
        # Float32 within a batch and float64 across batches, as the plain loop adds them.
        return [np.asarray(s, np.float64).sum(axis=1)[:num_copies] for s in sums]

    def _evaluate_copies(
        self, trained: list[Array], carried: list[Array], num_copies: Array, leaves: list[Array]
    ) -> list[Array]:
        slots = trained[0].shape[0]
        num_batches = self._full_batches + (self._rest is not None)
        outputs = 3 if self.has_metric else 2

        def one(copy: Array, sums: list[Array]) -> list[Array]:
            own = jax.tree.map(lambda x: x[copy], (trained, carried))
            rows = self._evaluate_one(own[0], own[1], leaves)
            return [s.at[copy].set(row) for s, row in zip(sums, rows, strict=True)]

        empty = [jnp.zeros((slots, num_batches), jnp.float32) for _ in range(outputs)]
        return lax.fori_loop(0, num_copies, one, empty)

    def _evaluate_one(
        self, trained: list[Array], carried: list[Array], leaves: list[Array]
    ) -> list[Array]:
        """Sums of one copy, each of shape (batches,)."""

        def full(index: Array) -> list[Array]:
            start = index * self._size
            batch = [lax.dynamic_slice_in_dim(leaf, start, self._size) for leaf in leaves]
            return list(self._full(trained, carried, batch))

        sums = lax.map(full, jnp.arange(self._full_batches))
        if self._rest is None:
            return sums
        tail = [leaf[self._full_batches * self._size :] for leaf in leaves]
        rest = self._rest(trained, carried, tail)
        return [jnp.append(s, r) for s, r in zip(sums, rest, strict=True)]
