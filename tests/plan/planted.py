"""Evidence with planted numbers: what was measured once, with the parts that decide replaced."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import takewhile
from typing import Any

from rightbatch.laws.estimate import Estimate, unresolved
from rightbatch.laws.timing import fit_step_time
from rightbatch.plan import Evidence
from rightbatch.study.records import RaceRecord, State, TrialPoint, TrialRecord
from rightbatch.study.runs import look_steps


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
        learning_rate=replace(
            evidence.learning_rate, global_batch=32, edge=known(0.4), minimum_div_10=known(0.02)
        ),
        race=None,
    )


TARGET = 0.3


def plant_trial(
    batch: int, rate: float, scale: float, *, steps: int | None = None, state: State = "stopped"
) -> TrialRecord:
    """A run whose loss is 3/(1 + n/scale) after n steps: it meets 0.3 at 9 × `scale`.

    Args:
        batch: Examples per update.
        rate: Learning rate.
        scale: Steps per unit of progress.
        steps: Where it ended; default: at the target.
        state: How it ended, where that is not at the target.

    Returns:
        The run.
    """
    end = round(9 * scale)
    steps = min(steps or end, end)
    looks = [*takewhile(lambda n: n < steps, look_steps()), steps]
    arrived = steps == end
    losses: list[float | None] = [3 / (1 + n / scale) for n in looks]
    if state == "diverged":
        losses[-1] = None
    return TrialRecord(
        global_batch=batch,
        learning_rate=rate,
        seed=0,
        state="reached" if arrived else state,
        steps_to_target=steps if arrived else None,
        points=tuple(TrialPoint(steps=n, loss=loss) for n, loss in zip(looks, losses, strict=True)),
    )


def plant_race(
    evidence: Evidence,
    trials: Sequence[TrialRecord],
    *,
    leader: int = 0,
    sizes: Sequence[int] = tuple(2**k for k in range(11)),
    **changes: Any,
) -> Evidence:
    """Evidence with a race of planted runs.

    Args:
        evidence: Its race is replaced.
        trials: The runs.
        leader: Index of the one that leads.
        sizes: Open to choice.
        **changes: Other fields of the race.

    Returns:
        The evidence.
    """
    race = RaceRecord(
        leader=leader,
        leader_share=1.0,
        target_loss=TARGET,
        target_reached=trials[leader].state == "reached",
        normalised=evidence.setting.normalised,
        usual_batch=100.0,
        sizes=tuple(sizes),
        trials=tuple(trials),
        examples=sum(t.examples for t in trials),
        evaluation_examples=0,
        seconds=1.0,
        stopped_by="done",
    )
    return replace(evidence, race=replace(race, **changes))
