"""What is compiled once per (workload, global batch) and serves any learning rates and seeds.

The compiled function runs a stretch of training that may begin and end inside an epoch: a loop
over epochs around a loop over steps, both with bounds that are arguments, so that another number
of steps compiles nothing. The smaller last batch of an epoch is a second graph after the inner
loop. One copy's step is written once. Small steps are mapped over all copies at once, which shares
the loop's overhead among them; of large steps one copy after the other does its whole stretch,
which keeps its intermediate results in the cache.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from rightbatch.engines.device_set import DeviceSet
from rightbatch.engines.lowering import lower
from rightbatch.engines.lowering.graph import Lowered
from rightbatch.engines.optimizer_plan import Group
from rightbatch.engines.optimizers import State, update
from rightbatch.engines.trace import Layout, trace_training
from rightbatch.training.loop import EXPLOSION
from rightbatch.workload import Workload

MAX_SHARED_STEP_BYTES = 0.5e6
"""Copies are advanced together while the results of one copy's step take up to this much."""

Carry = dict[str, Any]
Place = tuple[int, tuple[int, ...]]
"""One weight: a position among the trained tensors, and an index without the slots axis."""
OneStep = Callable[[Lowered, Array, Carry], Carry]


class Stretch(NamedTuple):
    """What to run; arrays or numbers, so that no value of it is compiled in.

    Attributes:
        orders: Data order, int32, shape (epochs, seeds, examples).
        which: Row of `orders` that each copy follows, int32, shape (slots,).
        num_copies: Copies in use, from the first slot.
        num_epochs: Epochs touched.
        first: First step within the first epoch.
        last: End step within the last epoch.
    """

    orders: Any
    which: Any
    num_copies: Any
    num_epochs: Any
    first: Any
    last: Any


_SMALL_PRODUCT = 2**15
"""Floating-point operations of a product up to which a library call costs more than it saves."""
_ONE_THREAD: dict[str, bool | str] = {"xla_cpu_multi_thread_eigen": False}
"""Products as small as these are not worth handing to other threads."""
_NO_LIBRARY: dict[str, bool | str] = {"xla_cpu_experimental_ynn_fusion_type": ""}
"""Products become part of the program instead of calls of YNNPACK, of 2 µs each."""


