"""From a race's record to a choice: pure, seeded, and the same bit for bit when replayed.

All runs share initial weights and data order. The leader is the best learning rate of one size;
runs at other sizes are compared with it by the steps they take to the same losses. The posterior
of the critical batch (`laws.critical_batch`) joins these ratios, and the price of a step turns
them into costs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rightbatch.laws.critical_batch import (
    CriticalBatch,
    MeasuredSize,
    draw_log_steps,
    infer_critical_batch,
)
from rightbatch.laws.curve import LossCurve, compare_steps, make_loss_curve
from rightbatch.study.records import Cell, RaceRecord, TrialRecord

Array = NDArray[np.float64]

_EARLY_BIAS = 0.13
"""Per octave of batch and remaining share of the way: gradient noise grows during training, so
that a larger batch looks slower early than it is. Measured on image and text workloads with SGD
and Adam: 0.10 per octave at a quarter of the way, 0.06 at four tenths, 0.04 at half."""
_DEVIATION, _EARLY_DEVIATION = 0.12, 0.15
"""Of ln steps ratios at the target, and what is added per remaining share of the way."""
_LEAST_SHARE = 0.15
"""Runs that ended before this share of the way are not compared."""
CHOOSABLE_SHARE = 0.25
"""Runs that came this far may be chosen without having arrived, when the budget ends."""
_CHOOSABLE_STEPS = 10
"""And did this many steps, or as many as the leader."""
_MOST_RATIO = 2.5
_NOT_YET = 0.99
_ROBUST_RATIO = 1.2
"""Of two learning rates half an octave apart the higher saves at most 1.41 × the steps. Where it
saves less than this it is close to the cliff, and on other seeds may be beyond it."""
_ROBUST_SHARE = 0.35
_FLAT_RATIO, _FLAT_SHARE = 1.1, 0.3


@dataclass(frozen=True, kw_only=True)
class SizeSeen:
    """A size, and the run that tells most of it.

    Attributes:
        trial: Index of the run.
        measured: Its steps against the leader's.
        share: How far it came, as a share of the way to the target.
    """

    trial: int
    measured: MeasuredSize
    share: float


@dataclass(frozen=True)
class Outlook:
    """What the evidence says of every size.

    Attributes:
        sizes: Ascending.
        leader: The leader's batch.
        seen: Sizes other than the leader's that were run far enough.
        critical_batch: Posterior.
        log_cost: ln cost to the target over the leader's, shape (draws, sizes).
        log_steps: ln steps over the leader's, shape (draws, sizes).
    """

    sizes: tuple[int, ...]
    leader: int
    seen: tuple[SizeSeen, ...]
    critical_batch: CriticalBatch
    log_cost: Array
    log_steps: Array

    def was_seen(self, size: int) -> bool:
        """Whether a run at this size, other than the leader's, came far enough to compare."""
        return any(seen.measured.global_batch == size for seen in self.seen)

    def expected(self, size: int) -> float:
        """Mean ln cost over the leader's."""
        return float(self.log_cost[:, self.sizes.index(size)].mean())

    def step_ratio(self, size: int) -> float:
        """Steps over the leader's, geometric mean."""
        return math.exp(float(self.log_steps[:, self.sizes.index(size)].mean()))


def trial_curve(trial: TrialRecord) -> LossCurve:
    """The curve of a run's evaluations."""
    return make_loss_curve([p.steps for p in trial.points], [p.loss for p in trial.points])


def trial_curves(record: RaceRecord) -> list[tuple[Cell, LossCurve]]:
    """Cell and curve of every run of a race."""
    return [
        (Cell(global_batch=t.global_batch, learning_rate=t.learning_rate), trial_curve(t))
        for t in record.trials
    ]


def own_share(curve: LossCurve, *, arrived: bool, target_loss: float | None) -> float:
    """How far a run came, as a share of its way; 0 where nothing tells."""
    if arrived:
        return 1.0
    if target_loss is None or target_loss <= 0:
        return 0.0
    return min(_NOT_YET, curve.share_of_way(math.log(target_loss)))


def look_at_sizes(
    curves: Sequence[tuple[Cell, LossCurve]],
    leader: int,
    *,
    leader_share: float,
    sizes: Sequence[int],
    price: Callable[[int], float],
    usual: float,
    seed: int = 0,
) -> Outlook:
    """What the runs so far say of every size.

    Args:
        curves: Cell and curve of every run, the leader's among them.
        leader: Index of the leader's.
        leader_share: How far the leader came, as a share of its way.
        sizes: Sizes open to choice, the leader's among them.
        price: Cost of one step at a batch: modelled seconds, examples, or 1.
        usual: The critical batch expected before anything is measured.
        seed: Of the draws.

    Returns:
        The outlook.
    """
    reference, ruler = curves[leader][0].global_batch, curves[leader][1]
    best: dict[int, SizeSeen] = {}
    for index, (cell, curve) in enumerate(curves):
        batch = cell.global_batch
        if batch == reference or len(curve.steps) < 3 or _diverged(curve):
            continue
        seen = _see(index, batch, reference, curve, ruler, leader_share)
        if seen is None:
            continue
        before = best.get(batch)
        if before is None or _optimism(seen) < _optimism(before):
            best[batch] = seen
    seen_sizes = tuple(best[batch] for batch in sorted(best))
    measured = [s.measured for s in seen_sizes]
    log_steps = draw_log_steps(measured, reference, sizes, usual=usual, seed=seed)
    ln_price = np.log([price(size) / price(reference) for size in sizes])
    return Outlook(
        sizes=tuple(sizes),
        leader=reference,
        seen=seen_sizes,
        critical_batch=infer_critical_batch(measured, reference, usual=usual),
        log_cost=log_steps + ln_price,
        log_steps=log_steps,
    )


