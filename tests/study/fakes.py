"""Contestants without a network, whose loss is known exactly at every batch and learning rate."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rightbatch.laws.critical_batch import USUAL
from rightbatch.laws.linear_regression import LinearRegression, best_steps, steps_to_target
from rightbatch.study.conclude import choose_trial, conclude, trial_curves
from rightbatch.study.race import Race, RaceSettings
from rightbatch.study.records import RaceRecord, TrialRecord
from rightbatch.study.runs import Contestant, Look

Array = NDArray[np.float64]
Price = Callable[[int], float]
Fresh = Callable[[int, float, int], Contestant]
SIZES = tuple(2**k for k in range(11))


@dataclass
class Counter:
    """What all contestants of a race have done together."""

    examples: int = 0
    looks: int = 0


def _look(loss: float, target: float | None) -> Look:
    if not math.isfinite(loss):
        return Look(math.inf, None if target is None else False)
    return Look(loss, None if target is None else loss <= target)


# --------------------------------------------------------------------------- exact expected SGD


@dataclass
class Quadratic:
    """Expected SGD on Gaussian linear regression: the exact recursion of science.md 6.2.

    One step maps the moments m to Mm + g; n steps are a power of one matrix.
    """

    problem: LinearRegression
    target: float | None
    global_batch: int
    learning_rate: float
    moments: Array
    counter: Counter

    def advance(self, num_steps: int) -> None:
        self.counter.examples += num_steps * self.global_batch
        eigenvalues, d = np.array(self.problem.eigenvalues), self.problem.dimension
        scaled, batch = self.learning_rate * eigenvalues, self.global_batch
        step = np.zeros((d + 1, d + 1))
        step[:d, :d] = np.diag((1 - scaled) ** 2 + scaled**2 / batch)
        step[:d, :d] += np.outer(scaled, scaled) / batch
        step[:d, d] = self.learning_rate * scaled * self.problem.noise_variance / batch
        step[d, d] = 1.0
        with np.errstate(all="ignore"):
            power = np.linalg.matrix_power(step, num_steps)
            self.moments = (power @ np.append(self.moments, 1.0))[:d]

    def look(self) -> Look:
        self.counter.looks += 1
        with np.errstate(all="ignore"):
            excess = float(self.moments @ np.array(self.problem.eigenvalues)) / 2
        return _look(excess + self.problem.noise_variance / 2, self.target)


@cache
def _fewest_steps(problem: LinearRegression, size: int, excess: float) -> float:
    """At one batch and its best learning rate."""
    found = best_steps(problem, global_batch=size, target_loss=excess, max_steps=1e5)
    return math.inf if found.steps is None else found.steps


@dataclass(frozen=True)
class QuadraticProblem:
    """Makes contestants; `target` is a whole loss, its floor s²/2 included."""

    problem: LinearRegression
    target: float | None
    counter: Counter = field(default_factory=Counter)

    def __call__(self, global_batch: int, learning_rate: float, seed: int) -> Quadratic:
        start = np.array(self.problem.offsets) ** 2
        return Quadratic(
            self.problem, self.target, global_batch, learning_rate, start, self.counter
        )

    @property
    def excess(self) -> float:
        """The target without the floor."""
        assert self.target is not None
        return self.target - self.problem.noise_variance / 2

    def best_cost(self, size: int, price: Price) -> float:
        """Of one size at its best learning rate."""
        return _fewest_steps(self.problem, size, self.excess) * price(size)

    def best_size(self, price: Price, sizes: Sequence[int] = SIZES) -> int:
        """The size of least cost."""
        return min(sizes, key=lambda size: self.best_cost(size, price))

    def regret(self, price: Price, batch: int, rate: float, sizes: Sequence[int] = SIZES) -> float:
        """Modelled cost of a choice over that of the best of all sizes at its best rate, − 1."""
        steps = steps_to_target(
            self.problem, learning_rates=[rate], global_batch=batch, target_loss=self.excess
        )
        best = min(self.best_cost(size, price) for size in sizes)
        return float(steps[0]) * price(batch) / best - 1


def make_quadratic(
    *,
    share: float | None,
    smallest: float = 0.02,
    largest: float = 2.0,
    noise_variance: float = 0.3,
    dimension: int = 8,
) -> QuadraticProblem:
    """A problem with the same loss on each eigenvalue; the target is a share of it."""
    eigenvalues = np.geomspace(largest, smallest, dimension)
    problem = LinearRegression(
        eigenvalues=tuple(eigenvalues.tolist()),
        offsets=tuple((1 / np.sqrt(eigenvalues)).tolist()),
        noise_variance=noise_variance,
    )
    target = None if share is None else share * dimension / 2 + noise_variance / 2
    return QuadraticProblem(problem, target)


# ------------------------------------------------------------------------------ a planted answer


@dataclass
class Planted:
    """A run of `PlantedProblem`."""

    problem: PlantedProblem
    global_batch: int
    learning_rate: float
    seed: int
    steps: int = 0

    def advance(self, num_steps: int) -> None:
        self.problem.counter.examples += num_steps * self.global_batch
        self.steps += num_steps

    def look(self) -> Look:
        self.problem.counter.looks += 1
        rate = self.problem.progress_rate(self.global_batch, self.learning_rate)
        if rate <= 0:
            return _look(math.inf, self.problem.target)
        noise = self.problem.noise * np.random.default_rng((self.seed, self.steps)).normal()
        loss = self.problem.loss_at(self.steps * rate) * math.exp(noise)
        return _look(loss, self.problem.target)


@dataclass(frozen=True)
class PlantedProblem:
    """Makes contestants whose loss is F(p) = 3(1 + p)^−a at the progress p.

    A step makes the progress η(1 − (η/η_c)³) below the cliff η_c = η_∞/(1 + B_c/B) and diverges
    beyond it. The best learning rate is 4^(−1/3) η_c, and steps at it are exactly ∝ 1 + B_c/B.
    """

    target: float | None = 3 * 61**-0.5
    critical: float = 100.0
    cliff_at_large: float = 2.0
    power: float = 0.5
    noise: float = 0.0
    counter: Counter = field(default_factory=Counter)

    def __call__(self, global_batch: int, learning_rate: float, seed: int) -> Planted:
        return Planted(self, global_batch, learning_rate, seed)

    def cliff(self, batch: float) -> float:
        """η_c."""
        return self.cliff_at_large / (1 + self.critical / batch)

    def best_rate(self, batch: float) -> float:
        """The learning rate of the fewest steps."""
        return self.cliff(batch) * 4 ** (-1 / 3)

    def progress_rate(self, batch: float, rate: float) -> float:
        """Progress of one step; not positive beyond the cliff."""
        return rate * (1 - (rate / self.cliff(batch)) ** 3)

    def loss_at(self, progress: float) -> float:
        """F(p)."""
        return 3.0 * (1 + progress) ** -self.power

    def steps(self, batch: float, rate: float) -> float:
        """To the target."""
        assert self.target is not None
        progress = (3 / self.target) ** (1 / self.power) - 1
        made = self.progress_rate(batch, rate)
        return progress / made if made > 0 else math.inf

    def regret(self, price: Price, batch: int, rate: float, sizes: Sequence[int] = SIZES) -> float:
        """Cost of a choice over that of the best of all sizes at its best rate, − 1."""
        best = min(self.steps(size, self.best_rate(size)) * price(size) for size in sizes)
        return self.steps(batch, rate) * price(batch) / best - 1


# ---------------------------------------------------------------------------------------- races


def linear_price(alpha: float, beta: float) -> Price:
    """t(B) = α + βB."""
    return lambda global_batch: alpha + beta * global_batch


def make_race(
    fresh: Fresh,
    price: Price,
    *,
    first_lr: float,
    target_loss: float | None = None,
    settings: RaceSettings | None = None,
    sizes: Sequence[int] = SIZES,
    normalised: bool = False,
    averaging: bool = False,
    usual_batch: float = USUAL["plain"],
    seed: int = 0,
    **more: Any,
) -> Race:
    """A race that has not been run yet."""
    return Race(
        fresh,
        sizes=sizes,
        price=price,
        first_lr=first_lr,
        normalised=normalised,
        averaging=averaging,
        usual_batch=usual_batch,
        settings=settings or RaceSettings(most_examples=2_000_000),
        target_loss=target_loss,
        seed=seed,
        **more,
    )


def choose(record: RaceRecord, price: Price) -> TrialRecord:
    """The run that a race's record recommends."""
    outlook = conclude(record, price)
    return record.trials[choose_trial(outlook, trial_curves(record), record.leader)]