class Program:
    """The compiled training of one (workload, global batch).

    Args:
        workload: What to train. It is not kept.
        global_batch: Examples per update.
        layout: Which tensors are trained.
        data: The training set on the device.

    Raises:
        Unsupported: If the training step cannot be traced or lowered.
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
        self.together = self._full.result_bytes <= MAX_SHARED_STEP_BYTES
        self._compiled: dict[tuple[tuple[Group, ...], Place | None], Callable[..., Carry]] = {}

    def run(
        self, groups: tuple[Group, ...], place: Place | None, carry: Carry, stretch: Stretch
    ) -> Carry:
        """Advances all copies.

        Args:
            groups: The optimizer's parameter groups.
            place: The weight whose path is followed, or None.
            carry: State of the copies; it is consumed.
            stretch: What to run.

        Returns:
            The new state.
        """
        key = groups, place
        if key not in self._compiled:
            function = functools.partial(self._advance, groups, place)
            options = _compiler_options(self._full.flops_per_product)
            self._compiled[key] = jax.jit(function, donate_argnums=0, compiler_options=options)
        return self._compiled[key](carry, stretch, self._leaves)

    def _advance(
        self,
        groups: tuple[Group, ...],
        place: Place | None,
        carry: Carry,
        stretch: Stretch,
        leaves: list[Array],
    ) -> Carry:
        step = functools.partial(step_of_one_copy, groups, place, leaves)
        slots = len(carry["limit"])
        if slots == 1 or not self.together:
            return self._one_by_one(step, carry, stretch)
        return self._all_at_once(step, carry, stretch)

    def _all_at_once(self, step: OneStep, carry: Carry, stretch: Stretch) -> Carry:
        def mapped(graph: Lowered, rows: Array, carry: Carry) -> Carry:
            # Also where all copies read the same rows: a batch of products with one factor in
            # common is slower than a batch of plain ones.
            return jax.vmap(lambda copy, own: step(graph, own, copy))(carry, rows[stretch.which])

        return self._loop(mapped, carry, stretch, stretch.orders)

    def _one_by_one(self, step: OneStep, carry: Carry, stretch: Stretch) -> Carry:
        def single(graph: Lowered, rows: Array, carry: Carry) -> Carry:
            return step(graph, rows[0], carry)

        def one(copy: Array, carry: Carry) -> Carry:
            own = jax.tree.map(lambda x: x[copy], carry)
            order = lax.dynamic_slice_in_dim(stretch.orders, stretch.which[copy], 1, axis=1)
            own = self._loop(single, own, stretch, order)
            return jax.tree.map(lambda x, value: x.at[copy].set(value), carry, own)

        return lax.fori_loop(0, stretch.num_copies, one, carry)

    def _loop(self, advance: OneStep, carry: Carry, stretch: Stretch, orders: Array) -> Carry:
        """The loop over epochs and steps; `advance` gets the rows of every seed in `orders`."""

        def step(graph: Lowered, size: int, epoch: Array, position: Any, carry: Carry) -> Carry:
            start = position * self.global_batch
            rows = lax.dynamic_slice(orders, (epoch, 0, start), (1, orders.shape[1], size))
            return advance(graph, rows[0], carry)

        def epoch_body(epoch: Array, carry: Carry) -> Carry:
            begin = jnp.where(epoch == 0, stretch.first, 0)
            end = jnp.where(epoch == stretch.num_epochs - 1, stretch.last, self.steps_per_epoch)
            carry = lax.fori_loop(
                begin,
                jnp.minimum(end, self.full_steps),
                lambda position, c: step(self._full, self.global_batch, epoch, position, c),
                carry,
            )
            if self._rest is None:
                return carry
            rest = functools.partial(step, self._rest, self.rest, epoch, self.full_steps)
            return lax.cond(end > self.full_steps, rest, lambda c: c, carry)

        return lax.fori_loop(0, stretch.num_epochs, epoch_body, carry)


def _compiler_options(flops_per_product: float) -> dict[str, bool | str]:
    """Of those that this backend and version of XLA know, the ones that suit the products."""
    if jax.default_backend() != "cpu":
        return {}
    wanted = [_ONE_THREAD, _NO_LIBRARY] if flops_per_product < _SMALL_PRODUCT else [_ONE_THREAD]
    return {name: option[name] for option in wanted for name in option if _is_known(name)}


@functools.cache
def _is_known(name: str) -> bool:
    value = {**_ONE_THREAD, **_NO_LIBRARY}[name]
    lowered = jax.jit(lambda x: x).lower(jnp.zeros(()))
    try:
        lowered.compile(compiler_options={name: value})
    except jax.errors.JaxRuntimeError:  # "No such compile option": they come and go
        return False
    return True


def new_carry(
    trained: list[Array],
    carried: list[Array],
    states: list[State],
    learning_rates: list[Array],
    decays: list[Array],
    place: Place | None,
) -> Carry:
    """State of a group of copies before the first update; every array has a leading slots axis.

    Args:
        trained: Initial values of the trained tensors.
        carried: Initial values of all other tensors.
        states: Optimizer state.
        learning_rates: Shape (slots,), one array per parameter group.
        decays: Likewise.
        place: The weight whose path is followed, or None.

    Returns:
        The state.
    """
    slots = learning_rates[0].shape
    path: dict[str, Array] = {}
    if place is not None:
        position, index = place
        begin = trained[position][:, *index]
        # Copies: the state is donated, and no buffer may be in it twice.
        path = {name: jnp.copy(begin) for name in ("last", "low", "high")}
        path |= {name: jnp.zeros(slots, jnp.float32) for name in ("travel", "travel_rest")}
    return {
        "path": path,
        "trained": trained,
        "carried": carried,
        "states": states,
        "learning_rates": learning_rates,
        "decays": decays,
        "limit": jnp.full(slots, jnp.inf, jnp.float32),
        "diverged": jnp.zeros(slots, jnp.bool_),
        "loss_sum": jnp.zeros(slots, jnp.float32),
        "loss_rest": jnp.zeros(slots, jnp.float32),
        "step": jnp.zeros(slots, jnp.int32),
    }


def step_of_one_copy(
    groups: tuple[Group, ...],
    place: Place | None,
    leaves: list[Array],
    graph: Lowered,
    rows: Array,
    copy: Carry,
) -> Carry:
    """One update of one copy.

    Args:
        groups: The optimizer's parameter groups.
        place: The weight whose path is followed, or None.
        leaves: The training set.
        graph: Loss and gradient at this batch size.
        rows: Examples of the batch, int32, shape (batch,).
        copy: The copy's state, without the slots axis.

    Returns:
        Its new state.
    """
    batch = [leaf[rows] for leaf in leaves]
    loss, gradients, carried = graph(copy["trained"], copy["carried"], batch)
    rates, decays = copy["learning_rates"], copy["decays"]
    trained, states = update(
        groups, copy["trained"], gradients, copy["states"], rates, decays, copy["step"]
    )
    magnitude = jnp.abs(loss)
    first_limit = EXPLOSION * jnp.maximum(magnitude, 1e-8)
    limit = jnp.where(copy["step"] == 0, first_limit, copy["limit"])
    total, rest = _add(copy["loss_sum"], copy["loss_rest"], loss)
    return {
        **copy,
        "trained": trained,
        "carried": list(carried),
        "states": states,
        "limit": limit,
        # Written so that NaN counts as diverged.
        "diverged": copy["diverged"] | ~((magnitude <= limit) & jnp.isfinite(magnitude)),
        "loss_sum": total,
        "loss_rest": rest,
        "step": copy["step"] + 1,
        "path": _follow(copy["path"], place, trained),
    }


def _follow(path: dict[str, Array], place: Place | None, trained: list[Array]) -> dict[str, Array]:
    """Goes on to the watched weight's new value, in constant memory."""
    if place is None:
        return path
    position, index = place
    value = trained[position][index]
    travel, rest = _add(path["travel"], path["travel_rest"], jnp.abs(value - path["last"]))
    return {
        "last": value,
        "low": jnp.minimum(path["low"], value),
        "high": jnp.maximum(path["high"], value),
        "travel": travel,
        "travel_rest": rest,
    }


def _add(total: Array, rest: Array, value: Array) -> tuple[Array, Array]:
    """Kahan's sum: over a hundred thousand steps a plain float32 sum would lose digits."""
    corrected = value - rest
    new = total + corrected
    return new, (new - total) - corrected
