"""From a race's record to a choice: pure, seeded, and the same bit for bit when replayed.

The record's runs become observations of the law in `laws.progress`, measured with the baseline's
curve as the ruler; the posterior of the law gives, for every (batch, learning rate) of a lattice,
draws of the logarithm of its cost to the target. Everything that is decided, during the race and
at its end, is read off these draws.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rightbatch.laws.curve import LossCurve, make_loss_curve
from rightbatch.laws.progress import (
    PARAMETERS,
    ProgressObservation,
    ProgressPrior,
    log_extra_steps,
    log_rate,
    make_log_likelihood,
    make_prior,
    relative_log_steps,
    sample_posterior,
)
from rightbatch.study.records import TrialRecord

Array = NDArray[np.float64]

HALF_OCTAVES = range(-10, 17)
"""Learning rates of the lattice: the baseline's × 2^(k/2)."""
_LONG_SHOT = 0.25
_WORST = 2.0
"""Costs more than e² times the best are all as bad: what is hopeless should not sway a mean."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One (batch, learning rate) of the lattice."""

    global_batch: int
    learning_rate: float


@dataclass(frozen=True)
class Outlook:
    """What the evidence says of every cell.

    Attributes:
        cells: The lattice.
        log_cost: ln cost to the target less that of the cheapest cell, per draw;
            shape (draws, cells).
        expected: Mean over draws, hopeless cells capped; shape (cells,).
        log_steps: ln steps to the target, per draw; shape (draws, cells).
    """

    cells: tuple[Cell, ...]
    log_cost: Array
    expected: Array
    log_steps: Array

    def best(self, among: Sequence[Cell] | None = None) -> Cell:
        """The cell of least expected cost."""
        if among is None:
            return self.cells[int(self.expected.argmin())]
        return min(among, key=lambda cell: self.expected[self.index(cell)])

    def index(self, cell: Cell) -> int:
        """Where a cell stands in the lattice."""
        for i, other in enumerate(self.cells):
            same_rate = math.isclose(other.learning_rate, cell.learning_rate, rel_tol=1e-9)
            if other.global_batch == cell.global_batch and same_rate:
                return i
        raise ValueError(f"{cell} is not in the lattice.")

    def steps_to_target(self, cell: Cell) -> float:
        """Median of the predicted steps."""
        return float(np.exp(np.median(self.log_steps[:, self.index(cell)])))

    def portfolio(self, size: int, *, most_examples: float = math.inf) -> list[Cell]:
        """Cells that together promise the least cost: E[min over them], chosen one by one.

        Args:
            size: How many at most.
            most_examples: Cells whose training is predicted to need more are left out, unless
                all are.

        Returns:
            Cells, the best first.
        """
        capped = np.minimum(self.log_cost, _WORST)
        batches = np.array([cell.global_batch for cell in self.cells])
        dear = np.exp(np.median(self.log_steps, axis=0)) * batches > most_examples
        if dear.all():
            dear[:] = False
        chosen = [int(np.where(dear, np.inf, self.expected).argmin())]
        # A long shot that would win only under odd laws is not worth a whole run.
        hopeless = dear | (self.expected > self.expected[chosen[0]] + _LONG_SHOT)
        while len(chosen) < size:
            so_far = capped[:, chosen].min(axis=1, keepdims=True)
            gain = np.minimum(so_far, capped).mean(axis=0)
            gain[hopeless] = np.inf
            gain[chosen] = np.inf
            if not np.isfinite(gain).any():
                break
            chosen.append(int(gain.argmin()))
        return [self.cells[i] for i in chosen]


