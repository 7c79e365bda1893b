"""Data in every form become the same examples; what cannot is refused in words."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    SequentialSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from rightbatch.errors import WorkloadError
from rightbatch.workload import data as data_module
from rightbatch.workload import open_examples
from rightbatch.workload.data import TensorExamples

X = torch.arange(30.0).reshape(10, 3)
Y = torch.arange(10)
PICK = torch.tensor([7, 0, 7])


class _Map(Dataset[tuple[Tensor, Tensor]]):
    def __len__(self) -> int:
        return len(X)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return X[index], Y[index]


class _Stream(IterableDataset[tuple[Tensor, Tensor]]):
    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter([(X[i], Y[i]) for i in range(len(X))])


FORMS: dict[str, Any] = {
    "tensors": (X, Y),
    "list of tensors": [X, Y],
    "arrays": (X.numpy(), Y.numpy()),
    "tensor dataset": TensorDataset(X, Y),
    "map-style dataset": _Map(),
    "iterable dataset": _Stream(),
    "list of examples": [(X[i], Y[i]) for i in range(10)],
    "loader": DataLoader(_Map(), batch_size=4, shuffle=True),
    "loader of tensors": DataLoader(TensorDataset(X, Y), batch_size=3),
    "loader of a stream": DataLoader(_Stream(), batch_size=4),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_batch(form: str) -> None:
    examples = open_examples(FORMS[form])
    assert examples.num_examples == 10
    assert not examples.truncated
    inputs, targets = examples.batch(PICK)
    assert torch.equal(inputs, X[PICK])
    assert torch.equal(targets, Y[PICK])


@pytest.mark.parametrize("data", [X, X.numpy()])
def test_a_bare_tensor_is_a_batch_of_its_rows(data: Any) -> None:
    batch = open_examples(data).batch(PICK)
    assert isinstance(batch, Tensor)
    assert torch.equal(batch, X[PICK])


def test_a_dict_of_tensors_gives_dicts() -> None:
    batch = open_examples({"x": X, "y": Y.numpy()}).batch(PICK)
    assert torch.equal(batch["x"], X[PICK])
    assert torch.equal(batch["y"], Y[PICK])


def test_tensors_of_a_dataset_are_taken_without_a_call_per_example() -> None:
    assert isinstance(open_examples(TensorDataset(X, Y)), TensorExamples)


def test_collate_of_the_loader_and_of_the_caller() -> None:
    def summed(items: list[Any]) -> Tensor:
        return torch.stack([x for x, _ in items]).sum(0)

    loader = DataLoader(_Map(), batch_size=2, collate_fn=summed)
    assert torch.equal(open_examples(loader).batch(PICK), X[PICK].sum(0))
    assert torch.equal(open_examples(TensorDataset(X, Y), summed).batch(PICK), X[PICK].sum(0))


def test_a_split_made_by_a_sampler_stays_a_split() -> None:
    examples = open_examples(DataLoader(_Map(), sampler=SubsetRandomSampler([1, 3, 5])))
    assert examples.num_examples == 3
    assert examples.batch(torch.arange(3))[1].tolist() == [1, 3, 5]


def test_a_long_stream_is_cut_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_module, "STREAM_EXAMPLES", 6)
    examples = open_examples(_Stream())
    assert examples.num_examples == 6
    assert examples.truncated


class _NoLength(_Map):
    def __len__(self) -> int:
        raise NotImplementedError("unknown")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ((x for x in [1]), r"generator, which can be read only once\. Pass an object whose"),
        (3, r"of type int\. Pass tensors"),
        ("text", r"of type str\. Pass tensors"),
        (([1.0, 2.0], [0, 1]), r"tuple of lists, of lengths 2 and 2\. Pass tensors"),
        (
            {"x": X, "y": [1, 2]},
            r"In the dict of data 'y' is a list\. Every value must be a tensor",
        ),
        ({"x": X, "y": Y[:4]}, r"different numbers of examples \(shapes \(10, 3\), \(4,\)\)"),
        ((X, torch.tensor(1.0)), r"different numbers of examples"),
        (np.array(["a", "b"]), r"dtype <U1 cannot become a tensor"),
        (DataLoader(_Map(), batch_size=None), r"batch_size=None.*Pass the dataset itself"),
        (
            DataLoader(_Map(), sampler=WeightedRandomSampler([1.0] * 10, 10)),
            r"draws with WeightedRandomSampler, which would be lost",
        ),
        (_NoLength(), r"_NoLength has no length \(unknown\)"),
    ],
)
def test_what_cannot_be_read_is_refused(data: Any, message: str) -> None:
    with pytest.raises(WorkloadError, match=message):
        open_examples(data)


def test_a_batch_sampler_of_its_own_is_refused() -> None:
    class Grouped(BatchSampler):
        pass

    loader = DataLoader(_Map(), batch_sampler=Grouped(SequentialSampler(Y), 2, False))
    with pytest.raises(WorkloadError, match="batch sampler of its own, Grouped"):
        open_examples(loader)
