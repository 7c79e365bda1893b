"""What the catalog holds, as plain data: the only place that states the targets."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One line of the catalog.

    Attributes:
        name: What the command line and `catalog.get` call it.
        module: The module that builds it, below `rightbatch.catalog`.
        num_examples: Training examples N.
        optimizer: The optimizer it is trained with, in words.
        target: What counts as trained.
        description: One line: the data, the model, the task.
    """

    name: str
    module: str
    num_examples: int
    optimizer: str
    target: str
    description: str


_ENTRIES = (
    Entry(
        name="max3",
        module="max3",
        num_examples=1000,
        optimizer="SGD",
        target="val_loss<=0.12",
        description="index of the largest of three uniform numbers; 9-9-3 ReLU network",
    ),
    Entry(
        name="digits",
        module="digits",
        num_examples=1438,
        optimizer="SGD",
        target="val_loss<=0.12",
        description="8×8 handwritten digits; 64-64-10 ReLU network",
    ),
    Entry(
        name="digits-cnn",
        module="digits",
        num_examples=1438,
        optimizer="Adam",
        target="val_loss<=0.12",
        description="8×8 handwritten digits; two convolutions, no BatchNorm",
    ),
    Entry(
        name="breast-cancer",
        module="tables",
        num_examples=455,
        optimizer="SGD, momentum 0.9",
        target="val_loss<=0.06",
        description="benign or malignant from 30 measurements; 30-16-2 ReLU network",
    ),
    Entry(
        name="diabetes",
        module="tables",
        num_examples=354,
        optimizer="SGD",
        target="val_loss<=0.49",
        description="disease progression, a regression; 10-16-1 tanh network",
    ),
    Entry(
        name="source-lm",
        module="source_lm",
        num_examples=4096,
        optimizer="AdamW",
        target="val_loss<=1.9",
        description="next byte of Python's library; causal transformer, 2 layers",
    ),
    Entry(
        name="quadratic",
        module="quadratic",
        num_examples=1024,
        optimizer="SGD",
        target="val_loss<=2.01",
        description="linear regression on Gaussian inputs with every constant known",
    ),
)


def entries() -> tuple[Entry, ...]:
    """The lines of the catalog, in the order they are shown."""
    return _ENTRIES


def names() -> list[str]:
    """The names of the built-in workloads.

    Returns:
        The names, in the order they are shown.

    Example:
        >>> names()[:2]
        ['max3', 'digits']
    """
    return [entry.name for entry in _ENTRIES]


def find_entry(name: str) -> Entry | None:
    """The line with this name, or None."""
    return next((entry for entry in _ENTRIES if entry.name == name), None)


def target_of(name: str) -> str:
    """The target of a built-in workload, for the module that builds it."""
    entry = find_entry(name)
    assert entry is not None
    return entry.target
