"""What probes alone say: closed forms of the laws, with planted numbers."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from tests.plan.planted import known, plant

from rightbatch.laws.critical_batch import USUAL
from rightbatch.laws.estimate import unresolved
from rightbatch.plan import Evidence
from rightbatch.plan.predict import (
    expected_critical_batch,
    predict_batch,
    predict_rate,
)


def test_without_a_resolved_noise_scale_the_usual_critical_batch_is_expected(
    evidence: Evidence,
) -> None:
    noise = plant(evidence, alpha=1e-3, beta=1e-5, noise=None).noise_scale
    assert expected_critical_batch(noise, averaging=False) == USUAL["plain"]
    assert expected_critical_batch(noise, averaging=True) == USUAL["averaging"]


def test_the_noise_scale_moves_what_is_expected_but_does_not_stand_for_it(
    evidence: Evidence,
) -> None:
    def expected(noise: float) -> float:
        found = plant(evidence, alpha=1e-3, beta=1e-5, noise=noise).noise_scale
        return expected_critical_batch(found, averaging=False)

    assert expected(USUAL["plain"] / 0.3) == pytest.approx(USUAL["plain"])
    assert expected(10.0) < expected(1000.0)
    # A hundred times the noise scale: four times the batch.
    assert expected(1000.0) / expected(10.0) == pytest.approx(100**0.3)


@pytest.mark.parametrize(("alpha", "critical"), [(1e-3, 100.0), (4e-3, 100.0), (1e-3, 400.0)])
def test_the_cheapest_batch_is_the_root_of_critical_batch_times_knee(
    evidence: Evidence, alpha: float, critical: float
) -> None:
    found = plant(evidence, alpha=alpha, beta=1e-5, noise=100.0).throughput
    batch = predict_batch(found, critical, goal="time", num_examples=16_384, replicas=1)
    exact = math.sqrt(critical * alpha / 1e-5)
    assert abs(math.log2(batch / exact)) <= 0.51


def test_the_rate_is_a_share_of_where_the_ramp_is_lowest_and_stays_below_its_edge(
    evidence: Evidence,
) -> None:
    ramp = replace(
        evidence.learning_rate, minimum_div_10=known(0.02), edge=unresolved(3), steepest=known(0.01)
    )
    assert predict_rate(ramp, averaging=False, normalised=False) == pytest.approx(0.2 * 0.8)
    assert predict_rate(ramp, averaging=True, normalised=True) == pytest.approx(0.2 * 0.35)
    assert predict_rate(
        replace(ramp, edge=known(0.1)), averaging=False, normalised=False
    ) == pytest.approx(0.05)


def test_a_ramp_without_a_minimum_falls_back_on_edge_then_steepest_then_the_usual(
    evidence: Evidence,
) -> None:
    ramp = replace(
        evidence.learning_rate, minimum_div_10=unresolved(3), edge=known(0.4), steepest=known(0.01)
    )
    assert predict_rate(ramp, averaging=False, normalised=False) == pytest.approx(0.2)
    assert predict_rate(ramp, averaging=True, normalised=True) == pytest.approx(0.05)
    ramp = replace(ramp, edge=unresolved(3))
    assert predict_rate(ramp, averaging=True, normalised=True) == 0.01
    ramp = replace(ramp, steepest=unresolved(3))
    assert predict_rate(ramp, averaging=False, normalised=False) == 0.1
    assert predict_rate(ramp, averaging=True, normalised=False) == 0.01, "momentum 0.9 adds up ten"
    assert predict_rate(ramp, averaging=True, normalised=True) == 0.001
