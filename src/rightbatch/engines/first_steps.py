"""An engine's first steps against those of the plain loop."""

from __future__ import annotations

import numpy as np

from rightbatch.engines.copies import Copies
from rightbatch.engines.unsupported import Unsupported
from rightbatch.recipe import Recipe
from rightbatch.training import Training
from rightbatch.workload import Workload

_STEPS = 3
_TOLERANCE = 1e-3


def check_first_steps(copies: Copies, workload: Workload, global_batch: int) -> None:
    """Compares the first losses with torch's, for the copy with the smallest learning rate.

    Tracing sees one run of the model's Python code. This finds what it cannot see: code that
    draws from Python's own random numbers, or does something else at every call.

    Args:
        copies: At their initial weights; they are advanced.
        workload: What they train.
        global_batch: Examples per update.

    Raises:
        Unsupported: If they differ.
    """
    copy = int(np.argmin(copies.learning_rates))
    recipe = Recipe(global_batch=global_batch, learning_rate=float(copies.learning_rates[copy]))
    training = Training(workload, recipe, seed=int(copies.seeds[copy]))
    training.advance(_STEPS)
    copies.advance(_STEPS)
    theirs, ours = training.evaluate(), copies.evaluate()
    if training.diverged:
        return
    pairs = [("training", theirs.train_loss, ours.train_loss)]
    if theirs.val_loss is not None and ours.val_loss is not None:
        pairs.append(("validation", theirs.val_loss, ours.val_loss))
    for name, their, our in pairs:
        if not abs(our[copy] - their) <= _TOLERANCE * abs(their) + 1e-6:
            raise Unsupported(
                f"after {_STEPS} steps its {name} loss is {our[copy]:.6g} and "
                f"torch's is {their:.6g}"
            )
