import pytest
from hypothesis import given
from hypothesis import strategies as st

from rightbatch.errors import UsageError
from rightbatch.laws.split import Split, split_batch

sizes = st.integers(1, 3000)
replica_counts = st.integers(1, 17)


def every_split(global_batch: int, max_micro_batch: int, replicas: int) -> list[tuple[int, int]]:
    """Naive reference: all (micro, accumulation) with the exact product."""
    return [
        (micro, global_batch // (micro * replicas))
        for micro in range(1, max_micro_batch + 1)
        if global_batch % (micro * replicas) == 0
    ]


def test_peer_failure_7_accelerate_effective_batch_drifts() -> None:
    # accelerate's example: accumulation = 128 // 65 = 1, so it trains with 65 instead of 128.
    assert 65 * (128 // 65) == 65
    split = split_batch(128, 65)
    assert (split.micro_batch, split.accumulation, split.global_batch) == (64, 2, 128)
    assert split.exact and split.deviation == 0


def test_peer_failure_12_deepspeed_accumulation_floors() -> None:
    # DeepSpeed: accumulation = 100 // 12 // 2 = 4, so 96 examples make an update, not 100.
    assert 12 * (100 // 12 // 2) * 2 == 96
    split = split_batch(100, 12, replicas=2)
    assert (split.micro_batch, split.accumulation, split.global_batch) == (10, 5, 100)


@given(sizes, sizes, replica_counts)
def test_exact_whenever_an_exact_split_exists_and_then_with_the_fewest_micro_batches(
    global_batch: int, max_micro_batch: int, replicas: int
) -> None:
    split = split_batch(global_batch, max_micro_batch, replicas)
    assert split.global_batch == split.micro_batch * split.accumulation * split.replicas
    assert 1 <= split.micro_batch <= max_micro_batch
    assert split.replicas == replicas
    exact = every_split(global_batch, min(max_micro_batch, global_batch), replicas)
    assert split.exact == bool(exact) == (split.deviation == 0)
    if exact:
        assert split.accumulation == min(accumulation for _, accumulation in exact)


@given(sizes, sizes, replica_counts)
def test_otherwise_the_nearest_and_the_deviation_is_told(
    global_batch: int, max_micro_batch: int, replicas: int
) -> None:
    split = split_batch(global_batch, max_micro_batch, replicas)
    assert split.deviation == pytest.approx(split.global_batch / global_batch - 1)
    off = abs(split.global_batch - global_batch)
    multiples = range(replicas, global_batch + 2 * replicas, replicas)
    assert off == min(abs(multiple - global_batch) for multiple in multiples)


@given(sizes, sizes, replica_counts, st.floats(0, 0.2))
def test_a_tolerance_never_costs_micro_batches_and_is_kept(
    global_batch: int, max_micro_batch: int, replicas: int, tolerance: float
) -> None:
    strict = split_batch(global_batch, max_micro_batch, replicas)
    loose = split_batch(global_batch, max_micro_batch, replicas, tolerance=tolerance)
    assert loose.accumulation <= strict.accumulation
    assert abs(loose.deviation) <= max(tolerance, abs(strict.deviation)) + 1e-12
    assert loose.micro_batch <= max_micro_batch


def test_a_tolerance_is_used_only_where_it_saves_micro_batches() -> None:
    assert split_batch(128, 64, tolerance=0.1).exact
    assert split_batch(127, 65).accumulation == 127
    assert split_batch(127, 65, tolerance=0.01).accumulation == 2


def test_fewer_examples_than_replicas_still_gives_each_one() -> None:
    split = split_batch(3, 8, replicas=8)
    assert (split.global_batch, split.micro_batch, split.accumulation) == (8, 1, 1)
    assert "not the 3 asked for" in str(split)


@pytest.mark.parametrize("name", ["global_batch", "max_micro_batch", "replicas"])
def test_numbers_below_one_are_refused(name: str) -> None:
    arguments = {"global_batch": 4, "max_micro_batch": 4, "replicas": 1, name: 0}
    with pytest.raises(UsageError, match=f"{name} is 0; it must be at least 1"):
        split_batch(**arguments)


def test_a_tolerance_out_of_range_is_refused() -> None:
    with pytest.raises(UsageError, match=r"tolerance is 1\.5; it must be at least 0 and below 1"):
        split_batch(4, 4, tolerance=1.5)


def test_a_split_makes_a_recipe() -> None:
    from rightbatch.recipe import Recipe

    split: Split = split_batch(96, 20, replicas=2)
    recipe = Recipe(
        global_batch=split.global_batch,
        micro_batch=split.micro_batch,
        accumulation=split.accumulation,
        replicas=split.replicas,
        learning_rate=0.1,
    )
    assert recipe.global_batch == 96
