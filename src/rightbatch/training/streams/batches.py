"""Single examples to batches, and batches to single examples."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, default_collate

from rightbatch.workload import Examples, Workload
from rightbatch.workload.data import DatasetExamples, TensorExamples
from rightbatch.workload.describe import tensors_in


def collate_of(workload: Workload) -> Callable[[list[Any]], Any]:
    """What turns a list of a workload's examples into a batch.

    Args:
        workload: Its own `collate` comes first, then that of its DataLoader.

    Returns:
        The function.
    """
    if workload.collate is not None:
        return workload.collate
    data = workload.train_data
    if isinstance(data, DataLoader) and data.batch_sampler is not None:
        return stack if data.collate_fn is default_collate else data.collate_fn
    return stack


def stack(examples: list[Any]) -> Any:
    """As torch's `default_collate`, but a pair of tensors stays a tuple, and sooner.

    Args:
        examples: Of one structure.

    Returns:
        The batch.
    """
    first = examples[0]
    if type(first) is tuple and all(isinstance(part, Tensor) for part in first):
        return tuple([torch.stack(column) for column in zip(*examples, strict=True)])
    return default_collate(examples)


def dtype_of(model: nn.Module) -> torch.dtype | None:
    """The type of a model's first floating-point parameter, or None."""
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), None)


def as_read_by(dtype: torch.dtype | None, batch: Any) -> Any:
    """A batch with float64 made float32 where the model is float32; else as it is.

    Python's and NumPy's numbers are float64, which a float32 model refuses.

    Args:
        dtype: Of the model.
        batch: The batch.

    Returns:
        The batch; containers keep their kind.
    """
    if dtype is not torch.float32 or not _holds_double(batch):
        return batch
    return map_tensors(lambda t: t.float() if t.dtype is torch.float64 else t, batch)


def _holds_double(batch: Any) -> bool:
    if type(batch) is tuple and len(batch) == 2:  # the usual batch, the short way
        inputs, targets = batch
        if isinstance(inputs, Tensor) and isinstance(targets, Tensor):
            return inputs.dtype is torch.float64 or targets.dtype is torch.float64
    return any(tensor.dtype is torch.float64 for tensor in tensors_in(batch))


def map_tensors(change: Callable[[Tensor], Tensor], value: Any) -> Any:
    """A value with a function applied to every tensor in it.

    Args:
        change: The function.
        value: Tensors in nested dicts, tuples and lists; whatever else stays.

    Returns:
        The value; containers keep their kind.
    """
    return map_parts(lambda part: change(part) if isinstance(part, Tensor) else part, value)


def map_parts(change: Callable[[Any], Any], value: Any) -> Any:
    """A value with a function applied to every part that is no container.

    Args:
        change: The function.
        value: Nested dicts, tuples and lists.

    Returns:
        The value; containers keep their kind.
    """
    if isinstance(value, dict):
        return {key: map_parts(change, part) for key, part in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(map_parts(change, part) for part in value))
    if isinstance(value, tuple | list):
        return type(value)(map_parts(change, part) for part in value)
    return change(value)


def as_tensors(value: Any) -> Any:
    """An example with its NumPy arrays and numbers as tensors of their own memory.

    Args:
        value: In nested dicts, tuples and lists; whatever else stays.

    Returns:
        The example; containers keep their kind.
    """
    if type(value) is tuple and all(isinstance(part, Tensor) for part in value):
        return value
    return map_parts(_as_tensor, value)


def _as_tensor(value: Any) -> Any:
    if isinstance(value, np.generic | np.ndarray):
        return torch.tensor(np.ascontiguousarray(value) if value.ndim else value)
    return value


def kept(example: Any) -> Any:
    """A copy of an example that does not share the memory of what it came from.

    Args:
        example: What may be written over by its owner while it waits.

    Returns:
        The copy: NumPy's as tensors, tensors cloned, without gradient.
    """
    return map_tensors(lambda t: t.detach().clone(), as_tensors(example))


class Rows:
    """The examples of tensors, one after the other or several at once.

    Args:
        examples: The tensors.
    """

    def __init__(self, examples: TensorExamples) -> None:
        self._examples = examples
        self._place = 0

    @property
    def left(self) -> int:
        """Examples not yet given."""
        return self._examples.num_examples - self._place

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        if self.left == 0:
            raise StopIteration
        example = self.peek()
        self._place += 1
        return example

    def peek(self) -> Any:
        """The next example: the tensors' rows, without a copy."""
        place, tensors = self._place, self._examples.tensors
        if isinstance(tensors, Tensor):
            return tensors[place]
        if isinstance(tensors, Mapping):
            return {key: tensor[place] for key, tensor in tensors.items()}
        return tuple([tensor[place] for tensor in tensors])

    def take(self, size: int) -> Any:
        """The next examples, as `stack` makes a batch of them.

        Args:
            size: How many; not more than are left.

        Returns:
            The batch.
        """
        start, self._place = self._place, self._place + size
        return self._examples.batch(torch.arange(start, self._place))


def rows_of(examples: Examples) -> Iterator[Any]:
    """Single examples of data with random access, in order.

    Args:
        examples: The data.

    Returns:
        An iterator over them, a `Rows` where they are tensors.
    """
    if isinstance(examples, TensorExamples):
        return Rows(examples)
    dataset = cast("DatasetExamples", examples).dataset
    return (as_tensors(dataset[index]) for index in range(examples.num_examples))
