"""What a step costs: the law at the sizes that are really run, and the goal's unit."""

from __future__ import annotations

import pytest
from tests.plan.planted import plant

from rightbatch.plan import Evidence
from rightbatch.plan.price import make_price, open_sizes, step_seconds

ALPHA, BETA = 1e-3, 1e-5


@pytest.fixture(scope="module")
def planted(evidence: Evidence) -> Evidence:
    return plant(evidence, alpha=ALPHA, beta=BETA, noise=100.0, num_examples=4096, ceiling=48)


def test_a_batch_that_fits_costs_one_step(planted: Evidence) -> None:
    assert step_seconds(planted.throughput, 32, 48) == pytest.approx(ALPHA + 32 * BETA, rel=0.02)


def test_accumulation_pays_the_overhead_once_per_micro_batch(planted: Evidence) -> None:
    assert step_seconds(planted.throughput, 128, 48) == pytest.approx(
        4 * (ALPHA + 32 * BETA), rel=0.02
    )


def test_a_batch_that_only_divides_into_single_examples_is_priced_as_it_is_run(
    planted: Evidence,
) -> None:
    """199 is prime: what does not fit at once is run one by one."""
    assert step_seconds(planted.throughput, 199, 48) == pytest.approx(
        199 * (ALPHA + BETA), rel=0.02
    )


def test_replicas_share_the_batch(planted: Evidence) -> None:
    assert step_seconds(planted.throughput, 128, 48, 4) == pytest.approx(
        ALPHA + 32 * BETA, rel=0.02
    )


def test_the_goal_decides_the_unit(planted: Evidence) -> None:
    seconds = make_price("time", planted.throughput, 48)
    assert seconds(32) == pytest.approx(ALPHA + 32 * BETA, rel=0.02)
    assert make_price("quality", planted.throughput, 48)(32) == seconds(32)
    assert make_price("examples", planted.throughput, 48)(32) == 32
    assert make_price("steps", planted.throughput, 48)(32) == 1


def test_open_sizes_are_powers_of_two_and_the_full_batch() -> None:
    assert open_sizes(20) == (1, 2, 4, 8, 16, 20)
    assert open_sizes(20, 6) == (8, 16, 20)
    assert open_sizes(1) == (1,)
