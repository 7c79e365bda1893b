"""One entry of one parameter, watched: its value after every update, and whether it can learn."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from rightbatch.errors import UsageError

FIRST = "first"
"""The name of the first weight of the first layer, whatever the model calls it."""
_NAME = re.compile(r"(?P<parameter>[^\[\]]+?)\s*(?:\[(?P<index>[^\[\]]*)\])?")
_FEWEST_LOOKS = 8
"""Looks at a gradient, each of which found 0, before a weight is called dead."""


class WatchedWeight:
    """Reads one weight after each update, without waiting for a GPU.

    Args:
        model: Where the parameter is.
        asked: Such as `0.weight[3,1]`, or `first`.
        epochs: Passes over the training set when watching begins.

    Attributes:
        asked: As it was asked for.
        name: The parameter's name, with the index.
        initial: The value when watching began.

    Raises:
        UsageError: If the model has no such weight.
    """

    def __init__(self, model: nn.Module, asked: str, epochs: float = 0.0) -> None:
        self.asked = asked
        self._parameter_name, self._index = find_weight(model, asked)
        self.name = weight_name(self._parameter_name, self._index)
        named = model.named_parameters(remove_duplicate=False)
        self._parameter: Tensor = dict(named)[self._parameter_name]
        self._unread: list[Any] = []
        self._judged: list[float] = []
        self._bind()
        self.initial = float(self._read())
        self._last = self.initial
        self._looks, self._alive_at, self._told = 0, epochs, False
        # An entry that has a gradient while this has none: of the same unit, or of any.
        self._living: tuple[tuple[int, ...], list[int]] | None = None

    def _bind(self) -> None:
        """Finds the weight in memory: a view that is read again and again costs next to nothing."""
        self._pointer = self._parameter.data_ptr()
        values = self._parameter.detach()
        try:
            self._read = partial(values.numpy().item, *self._index)
        except TypeError:  # on a GPU, or of a type that NumPy does not have
            # A copy that waits on the device: what is read now would be waited for.
            self._read = values[self._index].clone

    def look(self) -> None:
        """Notes the value of now."""
        self._unread.append(self._value())

    def value(self) -> float:
        """The value of now; on a GPU this waits for the device."""
        return float(self._value())

    def _value(self) -> Any:
        if self._parameter.data_ptr() != self._pointer:
            self._bind()
        return self._read()

    def take(self) -> list[float]:
        """The values of all updates that were judged since the last call."""
        judged, self._judged = self._judged, []
        return judged

    def judge(self, epochs: float, optimizer: torch.optim.Optimizer) -> str | None:
        """Takes in what was noted since the last call, and finds a weight that gets no gradient.

        It is said once: when every look at the gradient, over at least one epoch, found exactly 0.

        Args:
            epochs: Passes over the training set, at the update that has just been done.
            optimizer: Of the run.

        Returns:
            What to warn of, or None.
        """
        values, self._unread = self._unread, []
        if isinstance(values[0], Tensor):  # all are fetched from the device at once
            values = torch.stack(values).double().tolist()
        self._judged += values
        moved = values[-1] != self._last or any(value != self._last for value in values)
        self._last = values[-1]
        if self._told:
            return None
        # Without momentum and decay nothing but a gradient moves a weight.
        if (moved and _only_gradients_move(optimizer)) or self._has_gradient():
            self._looks, self._alive_at, self._living = 0, epochs, None
            return None
        self._looks += 1 if moved else len(values)
        if self._looks < _FEWEST_LOOKS or epochs - self._alive_at < 1 - 1e-9:
            return None
        self._told = True
        return self._describe_standstill(epochs - self._alive_at)

    def _has_gradient(self) -> bool:
        """Looks at the last update's gradient, and where else in the parameter there is one."""
        gradient = self._parameter.grad
        if gradient is None:
            return False
        dense = gradient.to_dense() if gradient.is_sparse else gradient
        if dense[self._index].item() != 0:
            return True
        for place in (self._index[:1], ()):
            if self._living is None or len(place) > len(self._living[0]):
                found = dense[place].nonzero()
                if len(found):
                    self._living = (place, [*place, *found[0].tolist()])
        return False

    def _describe_standstill(self, epochs: float) -> str:
        span = f"{epochs:.3g} epoch{'' if epochs < 1.005 else 's'}"
        fact = f"The gradient of {self.name} has been exactly 0 for {span}"
        if self._living is None:
            return f"{fact}: no gradient reaches {self._parameter_name} at all. Watch another."
        unit, other = self._index[0], weight_name(self._parameter_name, self._living[1])
        if self._living[0]:
            why = f"what it multiplies is always 0, while other weights of unit {unit} learn"
        else:
            why = f"unit {unit} is dead, as a ReLU is that no example makes positive"
        return f"{fact}: {why}. Watch another, such as {other}."


def _only_gradients_move(optimizer: torch.optim.Optimizer) -> bool:
    return type(optimizer) is torch.optim.SGD and not any(
        group["momentum"] or group["weight_decay"] for group in optimizer.param_groups
    )


def find_weight(model: nn.Module, asked: str) -> tuple[str, tuple[int, ...]]:
    """The parameter and the index that a name means.

    Args:
        model: Whose parameter.
        asked: `name[i,j]` as in `named_parameters`, a bare name for a single number, or `first`.

    Returns:
        The parameter's name, and the index of one entry.

    Raises:
        UsageError: If there is no such parameter or entry.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    if asked == FIRST and FIRST not in parameters:
        return _first_weight(parameters)
    match = _NAME.fullmatch(asked.strip())
    name = match["parameter"] if match else asked
    if match is None or name not in parameters:
        near = difflib.get_close_matches(name, parameters, n=3, cutoff=0.0)
        listed = ", ".join(f"{n} {_shape(parameters[n])}" for n in near)
        raise UsageError(
            f"The model has no weight {asked!r}. Give a parameter and an index, such as "
            f"{_example(near[0], parameters[near[0]]) if near else 'name[0,0]'}"
            + (f"; the nearest names are {listed}." if near else "; it has no parameters.")
        )
    return name, _read_index(asked, name, match["index"], parameters[name])


def _first_weight(parameters: dict[str, nn.Parameter]) -> tuple[str, tuple[int, ...]]:
    filled = {name: p for name, p in parameters.items() if p.numel()}
    if not filled:
        raise UsageError("The first weight cannot be watched: the model has no parameters.")
    weights = [name for name in filled if name.rpartition(".")[2] == "weight"]
    name = next(iter([*weights, *filled]))
    return name, (0,) * filled[name].ndim


def _read_index(asked: str, name: str, text: str | None, parameter: Tensor) -> tuple[int, ...]:
    words = [word.strip() for word in text.split(",")] if text and text.strip() else []
    shape = tuple(parameter.shape)
    whole = [int(word) for word in words if word.isascii() and word.isdigit()]
    fits = len(whole) == len(words) == len(shape) and all(
        i < n for i, n in zip(whole, shape, strict=True)
    )
    if not fits:
        raise UsageError(
            f"{asked!r} is not one entry of {name}, which has the shape {_shape(parameter)}. Give "
            f"{len(shape)} whole numbers, counted from 0, such as {_example(name, parameter)}."
        )
    return tuple(whole)


def weight_name(parameter: str, index: Sequence[int]) -> str:
    """The parameter's name with the index of an entry."""
    return f"{parameter}[{','.join(map(str, index))}]" if index else parameter


def _shape(parameter: Tensor) -> str:
    return f"({', '.join(map(str, parameter.shape))})"


def _example(name: str, parameter: Tensor) -> str:
    return weight_name(name, [0] * parameter.ndim)
