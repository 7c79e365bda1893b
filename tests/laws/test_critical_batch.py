"""The critical batch from step ratios that were planted exactly."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rightbatch.laws.critical_batch import (
    MISFIT,
    USUAL,
    MeasuredSize,
    draw_log_steps,
    infer_critical_batch,
)

SIZES = (8, 16, 32, 64, 128, 256, 512)


def exact(batch: int, reference: int, critical: float) -> float:
    """ln S(batch)/S(reference) on the hyperbola."""
    return math.log((1 + critical / batch) / (1 + critical / reference))


def measure(
    critical: float, *batches: int, reference: int = 64, deviation: float = 0.01
) -> list[MeasuredSize]:
    return [
        MeasuredSize(global_batch=b, log_ratio=exact(b, reference, critical), deviation=deviation)
        for b in batches
    ]


def width(measured: list[MeasuredSize]) -> float:
    """Of the middle 68 % of ln B_c."""
    posterior = infer_critical_batch(measured, 64, usual=100.0)
    return math.log(posterior.quantile(0.84) / posterior.quantile(0.16))


# ---------------------------------------------------------------------------------- the posterior


@pytest.mark.parametrize("critical", [10.0, 40.0, 100.0, 300.0, 1500.0])
def test_exact_ratios_at_many_sizes_recover_the_planted_critical_batch(critical: float) -> None:
    """Each size counts with a misfit of 0.1, and the usual one pulls a little."""
    measured = measure(critical, 4, 16, 256, 1024, 4096)
    found = infer_critical_batch(measured, 64, usual=100.0)
    assert found.median == pytest.approx(critical, rel=0.15)
    assert found.quantile(0.16) < critical < found.quantile(0.84)


@pytest.mark.parametrize("usual", [40.0, *USUAL.values()])
def test_without_data_it_is_the_usual_one_within_a_factor_of_e(usual: float) -> None:
    found = infer_critical_batch([], 64, usual=usual)
    assert found.median == pytest.approx(usual, rel=0.03)
    assert found.quantile(0.8413) / found.median == pytest.approx(math.e, rel=0.05)


def test_a_ratio_against_itself_tells_nothing() -> None:
    own = MeasuredSize(global_batch=64, log_ratio=0.3, deviation=0.01)
    found = infer_critical_batch([own], 64, usual=100.0)
    np.testing.assert_allclose(found.weight, infer_critical_batch([], 64, usual=100.0).weight)


def test_larger_deviations_and_fewer_sizes_leave_more_doubt() -> None:
    doubts = [width(measure(100.0, 256, deviation=deviation)) for deviation in (0.01, 0.1, 0.3, 1)]
    assert doubts == sorted(doubts)
    assert doubts[-1] > 1.5 * doubts[0]
    assert width(measure(100.0, 16, 256)) < width(measure(100.0, 256)) < width([])


def test_the_median_lies_between_the_usual_and_the_measured() -> None:
    found = infer_critical_batch(measure(1000.0, 256, deviation=0.2), 64, usual=100.0)
    assert 120 < found.median < 1000


@given(
    st.lists(
        st.tuples(st.sampled_from(SIZES), st.floats(-2.5, 2.5), st.floats(0.01, 1.0)), max_size=6
    ),
    st.floats(20.0, 900.0),
)
def test_the_weights_are_a_distribution_whatever_was_measured(
    given_ratios: list[tuple[int, float, float]], usual: float
) -> None:
    measured = [MeasuredSize(global_batch=b, log_ratio=r, deviation=d) for b, r, d in given_ratios]
    found = infer_critical_batch(measured, 64, usual=usual)
    assert (found.weight >= 0).all()
    assert found.weight.sum() == pytest.approx(1.0)
    assert found.quantile(0.05) <= found.median <= found.quantile(0.95)
    steps = [found.log_steps(batch, 64) for batch in SIZES]
    assert steps == sorted(steps, reverse=True), "a larger batch takes no more steps"
    assert found.log_steps(64, 64) == 0.0


def test_expected_steps_are_those_of_the_hyperbola_when_it_is_known() -> None:
    found = infer_critical_batch(measure(100.0, 4, 16, 256, 1024), 64, usual=100.0)
    for batch in SIZES:
        assert found.log_steps(batch, 64) == pytest.approx(exact(batch, 64, 100.0), abs=0.03)


# --------------------------------------------------------------------------------------- the draws


def test_steps_at_the_reference_are_0_in_every_draw() -> None:
    draws = draw_log_steps(measure(100.0, 256), 64, SIZES, usual=100.0)
    assert draws.shape == (2000, len(SIZES))
    assert (draws[:, SIZES.index(64)] == 0.0).all()
    assert np.isfinite(draws).all()


@pytest.mark.parametrize("off", [-0.5, 0.5])
@pytest.mark.parametrize("deviation", [0.05, 0.2, 0.5])
def test_a_measured_size_lies_between_the_law_and_the_measurement(
    off: float, deviation: float
) -> None:
    """Many exact sizes fix the hyperbola, one departs from it: weighed by the two precisions."""
    fixed = measure(100.0, 4, 8, 16, 32, 512, 1024, 2048)
    law = exact(128, 64, 100.0)
    odd = MeasuredSize(global_batch=128, log_ratio=law + off, deviation=deviation)
    drawn = draw_log_steps([*fixed, odd], 64, (128,), usual=100.0)[:, 0]
    weight = deviation**-2 / (deviation**-2 + MISFIT**-2)
    assert drawn.mean() == pytest.approx(law + weight * off, abs=0.05)
    assert drawn.std() == pytest.approx((deviation**-2 + MISFIT**-2) ** -0.5, rel=0.15)


def test_a_size_far_from_all_measured_ones_is_less_sure_than_one_close_by() -> None:
    drawn = draw_log_steps(measure(100.0, 4, 16, 256), 64, (96, 128, 1024), usual=100.0)
    doubts = drawn.std(axis=0)
    assert doubts[0] < doubts[1] < doubts[2]
    assert doubts[1] >= MISFIT / 2


def test_the_same_seed_gives_the_same_bits_and_another_one_others() -> None:
    one, again, other = (
        draw_log_steps(measure(100.0, 256), 64, SIZES, usual=100.0, seed=seed) for seed in (3, 3, 4)
    )
    assert one.tobytes() == again.tobytes()
    assert one.tobytes() != other.tobytes()


def test_the_global_random_state_is_neither_read_nor_touched() -> None:
    np.random.seed(5)
    expected = np.random.rand()
    np.random.seed(5)
    draw_log_steps(measure(100.0, 256), 64, SIZES, usual=100.0)
    assert np.random.rand() == expected
