"""Steps and examples of a run whose last update of an epoch is smaller."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from rightbatch.laws.progress import examples_after, spaced_steps, steps_per_epoch, steps_to_cover


def test_examples_count_the_smaller_last_batch() -> None:
    assert [examples_after(n, 32, 100) for n in range(6)] == [0, 32, 64, 96, 100, 132]
    assert examples_after(3, 100, 100) == 300


@given(st.integers(1, 60), st.integers(1, 60), st.integers(0, 300))
def test_steps_cover_the_examples_and_no_fewer_do(batch: int, more: int, examples: int) -> None:
    N = batch + more - 1
    steps = steps_to_cover(examples, batch, N)
    assert examples_after(steps, batch, N) >= examples
    assert steps == 0 or examples_after(steps - 1, batch, N) < examples
    assert examples_after(3 * steps_per_epoch(batch, N), batch, N) == 3 * N


@given(st.integers(1, 100_000), st.sampled_from([1.07, 1.1, 1.12, 2.0]))
def test_looks_are_close_enough_and_end_at_the_limit(limit: int, spacing: float) -> None:
    steps = list(spaced_steps(spacing, limit))
    assert (steps[0], steps[-1]) == (1, limit)
    for before, after in itertools.pairwise(steps):
        assert after == before + 1 or 1 < after / before <= spacing
    # Without a limit they are the same, and those of a longer run hold those of a shorter one.
    assert list(itertools.islice(spaced_steps(spacing), len(steps) - 1)) == steps[:-1]
