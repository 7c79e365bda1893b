"""Copies whose tensors are stacked on a leading axis, and what advances them by one update."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from rightbatch.engines.copies import BoolArray, FloatArray, IntArray
from rightbatch.engines.optimizer_plan import OptimizerPlan
from rightbatch.engines.stacked_pass import Evaluated, StackedEvaluation
from rightbatch.engines.stacked_path import StackedPath, WeightPlace
from rightbatch.engines.stacked_update import StackedOptimizer
from rightbatch.engines.stacker import Stacker
from rightbatch.engines.trace import named_tensors
from rightbatch.training import epoch_order
from rightbatch.workload import Workload

Step = Callable[[Tensor], Tensor]
"""One update on the rows of each copy's batch, int64, shape (copies, batch); returns the losses."""
_WARM_UPS = 3
"""Updates before one is captured: libraries set themselves up in the first ones."""


class Stack:
    """Copies that are advanced together.

    Args:
        workload: What to train.
        stacker: What its copies share.
        plan: The optimizer of all copies.
        seeds: Of all copies.
        part: Positions of these copies among all.
        global_batch: Examples per update.
        watched: Name and place of the weight to follow, or None.
    """

    def __init__(
        self,
        workload: Workload,
        stacker: Stacker,
        plan: OptimizerPlan,
        seeds: IntArray,
        part: IntArray,
        global_batch: int,
        watched: WeightPlace | None = None,
    ) -> None:
        self._workload, self._stacker = workload, stacker
        self._seeds = seeds[part]
        distinct, which = np.unique(self._seeds, return_inverse=True)
        models = [workload.build_model(int(seed), stacker.device) for seed in distinct]
        held = [named_tensors(model) for model in models]

        def stacked(names: Sequence[str]) -> list[Tensor]:
            return [torch.stack([h[n].detach() for h in held])[which.tolist()] for n in names]

        layout = stacker.layout
        self._trained, self._carried = stacked(layout.trained), stacked(layout.carried)
        self._path: StackedPath | None = None
        if watched is not None:
            self._path = StackedPath(layout.trained, held, models, which, watched)
        self._optimizer = StackedOptimizer(plan, self._trained, part.tolist())
        self._batch = global_batch
        self._per_epoch = -(-stacker.data.num_examples // global_batch)
        self._order: tuple[int, Tensor] | None = None
        self._steps: dict[int, Step] = {}
        # Traced now, so that what cannot be is known before the first update.
        for size in {global_batch, stacker.data.num_examples % global_batch or global_batch}:
            stacker.training_pass(workload, self.num_copies, size)

    @property
    def num_copies(self) -> int:
        """Copies still held."""
        return len(self._seeds)

    @torch.no_grad()
    def advance(self, first: int, num_steps: int) -> Tensor:
        """Does `num_steps` updates of every copy.

        Args:
            first: Updates done before.
            num_steps: How many to do.

        Returns:
            The losses, shape (updates, copies).
        """
        losses = []
        for step in range(first, first + num_steps):
            epoch, position = divmod(step, self._per_epoch)
            start = position * self._batch
            rows = self._epoch_order(epoch)[:, start : start + self._batch]
            size = rows.shape[1]
            if size not in self._steps:
                self._steps[size] = self._make_step(rows)
            losses.append(self._steps[size](rows))
            if self._path is not None:
                self._path.note(self._trained)
        if self._path is not None:
            self._path.add_noted()
        return torch.stack(losses)

    def look(self) -> tuple[FloatArray, FloatArray, FloatArray, FloatArray]:
        """Where the weights are.

        Returns:
            Distance from the initial weights, norm of those, the watched weight and the roughness
            of its path, each of shape (copies,).
        """
        assert self._path is not None  # asked only of copies that are watched
        return self._path.look(self._trained)

    def _epoch_order(self, epoch: int) -> Tensor:
        """Each copy's data order, shape (copies, examples)."""
        if self._order is None or self._order[0] != epoch:
            N = self._stacker.data.num_examples
            distinct, which = np.unique(self._seeds, return_inverse=True)
            orders = [epoch_order(N, seed=int(seed), epoch=epoch) for seed in distinct]
            rows = torch.stack(orders)[which.tolist()].to(self._stacker.device)
            self._order = epoch, rows
        return self._order[1]

    def _make_step(self, rows: Tensor) -> Step:
        """One update at the size of these batches; captured where the device can."""
        size = rows.shape[1]
        run = self._stacker.training_pass(self._workload, self.num_copies, size)
        leaves = self._stacker.data.leaves

        def step(rows: Tensor) -> Tensor:
            batch = [leaf[rows] for leaf in leaves]
            losses, gradients, carried = run(self._trained, self._carried, batch)
            self._optimizer.step(gradients)
            for held, new in zip(self._carried, carried, strict=True):
                held.copy_(new)
            return losses

        if rows.device.type != "cuda":
            return step
        return _captured(step, rows, [*self._trained, *self._carried, *self._optimizer.tensors])

    @torch.no_grad()
    def evaluate(
        self, evaluation: StackedEvaluation, num_rows: int, together: int
    ) -> tuple[FloatArray, FloatArray]:
        """Evaluates every copy on the validation set.

        Args:
            evaluation: Does it for a batch.
            num_rows: Examples in a batch.
            together: Copies in a pass.

        Returns:
            Loss and metric (0 without one), each of shape (copies,).
        """
        parts = []
        count = -(-self.num_copies // together)
        for part in np.array_split(np.arange(self.num_copies), count):
            trained, carried = (
                [t[part[0] : part[-1] + 1] for t in tensors]
                for tensors in (self._trained, self._carried)
            )
            starts = range(0, evaluation.num_examples, num_rows)
            batches = [
                evaluation(self._workload, trained, carried, a, a + num_rows) for a in starts
            ]
            parts.append(_means(batches))
        loss, metric = zip(*parts, strict=True)
        return np.concatenate(loss), np.concatenate(metric)

    def keep(self, mask: BoolArray) -> None:
        """Leaves out the copies whose entry is false.

        Args:
            mask: Shape (copies,).
        """
        if mask.all():
            return
        rows = torch.from_numpy(np.flatnonzero(mask)).to(self._stacker.device)
        self._seeds, self._order = self._seeds[mask], None
        self._trained, self._carried = (
            [t[rows] for t in tensors] for tensors in (self._trained, self._carried)
        )
        self._optimizer.keep(rows, self._trained)
        if self._path is not None:
            self._path.keep(rows)
        self._steps = {}

    def state_dict(self, index: int) -> dict[str, Tensor]:
        """Weights and buffers of one copy.

        Args:
            index: Which.

        Returns:
            Its state dict.
        """
        layout = self._stacker.layout
        names = [*layout.trained, *layout.carried]
        values = dict(zip(names, [*self._trained, *self._carried], strict=True))
        return {key: values[name][index].clone() for key, name in layout.names.items()}


def _means(batches: Sequence[Evaluated]) -> tuple[FloatArray, FloatArray]:
    """Means over all terms, added up in float64 as the plain loop adds them."""
    counts = np.array([b.counts.double().cpu().numpy() for b in batches])
    losses = np.array([b.loss_sums.double().cpu().numpy() for b in batches])
    # A mean over nothing (padding alone) is no number, and is left out.
    loss = np.where(counts > 0, losses, 0).sum(axis=0) / counts.sum(axis=0)
    metrics = np.array(
        [np.zeros_like(loss) if b.metrics is None else b.metrics.numpy() for b in batches]
    )
    return loss, (metrics * counts).sum(axis=0) / counts.sum(axis=0)


def _captured(step: Step, rows: Tensor, state: Sequence[Tensor]) -> Step:
    """The step as a CUDA graph, or as it is where it cannot be captured."""
    held = rows.clone()
    before = [tensor.clone() for tensor in state]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(_WARM_UPS):
            step(held)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            losses = step(held)
    except RuntimeError:  # an operation that waits for the device, or allocates outside
        return step
    finally:
        for tensor, value in zip(state, before, strict=True):
            tensor.copy_(value)

    def replay(rows: Tensor) -> Tensor:
        held.copy_(rows)
        graph.replay()
        return losses.clone()

    return replay
