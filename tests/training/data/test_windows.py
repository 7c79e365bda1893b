"""Windows: every example once an epoch, whatever the batch does, and the same in every process."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset

from rightbatch import Recipe, Workload
from rightbatch.recipe import LastBatch
from rightbatch.training import Training, epoch_order
from rightbatch.training.data import rows_ahead
from rightbatch.training.data.loader import load_windows
from rightbatch.training.data.rows_ahead import RowsAhead
from rightbatch.training.data.share import Share
from rightbatch.training.data.windows import (
    Place,
    Window,
    micro_batch_sizes,
    plan_windows,
    share_of_rank,
)
from rightbatch.workload.data import TensorExamples, open_examples

START = Place()
POLICIES: list[LastBatch] = ["keep", "drop", "merge", "scale-lr", "pad"]
ALL_SEEN: list[LastBatch] = ["keep", "merge", "scale-lr"]
sizes_of_sets = st.integers(1, 60)
batches = st.integers(1, 75)


def fixed(batch: int) -> Callable[[int], int]:
    return lambda _: batch


def changing(choices: list[int]) -> Callable[[int], int]:
    """Another batch at every place, but always the same there."""
    return lambda consumed: choices[consumed * 7919 % len(choices)]


def one_epoch(num_examples: int, batch_at: Callable[[int], int], **options: Any) -> list[Window]:
    start = options.pop("start", Place())
    planned = plan_windows(num_examples, seed=3, start=start, batch_at=batch_at, **options)
    windows: list[Window] = []
    for window in planned:
        if window.epoch != start.epoch:
            return windows
        windows.append(window)
    raise AssertionError("plan_windows came to an end")


def indices(windows: list[Window]) -> list[int]:
    return torch.cat([window.indices for window in windows]).tolist()


# --------------------------------------------------------------------------------- what is seen


def check_that_every_example_is_seen_once(policy: LastBatch) -> None:
    for num_examples, batch in [(105, 50), (105, 10), (7, 3), (1, 1), (6, 9), (60, 60), (61, 60)]:
        seen = indices(one_epoch(num_examples, fixed(batch), last_batch=policy))
        assert seen == epoch_order(num_examples, seed=3, epoch=0).tolist()


@pytest.mark.parametrize("policy", ALL_SEEN)
def test_every_example_is_seen_once(policy: LastBatch) -> None:
    check_that_every_example_is_seen_once(policy)


@given(sizes_of_sets, st.lists(batches, min_size=1, max_size=6), st.sampled_from(ALL_SEEN))
@settings(deadline=None)
def test_no_sequence_of_batches_loses_or_repeats_an_example(
    num_examples: int, choices: list[int], policy: LastBatch
) -> None:
    windows = one_epoch(num_examples, changing(choices), last_batch=policy)
    assert indices(windows) == epoch_order(num_examples, seed=3, epoch=0).tolist()
    assert windows[-1].end == num_examples
    for window in windows:
        asked = changing(choices)(window.start)
        assert window.global_batch == asked
        most = 2 * asked - 1 if policy == "merge" else asked
        assert 1 <= window.size <= most
        shares = policy == "scale-lr" and window.size < min(asked, num_examples)
        expected = window.size / min(asked, num_examples) if shares else 1.0
        assert window.rate_factor == expected


@given(sizes_of_sets, batches)
@settings(deadline=None)
def test_drop_leaves_out_n_mod_b(num_examples: int, batch: int) -> None:
    windows = one_epoch(num_examples, fixed(batch), last_batch="drop")
    seen = indices(windows)
    left_out = num_examples % batch if batch <= num_examples else 0
    assert seen == epoch_order(num_examples, seed=3, epoch=0).tolist()[: num_examples - left_out]
    assert {window.size for window in windows} == {min(batch, num_examples)}


@given(sizes_of_sets, st.lists(batches, min_size=1, max_size=6))
@settings(deadline=None)
def test_drop_ends_every_epoch_with_its_last_update(num_examples: int, choices: list[int]) -> None:
    """Also where the batch rises above what is left: nothing comes that trains on nothing."""
    windows = one_epoch(num_examples, changing(choices), last_batch="drop")
    assert windows[-1].end == num_examples
    for window in windows:
        assert window.size == min(changing(choices)(window.start), num_examples)


@given(sizes_of_sets, st.lists(batches, min_size=1, max_size=6), st.integers(1, 2))
@example(7, [3], 2)
@settings(deadline=None)
def test_pad_repeats_the_epochs_first(num_examples: int, choices: list[int], smallest: int) -> None:
    order = epoch_order(num_examples, seed=3, epoch=0).tolist()
    own: list[int] = []
    windows = one_epoch(num_examples, changing(choices), last_batch="pad", smallest=smallest)
    for window in windows:
        assert window.size == min(window.global_batch, num_examples)
        assert window.padding == 0 or window is windows[-1]
        cut = window.size - window.padding
        own += window.indices[:cut].tolist()
        assert window.indices[cut:].tolist() == order[: window.padding]
    assert own == order


@given(
    st.integers(2, 60),
    st.lists(st.integers(2, 75), min_size=1, max_size=6),
    st.sampled_from(POLICIES),
)
@settings(deadline=None)
def test_no_window_is_smaller_than_the_model_can_train_on(
    num_examples: int, choices: list[int], policy: LastBatch
) -> None:
    windows = one_epoch(num_examples, changing(choices), last_batch=policy, smallest=2)
    assert min(window.size for window in windows) >= 2


@given(
    sizes_of_sets,
    st.lists(batches, min_size=1, max_size=6),
    st.sampled_from(POLICIES),
    st.integers(1, 12),
)
@settings(deadline=None)
def test_the_windows_from_any_place_on_are_those_of_the_whole_run(
    num_examples: int, choices: list[int], policy: LastBatch, after: int
) -> None:
    def planned(start: Place) -> Any:
        return plan_windows(
            num_examples, seed=3, start=start, batch_at=changing(choices), last_batch=policy
        )

    whole = list(islice(planned(Place()), after + 5))
    consumed = whole[after - 1].epoch * num_examples + whole[after - 1].end
    rest = list(islice(planned(Place(*divmod(consumed, num_examples))), 5))
    assert [w._replace(order=w.order.tolist()) for w in rest] == [
        w._replace(order=w.order.tolist()) for w in whole[after:]
    ]


@pytest.mark.parametrize(
    ("num_examples", "batch", "steps"),
    [(1050, 100, 11), (1050, 21, 50), (1000, 1000, 1), (1000, 500, 2), (1000, 200, 5),
     (1000, 100, 10), (1000, 10, 100), (1000, 1, 1000)],
)  # fmt: skip
def test_steps_of_an_epoch(num_examples: int, batch: int, steps: int) -> None:
    windows = one_epoch(num_examples, fixed(batch))
    assert len(windows) == steps == math.ceil(num_examples / batch)
    assert windows[-1].size == (num_examples - 1) % batch + 1


def test_each_epoch_has_its_own_order_however_many_are_decided_at_once() -> None:
    for start in (0, 5):
        planned = plan_windows(7, seed=3, start=Place(start, 2), batch_at=fixed(7))
        for epoch, window in enumerate(islice(planned, 20), start):
            assert window.epoch == epoch
            assert torch.equal(window.order, epoch_order(7, seed=3, epoch=epoch))


# ------------------------------------------------------------------------------------- the parts


@given(st.integers(1, 300), st.integers(1, 64), st.integers(1, 2))
@settings(deadline=None)
def test_micro_batches_hold_what_the_model_needs(total: int, micro: int, smallest: int) -> None:
    micro = max(micro, smallest)
    sizes = micro_batch_sizes(total, micro, smallest)
    assert sum(sizes) == total
    assert total < smallest or min(sizes) >= smallest
    # One more than fits, only where nothing else is possible: 2 + 1 of a model that needs 2.
    assert max(sizes) <= (micro if micro >= 2 * smallest - 1 else micro + smallest - 1)


weights_of_ranks = st.lists(st.integers(1, 9), min_size=1, max_size=5)


@given(st.integers(1, 90), weights_of_ranks, st.integers(1, 16), st.integers(1, 2))
@settings(deadline=None)
def test_the_ranks_shares_together_are_the_window(
    size: int, weights: list[int], micro: int, smallest: int
) -> None:
    order = epoch_order(90, seed=0, epoch=0)
    window = Window(order, 0, size, 0, 0, size, size, 1.0)
    parts = [
        Share(micro_batch=max(micro, smallest), smallest=smallest, rank=rank,
              weights=tuple(weights)).cut(window)
        for rank in range(len(weights))
    ]  # fmt: skip
    together = [index for rank in parts for part in rank for index in part.tolist()]
    assert together == window.indices.tolist()
    assert parts[0], "rank 0 has some"
    if size >= smallest:
        assert min(len(part) for rank in parts for part in rank) >= smallest


@given(st.integers(1, 40), weights_of_ranks)
@settings(deadline=None)
def test_shares_are_in_proportion(times: int, weights: list[int]) -> None:
    for rank, weight in enumerate(weights):
        first, end = share_of_rank(times * sum(weights), rank, weights)
        assert end - first == times * weight


@given(st.data())
@settings(deadline=None, max_examples=60)
def test_rows_gathered_ahead_are_those_gathered_one_by_one(data: Any) -> None:
    """Bit for bit, for every kind of container, at block ends, and when the batch changes."""
    num_examples = data.draw(st.integers(1, 80))
    x, y = torch.randn(num_examples, 3), torch.arange(num_examples)
    kind = data.draw(st.sampled_from(["tensor", "tuple", "dict"]))
    source = TensorExamples({"tensor": x, "tuple": (x, y), "dict": {"x": x, "y": y}}[kind])
    share = Share(micro_batch=data.draw(st.integers(1, 20)))
    choices = data.draw(st.lists(st.integers(1, 12), min_size=1, max_size=5))
    policy = data.draw(st.sampled_from(POLICIES))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(rows_ahead, "AHEAD_BYTES", data.draw(st.sampled_from([64, 400, 2**18])))
        rows = RowsAhead(source, share)
        planned = plan_windows(
            num_examples, seed=1, start=Place(), batch_at=changing(choices), last_batch=policy
        )
        for window in islice(planned, 40):
            ahead = rows.batches(window)
            direct = [source.batch(part) for part in share.cut(window)]
            assert len(ahead) == len(direct)
            for one, other in zip(ahead, direct, strict=True):
                assert equal(one, other)


@pytest.mark.parametrize("batch", [2, 3, 4])
def test_rows_of_a_window_that_crosses_a_blocks_end(
    batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks of 33 rows, windows from 1 on: some hold rows of two blocks."""
    monkeypatch.setattr(rows_ahead, "AHEAD_BYTES", 33 * 8)
    source = TensorExamples(torch.arange(100))
    share = Share(micro_batch=4)
    rows = RowsAhead(source, share)
    windows = one_epoch(100, lambda consumed: batch if consumed else 1)
    assert any(w.start // 33 != (w.start + w.size - 1) // 33 for w in windows)
    for window in windows:
        (ahead,) = rows.batches(window)
        assert ahead.tolist() == window.indices.tolist()


def equal(one: Any, other: Any) -> bool:
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, tuple | list):
        return len(one) == len(other) and all(map(equal, one, other))
    return torch.equal(one, other)