def conclude(
    trials: Sequence[TrialRecord],
    *,
    target_loss: float,
    normalised: bool,
    sizes: Sequence[int],
    price: Callable[[int], float],
    seed: int = 0,
) -> Outlook:
    """What the runs so far say of every cell of the lattice.

    Args:
        trials: The runs; exactly one of them is the baseline, with three evaluations or more.
        target_loss: The loss that counts as trained.
        normalised: Whether the optimizer divides by the gradient's size.
        sizes: Batch sizes open to choice.
        price: Cost of one step at a batch: modelled seconds, examples, or 1.
        seed: Of the sampler.

    Returns:
        The outlook.
    """
    baseline = next(t for t in trials if t.kind == "baseline")
    ruler = _make_ruler(baseline)
    prior = make_prior(
        reference_batch=baseline.global_batch,
        learning_rate=baseline.learning_rate,
        normalised=normalised,
    )
    observations = observe(trials, ruler, target_loss)
    log_likelihood = make_log_likelihood(
        prior,
        observations,
        baseline_batch=baseline.global_batch,
        baseline_lr=baseline.learning_rate,
    )
    draws = _vary_between_seeds(sample_posterior(prior, log_likelihood, seed=seed), seed)
    cells = make_lattice(sizes, baseline.learning_rate)
    ln_target = float(ruler.ln_progress_at(math.log(target_loss)))
    log_steps = _log_steps(prior, draws, cells, baseline) + ln_target
    ln_price = np.log([price(cell.global_batch) for cell in cells])
    cost = log_steps + ln_price
    log_cost = cost - cost.min(axis=1, keepdims=True)
    return Outlook(cells, log_cost, np.minimum(log_cost, _WORST).mean(axis=0), log_steps)


_EDGE_SPREAD, _NOISE_SPREAD = 0.3, 0.2
"""How much the edge and the noise-limited learning rate differ between seeds, in e-folds."""


def _vary_between_seeds(draws: Array, seed: int) -> Array:
    """The law of a fresh seed, given draws of the law of the seeds that were run.

    What was seen on one seed holds for the next only nearly; next to the cliff that is the
    difference between the best and never. Decisions are about fresh seeds.

    Args:
        draws: Parameters, shape (draws, 8).
        seed: Of the variation.

    Returns:
        Parameters, shape (draws, 8).
    """
    rng = np.random.default_rng((seed, 1))
    varied = draws.copy()
    varied[:, PARAMETERS.index("ln_edge")] += _EDGE_SPREAD * rng.standard_normal(len(draws))
    varied[:, PARAMETERS.index("ln_noise_lr")] += _NOISE_SPREAD * rng.standard_normal(len(draws))
    return varied


def make_lattice(sizes: Sequence[int], baseline_lr: float) -> tuple[Cell, ...]:
    """Every size with every learning rate, half octaves apart, around the baseline's."""
    rates = [baseline_lr * 2.0 ** (k / 2) for k in HALF_OCTAVES]
    return tuple(Cell(global_batch=size, learning_rate=rate) for size in sizes for rate in rates)


def _log_steps(
    prior: ProgressPrior, draws: Array, cells: Sequence[Cell], baseline: TrialRecord
) -> Array:
    """Ln S of every cell less ln of the progress at which the baseline stood at the target."""
    ln_batch = np.log([float(c.global_batch) for c in cells])
    ln_lr = np.log([c.learning_rate for c in cells])
    at_batch = np.log([float(baseline.global_batch)])
    base = log_rate(draws, at_batch) - log_extra_steps(
        prior, draws, at_batch, np.log([baseline.learning_rate]), from_fresh=1.0
    )
    return relative_log_steps(prior, draws, ln_batch, ln_lr) + base


def observe(
    trials: Sequence[TrialRecord], ruler: LossCurve, target_loss: float
) -> tuple[ProgressObservation, ...]:
    """Branches and fresh runs as observations of the law.

    A branch gives two: shortly after it left (mostly the noise it relaxed to) and at its end
    (mostly its rate). A fresh run gives one, where it got to, that counts the more the nearer it
    came to the target. A run that diverged is known to be at least many times slower.

    Args:
        trials: The runs.
        ruler: The baseline's curve.
        target_loss: The loss that counts as trained.

    Returns:
        The observations.
    """
    found: list[ProgressObservation] = []
    for trial in trials:
        if trial.kind == "branch":
            found += _observe_branch(trial, ruler, target_loss)
        elif trial.kind == "run" and trial.steps > 0:
            found.append(_observe_run(trial, ruler, target_loss))
    return tuple(found)


def _make_ruler(baseline: TrialRecord) -> LossCurve:
    points = [p for p in baseline.points if p.loss is not None and p.loss > 0 and p.progress > 0]
    return make_loss_curve(
        np.array([p.progress for p in points]), np.array([p.loss for p in points])
    )


def _slope_ratio(ruler: LossCurve, ln_progress: float, target_loss: float) -> float:
    at_target = float(ruler.ln_progress_at(math.log(target_loss)))
    here = min(max(ln_progress, at_target - 2.0), at_target + 0.5)
    return float(np.clip(ruler.slope(at_target) / ruler.slope(here), 0.2, 2.0))


