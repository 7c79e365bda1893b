"""Roughness of a path: closed forms and symmetries."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rightbatch.laws.path import RunningPath, path_roughness, roughness_of

PATHS = st.lists(st.integers(-1000, 1000), min_size=2, max_size=40)


@pytest.mark.parametrize("path", [[0, 1], [3, 2, 1, -5], np.linspace(-1, 7, 100), [0, 0, 1, 1, 4]])
def test_a_path_that_goes_one_way_has_the_least_roughness(path: list[float]) -> None:
    assert path_roughness(path) == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize("num_steps", [1, 2, 7, 1000])
def test_a_zig_zag_is_as_rough_as_it_has_steps(num_steps: int) -> None:
    assert path_roughness([5.0 + i % 2 for i in range(num_steps + 1)]) == num_steps


def test_the_ends_of_the_floats() -> None:
    assert path_roughness([-1.7e308, 1.7e308, -1.7e308]) == 2
    assert path_roughness([0.0, 5e-324, 0.0, 5e-324]) == 3


def test_there_and_back_is_two() -> None:
    turns = np.linspace(0, 4 * np.pi, 4001)
    assert path_roughness([0, 1, 2, 1, 0]) == 2
    # A cosine of two periods: four times over a range of 2.
    assert path_roughness(np.cos(turns)) == pytest.approx(4, rel=1e-5)


@given(path=PATHS, factor=st.sampled_from([-4.0, 0.5, 1e-300, 1e300]))
def test_shift_scale_and_direction_do_not_matter(path: list[int], factor: float) -> None:
    found = path_roughness(path)
    if len(set(path)) == 1:
        assert math.isnan(found)
        return
    assert found >= 1
    assert path_roughness(path[::-1]) == pytest.approx(found)
    assert path_roughness([factor * x for x in path]) == pytest.approx(found, rel=1e-6)
    assert path_roughness([x + 77 for x in path]) == pytest.approx(found)


@pytest.mark.parametrize("path", [[2.0, 2.0, 2.0], [0.0, 0.0], [0.0, math.nan], [1.0, math.inf]])
def test_no_roughness_without_movement_or_numbers(path: list[float]) -> None:
    assert math.isnan(path_roughness(path))


@pytest.mark.parametrize("path", [[], [1.0], [[0.0, 1.0]]])
def test_what_is_no_path_is_refused(path: list[float]) -> None:
    with pytest.raises(ValueError, match="at least two numbers in a row; got shape"):
        path_roughness(path)


@given(
    values=st.lists(
        st.floats(-1e3, 1e3).filter(lambda x: x == 0 or abs(x) > 1e-3), min_size=2, max_size=40
    )
)
def test_a_running_path_is_as_rough_as_the_whole_one(values: list[float]) -> None:
    running = RunningPath(last=values[0], low=values[0], high=values[0])
    for value in values[1:]:
        running.add(value)
    whole = path_roughness(values)
    assert running.roughness == pytest.approx(whole, rel=1e-9, nan_ok=True)
    assert (running.low, running.high, running.last) == (min(values), max(values), values[-1])


def test_a_running_path_that_leaves_the_numbers_has_no_roughness() -> None:
    running = RunningPath(last=0.0, low=0.0, high=0.0)
    for value in (1.0, math.nan, 2.0):
        running.add(value)
    assert math.isnan(running.roughness)
    assert np.isnan(roughness_of([math.inf, 0.0], [math.inf, 0.0])).all()
