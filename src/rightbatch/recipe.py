"""How to train: the small, exact, machine-readable answer."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

from rightbatch.errors import RecipeError

Precision = Literal["float32", "bfloat16"]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How to train a workload. `global_batch = micro_batch × accumulation × replicas`.

    Attributes:
        global_batch: Examples per update.
        micro_batch: Examples in one forward and backward pass on one device. Default: all.
        accumulation: Micro-batches summed before one update. Default: what the split needs.
        replicas: Data-parallel workers.
        learning_rate: Passed to the workload's `make_optimizer`.
        warmup_steps: Updates over which the learning rate rises linearly from 0.
        precision: Arithmetic of the forward pass.

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
    learning_rate: float
    warmup_steps: int = 0
    precision: Precision = "float32"

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
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise RecipeError(
                f"learning_rate is {self.learning_rate}; it must be a positive finite number."
            )
        self._complete_the_split()

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

    def replace(self, **changes: Any) -> Recipe:
        """A copy with some fields changed; a changed batch clears the split unless it is given."""
        if {"global_batch", "micro_batch", "replicas"} & changes.keys():
            changes = {"micro_batch": 0, "accumulation": 0, **changes}
        return replace(self, **changes)
