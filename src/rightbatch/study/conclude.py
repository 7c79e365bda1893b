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
from rightbatch.laws.curve import LossCurve, StepRatio, compare_steps, make_loss_curve
from rightbatch.laws.scaling import scale_learning_rate
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
LEAST_STEPS = 10
"""And did this many steps, or as many as the leader."""
_MOST_RATIO = 2.5
_ROUNDING = 1.001
_NOT_YET = 0.99
_SAFE_SHARE = 0.35
"""The rate below must have been seen on this share of the way to be called safe."""
_SEEN_SHARE = 0.4
"""And the one above on this, to say whether a cliff is near."""
_CLIFF, _BESIDE_A_CLIFF = 2.0, 1.35
"""Where the one above takes 2 × the steps, 1.35 × is worth being farther away."""
_SLOPE, _BESIDE_A_SLOPE = 1.15, 1.1
_NOT_SEEN = 1.15


@dataclass(frozen=True, kw_only=True)
class SizeSeen:
    """A size, and the run that tells most of it.

    Attributes:
        trial: Index of the run.
        measured: Its steps against the leader's.
        share: How far it came, as a share of the way to the target.
        within_reach: Whether its learning rate is no higher than the leader's would be there.
    """

    trial: int
    measured: MeasuredSize
    share: float
    within_reach: bool


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
    normalised: bool,
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
        normalised: Whether the optimizer divides by the gradient's size.
        seed: Of the draws.

    Returns:
        The outlook.
    """
    reference = curves[leader][0].global_batch
    best: dict[int, SizeSeen] = {}
    for index, (cell, curve) in enumerate(curves):
        batch = cell.global_batch
        if batch == reference or len(curve.steps) < 3 or _diverged(curve):
            continue
        seen = _see(index, cell, curve, curves[leader], leader_share, normalised=normalised)
        if seen is None:
            continue
        before = best.get(batch)
        if before is None or _rank(seen) < _rank(before):
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
    cell: Cell,
    curve: LossCurve,
    leader: tuple[Cell, LossCurve],
    leader_share: float,
    *,
    normalised: bool,
) -> SizeSeen | None:
    lead, ruler = leader
    ratio = compare_steps(ruler, curve)
    share = ratio.share * leader_share
    if not math.isfinite(ratio.log_ratio) or share < _LEAST_SHARE:
        return None
    rest = 1.0 - share
    octaves = math.log2(cell.global_batch / lead.global_batch)
    log_ratio = ratio.log_ratio - _EARLY_BIAS * octaves * rest
    return SizeSeen(
        trial=index,
        measured=MeasuredSize(
            global_batch=cell.global_batch,
            log_ratio=float(np.clip(log_ratio, -_MOST_RATIO, _MOST_RATIO)),
            deviation=_DEVIATION + _EARLY_DEVIATION * rest,
        ),
        share=share,
        within_reach=_within_reach(cell, lead, normalised=normalised),
    )


def _within_reach(cell: Cell, leader: Cell, *, normalised: bool) -> bool:
    """Whether a learning rate is what the leader's would be at that batch, at the most."""
    # The largest that is stable grows no faster than the batch, with optimizers that divide by the
    # gradient's size than its root. The leader's was lowered until its neighbours lost; a run at
    # another size may have begun before that, and be ahead because this seed stands it.
    most = scale_learning_rate(
        leader.learning_rate,
        leader.global_batch,
        cell.global_batch,
        rule="sqrt" if normalised else "linear",
    )
    return cell.learning_rate <= most * _ROUNDING


def _diverged(curve: LossCurve) -> bool:
    """Whether it ended without a number: such a run is neither compared nor chosen."""
    return len(curve.steps) > 0 and not math.isfinite(curve.ln_loss[-1])


def _rank(seen: SizeSeen) -> tuple[bool, float]:
    """The run of a size that tells most of it: comparable, fast, and sure of it."""
    return not seen.within_reach, seen.measured.log_ratio + seen.measured.deviation


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
        normalised=record.normalised,
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
    least_steps = min(LEAST_STEPS, curves[leader][1].last_step)
    others = [
        s
        for s in outlook.seen
        if s.within_reach
        and s.share >= CHOOSABLE_SHARE
        and curves[s.trial][1].last_step >= least_steps
    ]
    best = min(others, key=lambda s: outlook.expected(s.measured.global_batch), default=None)
    chosen = leader
    if best is not None and outlook.expected(best.measured.global_batch) < 0.0:
        chosen = best.trial
    return _safe_side(curves, chosen)


def _safe_side(curves: Sequence[tuple[Cell, LossCurve]], index: int) -> int:
    """The run itself, or the one half an octave below it where a cliff may be near."""
    # Of two learning rates half an octave apart the higher saves at most 1.41 × the steps. Where it
    # saves little, or the one above does badly, it is close to the cliff, and on other seeds may be
    # beyond it.
    below = _neighbour(curves, index, -1)
    if below is None:
        return index
    saves = _compare(curves, index, below)
    if saves.share < _SAFE_SHARE:
        return index
    above = _neighbour(curves, index, 1)
    costs = StepRatio(0.0, 0.0) if above is None else _compare(curves, index, above)
    if costs.share >= _SEEN_SHARE and costs.log_ratio > math.log(_CLIFF):
        bearable = _BESIDE_A_CLIFF
    elif costs.share < _SEEN_SHARE:
        bearable = _NOT_SEEN
    else:
        bearable = _BESIDE_A_SLOPE if costs.log_ratio > math.log(_SLOPE) else 0.0
    return below if math.exp(saves.log_ratio) < bearable else index


def _neighbour(
    curves: Sequence[tuple[Cell, LossCurve]], index: int, half_octaves: int
) -> int | None:
    """The run at the same batch some half octaves away."""
    cell = curves[index][0]
    rate = cell.learning_rate * 2.0 ** (half_octaves / 2)
    for i, (other, _) in enumerate(curves):
        same = other.global_batch == cell.global_batch
        if same and math.isclose(other.learning_rate, rate, rel_tol=1e-6):
            return i
    return None


def _compare(curves: Sequence[tuple[Cell, LossCurve]], index: int, other: int) -> StepRatio:
    """The steps of a neighbour over a run's; without end, and known, if it diverged."""
    if _diverged(curves[other][1]):
        return StepRatio(math.inf, 1.0)
    return compare_steps(curves[index][1], curves[other][1])


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
