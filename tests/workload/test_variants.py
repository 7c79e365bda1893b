"""Variants of a workload: paired, reproducible, and nothing changed but what was asked for."""

from __future__ import annotations

import itertools
import random
from typing import Any, NamedTuple

import cloudpickle
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from rightbatch import Workload, load_workload, with_examples, with_label_noise
from rightbatch.errors import UsageError
from rightbatch.workload import check_workload
from rightbatch.workload.crossing import check_crossing
from rightbatch.workload.label_noise import add_noise

N, CLASSES = 400, 5
X = torch.randn(N, 3, generator=torch.Generator().manual_seed(0))
Y = torch.arange(N) % CLASSES + 10  # classes need not begin at 0
ALL = torch.arange(N)
SHARES = (0.0, 0.1, 0.3, 0.5, 1.0)


class Pair(NamedTuple):
    read: Tensor
    kind: int


class Lazy(Dataset[Any]):
    """Counts what was read; draws at random, as augmentation does."""

    def __init__(self, make: Any) -> None:
        self.make, self.read = make, list[int]()

    def __len__(self) -> int:
        return N

    def __getitem__(self, index: int) -> Any:
        self.read.append(index)
        _ = torch.rand(1), random.random(), np.random.rand()
        return self.make(index)


def make(data: Any = (X, Y), **changes: Any) -> Workload:
    made = {
        "name": "small",
        "make_model": lambda: nn.Linear(3, 20),
        "train_data": data,
        "val_data": (X[:50].clone(), Y[:50].clone()),
        "loss": F.cross_entropy,
        **changes,
    }
    return Workload(**made)


def targets_of(workload: Workload) -> Tensor:
    batch = workload.train_examples.batch(torch.arange(workload.num_examples))
    return batch["label"] if isinstance(batch, dict) else batch[1]


def swap(items: list[Any]) -> Any:
    return torch.stack([x for _, x in items]), torch.tensor([y for y, _ in items])


@pytest.mark.parametrize("share", SHARES)
def test_exactly_that_share_becomes_another_class_that_there_is(share: float) -> None:
    noisy = targets_of(with_label_noise(make(), share))
    assert int((noisy != Y).sum()) == round(share * N)  # one that stays the same is caught
    assert set(noisy.tolist()) <= set(Y.tolist())


def test_other_classes_are_drawn_uniformly() -> None:
    many = torch.arange(CLASSES).repeat(20_000)
    noisy = add_noise(many, 1.0, seed=3)
    counts = torch.zeros(CLASSES, CLASSES)
    counts.index_put_((many, noisy), torch.ones(len(many)), accumulate=True)
    assert bool((counts.diagonal() == 0).all())
    others = counts[~torch.eye(CLASSES, dtype=torch.bool)] / 20_000
    assert torch.allclose(others, torch.full_like(others, 1 / (CLASSES - 1)), atol=0.015)


def test_what_is_wrong_stays_wrong_in_the_same_way_as_the_share_grows() -> None:
    found = [targets_of(with_label_noise(make(), share, seed=5)) for share in SHARES]
    for less, more in itertools.pairwise(found):
        hit = less != Y
        assert torch.equal(more[hit], less[hit])
    other = targets_of(with_label_noise(make(), 0.3, seed=6))
    assert not torch.equal(other, targets_of(with_label_noise(make(), 0.3, seed=5)))


def test_inputs_validation_and_the_workload_itself_are_not_touched() -> None:
    before = Y.clone()
    clean = make()
    noisy = with_label_noise(clean, 0.5)
    assert noisy.val_data is clean.val_data
    assert noisy.train_examples.batch(ALL)[0].equal(X)
    assert torch.equal(Y, before) and torch.equal(targets_of(clean), before)
    assert (noisy.name, noisy.num_examples) == ("small, 50 % label noise", N)
    assert torch.equal(targets_of(with_label_noise(clean, 0.0)), Y)


