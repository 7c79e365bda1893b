"""What probes alone say of batch and learning rate, before any training run."""

from __future__ import annotations

import math

from rightbatch.laws.critical_batch import USUAL
from rightbatch.laws.efficiency import cost_optimal_batch
from rightbatch.plan.price import PRICES, open_sizes
from rightbatch.plan.records import Evidence, Goal
from rightbatch.probes.learning_rate import LearningRateRecord
from rightbatch.probes.noise import NoiseRecord
from rightbatch.probes.throughput import ThroughputRecord

_CRITICAL_SHARE = 0.3
"""Reported critical batches over B_simple averaged along training: 0.2 to 0.5 (McCandlish et al.
2018)."""
_NOISE_WEIGHT = 0.3
"""Weight of the noise probe against what is usual for the optimizer, in logs: measured on image
and text workloads, B_simple early in training misses the critical batch by a factor of five."""
_MINIMUM_SHARE = {"plain": 0.8, "averaging": 0.35}
"""The learning rate to train with, as a share of the one where a ramp's loss is least. A ramp
passes each learning rate in a few steps: an average of gradients follows it late. Measured with 40
steps per decade on image and text workloads: 0.5 to 1.3 and 0.27 to 0.45."""
_EDGE_SHARE = {"plain": 1 / 2, "averaging": 1 / 8}
"""The same, as a share of where the ramp explodes. On a quadratic gradient descent diverges beyond
2/λ and is quickest at 1/λ: a half."""
_USUAL_RATE = {"plain": 0.1, "averaging": 1e-2}
_USUAL_NORMALISED_RATE = 1e-3


def kind_of(*, averaging: bool) -> str:
    """The key of the tables by optimizer: `plain` or `averaging`."""
    return "averaging" if averaging else "plain"


def expected_critical_batch(noise: NoiseRecord, *, averaging: bool) -> float:
    """The critical batch that is expected before any training.

    The usual one for the optimizer, moved by the noise scale late on the warm trajectory, which
    is of its order and not equal to it.

    Args:
        noise: The noise probe.
        averaging: Whether the optimizer averages gradients over steps.

    Returns:
        Examples.
    """
    usual = USUAL[kind_of(averaging=averaging)]
    points = [p.value for p in noise.trajectory if p.value is not None]
    if not points:
        return usual
    measured = _CRITICAL_SHARE * max(points[-1], 1.0)
    return usual ** (1 - _NOISE_WEIGHT) * measured**_NOISE_WEIGHT


def predict_batch(
    throughput: ThroughputRecord,
    critical_batch: float,
    *,
    goal: Goal,
    num_examples: int,
    replicas: int,
) -> int:
    """The open size that is cheapest by the laws.

    Args:
        throughput: The measured step time.
        critical_batch: Expected, in examples.
        goal: What should be least.
        num_examples: N.
        replicas: Data-parallel workers.

    Returns:
        The batch.
    """
    law = throughput.step_time.law
    best = cost_optimal_batch(
        critical_batch=critical_batch,
        alpha_seconds=law.alpha_seconds.value or 0.0,
        beta_seconds=law.beta_seconds.value or 0.0,
        floor_seconds=law.floor_seconds.value or 0.0,
        largest=num_examples,
        price=PRICES[goal],
    )
    sizes = open_sizes(num_examples, replicas)
    return min(sizes, key=lambda size: abs(math.log(size / best)))


def predict_rate(ramp: LearningRateRecord, *, averaging: bool, normalised: bool) -> float:
    """The learning rate to train with at the ramp's batch, or to begin a search at.

    The usual suggestions (steepest, valley, a tenth of the minimum) are reported, but are several
    times too low: the ramp passes each learning rate in a step or two, and the loss has no time
    to follow.

    Args:
        ramp: The learning-rate probe.
        averaging: Whether the optimizer averages gradients over steps.
        normalised: Whether it divides by the gradient's size.

    Returns:
        The learning rate; the optimizer's usual one where the ramp does not tell.
    """
    kind = kind_of(averaging=averaging)
    if ramp.minimum_div_10.value is not None:
        rate = 10 * ramp.minimum_div_10.value * _MINIMUM_SHARE[kind]
        edge = ramp.edge.value
        return rate if edge is None else min(rate, edge * _EDGE_SHARE["plain"])
    if ramp.edge.value is not None:
        return ramp.edge.value * _EDGE_SHARE[kind]
    if ramp.steepest.value is not None:
        return ramp.steepest.value
    return _USUAL_NORMALISED_RATE if normalised else _USUAL_RATE[kind]


def starting_rate(evidence: Evidence) -> float:
    """Where a race begins to look for the learning rate."""
    setting = evidence.setting
    return predict_rate(
        evidence.learning_rate, averaging=setting.averaging, normalised=setting.normalised
    )