_LOSS_NOISE = 0.008
"""Relative error of a smoothed loss; on a flat curve it is a large error in progress."""


def _observation(
    trial: TrialRecord,
    ruler: LossCurve,
    target_loss: float,
    steps: float,
    ln_seen: float,
    sd: float,
) -> ProgressObservation:
    """One observation; `sd` is the seed's share of its deviation."""
    at = min(ln_seen, float(ruler.ln_progress[-1]) + 0.3)
    deviation = math.hypot(sd, _LOSS_NOISE / float(ruler.slope(at)))
    return ProgressObservation(
        global_batch=trial.global_batch,
        learning_rate=trial.learning_rate,
        start_progress=trial.start_progress,
        steps=steps,
        equivalent_progress=math.exp(ln_seen),
        slope_ratio=_slope_ratio(ruler, ln_seen, target_loss),
        deviation=deviation,
        at_most=trial.state == "diverged",
    )


def _observe_branch(
    trial: TrialRecord, ruler: LossCurve, target_loss: float
) -> list[ProgressObservation]:
    ln_start = math.log(trial.start_progress)
    losses = [p.loss for p in trial.points if p.loss is not None]
    if trial.state == "diverged" or len(losses) < 4:
        steps = float(max(trial.steps, 1))
        return [_observation(trial, ruler, target_loss, steps, ln_start - 1.2, 0.35)]
    seen = np.maximum(ruler.ln_progress_at(np.log(losses)), ln_start - 1.5)
    steps = np.array([float(p.steps) for p in trial.points])
    third = max(2, len(losses) // 3)
    return [
        _observation(
            trial, ruler, target_loss, float(steps[part].mean()), float(seen[part].mean()), 0.25
        )
        for part in (slice(0, third), slice(-third, None))
    ]


def _observe_run(trial: TrialRecord, ruler: LossCurve, target_loss: float) -> ProgressObservation:
    own = math.log(trial.learning_rate * trial.steps)
    if trial.state == "diverged":
        return _observation(trial, ruler, target_loss, float(trial.steps), own - 2.3, 0.35)
    ln_target = float(ruler.ln_progress_at(math.log(target_loss)))
    if trial.steps_to_target is not None:
        steps = float(trial.steps_to_target)
        return _observation(trial, ruler, target_loss, steps, ln_target, 0.12)
    tail = [p for p in trial.points if p.loss is not None and p.steps >= 0.75 * trial.steps]
    losses = np.log([p.loss for p in tail if p.loss is not None])
    seen = float(np.mean(ruler.ln_progress_at(losses)))
    seen = min(max(seen, own - 2.5), ln_target)
    steps = float(np.exp(np.mean(np.log([p.steps for p in tail]))))
    share = math.exp(seen - ln_target)
    return _observation(trial, ruler, target_loss, steps, seen, 0.18 + 0.25 * max(0.0, 0.5 - share))


def near_best(outlook: Outlook, chosen: Cell, *, most_span: float = 8.0) -> tuple[int, int]:
    """The batch sizes among which the best one probably is.

    Each draw of the law has its cheapest size, with its own best learning rate; sizes within 5 %
    of it are as good. The interval holds the sizes that are as good as the best in at least 5 %
    of the draws, the chosen one always; when that spans more than 8 ×, it is narrowed from the
    less likely side.

    Args:
        outlook: What the evidence says.
        chosen: The chosen cell.
        most_span: Largest ratio of its ends.

    Returns:
        The smallest and the largest size.
    """
    sizes = sorted({c.global_batch for c in outlook.cells})
    batches = np.array([c.global_batch for c in outlook.cells])
    by_size = np.stack([outlook.log_cost[:, batches == s].min(axis=1) for s in sizes])
    share = (by_size <= by_size.min(axis=0) + math.log(1.05)).mean(axis=1)
    inside = [i for i, s in enumerate(sizes) if share[i] >= 0.05 or s == chosen.global_batch]
    low, high = min(inside), max(inside)
    own = sizes.index(chosen.global_batch)
    while sizes[high] > most_span * sizes[low]:
        drop_low = low < own and (share[low] <= share[high] or high == own)
        low, high = (low + 1, high) if drop_low else (low, high - 1)
    return sizes[low], sizes[high]
