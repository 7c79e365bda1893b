"""The search over a user's own step: only what ran, only memory, nothing left behind."""

import gc
import inspect
import weakref

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter

import rightbatch as rb
from rightbatch.errors import NoBatchFitsError, UsageError
from rightbatch.probes.find_max_micro_batch import MaxMicroBatch

OOM = "CUDA out of memory. Tried to allocate 20.00 MiB"


class Step:
    """Runs out of memory above a limit, and remembers what it was asked."""

    def __init__(self, limit: int, error: type[Exception] = RuntimeError) -> None:
        self.limit, self.error = limit, error
        self.ran: list[int] = []

    def __call__(self, n: int) -> None:
        self.ran.append(n)
        if n > self.limit:
            raise self.error(OOM)


# Every trial collects garbage, which takes a while with torch in memory.
@settings(max_examples=12, deadline=None)
@example(limit=90, max_size=100, start=1, exact=True)
@example(limit=5, max_size=4096, start=64, exact=False)
@given(
    limit=st.integers(1, 5000),
    max_size=st.integers(1, 5000),
    start=st.integers(1, 6000),
    exact=st.booleans(),
)
def test_the_answer_ran_and_is_near_the_truth(limit, max_size, start, exact):
    step = Step(limit)
    found = rb.find_max_micro_batch(step, max_size=max_size, start=start, exact=exact)
    truth = min(limit, max_size)
    assert found.micro_batch in step.ran
    assert found.micro_batch <= truth
    assert found.micro_batch >= (truth if exact else 0.9 * truth)
    assert [t.micro_batch for t in found.trials] == step.ran
    assert all((t.verdict == "fits") == (t.micro_batch <= limit) for t in found.trials)
    failed = [n for n in step.ran if n > limit]
    assert found.smallest_failed == (min(failed) if failed else None)


def test_nothing_fits():
    with pytest.raises(
        NoBatchFitsError, match=r"one example runs out of memory \(CUDA out .*Lower the precision"
    ):
        rb.find_max_micro_batch(Step(0), max_size=100, start=16)


def test_foreign_errors_go_through_unchanged():
    norm = torch.nn.BatchNorm1d(4)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        rb.find_max_micro_batch(lambda n: norm(torch.randn(n, 4)), max_size=8)
    found = rb.find_max_micro_batch(lambda n: norm(torch.randn(n, 4)), max_size=8, start=2)
    assert found.micro_batch == 8


def test_interrupts_go_through():
    def interrupt(n):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        rb.find_max_micro_batch(interrupt, max_size=8)


def test_a_real_allocation_that_fails():
    # 2^57 bytes an example: one example is refused by any machine.
    with pytest.raises(NoBatchFitsError, match="can't allocate memory"):
        rb.find_max_micro_batch(lambda n: torch.empty(n << 57, dtype=torch.uint8), max_size=4)


def test_memory_of_a_failed_trial_is_freed_before_the_next():
    alive: list[weakref.ref] = []

    def step(n):
        assert all(ref() is None for ref in alive), "the last trial's tensors are still there"
        activations = torch.ones(n, 100)
        alive.append(weakref.ref(activations))
        if n > 5:
            raise RuntimeError(OOM)

    gc.disable()  # frees cycles only when asked to
    try:
        assert rb.find_max_micro_batch(step, max_size=64, exact=True).micro_batch == 5
    finally:
        gc.enable()


def test_as_a_decorator():
    ran = []

    @rb.find_max_micro_batch(max_size=100, start=10, exact=True)
    def search(n):
        """Trains on n examples."""
        ran.append(n)
        if n > 42:
            raise MemoryError

    assert ran == []
    assert search().micro_batch == 42
    assert search.__doc__ == "Trains on n examples."
    assert not inspect.signature(search).parameters


@pytest.mark.parametrize("options", [{"max_size": 0}, {"max_size": 5, "start": 0}])
def test_sizes_out_of_range_are_refused(options):
    with pytest.raises(UsageError, match="must be at least 1"):
        rb.find_max_micro_batch(Step(5), **options)


def test_the_record_survives_json():
    found = rb.find_max_micro_batch(Step(9), max_size=100)
    adapter = TypeAdapter(MaxMicroBatch)
    assert adapter.validate_python(adapter.dump_python(found, mode="json")) == found
