"""What a study runs: batch sizes, learning rates, seeds, and how far each training goes."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from rightbatch.errors import UsageError
from rightbatch.laws.progress import steps_to_cover

FULL = "full"
BatchSizes = Sequence[int | str] | str
LearningRates = Sequence[float] | str
Unit = Literal["epochs", "steps", "examples", "seconds"]
SearchName = Literal["grid", "race", "tpe", "gp", "random"]
SAMPLERS: tuple[SearchName, ...] = ("tpe", "gp", "random")
"""Searches that Optuna's samplers do."""
DEFAULT_TRIALS = 20


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How far every training of a study goes.

    Attributes:
        unit: What is the same for all: epochs, steps, examples, or modelled seconds.
        amount: How many.
    """

    unit: Unit
    amount: float

    def steps(
        self,
        global_batch: int,
        num_examples: int,
        step_seconds: float | None,
        smallest: int = 1,
    ) -> int:
        """Updates at one batch.

        Args:
            global_batch: B.
            num_examples: N.
            step_seconds: Of one update at B; needed for a budget in seconds.
            smallest: Examples that the model needs in one pass.

        Returns:
            At least 1.
        """
        if self.unit == "steps":
            return max(1, round(self.amount))
        if self.unit == "seconds":
            assert step_seconds is not None  # a study with such a budget measures it first
            return max(1, math.floor(self.amount / step_seconds))
        examples = self.amount * (num_examples if self.unit == "epochs" else 1)
        return max(1, steps_to_cover(examples, global_batch, num_examples, smallest))


@dataclass(frozen=True, kw_only=True)
class StudyDesign:
    """What a study runs.

    Attributes:
        batch_sizes: Ascending, each between 1 and N.
        learning_rates: The same for every size, ascending; None: found for each size from its
            range test, and extended where the best of them is the first or the last.
        seeds: Each decides initial weights and data order, alike at every size and rate.
        budget: How far every training goes.
        target: What counts as trained, such as `val_loss<=0.15`, or None.
        search: Which of the pairs are run, and how far.
        trials: How many pairs, where a sampler chooses them; otherwise None.
        watch: The weight whose path is followed in every training, such as `0.weight[3,1]`, or
            `first`: the first weight of the first layer.
    """

    batch_sizes: tuple[int, ...]
    learning_rates: tuple[float, ...] | None
    seeds: tuple[int, ...]
    budget: Budget
    target: str | None = None
    search: SearchName = "grid"
    trials: int | None = None
    watch: str = "first"


def sizes_around(low: int, high: int, num_examples: int, *, factor: int = 4) -> tuple[int, ...]:
    """Powers of two around an interval, such as the `near_best` of a plan.

    Args:
        low: Its lower end.
        high: Its upper end.
        num_examples: N: no size is larger.
        factor: How far beyond either end.

    Returns:
        Ascending.

    Example:
        >>> sizes_around(32, 64, 200)
        (8, 16, 32, 64, 128, 200)
    """
    least, most = max(1, low // factor), min(num_examples, high * factor)
    powers = {2**k for k in range(num_examples.bit_length()) if least <= 2**k <= most}
    return tuple(sorted(powers | ({num_examples} if most == num_examples else set())))


def make_design(
    num_examples: int,
    *,
    batch_sizes: BatchSizes,
    learning_rates: LearningRates,
    seeds: int | Sequence[int],
    epochs: float | None = None,
    steps: int | None = None,
    examples: int | None = None,
    seconds: float | None = None,
    target: str | None = None,
    search: SearchName = "grid",
    trials: int | None = None,
    watch: str = "first",
) -> StudyDesign:
    """A design from what a user writes.

    Args:
        num_examples: N.
        batch_sizes: Numbers and `full`; `powers` (1, 2, 4, … and N); or `auto` (every second
            power of two from 8 to 512, and N where that is near). As a list, or as a text with
            commas.
        learning_rates: Numbers; a logarithmic grid as `first:last:count`; or `auto`.
        seeds: How many, counted from 0, or which.
        epochs: Passes of each training.
        steps: Or updates.
        examples: Or training examples.
        seconds: Or modelled seconds.
        target: What counts as trained.
        search: Which pairs are run: all (`grid`), all for a part of their way and the better ones
            farther (`race`), or those that a sampler of Optuna asks for (`tpe`, `gp`, `random`).
        trials: How many pairs a sampler asks for. Default: 20.
        watch: The weight to follow.

    Returns:
        The design.

    Raises:
        UsageError: If something is out of range, or not exactly one length is given.

    Example:
        >>> design = make_design(
        ...     1000, batch_sizes="full,100,1", learning_rates="0.1:10:3", seeds=2, epochs=5
        ... )
        >>> design.batch_sizes, [round(rate, 6) for rate in design.learning_rates]
        ((1, 100, 1000), [0.1, 1.0, 10.0])
    """
    return StudyDesign(
        batch_sizes=_read_sizes(batch_sizes, num_examples),
        learning_rates=_read_rates(learning_rates),
        seeds=_read_seeds(seeds),
        budget=_read_budget(
            [("epochs", epochs), ("steps", steps), ("examples", examples), ("seconds", seconds)]
        ),
        target=target,
        search=search,
        trials=_read_trials(search, trials),
        watch=watch,
    )


def _read_trials(search: SearchName, trials: int | None) -> int | None:
    if search not in get_args(SearchName):
        raise UsageError(f"The search is {search!r}. Choose {', '.join(get_args(SearchName))}.")
    if search not in SAMPLERS:
        if trials is not None:
            raise UsageError(
                f"trials is {trials}, and the search {search!r} decides itself how many pairs are "
                f"run. Drop it, or choose {', '.join(SAMPLERS)}."
            )
        return None
    if trials is not None and trials < 1:
        raise UsageError(f"trials is {trials}. Ask for at least one pair.")
    return DEFAULT_TRIALS if trials is None else trials


def _read_sizes(asked: BatchSizes, num_examples: int) -> tuple[int, ...]:
    words = asked.split(",") if isinstance(asked, str) else [str(size) for size in asked]
    N, sizes = num_examples, set[int]()
    for word in (word.strip() for word in words):
        if word == FULL:
            sizes.add(N)
        elif word == "powers":
            sizes |= {2**k for k in range(N.bit_length()) if 2**k <= N} | {N}
        elif word == "auto":
            sizes |= {size for size in (8, 32, 128, 512) if size <= N}
            sizes |= {N} if N <= 2048 else set()
        elif word.isascii() and word.isdigit() and 1 <= int(word) <= N:
            sizes.add(int(word))
        else:
            raise UsageError(
                f"A batch size is {word!r}. Give numbers from 1 to {N:,}, the size of the training "
                "set, and full, powers or auto."
            )
    if not sizes:
        raise UsageError("There is no batch size. Give at least one.")
    return tuple(sorted(sizes))


def _read_rates(asked: LearningRates) -> tuple[float, ...] | None:
    if isinstance(asked, str) and asked.strip() == "auto":
        return None
    words = asked.split(",") if isinstance(asked, str) else [str(rate) for rate in asked]
    rates: set[float] = set()
    for word in words:
        rates |= set(_read_grid(word) if ":" in word else [_read_rate(word)])
    if not rates:
        raise UsageError("There is no learning rate. Give at least one, or auto.")
    return tuple(sorted(rates))


def _read_grid(text: str) -> list[float]:
    parts = text.split(":")
    count = parts[2].strip() if len(parts) == 3 else ""
    if not (count.isascii() and count.isdigit() and int(count) >= 2):
        raise UsageError(
            f"The learning rates are {text!r}. Write a grid as first:last:count, such as 1e-3:1:7."
        )
    first, last = _read_rate(parts[0]), _read_rate(parts[1])
    # Rounded, so that 0.001:1:4 has 0.01 in it and not 0.010000000000000002.
    return [float(f"{rate:.12g}") for rate in np.geomspace(first, last, int(count))]


def _read_rate(text: str) -> float:
    try:
        rate = float(text)
    except ValueError:
        rate = math.nan
    if not (math.isfinite(rate) and rate > 0):
        raise UsageError(
            f"A learning rate is {text.strip()!r}. Give positive numbers, a grid such as 1e-3:1:7, "
            "or auto."
        )
    return rate


def _read_seeds(asked: int | Sequence[int]) -> tuple[int, ...]:
    try:
        listed = list(asked) if isinstance(asked, Iterable) else range(operator.index(asked))
        seeds = tuple(dict.fromkeys(operator.index(seed) for seed in listed))
    except TypeError:
        seeds = ()
    if not seeds or min(seeds) < 0:
        raise UsageError(f"seeds is {asked}. Give how many, at least 1, or a list of them from 0.")
    return seeds


def _read_budget(asked: Sequence[tuple[Unit, float | None]]) -> Budget:
    given: list[tuple[Unit, float]] = [(u, amount) for u, amount in asked if amount is not None]
    if len(given) != 1:
        many = " and ".join(unit for unit, _ in given) or "no length"
        raise UsageError(
            f"The study was given {many}. Give exactly one of epochs, steps, examples and seconds."
        )
    unit, amount = given[0]
    if not (math.isfinite(amount) and amount > 0):
        raise UsageError(f"{unit} is {amount}. Give a positive number.")
    return Budget(unit=unit, amount=amount)
