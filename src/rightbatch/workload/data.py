"""Random access to training examples, whatever form the data came in.

A tensor, a tuple or a dict of tensors, map-style datasets, DataLoaders (their dataset and collate
function are used, their batch size is what we are choosing) and iterables of single examples all
become an `Examples`: a length and `batch(indices)`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    default_collate,
)

from rightbatch.errors import WorkloadError

STREAM_EXAMPLES = 16_384
"""Examples read from an iterable of unknown length: enough to measure, bounded in memory."""

_WHOLE = (Mapping, str, bytes)
"""Iterables whose elements are not examples."""


class Examples(Protocol):
    """Random access to examples.

    Attributes:
        num_examples: How many there are.
        truncated: Whether the source has more examples than these (a stream cut short).
    """

    num_examples: int
    truncated: bool

    def batch(self, indices: Tensor) -> Any:
        """The examples at `indices` (int64, shape (batch,)), collated into one batch."""
        ...


class TensorExamples:
    """Examples held as tensors whose first dimension counts examples."""

    truncated = False

    def __init__(self, tensors: Tensor | Sequence[Tensor] | Mapping[str, Tensor]) -> None:
        self.tensors = tensors
        values = list(tensors.values()) if isinstance(tensors, Mapping) else list(tensors)
        if isinstance(tensors, Tensor):
            values = [tensors]
        lengths = {int(t.shape[0]) if t.ndim else 0 for t in values} or {0}
        if len(lengths) != 1:
            shapes = ", ".join(str(tuple(t.shape)) for t in values)
            raise WorkloadError(
                f"The data tensors have different numbers of examples (shapes {shapes}). "
                "The first dimension of each must be the number of examples."
            )
        self.num_examples = lengths.pop()
        self.bytes_per_example = sum(t[:1].numel() * t.element_size() for t in values)

    def batch(self, indices: Tensor) -> Any:
        """The rows at `indices` of every tensor, in the container the data came in."""
        if isinstance(self.tensors, Tensor):
            return self.tensors.index_select(0, indices)
        if isinstance(self.tensors, Mapping):
            return {key: tensor.index_select(0, indices) for key, tensor in self.tensors.items()}
        return tuple([tensor.index_select(0, indices) for tensor in self.tensors])

    def cut(self, batch: Any, first: int, end: int) -> Any:
        """A piece of a batch: its examples from `first` to before `end`, without a copy."""
        if isinstance(batch, Tensor):
            return batch[first:end]
        if isinstance(batch, Mapping):
            return {key: tensor[first:end] for key, tensor in batch.items()}
        return tuple([tensor[first:end] for tensor in batch])


class DatasetExamples:
    """Examples of a map-style dataset, collated on demand."""

    def __init__(
        self, dataset: Any, collate: Callable[[list[Any]], Any], *, truncated: bool = False
    ) -> None:
        self.dataset = dataset
        self.collate = collate
        self.num_examples = _length(dataset)
        self.truncated = truncated

    def batch(self, indices: Tensor) -> Any:
        """The examples at `indices`, fetched one by one (or at once by `__getitems__`)."""
        wanted = indices.tolist()
        fetch_many = getattr(self.dataset, "__getitems__", None)
        items = fetch_many(wanted) if fetch_many else [self.dataset[i] for i in wanted]
        return self.collate(items)


def open_examples(data: Any, collate: Callable[[list[Any]], Any] | None = None) -> Examples:
    """Gives random access to data in any supported form.

    Args:
        data: A tensor (or NumPy array), or a tuple, list or dict of them; a map-style dataset; a
            DataLoader; or an iterable of single examples that can be iterated more than once.
        collate: Turns a list of examples into a batch. Default: torch's `default_collate`.

    Returns:
        An `Examples`. Iterables are read up to `STREAM_EXAMPLES` examples.

    Raises:
        WorkloadError: If the data are empty, of an unsupported kind, or can be read only once.
    """
    examples = _open(data, collate)
    if examples.num_examples == 0:
        raise WorkloadError(
            f"The data (a {type(data).__name__}) hold no examples. Pass at least one."
        )
    return examples


def _open(data: Any, collate: Callable[[list[Any]], Any] | None) -> Examples:
    if isinstance(data, DataLoader):
        return _open_loader(cast("DataLoader[Any]", data), collate)
    if type(data) is TensorDataset and collate is None:
        # What a dataset of tensors returns for many indices at once, without a call per example.
        return TensorExamples(data.tensors)
    arrays = _as_tensors(data)
    if arrays is not None:
        return TensorExamples(arrays)
    _refuse_columns_of_lists(data)
    if is_stream(data):
        return _open_stream(cast("Iterable[Any]", data), collate)
    if hasattr(data, "__getitem__") and hasattr(data, "__len__") and not isinstance(data, _WHOLE):
        return DatasetExamples(data, collate or default_collate)
    raise WorkloadError(
        f"The data are of type {type(data).__name__}. Pass tensors, a map-style dataset, a "
        "DataLoader, or an iterable of examples."
    )


def is_stream(data: Any) -> bool:
    """Whether data can only be gone through in order: an iterable without random access.

    Args:
        data: Training data in any form but a DataLoader.

    Returns:
        True for an IterableDataset, a generator or another iterable.
    """
    # An IterableDataset inherits a __getitem__ that only raises.
    indexable = hasattr(data, "__getitem__") and hasattr(data, "__len__")
    alike = isinstance(data, IterableDataset) or not indexable
    return isinstance(data, Iterable) and alike and not isinstance(data, _WHOLE)


def _open_stream(data: Iterable[Any], collate: Callable[[list[Any]], Any] | None) -> Examples:
    stream = iter(data)
    if stream is data:
        raise WorkloadError(
            f"The data are a {type(data).__name__}, which can be read only once. Pass an "
            "object whose __iter__ starts again, or a list."
        )
    items = list(itertools.islice(stream, STREAM_EXAMPLES + 1))
    truncated = len(items) > STREAM_EXAMPLES
    return DatasetExamples(items[:STREAM_EXAMPLES], collate or default_collate, truncated=truncated)


def _open_loader(loader: DataLoader[Any], collate: Callable[[list[Any]], Any] | None) -> Examples:
    """The examples behind a DataLoader: its dataset, restricted as its sampler restricts it."""
    remedy = "Pass the dataset itself, of single examples, and `collate` where it needs one."
    if loader.batch_sampler is None:
        raise WorkloadError(
            "The DataLoader has batch_size=None: its dataset makes the batches, so their size "
            f"cannot be chosen. {remedy}"
        )
    dataset: Any = loader.dataset
    if not isinstance(dataset, IterableDataset):
        if type(loader.batch_sampler) is not BatchSampler:
            raise WorkloadError(
                f"The DataLoader has a batch sampler of its own, "
                f"{type(loader.batch_sampler).__name__}, which decides the batches. {remedy}"
            )
        dataset = _restrict(dataset, loader.sampler, remedy)
    default = loader.collate_fn is default_collate
    return _open(dataset, collate or (None if default else loader.collate_fn))


def _restrict(dataset: Any, sampler: Any, remedy: str) -> Any:
    """The part of a dataset that a sampler visits: a split made by sampler must stay a split."""
    if type(sampler) in (SequentialSampler, RandomSampler, DistributedSampler):
        return dataset
    if type(sampler) is SubsetRandomSampler:
        return Subset(dataset, list(sampler.indices))
    raise WorkloadError(
        f"The DataLoader draws with {type(sampler).__name__}, which would be lost: rightbatch "
        f"draws its own order. {remedy}"
    )


def _refuse_columns_of_lists(data: Any) -> None:
    """A tuple of two lists means columns, but would be read as two examples."""
    if isinstance(data, tuple) and data and all(isinstance(part, list) for part in data):
        lengths = " and ".join(str(len(part)) for part in data)
        raise WorkloadError(
            f"The data are a tuple of lists, of lengths {lengths}. Pass tensors: "
            "tuple(torch.tensor(part) for part in data)."
        )


def _length(dataset: Any) -> int:
    try:
        return len(dataset)
    except (TypeError, NotImplementedError) as error:
        raise WorkloadError(
            f"The dataset {type(dataset).__name__} has no length ({error}). Give it a __len__, or "
            "pass an iterable of examples."
        ) from error


def _as_tensors(data: Any) -> Tensor | Sequence[Tensor] | Mapping[str, Tensor] | None:
    """The data as tensors when they are an array, or a tuple or dict of arrays; else None."""
    if isinstance(data, Mapping):
        return _as_named_tensors(data) if data else ()
    if isinstance(data, tuple | list) and 0 < len(data) <= 8:
        tensors = [_as_tensor(value) for value in data]
        return None if any(v is None for v in tensors) else cast("Any", tuple(tensors))
    return _as_tensor(data)


def _as_named_tensors(data: Mapping[Any, Any]) -> Mapping[str, Tensor]:
    converted = {key: _as_tensor(value) for key, value in data.items()}
    wrong = [
        f"{key!r} is a {type(data[key]).__name__}" for key, v in converted.items() if v is None
    ]
    if wrong:
        raise WorkloadError(
            f"In the dict of data {', '.join(wrong)}. Every value must be a tensor whose first "
            "dimension counts examples; for anything else pass a map-style dataset."
        )
    return cast("Any", converted)


def _as_tensor(value: Any) -> Tensor | None:
    if isinstance(value, Tensor):
        return value
    # NumPy arrays (and what behaves like them) have a dtype and a shape; lists of numbers do not.
    if not (hasattr(value, "__array__") and hasattr(value, "dtype") and getattr(value, "ndim", 0)):
        return None
    try:
        return torch.as_tensor(value)
    except TypeError as error:
        raise WorkloadError(
            f"An array of dtype {value.dtype} cannot become a tensor. Convert it to numbers first."
        ) from error
