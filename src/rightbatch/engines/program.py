"""What is compiled once per (workload, global batch) and serves any learning rates and seeds.

The compiled function runs a stretch of training that may begin and end inside an epoch: a loop
over epochs around a loop over steps, both with bounds that are arguments, so that another number
of steps compiles nothing. The smaller last batch of an epoch is a second graph after the inner
loop. One copy's step is written once and mapped over copies; the data are not copied.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from rightbatch.engines.lowering import lower
from rightbatch.engines.lowering.dtypes import to_jax
from rightbatch.engines.lowering.graph import Lowered
from rightbatch.engines.optimizers import Group, State, update
from rightbatch.engines.trace import Layout, find_layout, trace_evaluation, trace_training
from rightbatch.engines.whole_set import WholeSet, collate_all
from rightbatch.training.evaluate import EVALUATION_BATCH
from rightbatch.training.loop import EXPLOSION
from rightbatch.workload import Workload

Carry = dict[str, Any]


@dataclass(frozen=True, kw_only=True, eq=False)
class DeviceSet:
    """A set of examples on the device.

    Attributes:
        whole: The same as torch tensors, to trace with.
        leaves: Shape (examples, …) each.
    """

    whole: WholeSet
    leaves: list[Array]

    @property
    def num_examples(self) -> int:
        """How many examples there are."""
        return self.whole.num_examples


def put_on_device(examples: Any) -> DeviceSet:
    """Copies a set of examples to the device.

    Args:
        examples: The set.

    Returns:
        The set on the device.
    """
    whole = collate_all(examples)
    return DeviceSet(whole=whole, leaves=[to_jax(leaf) for leaf in whole.leaves])


class Evaluator:
    """Evaluates copies on the validation set; one per workload."""

    def __init__(self, workload: Workload, layout: Layout, data: DeviceSet) -> None:
        self.has_metric = workload.loss is not None and workload.metric is not None
        self.num_examples = data.num_examples
        self._leaves = data.leaves
        size = min(EVALUATION_BATCH, data.num_examples)
        self._full_batches, rest = divmod(data.num_examples, size)
        self._size = size

        def trace(rows: int) -> Lowered:
            model = workload.build_model(0)
            return lower(trace_evaluation(workload, model, layout, data.whole, rows))

        self._full = trace(size)
        self._rest = trace(rest) if rest else None
        self._run = jax.jit(self._evaluate_copies)

    def __call__(self, carry: Carry) -> list[Any]:
        """Loss sums, counts and metric sums, each of shape (batches, copies)."""
        return self._run(carry["trained"], carry["carried"], self._leaves)

    def _evaluate_copies(
        self, trained: list[Array], carried: list[Array], leaves: list[Array]
    ) -> list[Array]:
        def batch_sums(graph: Lowered, batch: list[Array]) -> list[Array]:
            return jax.vmap(lambda t, c: list(graph(t, c, batch)))(trained, carried)

        def full(index: Array) -> list[Array]:
            batch = [
                lax.dynamic_slice_in_dim(leaf, index * self._size, self._size) for leaf in leaves
            ]
            return batch_sums(self._full, batch)

        sums = lax.map(full, jnp.arange(self._full_batches))
        if self._rest is not None:
            tail = [leaf[self._full_batches * self._size :] for leaf in leaves]
            rest = batch_sums(self._rest, tail)
            sums = [jnp.concatenate([s, r[None]]) for s, r in zip(sums, rest, strict=True)]
        return sums


class Program:
    """The compiled training of one (workload, global batch).

    Args:
        workload: What to train. It is not kept.
        global_batch: Examples per update.
        layout: Which tensors are trained.
        data: The training set on the device.
    """

    def __init__(
        self, workload: Workload, global_batch: int, layout: Layout, data: DeviceSet
    ) -> None:
        self.num_examples = data.num_examples
        self.global_batch = min(global_batch, self.num_examples)
        self.full_steps, self.rest = divmod(self.num_examples, self.global_batch)
        self.steps_per_epoch = self.full_steps + (self.rest > 0)
        self.verified = False
        self._leaves = data.leaves

        def trace(rows: int) -> Lowered:
            model = workload.build_model(0)
            return lower(trace_training(workload, model, layout, data.whole, rows))

        self._full = trace(self.global_batch)
        self._rest = trace(self.rest) if self.rest else None
        self._compiled: dict[tuple[Group, ...], Callable[..., Carry]] = {}

    def run(
        self,
        groups: tuple[Group, ...],
        carry: Carry,
        orders: Any,
        which: Any,
        bounds: Sequence[int],
    ) -> Carry:
        """Advances all copies.

        Args:
            groups: The optimizer's parameter groups.
            carry: State of the copies; it is consumed.
            orders: Data order, int32, shape (epochs, seeds, examples).
            which: Row of `orders` that each copy follows, int32, shape (copies,).
            bounds: Number of epochs touched; first step of the first; end step of the last.

        Returns:
            The new state.
        """
        if groups not in self._compiled:
            function = functools.partial(self._advance, groups)
            self._compiled[groups] = jax.jit(function, donate_argnums=0)
        numbers = jnp.asarray(bounds, jnp.int32)
        return self._compiled[groups](carry, orders, which, numbers, self._leaves)

    def _advance(
        self,
        groups: tuple[Group, ...],
        carry: Carry,
        orders: Array,
        which: Array,
        bounds: Array,
        leaves: list[Array],
    ) -> Carry:
        num_epochs, first, last = bounds[0], bounds[1], bounds[2]
        num_seeds = orders.shape[1]

        def step(graph: Lowered, rows: int, epoch: Array, position: Array, carry: Carry) -> Carry:
            start = position * self.global_batch
            indices = lax.dynamic_slice(orders, (epoch, 0, start), (1, num_seeds, rows))[0]
            one = functools.partial(_step_of_one_copy, graph, groups, leaves, carry["step"])
            if num_seeds == 1:
                advanced = jax.vmap(one, in_axes=(0, None))(_per_copy(carry), indices[0])
            else:
                advanced = jax.vmap(one)(_per_copy(carry), indices[which])
            return {**advanced, "step": carry["step"] + 1}

        def epoch_body(epoch: Array, carry: Carry) -> Carry:
            begin = jnp.where(epoch == 0, first, 0)
            end = jnp.where(epoch == num_epochs - 1, last, self.steps_per_epoch)
            if self.full_steps:
                carry = lax.fori_loop(
                    begin,
                    jnp.minimum(end, self.full_steps),
                    lambda position, c: step(self._full, self.global_batch, epoch, position, c),
                    carry,
                )
            if self._rest is None:
                return carry
            rest, final = self._rest, jnp.asarray(self.full_steps)
            return lax.cond(
                end > self.full_steps,
                lambda c: step(rest, self.rest, epoch, final, c),
                lambda c: c,
                carry,
            )

        return lax.fori_loop(0, num_epochs, epoch_body, carry)


def _per_copy(carry: Carry) -> Carry:
    return {name: value for name, value in carry.items() if name != "step"}


def new_carry(
    trained: list[Array],
    carried: list[Array],
    states: list[State],
    learning_rates: list[Array],
    decays: list[Array],
) -> Carry:
    """State of a group of copies before the first update; arrays have a leading copies axis."""
    copies = learning_rates[0].shape
    return {
        "trained": trained,
        "carried": carried,
        "states": states,
        "learning_rates": learning_rates,
        "decays": decays,
        "limit": jnp.full(copies, jnp.inf, jnp.float32),
        "diverged": jnp.zeros(copies, jnp.bool_),
        "loss_sum": jnp.zeros(copies, jnp.float32),
        "loss_rest": jnp.zeros(copies, jnp.float32),
        "step": jnp.zeros((), jnp.int32),
    }


def _step_of_one_copy(
    graph: Lowered,
    groups: tuple[Group, ...],
    leaves: list[Array],
    step: Array,
    copy: Carry,
    indices: Array,
) -> Carry:
    batch = [leaf[indices] for leaf in leaves]
    loss, gradients, carried = graph(copy["trained"], copy["carried"], batch)
    trained, states = update(
        groups,
        copy["trained"],
        gradients,
        copy["states"],
        copy["learning_rates"],
        copy["decays"],
        step,
    )
    magnitude = jnp.abs(loss)
    first_limit = EXPLOSION * jnp.maximum(magnitude, 1e-8)
    limit = jnp.where(step == 0, first_limit, copy["limit"])
    # Kahan's sum: over a hundred thousand steps a plain float32 sum would lose digits.
    corrected = loss - copy["loss_rest"]
    total = copy["loss_sum"] + corrected
    return {
        **copy,
        "trained": trained,
        "carried": list(carried),
        "states": states,
        "limit": limit,
        # Written so that NaN counts as diverged.
        "diverged": copy["diverged"] | ~((magnitude <= limit) & jnp.isfinite(magnitude)),
        "loss_sum": total,
        "loss_rest": (total - copy["loss_sum"]) - corrected,
    }


class Compiler:
    """Everything compiled for one workload: its data on the device, its programs, its evaluator."""

    def __init__(self, workload: Workload) -> None:
        self.data = put_on_device(workload.train_examples)
        model = workload.build_model(0)
        rows = min(2, self.data.num_examples)
        self.layout = find_layout(workload, model, self.data.whole, rows)
        self.evaluator = None
        if workload.val_examples is not None:
            validation = put_on_device(workload.val_examples)
            self.evaluator = Evaluator(workload, self.layout, validation)
        self._programs: dict[int, Program] = {}

    def program(self, workload: Workload, global_batch: int) -> Program:
        """The program for a global batch, traced at the first call."""
        size = min(global_batch, self.data.num_examples)
        if size not in self._programs:
            self._programs[size] = Program(workload, size, self.layout, self.data)
        return self._programs[size]