# ------------------------------------------------------------------------------------ the loader


class Augmented(Dataset[Any]):
    """Draws from all three random generators for every example."""

    def __len__(self) -> int:
        return 23

    def __getitem__(self, index: int) -> Tensor:
        drawn = [random.random(), float(np.random.rand()), torch.rand(()).item()]
        return torch.tensor([float(index), *drawn])


def global_states() -> tuple[Any, ...]:
    numpy = np.random.get_state()
    return random.getstate(), numpy[1].tolist(), numpy[2], torch.get_rng_state().tolist()  # pyright: ignore[reportAttributeAccessIssue, reportArgumentType]


def loaded(workers: int, *, start: Place = START, count: int = 14) -> list[Any]:
    windows = plan_windows(23, seed=1, start=start, batch_at=changing([4, 7, 3]))
    loader = load_windows(
        open_examples(Augmented()),
        windows,
        share=Share(micro_batch=3),
        seed=8,
        device="cpu",
        workers=workers,
    )
    return [(window, batches) for window, batches in islice(loader, count)]


def check_that_draws_do_not_depend_on_the_workers() -> None:
    random.seed(1)
    np.random.seed(2)
    torch.manual_seed(3)
    before = global_states()
    here, there = loaded(0), loaded(2)
    assert global_states() == before, "the caller's random states were touched"
    for (window, batches), (other_window, other_batches) in zip(here, there, strict=True):
        assert window.start == other_window.start
        assert equal(batches, other_batches)


