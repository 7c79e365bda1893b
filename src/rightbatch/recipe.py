"""How to train: the small, exact, machine-readable answer."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace
from typing import Any, Literal

from rightbatch.errors import RecipeError

Precision = Literal["float32", "bfloat16", "float16"]
LastBatch = Literal["keep", "drop", "merge", "scale-lr", "pad"]
Reduction = Literal["mean", "sum"]
Schedule = Literal["constant", "cosine", "step"]
RateRule = Literal["none", "linear", "sqrt", "adam-sde", "adascale"]
BatchPolicy = Literal["fixed", "follow-noise"]
Sharding = Literal["replicated", "fsdp"]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How to train a workload. `global_batch = micro_batch × accumulation × replicas`.

    Attributes:
        global_batch: Examples per update.
        micro_batch: Examples in one forward and backward pass on one device. Default: all.
        accumulation: Micro-batches summed before one update. Default: what the split needs.
        replicas: Data-parallel workers.
        replica_batches: Examples per update of each replica, for unequal devices; empty: equal.
        sharding: Whether replicas hold whole models or shards of one (FSDP2).
        learning_rate: Passed to the workload's `make_optimizer`.
        reduction: Whether an update follows the mean of its examples' gradients or their sum. The
            same training needs lr_sum = lr_mean / B.
        clip_norm: The gradient of an update is scaled down to this norm; None: never.
        last_batch: What becomes of the smaller last batch of an epoch. `keep`: an update of its
            own (joined to the one before where the model cannot train on it). `drop`: left out.
            `merge`: joined to the one before. `scale-lr`: an update whose learning rate is scaled
            by its share of a batch. `pad`: filled up with the epoch's first examples.
        warmup_steps: Updates over which the learning rate rises linearly from 0.
        schedule: The learning rate over the run: `constant`, `cosine` down to `final_factor`, or
            in steps: times `decay` at each share of the run in `decay_at`.
        decay_at: Milestones of `step`, shares of the run.
        decay: What `step` multiplies the learning rate by.
        final_factor: Where `cosine` ends.
        batch_ramp: Phases (from so many examples on, this global batch), in order.
        batch_policy: `follow-noise`: the batch rises with the root of the measured noise scale.
        largest_batch: Where `follow-noise` stops. Default: the training set.
        rate_rule: How the learning rate follows when the batch changes on the way.
        ghost_batch: Examples that BatchNorm normalises together in training; None: all it gets.
        precision: Arithmetic of the forward pass.
        tf32: Whether float32 products on CUDA may use TensorFloat-32.
        activation_checkpointing: Recompute activations in the backward pass, to save memory.
        compile: The backend of `torch.compile`, such as `inductor`; None: not compiled. What is
            recomputed is not compiled.

    Raises:
        RecipeError: If a number is out of range or the split does not multiply to `global_batch`.

    Example:
        >>> Recipe(global_batch=256, micro_batch=64, learning_rate=0.1).accumulation
        4
    """

    global_batch: int
    micro_batch: int = 0
    accumulation: int = 0
    replicas: int = 1
    replica_batches: tuple[int, ...] = ()
    sharding: Sharding = "replicated"
    learning_rate: float
    reduction: Reduction = "mean"
    clip_norm: float | None = None
    last_batch: LastBatch = "keep"
    warmup_steps: int = 0
    schedule: Schedule = "constant"
    decay_at: tuple[float, ...] = ()
    decay: float = 0.1
    final_factor: float = 0.0
    batch_ramp: tuple[tuple[int, int], ...] = ()
    batch_policy: BatchPolicy = "fixed"
    largest_batch: int | None = None
    rate_rule: RateRule = "none"
    ghost_batch: int | None = None
    precision: Precision = "float32"
    tf32: bool = False
    activation_checkpointing: bool = False
    compile: str | None = None

    def __post_init__(self) -> None:
        if self.global_batch < 1:
            raise RecipeError(f"global_batch is {self.global_batch}; it must be at least 1.")
        if self.replicas < 1:
            raise RecipeError(f"replicas is {self.replicas}; it must be at least 1.")
        for name in ("micro_batch", "accumulation"):
            if getattr(self, name) < 0:
                raise RecipeError(
                    f"{name} is {getattr(self, name)}; it must be at least 1, or left out."
                )
        if self.warmup_steps < 0:
            raise RecipeError(f"warmup_steps is {self.warmup_steps}; it cannot be negative.")
        for name in ("learning_rate", "clip_norm", "decay"):
            self._check_positive(name)
        self._check_over_time()
        if self.replica_batches:
            self._check_unequal_replicas()
        else:
            self._complete_the_split()
        self._check_noise_is_measured()

    def _check_positive(self, name: str) -> None:
        value = getattr(self, name)
        if value is not None and not (math.isfinite(value) and value > 0):
            raise RecipeError(f"{name} is {value}; it must be a positive finite number.")

    def _check_over_time(self) -> None:
        """Schedules that mean nothing are refused here, before anything is trained."""
        if self.schedule == "step" and not self.decay_at:
            raise RecipeError(
                "schedule is 'step' without decay_at. Give the shares of the run at which the "
                "learning rate falls, such as decay_at=(0.5, 0.75)."
            )
        if not all(0 < share < 1 for share in self.decay_at):
            raise RecipeError(f"decay_at is {self.decay_at}; give shares of the run, in (0, 1).")
        if self.final_factor < 0:
            raise RecipeError(f"final_factor is {self.final_factor}; it cannot be negative.")
        starts = [start for start, _ in self.batch_ramp]
        rising = all(before < after for before, after in itertools.pairwise(starts))
        if not rising or any(start < 1 or batch < 1 for start, batch in self.batch_ramp):
            raise RecipeError(
                f"batch_ramp is {self.batch_ramp}; give (examples, batch) in rising order of "
                "examples, such as ((10_000, 64), (30_000, 128))."
            )
        if self.batch_ramp and self.batch_policy != "fixed":
            raise RecipeError(
                f"batch_ramp is {self.batch_ramp} and batch_policy {self.batch_policy!r}; both "
                "decide the batch. Give one of them."
            )
        for name in ("largest_batch", "ghost_batch"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise RecipeError(f"{name} is {value}; it must be at least 1, or None.")

    def _check_unequal_replicas(self) -> None:
        """Each replica cuts its own share into micro-batches; the product rule cannot hold."""
        if len(self.replica_batches) != self.replicas or min(self.replica_batches) < 1:
            raise RecipeError(
                f"replica_batches is {self.replica_batches} for {self.replicas} replicas. Give "
                "each of them one positive number."
            )
        if sum(self.replica_batches) != self.global_batch:
            raise RecipeError(
                f"replica_batches {self.replica_batches} add up to {sum(self.replica_batches)}, "
                f"not to the global batch {self.global_batch}."
            )
        if self.micro_batch == 0:
            object.__setattr__(self, "micro_batch", max(self.replica_batches))
        passes = math.ceil(max(self.replica_batches) / self.micro_batch)
        if self.accumulation not in (0, passes):
            raise RecipeError(
                f"accumulation is {self.accumulation}, but a share of "
                f"{max(self.replica_batches)} in micro-batches of {self.micro_batch} takes "
                f"{passes}. Leave accumulation out."
            )
        object.__setattr__(self, "accumulation", passes)

    def _complete_the_split(self) -> None:
        """Fills in what was left out of the split, and checks the product."""
        per_replica, rest = divmod(self.global_batch, self.replicas)
        if self.micro_batch == 0:
            object.__setattr__(self, "micro_batch", per_replica // max(self.accumulation, 1))
        if self.accumulation == 0 and self.micro_batch > 0:
            object.__setattr__(self, "accumulation", per_replica // self.micro_batch)
        product = self.micro_batch * self.accumulation * self.replicas
        if rest or product != self.global_batch:
            raise RecipeError(
                f"micro_batch {self.micro_batch} × accumulation {self.accumulation} × replicas "
                f"{self.replicas} = {product}, which is not the global batch {self.global_batch}. "
                "Use rightbatch.split_batch to find a split, or leave accumulation out."
            )

    def _check_noise_is_measured(self) -> None:
        """The noise on the way is that between micro-batches of one update: it takes two."""
        if self.rate_rule == "adascale" and not self.changes_batch:
            raise RecipeError(
                f"rate_rule is 'adascale', but the batch is {self.global_batch} all the way, so "
                "there is no gain to follow. Give a batch_ramp or batch_policy='follow-noise', or "
                "leave rate_rule out."
            )
        if self.replicas > 1:
            return
        largest = max(self.global_batch, *(batch for _, batch in self.batch_ramp), 0)
        for field, value, batch in (
            ("batch_policy", self.batch_policy, self.global_batch),
            ("rate_rule", self.rate_rule, largest),
        ):
            if value in ("follow-noise", "adascale") and batch <= self.micro_batch:
                raise RecipeError(
                    f"{field} is {value!r}, but an update of {batch} is one micro-batch on one "
                    "replica, and the noise is measured between several. Give a micro_batch of at "
                    f"most {max(batch // 2, 1)}."
                )

    @property
    def changes_batch(self) -> bool:
        """Whether the global batch may change on the way."""
        return bool(self.batch_ramp) or self.batch_policy != "fixed"

    def replace(self, **changes: Any) -> Recipe:
        """A copy with some fields changed; a changed batch clears the split unless it is given."""
        if {"global_batch", "micro_batch", "replicas", "replica_batches"} & changes.keys():
            cleared: dict[str, Any] = {"micro_batch": 0, "accumulation": 0, "replica_batches": ()}
            changes = {**cleared, **changes}
        return replace(self, **changes)
