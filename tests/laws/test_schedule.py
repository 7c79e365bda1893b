"""Schedules of learning rate and batch: exact values, limits, and what is refused."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rightbatch.errors import UsageError
from rightbatch.laws.scaling import noise_temperature
from rightbatch.laws.schedule import (
    batch_at,
    cosine_factor,
    doubling_ramp,
    follow_noise_scale,
    raise_batch_instead,
    step_factor,
    warmup_factor,
)


@given(st.integers(0, 50))
def test_warm_up_rises_in_equal_steps_and_never_is_zero(warmup_steps: int) -> None:
    factors = [warmup_factor(step, warmup_steps) for step in range(warmup_steps + 3)]
    assert factors[0] == 1 / (warmup_steps + 1)
    assert factors[warmup_steps:] == [1.0] * 3
    for before, after in pairwise(factors[: warmup_steps + 1]):
        assert after - before == pytest.approx(1 / (warmup_steps + 1))


@given(st.floats(0, 1), st.floats(0, 1))
def test_cosine_falls_from_one_to_its_end(progress: float, final: float) -> None:
    factor = cosine_factor(progress, final)
    assert factor == pytest.approx(final + (1 - final) * math.cos(math.pi * progress / 2) ** 2)
    assert cosine_factor(min(progress + 0.01, 1), final) <= factor + 1e-15
    assert cosine_factor(0, final) == 1
    assert cosine_factor(1, final) == cosine_factor(7.5, final) == pytest.approx(final)


def test_steps_fall_at_their_milestones() -> None:
    factors = [step_factor(p / 8, (0.25, 0.5, 0.75), 0.5) for p in range(9)]
    assert factors == [1, 1, 0.5, 0.5, 0.25, 0.25, 0.125, 0.125, 0.125]


@given(st.lists(st.tuples(st.integers(1, 100), st.integers(1, 64)), unique_by=lambda x: x[0]))
def test_the_batch_is_that_of_the_last_phase_begun(phases: list[tuple[int, int]]) -> None:
    ramp = tuple(sorted(phases))
    for examples in range(105):
        begun = [batch for start, batch in ramp if start <= examples]
        assert batch_at(examples, 7, ramp) == (begun[-1] if begun else 7)


@given(st.integers(1, 100), st.integers(0, 5000), st.integers(1, 1000), st.floats(1, 3))
def test_a_doubling_ramp_ends_where_it_should(
    first: int, more: int, examples: int, growth: float
) -> None:
    ramp = doubling_ramp(first, first + more, first_examples=examples, growth=growth)
    batches = [first, *(batch for _, batch in ramp)]
    assert batches[-1] == first + more
    for before, after in pairwise(batches[:-1]):
        assert after == 2 * before
    starts = [start for start, _ in ramp]
    assert starts == sorted(set(starts))
    assert not ramp or starts[0] == examples


@given(
    st.integers(1, 64),
    st.lists(st.floats(0.01, 0.99), max_size=4, unique=True),
    st.floats(0.05, 0.95),
    st.integers(64, 4096),
)
def test_raising_the_batch_lowers_the_noise_as_lowering_the_rate_would(
    batch: int, decay_at: list[float], decay: float, largest: int
) -> None:
    phases, left = raise_batch_instead(
        batch, decay_at, decay, total_examples=100_000, largest=largest
    )
    assert all(size <= largest for _, size in phases)
    assert [start for start, _ in phases] == [round(100_000 * at) for at in sorted(decay_at)]
    last = phases[-1][1] if phases else batch
    lowered = noise_temperature(0.1 * decay ** len(decay_at), batch, 1000)
    # What the batch could not do, the learning rate still has to.
    assert noise_temperature(0.1 * left, last, 1000) == pytest.approx(lowered)
    if last < largest:
        assert left == pytest.approx(1, abs=0.5 / (last - 0.5) + 1e-9)


def test_raising_the_batch_by_whole_factors() -> None:
    assert raise_batch_instead(
        128, (0.3, 0.6, 0.8), 0.2, total_examples=1_000_000, largest=10**9
    ) == (((300_000, 640), (600_000, 3200), (800_000, 16_000)), 1.0)


def test_following_the_noise_goes_with_its_root_and_stops() -> None:
    def follow(noise: float) -> int:
        return follow_noise_scale(noise, reference_batch=32, reference_noise=10, largest=100)

    assert [follow(n) for n in (10, 40, 90, 1000, 0.001)] == [32, 64, 96, 100, 1]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: doubling_ramp(0, 8, first_examples=1), "A ramp from batch 0 to 8 .* not rise"),
        (lambda: doubling_ramp(8, 4, first_examples=1), "Give positive numbers and a larger last"),
        (lambda: doubling_ramp(8, 16, first_examples=0), "with 0 examples first"),
        (
            lambda: raise_batch_instead(8, (0.5,), 1.5, total_examples=10, largest=99),
            "decay is 1.5; a learning rate falls by a factor between 0 and 1",
        ),
        (
            lambda: follow_noise_scale(-1, reference_batch=8, reference_noise=2, largest=9),
            "The noise scales are -1 and 2; .* the batch stays as it is",
        ),
    ],
)
def test_what_means_nothing_is_refused(call: object, message: str) -> None:
    assert callable(call)
    with pytest.raises(UsageError, match=message):
        call()