def test_draws_do_not_depend_on_the_workers() -> None:
    check_that_draws_do_not_depend_on_the_workers()


def test_draws_depend_on_the_place_and_differ_between_epochs() -> None:
    whole = loaded(0)
    window = whole[5][0]
    resumed = loaded(0, start=Place(window.epoch, window.end), count=3)
    assert equal([b for _, b in resumed], [b for _, b in whole[6:9]])
    drawn = {float(row[1]) for _, batches in whole for batch in batches for row in batch}
    assert len(drawn) == sum(len(batch) for _, batches in whole for batch in batches)


def test_training_with_workers_is_the_training_without() -> None:
    """Workers fetch ahead, across the rises of a ramp and the ends of epochs."""
    x = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
    workload = Workload(
        name="toy",
        make_model=lambda: nn.Linear(4, 2),
        train_data=[(row, int(row[0] > 0)) for row in x],
        loss=F.cross_entropy,
    )
    recipe = Recipe(
        global_batch=4, micro_batch=2, learning_rate=0.3, batch_ramp=((40, 8), (100, 12))
    )
    runs = [Training(workload, recipe, workers=workers) for workers in (0, 2)]
    for run in runs:
        run.advance(25)
    for one, other in zip(*(run.model.parameters() for run in runs), strict=True):
        assert torch.equal(one, other)
    assert runs[0].examples == runs[1].examples == 188


