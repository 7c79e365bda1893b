"""Chooses an engine for a group of trainings, and says why."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any, Literal

import numpy as np

from rightbatch.engines.copies import Copies
from rightbatch.engines.loop import LoopCopies
from rightbatch.engines.unsupported import Unsupported
from rightbatch.errors import MissingExtraError, UsageError
from rightbatch.recipe import Recipe
from rightbatch.workload import Workload

Engine = Literal["auto", "compiled", "loop"]


def make_copies(
    workload: Workload,
    *,
    global_batch: int,
    learning_rates: Any,
    seeds: Any,
    engine: Engine = "auto",
) -> Copies:
    """Makes a group of trainings that are advanced together.

    Args:
        workload: What to train.
        global_batch: Examples per update.
        learning_rates: One per copy, shape (copies,).
        seeds: One per copy, shape (copies,): pairs with the learning rates, not a product.
        engine: `compiled` (all copies in one JAX loop lowered from the torch model), `loop` (one
            after the other, runs every workload), or `auto`: compiled where it can.

    Returns:
        The copies, at their initial weights; `.engine` and `.reason` say who runs them and why.

    Raises:
        MissingExtraError: If `engine="compiled"` and JAX is not installed.
        UsageError: If the arguments do not fit together, or `engine="compiled"` cannot run this
            workload; the message names what is missing.

    Example:
        >>> from rightbatch import catalog
        >>> copies = make_copies(
        ...     catalog.get("max3"), global_batch=100, learning_rates=[0.1, 1.0], seeds=[0, 0],
        ...     engine="loop",
        ... )
        >>> copies.advance(20)
        >>> bool(copies.evaluate().train_loss[1] < copies.evaluate().train_loss[0])
        False
    """
    rates, numbers = _checked(global_batch, learning_rates, seeds)
    if engine not in ("auto", "compiled", "loop"):
        raise UsageError(f"The engine is {engine!r}. Choose auto, compiled or loop.")
    arguments = {"global_batch": global_batch, "learning_rates": rates, "seeds": numbers}
    if engine == "loop":
        return LoopCopies(workload, **arguments, reason="The loop was asked for.")
    if find_spec("jax") is None:
        if engine == "compiled":
            raise MissingExtraError("jax", "fast")
        reason = "JAX is not installed (pip install 'rightbatch[fast]'), so the loop runs."
        return LoopCopies(workload, **arguments, reason=reason)
    from rightbatch.engines.compiled import CompiledCopies

    asked = "The compiled engine was asked for."
    found = "Every operation of the training step could be lowered to JAX."
    try:
        return CompiledCopies(workload, **arguments, reason=asked if engine != "auto" else found)
    except Unsupported as error:
        if engine == "compiled":
            raise UsageError(
                f"The compiled engine cannot run workload {workload.name!r}: {error}. Use "
                "engine='loop', or 'auto' to have it chosen."
            ) from error
        reason = f"The compiled engine cannot run this workload: {error}; so the loop runs."
        return LoopCopies(workload, **arguments, reason=reason)


def _checked(global_batch: int, learning_rates: Any, seeds: Any) -> tuple[Any, Any]:
    rates = np.atleast_1d(np.asarray(learning_rates, dtype=np.float64))
    numbers = np.atleast_1d(np.asarray(seeds, dtype=np.int64))
    if rates.ndim != 1 or rates.shape != numbers.shape or len(rates) == 0:
        raise UsageError(
            f"There are {rates.size} learning rates and {numbers.size} seeds. Give one of each "
            "per copy: pairs, not a product."
        )
    for rate in np.unique(rates):
        Recipe(global_batch=global_batch, learning_rate=float(rate))  # checks both
    return rates, numbers
