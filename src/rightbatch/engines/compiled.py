"""The compiled engine: all copies at once, in one JAX loop lowered from the torch model."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from torch import Tensor

from rightbatch.engines.compiler import compiler_of
from rightbatch.engines.copies import (
    BoolArray,
    CopiesEvaluation,
    EngineName,
    FloatArray,
    IntArray,
    Watched,
    make_watched,
    without_diverged,
)
from rightbatch.engines.first_steps import check_first_steps
from rightbatch.engines.lowering.dtypes import to_numpy, to_torch
from rightbatch.engines.optimizer_plan import OptimizerPlan, read_optimizer
from rightbatch.engines.optimizers import init_state
from rightbatch.engines.program import Carry, Place, Stretch, new_carry
from rightbatch.engines.trace import named_tensors
from rightbatch.engines.unsupported import Unsupported
from rightbatch.laws.path import roughness_of
from rightbatch.training import epoch_order
from rightbatch.training.watching.distance import norm_of_weights
from rightbatch.training.watching.watched_weight import find_weight, weight_name
from rightbatch.workload import Workload

_MAX_ORDER_BYTES = 64 * 2**20
_STEPS_PER_CALL = 4096


class CompiledCopies:
    """Copies that are trained at once by a compiled loop.

    Args:
        workload: What to train.
        global_batch: Examples per update.
        learning_rates: Shape (copies,).
        seeds: Shape (copies,).
        reason: Why this engine was taken.
        watch: The weight to follow, as in `rightbatch.Watch`; None watches nothing.

    Raises:
        Unsupported: If the workload cannot be compiled, or the compiled loop disagrees with torch
            in its first steps.
    """

    engine: EngineName = "compiled"

    def __init__(
        self,
        workload: Workload,
        *,
        global_batch: int,
        learning_rates: FloatArray,
        seeds: IntArray,
        reason: str,
        watch: str | None = None,
    ) -> None:
        self.learning_rates = learning_rates
        self.seeds = seeds
        self.reason = reason
        self.steps = 0
        self.watching: str | None = None
        self._compiler = compiler_of(workload)
        self._program = self._compiler.program(workload, global_batch)
        model = workload.build_model(0)
        trained = self._compiler.layout.trained
        self._plan = read_optimizer(workload, model, trained, learning_rates)
        self._dtypes = {name: t.dtype for name, t in named_tensors(model).items()}
        self._place: Place | None = None
        if watch is not None:
            name, index = find_weight(model, watch)
            self.watching = weight_name(name, index)
            # Under the name by which a tied weight is held; one without a gradient never moves.
            self._watched = self._compiler.layout.names.get(name, name), index
            if self._watched[0] in trained:
                self._place = trained.index(self._watched[0]), index
        self._held = _slots(len(seeds))
        self._losses_since = 0
        self._orders: tuple[tuple[int, ...], np.ndarray[Any, Any]] | None = None
        self._carry = self._initial_carry(workload)
        if not self._program.verified:
            try:
                check_first_steps(self, workload, global_batch)
            except (Unsupported, jax.errors.JaxRuntimeError) as error:
                refusal = Unsupported(str(error))
                self._compiler.refuse(global_batch, refusal)
                raise refusal from error
            self._carry = self._initial_carry(workload)
            self.steps = self._losses_since = 0
            self._program.verified = True

    def advance(self, num_steps: int) -> None:
        """Does `num_steps` updates of every copy that has not diverged."""
        if len(self.seeds) == 0:
            self.steps += num_steps
            return
        per_epoch = self._program.steps_per_epoch
        seeds, which = np.unique(self._padded(self.seeds), return_inverse=True)
        epochs_per_call = self._epochs_per_call(len(seeds))
        done = 0
        while done < num_steps:
            epoch, first = divmod(self.steps, per_epoch)
            count = min(num_steps - done, epochs_per_call * per_epoch - first)
            touched, last = divmod(first + count - 1, per_epoch)
            orders = self._epoch_orders(seeds, epoch, touched + 1, epochs_per_call)
            stretch = Stretch(
                orders=orders,
                which=which.astype(np.int32),
                num_copies=len(self.seeds),
                num_epochs=touched + 1,
                first=first,
                last=last + 1,
            )
            self._carry = self._program.run(self._plan.groups, self._place, self._carry, stretch)
            self.steps += count
            done += count
        self._losses_since += num_steps

    def wait(self) -> None:
        """Returns when the updates that were asked for are done."""
        jax.block_until_ready(self._carry)

    def evaluate(self) -> CopiesEvaluation:
        """Evaluates every copy on the validation set and closes the training-loss interval."""
        count = len(self.seeds)
        diverged: BoolArray = np.array(self._carry["diverged"])[:count]
        train_loss = np.full(count, np.nan)
        if self._losses_since:
            sums = np.array(self._carry["loss_sum"], np.float64)
            sums -= np.array(self._carry["loss_rest"], np.float64)
            train_loss = np.where(diverged, np.nan, sums[:count] / self._losses_since)
        zeros = jnp.zeros_like(self._carry["loss_sum"])
        self._carry = {**self._carry, "loss_sum": zeros, "loss_rest": jnp.copy(zeros)}
        self._losses_since = 0
        val_loss, val_metric = self._validate()
        return CopiesEvaluation(
            train_loss=train_loss,
            val_loss=without_diverged(val_loss, diverged),
            val_metric=without_diverged(val_metric, diverged),
            diverged=diverged,
            watched=self._look(diverged) if self.watching is not None else None,
        )

    def _look(self, diverged: BoolArray) -> Watched:
        count = len(self.seeds)
        rows = self._rows[:count]
        squares = np.zeros(count)
        with np.errstate(invalid="ignore", over="ignore"):  # of copies that diverged
            for now, before in zip(self._carry["trained"], self._initial, strict=True):
                moved = np.asarray(now)[:count] - before[rows]
                squares += np.linalg.norm(moved.reshape(count, -1), axis=1).astype(float) ** 2
        path = {name: np.asarray(x, np.float64)[:count] for name, x in self._carry["path"].items()}
        if path:
            travel = path["travel"] - path["travel_rest"]
            roughness = roughness_of(travel, path["high"] - path["low"])
        else:
            path, roughness = {"last": self._initial_weight[rows]}, np.full(count, np.nan)
        return make_watched(
            distance=np.sqrt(squares),
            initial_norm=self._initial_norm[rows],
            weight=path["last"],
            roughness=roughness,
            diverged=diverged,
        )

    def keep(self, mask: Any) -> None:
        """Retires the copies whose entry in `mask` (bool, shape (copies,)) is false."""
        kept = np.flatnonzero(np.asarray(mask, dtype=np.bool_))
        self.learning_rates = self.learning_rates[kept]
        self.seeds = self.seeds[kept]
        if len(kept) == 0:
            return
        self._held = _slots(len(kept))
        rows = self._padded(kept)
        self._rows = self._rows[rows]
        taken = jnp.asarray(rows)
        self._carry = jax.tree.map(lambda x: x[taken], self._carry)

    def state_dict(self, copy_index: int) -> dict[str, Tensor]:
        """Weights and buffers of one copy (an index into the copies still held)."""
        index = range(len(self.seeds))[copy_index]
        layout = self._compiler.layout
        values = dict(zip(layout.trained, self._carry["trained"], strict=True))
        values.update(zip(layout.carried, self._carry["carried"], strict=True))
        return {
            key: to_torch(values[name][index], self._dtypes[name])
            for key, name in layout.names.items()
        }

    def _padded(self, values: Any) -> Any:
        """Values per copy, the first repeated until all slots are filled."""
        missing = self._held - len(values)
        return np.concatenate([values, np.repeat(values[:1], missing)])

    def _initial_carry(self, workload: Workload) -> Carry:
        layout = self._compiler.layout
        seeds, which = np.unique(self._padded(self.seeds), return_inverse=True)
        models = [workload.build_model(int(seed)) for seed in seeds]
        held = [named_tensors(model) for model in models]

        def stack(names: tuple[str, ...]) -> list[np.ndarray[Any, Any]]:
            return [np.stack([to_numpy(h[n]) for h in held]) for n in names]

        initial = stack(layout.trained)
        self._rows = which
        if self.watching is not None:
            self._initial = initial  # once for each seed, and not for each copy
            self._initial_norm = np.array([norm_of_weights(model) for model in models])
            name, index = self._watched
            self._initial_weight = np.array([h[name][index].item() for h in held])
        trained = [jnp.asarray(values[which]) for values in initial]
        plan = self._plan
        return new_carry(
            trained,
            [jnp.asarray(values[which]) for values in stack(layout.carried)],
            init_state(plan.groups, trained),
            self._per_group(plan, plan.learning_rates),
            self._per_group(plan, plan.decays),
            self._place,
        )

    def _per_group(self, plan: OptimizerPlan, values: FloatArray) -> list[Any]:
        rows = [self._padded(values[g]) for g in range(len(plan.groups))]
        return [jnp.asarray(row, jnp.float32) for row in rows]

    def _epochs_per_call(self, num_seeds: int) -> int:
        wanted = -(-_STEPS_PER_CALL // self._program.steps_per_epoch)
        fitting = _MAX_ORDER_BYTES // (4 * num_seeds * self._program.num_examples)
        return max(1, min(wanted, fitting))

    def _epoch_orders(
        self, seeds: IntArray, epoch: int, touched: int, capacity: int
    ) -> np.ndarray[Any, Any]:
        """Orders of the epochs from `epoch` on, int32, shape (capacity, seeds, examples)."""
        key = (epoch, touched, capacity, *seeds.tolist())
        if self._orders is None or self._orders[0] != key:
            num_examples = self._program.num_examples
            orders = np.zeros((capacity, len(seeds), num_examples), np.int32)
            for e in range(touched):
                for s, seed in enumerate(seeds):
                    orders[e, s] = epoch_order(num_examples, seed=int(seed), epoch=epoch + e)
            self._orders = key, orders
        return self._orders[1]

    def _validate(self) -> tuple[FloatArray | None, FloatArray | None]:
        evaluator = self._compiler.evaluator
        if evaluator is None:
            return None, None
        if len(self.seeds) == 0:
            return np.zeros(0), np.zeros(0) if evaluator.has_metric else None
        sums = evaluator(self._carry["trained"], self._carry["carried"], len(self.seeds))
        metric = sums[2] / evaluator.num_examples if evaluator.has_metric else None
        return sums[0] / sums[1], metric


def _slots(num_copies: int) -> int:
    """Room for copies: the next number of three binary digits, so that few sizes are compiled."""
    unit = 1 << max(0, num_copies.bit_length() - 3)
    return -(-num_copies // unit) * unit