# --------------------------------------------------------------------------- last batches, trained


def make_batch_norm(num_examples: int) -> Workload:
    x = torch.randn(num_examples, 4, generator=torch.Generator().manual_seed(0))
    return Workload(
        name="toy",
        make_model=lambda: nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2)),
        train_data=(x, (x[:, 0] > 0).long()),
        loss=F.cross_entropy,
    )


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(
    ("num_examples", "batch", "micro"), [(51, 50, 50), (5, 2, 2), (21, 4, 2), (7, 6, 3), (3, 2, 2)]
)
def test_batch_norm_trains_with_a_last_batch_of_one(
    num_examples: int, batch: int, micro: int, policy: LastBatch
) -> None:
    recipe = Recipe(global_batch=batch, micro_batch=micro, learning_rate=0.01, last_batch=policy)
    training = Training(make_batch_norm(num_examples), recipe)
    training.advance(to_epoch=3)
    assert training.epochs == 3.0
    assert not training.diverged


def test_online_mini_batch_and_full_batch_are_one_axis() -> None:
    """One epoch at B = 1, 10, N: N, N/10 and 1 updates, written out by hand."""
    x = torch.randn(30, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y = x @ torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    workload = Workload(
        name="toy",
        make_model=lambda: nn.Linear(3, 1, bias=False, dtype=torch.float64),
        train_data=(x, y[:, None]),
        loss=F.mse_loss,
    )
    for batch in (1, 10, 30):
        training = Training(workload, Recipe(global_batch=batch, learning_rate=0.05), seed=2)
        w = next(workload.build_model(2).parameters()).detach()[0].clone()
        training.advance(to_epoch=1)
        for part in epoch_order(30, seed=2, epoch=0).split(batch):
            w -= 0.05 * 2 * ((x[part] @ w - y[part])[:, None] * x[part]).mean(0)
        torch.testing.assert_close(
            next(training.model.parameters())[0].detach(), w, rtol=1e-12, atol=1e-14
        )
        assert training.steps == 30 // batch
