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

Engine = Literal["auto", "compiled", "vmapped", "loop"]
_ENGINES = ("auto", "compiled", "vmapped", "loop")


def make_copies(
    workload: Workload,
    *,
    global_batch: int,
    learning_rates: Any,
    seeds: Any,
    engine: Engine = "auto",
    worth_compiling: bool = True,
    watch: str | None = None,
) -> Copies:
    """Makes a group of trainings that are advanced together.

    Args:
        workload: What to train.
        global_batch: Examples per update.
        learning_rates: One per copy, shape (copies,).
        seeds: One per copy, shape (copies,): pairs with the learning rates, not a product.
        engine: `compiled` (all copies in one JAX loop lowered from the torch model), `vmapped`
            (all copies at once in torch), `loop` (one after the other, runs every workload), or
            `auto`: the first of them that can, vmapped only where it is expected to be faster than
            the loop.
        worth_compiling: Whether there is enough to do that compiling would pay; `auto` leaves the
            compiled engine out where not.
        watch: A weight whose path is followed, as in `rightbatch.Watch`, such as `0.weight[3,1]` or
            `first`. With it, evaluations say how far the weights are from the initial ones.

    Returns:
        The copies, at their initial weights; `.engine` and `.reason` say who runs them and why.

    Raises:
        MissingExtraError: If `engine="compiled"` and JAX is not installed.
        UsageError: If the arguments do not fit together, or the engine that was asked for cannot
            run this workload; the message names what is missing.

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
    if engine not in _ENGINES:
        raise UsageError(f"The engine is {engine!r}. Choose {', '.join(_ENGINES[:-1])} or loop.")
    arguments: dict[str, Any] = {
        "global_batch": global_batch, "learning_rates": rates, "seeds": numbers, "watch": watch,
    }  # fmt: skip
    if engine == "loop":
        return LoopCopies(workload, **arguments, reason="The loop was asked for.")
    if engine != "auto":
        return _as_asked(engine, workload, arguments)
    return _chosen(workload, arguments, worth_compiling)


def _as_asked(
    engine: Literal["compiled", "vmapped"], workload: Workload, arguments: dict[str, Any]
) -> Copies:
    if engine == "compiled" and find_spec("jax") is None:
        raise MissingExtraError("jax", "fast")
    make = _compiled if engine == "compiled" else _vmapped
    try:
        return make(workload, arguments, f"The {engine} engine was asked for.")
    except Unsupported as error:
        raise UsageError(
            f"The {engine} engine cannot run workload {workload.name!r}: {error}. Use "
            "engine='loop', or 'auto' to have it chosen."
        ) from error


def _chosen(workload: Workload, arguments: dict[str, Any], worth_compiling: bool) -> Copies:
    """Compiled, else vmapped, else the loop, with what was missing."""
    if not worth_compiling:
        reason = "Trainings so short are done before a compiler would be"
    elif find_spec("jax") is None:
        reason = "JAX is not installed (pip install 'rightbatch[fast]')"
    else:
        try:
            found = "Every operation of the training step could be lowered to JAX."
            return _compiled(workload, arguments, found)
        except Unsupported as error:
            reason = f"The compiled engine cannot run this workload: {error}"
    try:
        return _vmapped(
            workload, arguments, f"{reason}; so the copies are mapped.", only_if_faster=True
        )
    except Unsupported as error:
        other = f"; the vmapped engine is not used: {error}; so the loop runs."
        return LoopCopies(workload, **arguments, reason=reason + other)


def _compiled(workload: Workload, arguments: dict[str, Any], reason: str) -> Copies:
    from rightbatch.engines.compiled import CompiledCopies

    return CompiledCopies(workload, **arguments, reason=reason)


def _vmapped(
    workload: Workload, arguments: dict[str, Any], reason: str, *, only_if_faster: bool = False
) -> Copies:
    from rightbatch.engines.vmapped import VmappedCopies

    return VmappedCopies(workload, **arguments, reason=reason, only_if_faster=only_if_faster)


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
