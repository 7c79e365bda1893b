"""Evidence with planted numbers: what was measured once, with the parts that decide replaced."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from rightbatch.laws.estimate import Estimate, unresolved
from rightbatch.laws.timing import fit_step_time
from rightbatch.plan import Evidence


def known(value: float) -> Estimate:
    """An exact number."""
    return Estimate(value=value, low=value, high=value, n=9, method="planted")


def plant(
    evidence: Evidence,
    *,
    alpha: float,
    beta: float,
    noise: float | None,
    num_examples: int = 16_384,
    ceiling: int | None = None,
    **setting: Any,
) -> Evidence:
    """Evidence of a workload with t(B) = α + βB, noise scale φ and a memory ceiling.

    Args:
        evidence: Of any workload; its race is left out.
        alpha: α in seconds.
        beta: β in seconds.
        noise: φ all along; None is unresolved.
        num_examples: N.
        ceiling: Largest micro-batch; default N.
        **setting: Fields of the setting to change.

    Returns:
        The evidence.
    """
    sizes = [4**k for k in range(7)]
    fit = fit_step_time(
        sizes * 3, [alpha + beta * b for b in sizes] * 3, [r for r in range(3) for _ in sizes]
    )
    points = tuple(
        replace(p, value=noise, low=noise, high=noise) for p in evidence.noise_scale.trajectory
    )
    assert evidence.memory is not None
    top = replace(
        evidence.memory.ceiling,
        micro_batch=ceiling or num_examples,
        headroom_bytes=300 * 2**20,
        smallest_failed=None if ceiling is None else 2 * ceiling,
    )
    return replace(
        evidence,
        setting=replace(evidence.setting, num_examples=num_examples, **setting),
        memory=replace(evidence.memory, ceiling=top),
        throughput=replace(evidence.throughput, law=fit.law, step_time=fit.step_time),
        noise_scale=replace(
            evidence.noise_scale,
            trajectory=points,
            noise_scale=known(noise) if noise is not None else unresolved(9),
        ),
        learning_rate=replace(evidence.learning_rate, global_batch=32, edge=known(0.4)),
        race=None,
    )
