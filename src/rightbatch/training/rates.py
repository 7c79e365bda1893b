"""Sets the optimizer's learning rates, and what must follow them, before each update."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from rightbatch.errors import RecipeError
from rightbatch.laws.scaling import AdamSettings, scale_adam, scale_learning_rate
from rightbatch.laws.schedule import cosine_factor, step_factor, warmup_factor
from rightbatch.recipe import Recipe


@dataclass(frozen=True, kw_only=True)
class Horizon:
    """How long a run is meant to be, for schedules over the whole of it; one of the two.

    Attributes:
        steps: Updates.
        examples: Examples consumed.
    """

    steps: int | None = None
    examples: float | None = None

    def progress(self, steps: float, examples: float) -> float:
        """The share of the run that is done after so many steps and examples."""
        if self.steps is not None:
            return steps / max(self.steps, 1)
        assert self.examples is not None
        return examples / max(self.examples, 1)


class Rates:
    """The learning rates of an optimizer's groups over a run.

    rate = group's own × warm-up(step) × schedule(progress) × rule(batch) × window's factor

    Args:
        optimizer: Its groups, as made for the recipe's learning rate, give the base rates.
        recipe: Says the schedule.
        horizon: The length of the run; needed by schedules that end somewhere.
        largest: Beyond this no batch rises: the training set.

    Attributes:
        settled: Whether the rates will not change any more.

    Raises:
        RecipeError: If the recipe asks for what this optimizer or run does not have.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        recipe: Recipe,
        horizon: Horizon | None,
        *,
        largest: int | None = None,
    ) -> None:
        if recipe.schedule != "constant" and horizon is None:
            raise RecipeError(
                f"The schedule {recipe.schedule!r} runs over the whole training, whose length is "
                "not known. Give epochs or steps."
            )
        if recipe.rate_rule == "adam-sde":
            _check_adam(optimizer)
        self._optimizer = optimizer
        self._recipe = recipe
        self._horizon = horizon
        self._base = [group_settings(group) for group in optimizer.param_groups]
        self._current: tuple[float, float, int] | None = None
        self._steady = (
            recipe.schedule == "constant"
            and recipe.last_batch != "scale-lr"
            and not (recipe.changes_batch and recipe.rate_rule != "none")
        )
        self.settled = False
        # What cannot be scaled is refused before training.
        batches = [batch for _, batch in recipe.batch_ramp]
        if recipe.batch_policy == "follow-noise":
            batches += [batch for batch in (recipe.largest_batch or largest,) if batch]
        for batch in batches:
            for base in self._base:
                _at_batch(base, recipe, batch, 1.0)

    def unsettle(self) -> None:
        """The optimizer's groups were changed from outside: they are set before the next update."""
        self._current, self.settled = None, False

    def set(
        self, *, steps: int, examples: float, global_batch: int, factor: float, gain: float
    ) -> None:
        """Sets the rates of the next update.

        Args:
            steps: Updates done.
            examples: Examples consumed, in the units of the horizon.
            global_batch: Batch that the update was planned with.
            factor: Of the window.
            gain: AdaScale's, where the recipe follows it.
        """
        recipe = self._recipe
        factor *= warmup_factor(steps, recipe.warmup_steps)
        if recipe.schedule != "constant":
            assert self._horizon is not None  # by __init__
            progress = self._horizon.progress(steps, examples)
            factor *= (
                cosine_factor(progress, recipe.final_factor)
                if recipe.schedule == "cosine"
                else step_factor(progress, recipe.decay_at, recipe.decay)
            )
        wanted = (factor, gain, global_batch)
        if wanted == self._current:
            return
        self._current = wanted
        self.settled = self._steady and steps >= recipe.warmup_steps
        for group, base in zip(self._optimizer.param_groups, self._base, strict=True):
            group.update(_at_batch(base, recipe, global_batch, gain))
            group["lr"] = group["lr"] * factor


def group_settings(group: dict[str, Any]) -> dict[str, Any]:
    """What of an optimizer's group a batch may change: rate, and Adam's betas and eps."""
    return {key: group[key] for key in ("lr", "betas", "eps") if key in group}


def _at_batch(
    base: dict[str, Any], recipe: Recipe, global_batch: int, gain: float
) -> dict[str, Any]:
    """A group's settings at the batch of an update, before the schedule."""
    if recipe.rate_rule == "adascale":
        return {**base, "lr": base["lr"] * gain}
    if global_batch == recipe.global_batch or recipe.rate_rule == "none":
        return base
    if recipe.rate_rule != "adam-sde":
        rule = recipe.rate_rule
        return {
            **base,
            "lr": scale_learning_rate(base["lr"], recipe.global_batch, global_batch, rule=rule),
        }
    beta1, beta2 = base["betas"]
    settings = AdamSettings(learning_rate=base["lr"], beta1=beta1, beta2=beta2, eps=base["eps"])
    scaled = scale_adam(settings, recipe.global_batch, global_batch)
    return {"lr": scaled.learning_rate, "betas": (scaled.beta1, scaled.beta2), "eps": scaled.eps}


def _check_adam(optimizer: torch.optim.Optimizer) -> None:
    if not all("betas" in group and "eps" in group for group in optimizer.param_groups):
        raise RecipeError(
            f"rate_rule is 'adam-sde', but the optimizer is {type(optimizer).__name__}, which has "
            "no betas and eps to scale along. Use 'linear' or 'sqrt'."
        )