@pytest.mark.parametrize(
    "data",
    [
        [X, Y],
        (X.numpy(), Y.numpy()),
        TensorDataset(X, Y),
        {"read": X, "label": Y},
        DataLoader(TensorDataset(X, Y), batch_size=3),
        Lazy(lambda i: (X[i], int(Y[i]))),
        Lazy(lambda i: [X[i], Y[i]]),
        Lazy(lambda i: Pair(X[i], int(Y[i]))),
        Lazy(lambda i: (X[i], np.int64(Y[i]))),
        Lazy(lambda i: {"read": X[i], "label": Y[i]}),
        DataLoader(Lazy(lambda i: (X[i], int(Y[i]))), batch_size=4),
        [(X[i], int(Y[i])) for i in range(N)],
    ],
    ids=lambda d: type(d).__name__,
)
def test_every_form_gets_the_same_noise_and_crosses(data: Any) -> None:
    noisy = with_label_noise(make(data), 0.25)
    assert torch.equal(targets_of(noisy), targets_of(with_label_noise(make(), 0.25)))
    if not isinstance(data, dict) and "Lazy" not in str(type(data)):
        check_crossing(noisy)
    there = cloudpickle.loads(cloudpickle.dumps(noisy))
    assert torch.equal(targets_of(there), targets_of(noisy))
    assert type(noisy.train_examples.batch(ALL[:4])) is type(
        make(data).train_examples.batch(ALL[:4])
    )


def test_a_dataset_is_read_when_it_is_asked_and_random_states_are_left_alone() -> None:
    data = Lazy(lambda i: (X[i], int(Y[i])))
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # type: ignore[index,union-attr]
    noisy = with_label_noise(make(data), 0.25)
    after = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # type: ignore[index,union-attr]
    assert torch.equal(states[0], after[0]) and states[1:] == after[1:]
    data.read.clear()
    noisy.train_examples.batch(torch.tensor([7, 3]))
    assert data.read == [7, 3]


def test_tokens_are_hit_one_by_one_and_padding_is_left_out() -> None:
    tokens = torch.randint(0, 30, (50, 12), generator=torch.Generator().manual_seed(1))
    tokens[:, 9:] = -100
    noisy = targets_of(with_label_noise(make((torch.zeros(50, 12), tokens)), 0.2))
    assert torch.equal(noisy[:, 9:], tokens[:, 9:])
    assert int((noisy != tokens).sum()) == round(0.2 * 50 * 9)
    assert 1 < int((noisy != tokens).any(dim=1).sum()) <= 50


def test_sequences_of_unequal_lengths() -> None:
    parts = [torch.randint(0, 9, (3 + i % 4,)) for i in range(40)]
    data = [(torch.zeros(3), part) for part in parts]
    noisy = with_label_noise(make(data, collate=list), 0.5, targets=1)
    found = [item[1] for item in noisy.train_examples.batch(torch.arange(40))]
    assert [f.shape for f in found] == [p.shape for p in parts]
    wrong = sum(int((f != p).sum()) for f, p in zip(found, parts, strict=True))
    assert wrong == round(0.5 * sum(map(len, parts)))


@pytest.mark.parametrize("shape", [(N,), (N, 1), (N, 2)])
def test_numbers_get_gaussian_noise_in_proportion(shape: tuple[int, ...]) -> None:
    values = torch.randn(shape) * torch.tensor([3.0, 50.0][: shape[-1] if len(shape) > 1 else 1])
    small, large = (add_noise(values, share, seed=2) - values for share in (0.1, 0.4))
    assert torch.allclose(4 * small, large, atol=1e-3)
    scale = values.std(dim=0, correction=0)
    assert torch.allclose(large.std(dim=0) / scale, torch.tensor(0.4), atol=0.06)
    assert abs(float((large / scale).mean())) < 0.06
    loaded = with_label_noise(load_workload("diabetes"), 0.5)
    assert loaded.train_data[1].dtype == torch.float32


@pytest.mark.parametrize("values", [Y % 2 == 0, (Y % 2).float(), (Y % 2).float()[:, None]])
def test_two_classes_as_booleans_or_zeros_and_ones(values: Tensor) -> None:
    noisy = add_noise(values, 0.25)
    assert noisy.dtype == values.dtype and noisy.shape == values.shape
    assert int((noisy != values).sum()) == N // 4


