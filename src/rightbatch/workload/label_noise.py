"""A share of the training targets made wrong: the same workload on noisier data.

Which targets are hit, and what each of them becomes, is decided by the seed alone and not by the
share: the targets that are wrong at 10 % are wrong in the same way at 30 %. A sweep over the share
is therefore paired.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, default_collate

from rightbatch.errors import UsageError
from rightbatch.isolate.preserve import preserved_state
from rightbatch.workload.count import IGNORED
from rightbatch.workload.data import DatasetExamples, TensorExamples
from rightbatch.workload.describe import describe
from rightbatch.workload.workload import Workload

_NAMES = ("label", "labels", "target", "targets", "y")
"""Keys under which a dict of data holds its targets, where it is not told."""
_LOOKED_AT = 8
"""Examples of which it is seen whether a collate function passes targets on."""
Place = str | int


def with_label_noise(
    workload: Workload, share: float, *, seed: int = 0, targets: Place | None = None
) -> Workload:
    """The workload with noise in its training targets; validation data stay as they are.

    Of classes (whole numbers, booleans, zeros and ones; tokens one by one), round(share × count)
    are replaced by another class that occurs, each with the same probability. To numbers, Gaussian
    noise of share × their standard deviation is added (column by column, where they have columns).
    Targets of -100, which losses leave out, stay.

    Args:
        workload: What to train. Its training set is gone through once, to know the classes; inputs
            are read later, when they are asked for.
        share: Of the targets that become wrong, 0 to 1; for numbers, any share of the standard
            deviation.
        seed: Decides which, and what they become.
        targets: Where in an example the targets are: a key of a dict, or a position. Default: the
            second of two, where the workload has a `loss`; the only key of a dict that is called
            `label`, `labels`, `target`, `targets` or `y`.

    Returns:
        Another workload, named such as `digits, 20 % label noise`.

    Raises:
        UsageError: If the share is out of range, or the targets cannot be told or understood.

    Example:
        >>> from rightbatch import load_workload
        >>> clean = load_workload("digits")
        >>> noisy = with_label_noise(clean, 0.2)
        >>> noisy.name, int((noisy.train_data[1] != clean.train_data[1]).sum())
        ('digits, 20 % label noise', 288)
    """
    if not (math.isfinite(share) and share >= 0):
        raise UsageError(f"The share of label noise is {share}. Give a number from 0 to 1.")
    examples = workload.train_examples
    if examples.truncated:
        raise UsageError(
            f"The training data of {workload.name!r} are a stream that is longer than what is held "
            "of it. Pass a part of it as tensors or as a map-style dataset."
        )
    if isinstance(examples, TensorExamples):
        data: Any = _noisy_tensors(examples, workload, share, seed, targets)
    else:
        assert isinstance(examples, DatasetExamples)  # there are two kinds
        data = _noisy_dataset(examples, workload, share, seed, targets)
        if isinstance(workload.train_data, DataLoader):
            data = DataLoader(data, collate_fn=examples.collate)
    name = f"{workload.name}, {100 * share:.4g} % label noise"
    return dataclasses.replace(workload, name=name, train_data=data)


def add_noise(values: Tensor, share: float, *, seed: int = 0) -> Tensor:
    """Targets with noise.

    Args:
        values: Classes (whole numbers, booleans, or zeros and ones) of any shape, or real numbers
            of shape (examples, …).
        share: Of those that are replaced, or of the standard deviation.
        seed: Decides which, and what they become.

    Returns:
        New targets of the same shape and kind.

    Raises:
        UsageError: If the share is above 1 for classes, or there is nothing to replace them by.

    Example:
        >>> add_noise(torch.tensor([0, 1, -100, 1]), 1.0).tolist()
        [1, 0, -100, 0]
    """
    generator = torch.Generator().manual_seed(seed)
    if values.is_complex():
        raise UsageError("The targets are complex numbers; label noise knows classes and reals.")
    if not values.is_floating_point() or _holds_zeros_and_ones(values):
        return _replace_classes(values, share, generator)
    if not bool(torch.isfinite(values).all()):
        raise UsageError("Some training targets are not finite. Leave those examples out.")
    # In double precision: the same noise whatever the kind of the targets.
    scale = values.double().std(dim=0, correction=0)
    if not bool((scale > 0).any()):
        raise UsageError("All training targets are the same: noise has no scale. Check the data.")
    noise = torch.randn(values.shape, generator=generator, dtype=torch.float64)
    return (values.double() + share * scale * noise).to(values.dtype)


def _holds_zeros_and_ones(values: Tensor) -> bool:
    if not bool(((values == 0) | (values == 1)).all()):
        return False
    if values.ndim > 1 and values.shape[-1] > 1:
        raise UsageError(
            f"The targets are rows of {values.shape[-1]} zeros and ones, which label noise does "
            "not know: one class each, or several? Pass class indices."
        )
    return True


def _replace_classes(values: Tensor, share: float, generator: torch.Generator) -> Tensor:
    if share > 1:
        raise UsageError(
            f"The share of label noise is {share:g}. Of classes at most all can be wrong: give a "
            "number from 0 to 1."
        )
    flat = values.flatten().clone()
    counted = torch.nonzero(flat != IGNORED).flatten()
    classes = flat[counted].unique()
    if len(classes) < 2:
        raise UsageError(
            f"The training targets hold {len(classes)} class: there is no other one to replace "
            "them by. Check the data."
        )
    order = torch.randperm(len(counted), generator=generator)
    # 1 to K − 1 classes farther, round: never the same class, and each other one alike.
    farther = torch.randint(1, len(classes), (len(counted),), generator=generator)
    hit = order[: round(share * len(counted))]
    own = torch.searchsorted(classes.double(), flat[counted[hit]].double())
    flat[counted[hit]] = classes[(own + farther[hit]) % len(classes)]
    return flat.reshape(values.shape)


# ---- where the targets are ---------------------------------------------------------------------


def _place(workload: Workload, example: Any, asked: Place | None) -> Place:
    """Where in an example, or in the tensors of all of them, the targets are."""
    parts: dict[Place, Any] | None = None
    if isinstance(example, Mapping):
        parts = dict(example)
    elif isinstance(example, tuple | list):
        parts = dict(enumerate(example))
    if parts is not None and asked is not None:
        if asked in parts:
            return asked
        raise UsageError(
            f"An example of {workload.name!r} has no part {asked!r}, only "
            f"{', '.join(map(repr, parts))}. Name one of these as targets."
        )
    named = [key for key in parts or () if key in _NAMES]
    if isinstance(example, Mapping) and len(named) == 1:
        return named[0]
    if not isinstance(example, Mapping) and len(parts or ()) == 2 and workload.loss is not None:
        return 1
    raise UsageError(
        f"Which part of an example of {workload.name!r} is its targets is not known: it is "
        f"{describe(example)}. Name it: targets='label', or its position in a tuple; where inputs "
        "and targets are one tensor, pass them apart."
    )


def _noisy_tensors(
    examples: TensorExamples, workload: Workload, share: float, seed: int, asked: Place | None
) -> Any:
    tensors = examples.tensors
    place = _place(workload, tensors, asked)
    if isinstance(tensors, Mapping):
        values = tensors[cast("str", place)]
        return {**tensors, place: add_noise(values, share, seed=seed)}
    noisy = list(tensors)
    noisy[cast("int", place)] = add_noise(noisy[cast("int", place)], share, seed=seed)
    return tuple(noisy)


def _noisy_dataset(
    examples: DatasetExamples, workload: Workload, share: float, seed: int, asked: Place | None
) -> NoisyDataset:
    dataset = examples.dataset
    # A dataset may draw at random whenever it is read.
    with preserved_state():
        place = _place(workload, dataset[0], asked)
        found = [_as_tensor(dataset[i][place]) for i in range(examples.num_examples)]
        if asked is None and examples.collate is not default_collate:
            _check_collate(examples, workload, found[:_LOOKED_AT])
    if len({values.shape for values in found}) == 1:
        noisy = list(add_noise(torch.stack(found), share, seed=seed))
    else:  # sequences of unequal lengths
        whole = add_noise(torch.cat([values.flatten() for values in found]), share, seed=seed)
        pieces = whole.split([values.numel() for values in found])
        noisy = [piece.reshape(v.shape) for piece, v in zip(pieces, found, strict=True)]
    return NoisyDataset(dataset, place, noisy)


def _check_collate(examples: DatasetExamples, workload: Workload, found: Sequence[Tensor]) -> None:
    """A collate function may put the targets elsewhere than where the examples have them."""
    batch = examples.batch(torch.arange(len(found)))
    known = isinstance(batch, tuple | list) and len(batch) == 2 and isinstance(batch[1], Tensor)
    flat = torch.cat([values.flatten() for values in found])
    if not known or not torch.equal(batch[1].flatten().cpu(), flat.to(batch[1].dtype)):
        raise UsageError(
            f"The collate function of {workload.name!r} makes a batch, {describe(batch)}, whose "
            "targets are not those of its examples as they are. Say which part of an example "
            "they are made from: targets=1, or its key."
        )


class NoisyDataset:
    """A map-style dataset whose targets are others; all else is read from it when asked for.

    Args:
        dataset: The dataset.
        place: Where in an example the targets are.
        targets: The new ones, one per example.
    """

    def __init__(self, dataset: Any, place: Place, targets: Sequence[Tensor]) -> None:
        self._dataset = dataset
        self._place = place
        self._targets = list(targets)

    def __len__(self) -> int:
        return len(self._targets)

    def __getitem__(self, index: int) -> Any:
        return self._changed(self._dataset[index], index)

    def __getitems__(self, indices: Sequence[int]) -> list[Any]:
        fetch_many = getattr(self._dataset, "__getitems__", None)
        items = fetch_many(indices) if fetch_many else [self._dataset[i] for i in indices]
        return [self._changed(item, i) for item, i in zip(items, indices, strict=True)]

    def _changed(self, item: Any, index: int) -> Any:
        new = _alike(item[self._place], self._targets[index])
        if isinstance(item, Mapping):
            return {**item, self._place: new}
        parts = list(item)
        parts[cast("int", self._place)] = new
        return type(item)(*parts) if hasattr(item, "_fields") else type(item)(parts)


def _as_tensor(value: Any) -> Tensor:
    """The targets of one example."""
    try:
        return torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UsageError(
            f"The targets of an example are {describe(value)}, which label noise does not know. "
            "Give numbers, a tensor or an array."
        ) from error


def _alike(before: Any, new: Tensor) -> Any:
    """New targets in the kind of those before."""
    if isinstance(before, Tensor):
        return new
    if isinstance(before, np.generic):
        return before.dtype.type(new.item())
    if isinstance(before, np.ndarray):
        return new.numpy()
    return new.tolist() if isinstance(before, list | tuple) else type(before)(new.item())
