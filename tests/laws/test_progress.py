"""Steps and examples of a run whose last update of an epoch is smaller."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from rightbatch.laws.progress import examples_after, steps_per_epoch, steps_to_cover


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
