"""Random access to training examples, whatever form the data came in.

Tensors (a tuple or a dict of them), map-style datasets, DataLoaders (their dataset and collate
function are used, their batch size is what we are choosing) and iterables of single examples all
become an `Examples`: a length and `batch(indices)`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader, default_collate

from rightbatch.errors import WorkloadError

STREAM_EXAMPLES = 16_384
"""Examples read from an iterable of unknown length: enough to measure, bounded in memory."""


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

    def __init__(self, tensors: Sequence[Tensor] | Mapping[str, Tensor]) -> None:
        self.tensors = tensors
        values = list(tensors.values()) if isinstance(tensors, Mapping) else list(tensors)
        lengths = {int(t.shape[0]) if t.ndim else 0 for t in values}
        if len(lengths) != 1:
            shapes = ", ".join(str(tuple(t.shape)) for t in values)
            raise WorkloadError(
                f"The data tensors have different numbers of examples (shapes {shapes}). "
                "The first dimension of each must be the number of examples."
            )
        self.num_examples = lengths.pop()

    def batch(self, indices: Tensor) -> Any:
        """The rows at `indices` of every tensor, in the container the data came in."""
        if isinstance(self.tensors, Mapping):
            return {key: tensor[indices] for key, tensor in self.tensors.items()}
        return tuple(tensor[indices] for tensor in self.tensors)


class DatasetExamples:
    """Examples of a map-style dataset, collated on demand."""

    def __init__(
        self, dataset: Any, collate: Callable[[list[Any]], Any], *, truncated: bool = False
    ) -> None:
        self.dataset = dataset
        self.collate = collate
        self.num_examples = len(dataset)
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
        data: A tuple, list or dict of tensors (or NumPy arrays); a map-style dataset; a
            DataLoader; or an iterable of single examples that can be iterated more than once.
        collate: Turns a list of examples into a batch. Default: torch's `default_collate`.

    Returns:
        An `Examples`. Iterables are read up to `STREAM_EXAMPLES` examples.

    Raises:
        WorkloadError: If the data are empty, of an unsupported kind, or can be read only once.
    """
    examples = _open(data, collate)
    if examples.num_examples == 0:
        raise WorkloadError("The data hold no examples. Pass at least one.")
    return examples


def _open(data: Any, collate: Callable[[list[Any]], Any] | None) -> Examples:
    arrays = _as_tensors(data)
    if arrays is not None:
        return TensorExamples(arrays)
    if isinstance(data, DataLoader):
        loader = cast("DataLoader[Any]", data)
        return _open(loader.dataset, collate or loader.collate_fn)
    if hasattr(data, "__getitem__") and hasattr(data, "__len__"):
        return DatasetExamples(data, collate or default_collate)
    if isinstance(data, Iterable):
        if iter(data) is data:
            raise WorkloadError(
                f"The data are a {type(data).__name__}, which can be read only once. Pass an "
                "object whose __iter__ starts again, or a list."
            )
        items = list(itertools.islice(iter(data), STREAM_EXAMPLES + 1))
        truncated = len(items) > STREAM_EXAMPLES
        return DatasetExamples(
            items[:STREAM_EXAMPLES], collate or default_collate, truncated=truncated
        )
    raise WorkloadError(
        f"The data are of type {type(data).__name__}. Pass tensors, a map-style dataset, a "
        "DataLoader, or an iterable of examples."
    )


def _as_tensors(data: Any) -> Sequence[Tensor] | Mapping[str, Tensor] | None:
    """The data as tensors when they are a tuple or dict of arrays, else None."""
    if isinstance(data, Mapping) and data:
        converted = {key: _as_tensor(value) for key, value in data.items()}
        return None if any(v is None for v in converted.values()) else cast("Any", converted)
    if isinstance(data, tuple | list) and 0 < len(data) <= 8:
        tensors = [_as_tensor(value) for value in data]
        return None if any(v is None for v in tensors) else cast("Any", tuple(tensors))
    return None


def _as_tensor(value: Any) -> Tensor | None:
    if isinstance(value, Tensor):
        return value
    # NumPy arrays (and what behaves like them) have a dtype and a shape; lists of numbers do not.
    if hasattr(value, "__array__") and hasattr(value, "dtype") and getattr(value, "ndim", 0) > 0:
        return torch.as_tensor(value)
    return None