def _see(
    index: int,
    batch: int,
    reference: int,
    curve: LossCurve,
    ruler: LossCurve,
    leader_share: float,
) -> SizeSeen | None:
    ratio = compare_steps(ruler, curve)
    share = ratio.share * leader_share
    if not math.isfinite(ratio.log_ratio) or share < _LEAST_SHARE:
        return None
    rest = 1.0 - share
    log_ratio = ratio.log_ratio - _EARLY_BIAS * math.log2(batch / reference) * rest
    return SizeSeen(
        trial=index,
        measured=MeasuredSize(
            global_batch=batch,
            log_ratio=float(np.clip(log_ratio, -_MOST_RATIO, _MOST_RATIO)),
            deviation=_DEVIATION + _EARLY_DEVIATION * rest,
        ),
        share=share,
    )


def _diverged(curve: LossCurve) -> bool:
    """Whether it ended without a number: such a run is neither compared nor chosen."""
    return len(curve.steps) > 0 and not math.isfinite(curve.ln_loss[-1])


def _optimism(seen: SizeSeen) -> float:
    """The run of a size that tells most of it: fast, and sure of it."""
    return seen.measured.log_ratio + seen.measured.deviation


def conclude(record: RaceRecord, price: Callable[[int], float], *, seed: int = 0) -> Outlook:
    """What a race says of every size.

    Args:
        record: The race.
        price: Cost of one step at a batch: modelled seconds, examples, or 1.
        seed: Of the draws.

    Returns:
        The outlook.
    """
    curves = trial_curves(record)
    return look_at_sizes(
        curves,
        record.leader,
        leader_share=record.leader_share,
        sizes=record.sizes,
        price=price,
        usual=record.usual_batch,
        seed=seed,
    )


def choose_trial(outlook: Outlook, curves: Sequence[tuple[Cell, LossCurve]], leader: int) -> int:
    """The run that is expected to be cheapest, on the safe side of the cliff.

    Args:
        outlook: What the evidence says.
        curves: Cell and curve of every run.
        leader: Index of the leader.

    Returns:
        Index of the run: the leader, one at another size, or the one half an octave below it.
    """
    least_steps = min(_CHOOSABLE_STEPS, curves[leader][1].last_step)
    others = [
        s
        for s in outlook.seen
        if s.share >= CHOOSABLE_SHARE and curves[s.trial][1].last_step >= least_steps
    ]
    best = min(others, key=lambda s: outlook.expected(s.measured.global_batch), default=None)
    chosen = leader
    if best is not None and outlook.expected(best.measured.global_batch) < 0.0:
        chosen = best.trial
    below = _neighbour(curves, chosen, -1)
    if below is None or not _is_close(curves, chosen, below, _ROBUST_SHARE, _ROBUST_RATIO):
        return chosen
    above = _neighbour(curves, chosen, 1)
    if above is not None and _is_close(curves, chosen, above, _FLAT_SHARE, _FLAT_RATIO):
        # The one above does as well: this is the flat of the valley, not the edge of the cliff.
        return chosen
    return below


def _neighbour(
    curves: Sequence[tuple[Cell, LossCurve]], index: int, half_octaves: int
) -> int | None:
    """The run at the same batch some half octaves away, unless it diverged."""
    cell = curves[index][0]
    rate = cell.learning_rate * 2.0 ** (half_octaves / 2)
    for i, (other, curve) in enumerate(curves):
        same = other.global_batch == cell.global_batch
        if same and math.isclose(other.learning_rate, rate, rel_tol=1e-6) and not _diverged(curve):
            return i
    return None


def _is_close(
    curves: Sequence[tuple[Cell, LossCurve]], index: int, other: int, share: float, ratio: float
) -> bool:
    """Whether another run was seen on this share of the way, and took at most this many steps."""
    seen = compare_steps(curves[index][1], curves[other][1])
    return seen.share >= share and seen.log_ratio < math.log(ratio)


def near_best(outlook: Outlook, chosen: int, *, most_span: float = 8.0) -> tuple[int, int]:
    """The batch sizes among which the best one probably is.

    Each draw has its cheapest size; sizes within 5 % of it are as good. The interval holds the
    sizes that are as good as the best in at least 5 % of the draws, the chosen one always; when
    that spans more than 8 ×, it is narrowed from the less likely side.

    Args:
        outlook: What the evidence says.
        chosen: The chosen size.
        most_span: Largest ratio of its ends.

    Returns:
        The smallest and the largest size.
    """
    sizes, by_size = outlook.sizes, outlook.log_cost
    as_good = by_size <= by_size.min(axis=1, keepdims=True) + math.log(1.05)
    share = as_good.mean(axis=0)
    inside = [i for i, s in enumerate(sizes) if share[i] >= 0.05 or s == chosen]
    low, high = min(inside), max(inside)
    own = sizes.index(chosen)
    while sizes[high] > most_span * sizes[low]:
        drop_low = low < own and (share[low] <= share[high] or high == own)
        low, high = (low + 1, high) if drop_low else (low, high - 1)
    return sizes[low], sizes[high]
