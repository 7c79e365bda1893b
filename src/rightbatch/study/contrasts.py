"""What the smallest and the largest batch differ in, seed by seed, after as many epochs."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rightbatch.laws.estimate import Estimate
from rightbatch.laws.seeds import geometric_mean_over_seeds, mean_over_seeds
from rightbatch.study.findings import Contrast
from rightbatch.study.judging import Setting
from rightbatch.study.size_table import SizeTable
from rightbatch.study.trials import EvaluationPoint


def common_epochs(tables: Sequence[SizeTable], setting: Setting) -> float | None:
    """As many epochs as trainings of every size did.

    Args:
        tables: Of each size.
        setting: Gives N.

    Returns:
        The epochs; None where there are no trainings.
    """
    reached = [_examples(table) for table in tables]
    return min(reached) / setting.num_examples if reached and min(reached) > 0 else None


def _examples(table: SizeTable) -> int:
    rows = [row for rate in table.rates for row in table.rows_at(rate) if row.state == "complete"]
    return max((row.examples for row in rows), default=0)


def contrast_sizes(tables: Sequence[SizeTable], setting: Setting) -> tuple[Contrast, ...]:
    """The smallest batch against the largest, at their best rates and at one rate.

    A seed begins with the same weights at every batch size, so that the two are compared seed by
    seed: what seeds have in common drops out.

    Args:
        tables: Of each size, ascending.
        setting: What they are about.

    Returns:
        The contrasts that can be made.
    """
    epochs = common_epochs(tables, setting)
    if len(tables) < 2 or epochs is None:
        return ()
    small, large = tables[0], tables[-1]
    pairs = [("best", small.rates[small.best], large.rates[large.best])]
    same = _common_rate(small, large)
    if same is not None:
        pairs.append(("same", same, same))
    found: list[Contrast] = []
    for at, own, other in pairs:
        for quantity, of in _QUANTITIES.items():
            seeds = [seed for seed in small.seeds if seed in large.seeds]
            values = [
                (small.value_at(own, seed, epochs, of), large.value_at(other, seed, epochs, of))
                for seed in seeds
            ]
            known = [(a, b) for a, b in values if a is not None and b is not None]
            difference = _difference(quantity, known)
            if difference is None:
                continue
            found.append(
                Contrast(
                    quantity=quantity,  # pyright: ignore[reportArgumentType]
                    at=at,  # pyright: ignore[reportArgumentType]
                    sizes=(small.batch_size, large.batch_size),
                    learning_rates=(own, other),
                    epochs=epochs,
                    difference=difference,
                    certain=_certain(difference, 0.0 if quantity == "gap" else 1.0),
                )
            )
    return tuple(found)


def _gap(point: EvaluationPoint) -> float | None:
    if point.val_loss is None or point.train_loss is None:
        return None
    return point.val_loss - point.train_loss


_QUANTITIES = {
    "roughness": lambda point: point.roughness,
    "distance": lambda point: point.distance,
    "gap": _gap,
}


def _common_rate(small: SizeTable, large: SizeTable) -> float | None:
    """A rate tried at both: the one whose worse loss of the two is the least."""

    def worse(rate: float) -> float:
        losses = [mean_over_seeds([table.last_loss(rate, s) for s in table.seeds]).value
                  for table in (small, large)]  # fmt: skip
        return max(math.inf if loss is None else loss for loss in losses)

    shared = sorted(set(small.rates) & set(large.rates))
    best = min(shared, key=worse, default=None)
    return best if best is not None and math.isfinite(worse(best)) else None


def _difference(quantity: str, pairs: Sequence[tuple[float, float]]) -> Estimate | None:
    if not pairs:
        return None
    if quantity == "gap":
        return mean_over_seeds([a - b for a, b in pairs], "difference seed by seed")
    if any(a <= 0 or b <= 0 for a, b in pairs):
        return None
    return geometric_mean_over_seeds([a / b for a, b in pairs])


def _certain(difference: Estimate, none: float) -> bool | None:
    if difference.low is None or difference.high is None:
        return None
    return not difference.low <= none <= difference.high