class Endless(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return ((X[i % N], i % 2) for i in range(20_000))


def loss_sum(model: Any, batch: Any) -> Any:
    return model(batch[0]).sum(), len(batch[0])


@pytest.mark.parametrize(
    ("workload", "share", "said"),
    [
        (make(), -0.1, "The share of label noise is -0.1. Give a number from 0 to 1"),
        (make(), float("nan"), "The share of label noise is nan"),
        (make(), 1.5, "Of classes at most all can be wrong"),
        (make((X, torch.zeros(N).long())), 0.1, "hold 1 class: there is no other"),
        (make((X, torch.full((N,), 2.5))), 0.1, "All training targets are the same"),
        (make((X, torch.full((N,), float("inf")))), 0.1, "are not finite"),
        (make((X, F.one_hot(Y % 5).float())), 0.1, "rows of 5 zeros and ones"),
        (make((X, X.to(torch.complex64))), 0.1, "complex"),
        (make(X, loss=None, compute_loss=loss_sum), 0.1, "targets is not known: it is float32"),
        (make((X, Y), loss=None, compute_loss=loss_sum), 0.1, "Name it: targets='label'"),
        (make({"a": X, "b": Y}), 0.1, "targets is not known"),
        (make({"y": X, "label": Y}), 0.1, "targets is not known"),
        (make([(i, "word") for i in range(9)]), 0.1, "targets of an example are 'word'"),
        (make(Endless()), 0.1, "a stream that is longer than what is held"),
        (make([(int(y), x) for x, y in zip(X, Y, strict=True)], collate=swap), 0.1,
         "targets are not those of its examples"),
    ],
)  # fmt: skip
def test_what_cannot_be_understood_is_refused(workload: Workload, share: float, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        with_label_noise(workload, share)


def test_targets_can_be_named() -> None:
    named = with_label_noise(make({"a": X, "b": Y}), 0.5, targets="b")
    assert int((named.train_data["b"] != Y).sum()) == N // 2
    swapped = make([(int(y), x) for x, y in zip(X, Y, strict=True)], collate=swap)
    assert int((targets_of(with_label_noise(swapped, 0.5, targets=0)) != Y).sum()) == N // 2
    with pytest.raises(UsageError, match="has no part 'c', only 'a', 'b'"):
        with_label_noise(make({"a": X, "b": Y}), 0.5, targets="c")


def test_padding_that_a_collate_adds_is_no_class() -> None:
    loader = DataLoader(Lazy(lambda i: (X[i], int(Y[i]))), collate_fn=lambda items: (
        torch.stack([x for x, _ in items]), torch.tensor([y for _, y in items])))  # fmt: skip
    noisy = with_label_noise(make(loader), 0.25)
    assert torch.equal(targets_of(noisy), targets_of(with_label_noise(make(), 0.25)))
    assert check_workload(noisy) is not None


# ---- parts of the training set -----------------------------------------------------------------


@pytest.mark.parametrize(
    "data",
    [(X, Y), {"read": X, "label": Y}, Lazy(lambda i: (X[i], int(Y[i]))),
     DataLoader(Lazy(lambda i: (X[i], int(Y[i]))), batch_size=4)],
)  # fmt: skip
def test_smaller_parts_lie_within_larger_ones(data: Any) -> None:
    def rows(num: int, seed: int = 0) -> set[tuple[float, ...]]:
        part = with_examples(make(data), num, seed=seed)
        assert part.num_examples == num
        batch = part.train_examples.batch(torch.arange(num))
        read = batch["read"] if isinstance(batch, dict) else batch[0]
        return {tuple(row) for row in read.tolist()}

    few, more = rows(30), rows(120)
    assert len(few) == 30 and few < more < {tuple(row) for row in X.tolist()}
    assert few == rows(30) and few != rows(30, seed=1)


def test_all_examples_are_the_workload_as_it_was() -> None:
    same = with_examples(make(), N)
    assert torch.equal(same.train_data[0], X) and torch.equal(same.train_data[1], Y)
    assert same.name == "small, 400 examples" and same.val_data is not None


def test_targets_go_with_their_inputs() -> None:
    part = with_examples(make((X, X.sum(dim=1)), loss=F.mse_loss), 50)
    read, targets = part.train_examples.batch(torch.arange(50))
    assert torch.equal(read.sum(dim=1), targets)


def test_noise_on_a_part() -> None:
    part = with_label_noise(with_examples(load_workload("digits"), 500), 0.1)
    assert part.name == "digits, 500 examples, 10 % label noise"
    check_crossing(part)


@pytest.mark.parametrize("num", [0, N + 1])
def test_more_than_there_are_is_refused(num: int) -> None:
    with pytest.raises(UsageError, match=f"Give a number from 1 to {N}"):
        with_examples(make(), num)
