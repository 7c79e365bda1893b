"""The memory law against lines with known constants."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter
from scipy import stats

from rightbatch.errors import UsageError
from rightbatch.laws.memory import MemoryLaw, fit_memory_law


@given(
    fixed=st.integers(0, 10**10),
    slope=st.integers(1, 10**8),
    sizes=st.lists(st.integers(1, 10_000), min_size=2, max_size=6, unique=True),
)
def test_a_line_is_found_exactly_and_inverted(fixed, slope, sizes):
    law = fit_memory_law(sizes, [fixed + slope * n for n in sizes])
    assert law.bytes_per_example.value == pytest.approx(slope, rel=1e-6)
    assert law.peak_bytes(20_000) == pytest.approx(fixed + slope * 20_000, rel=1e-6)
    assert law.largest_error < 1e-6
    exact = MemoryLaw(
        fixed_bytes=float(fixed), bytes_per_example=law.bytes_per_example, largest_error=0.0
    )
    answer = exact.largest_micro_batch(exact.peak_bytes(777))
    assert answer in {777, 776} if slope < 10 else answer == 777


def test_the_interval_covers_the_slope():
    rng = np.random.default_rng(0)
    sizes, covered = [8, 64, 256, 512], 0
    for _ in range(400):
        peaks = 1e8 + 1e4 * np.array(sizes) + rng.normal(0, 1e5, 4)
        slope = fit_memory_law(sizes, list(peaks)).bytes_per_example
        assert slope.low is not None and slope.high is not None
        covered += slope.low <= 1e4 <= slope.high
    assert 0.91 <= covered / 400 <= 0.98


def test_the_interval_is_that_of_an_independent_regression():
    sizes, peaks = [8, 64, 256, 512], [1080.0, 1700.0, 3500.0, 6200.0]
    slope = fit_memory_law(sizes, peaks).bytes_per_example
    reference: Any = stats.linregress(sizes, peaks)
    half = reference.stderr * stats.t.ppf(0.975, 2)
    assert slope.value == pytest.approx(reference.slope)
    assert slope.low == pytest.approx(reference.slope - half)
    assert slope.high == pytest.approx(reference.slope + half)


def test_two_sizes_have_no_interval():
    slope = fit_memory_law([1, 2], [110, 120]).bytes_per_example
    assert (slope.value, slope.low, slope.high, slope.n) == (pytest.approx(10), None, None, 2)


def test_no_growth_is_unresolved_and_unlimited():
    law = fit_memory_law([8, 64, 512], [1000, 990, 980])
    assert law.bytes_per_example.value is None
    assert law.largest_micro_batch(2000) is None
    assert law.peak_bytes(10_000) == pytest.approx(990)


def test_nothing_fits_below_the_fixed_part():
    assert fit_memory_law([1, 2], [110, 120]).largest_micro_batch(50) == 0


def test_the_error_is_relative_to_what_was_measured():
    law = fit_memory_law([1, 2, 3], [100, 130, 100])
    assert law.largest_error == pytest.approx(20 / 130)


@pytest.mark.parametrize(("sizes", "peaks"), [([8], [1.0]), ([8, 8], [1.0, 2.0]), ([1, 2], [1.0])])
def test_too_little_is_refused(sizes, peaks):
    with pytest.raises(UsageError, match="peaks at two different sizes"):
        fit_memory_law(sizes, peaks)


def test_it_survives_json():
    law = fit_memory_law([1, 2, 4], [110, 120, 141])
    adapter = TypeAdapter(MemoryLaw)
    assert adapter.validate_python(adapter.dump_python(law, mode="json")) == law
