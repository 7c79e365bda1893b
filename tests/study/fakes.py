"""Contestants without a network, whose loss is known exactly at every batch and learning rate."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rightbatch.laws.linear_regression import LinearRegression, best_steps, steps_to_target
from rightbatch.laws.progress import ProgressPrior, log_extra_steps, log_rate, relative_log_steps
from rightbatch.study.race import Contestant, Look, Race, RaceSettings
from rightbatch.study.records import RaceRecord

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

    def fork(self, global_batch: int, learning_rate: float) -> Quadratic:
        return replace(self, global_batch=global_batch, learning_rate=learning_rate)

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
        steps = best_steps(self.problem, global_batch=size, target_loss=self.excess).steps
        return math.inf if steps is None else steps * price(size)

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
    noise_variance: float = 0.3,
    dimension: int = 8,
) -> QuadraticProblem:
    """A problem with the same loss on each eigenvalue; the target is a share of it."""
    eigenvalues = np.geomspace(2.0, smallest, dimension)
    problem = LinearRegression(
        eigenvalues=tuple(eigenvalues.tolist()),
        offsets=tuple((1 / np.sqrt(eigenvalues)).tolist()),
        noise_variance=noise_variance,
    )
    target = None if share is None else share * dimension / 2 + noise_variance / 2
    return QuadraticProblem(problem, target)


# ----------------------------------------------------------------------------- the law of progress


@dataclass
class Lawful:
    """A run whose loss is F(p): progress as the law of progress counts it, with a little noise.

    F(p) = 3(1 + p)^−a. A run under penalty w stands at the progress p·e^−w.
    """

    maker: LawfulProblem
    global_batch: int
    learning_rate: float
    progress: float
    rng: np.random.Generator

    def fork(self, global_batch: int, learning_rate: float) -> Lawful:
        return replace(
            self,
            global_batch=global_batch,
            learning_rate=learning_rate,
            rng=np.random.default_rng(self.rng.integers(2**31)),
        )

    def advance(self, num_steps: int) -> None:
        self.maker.counter.examples += num_steps * self.global_batch
        rate = float(np.exp(log_rate(self.maker.law, np.log([float(self.global_batch)])))[0, 0])
        self.progress += num_steps * self.learning_rate * rate

    def look(self) -> Look:
        self.maker.counter.looks += 1
        extra = self.maker.extra(self.global_batch, self.learning_rate)
        if extra > 6.0 and self.progress > 0:
            return _look(math.inf, self.maker.target)
        noise = math.exp(self.maker.noise * self.rng.standard_normal())
        return _look(
            self.maker.loss_at(self.progress * math.exp(-extra)) * noise, self.maker.target
        )


@dataclass(frozen=True)
class LawfulProblem:
    """Makes contestants that follow one planted law, shape (1, 8)."""

    prior: ProgressPrior
    law: Array
    target: float
    noise: float = 0.005
    power: float = 0.5
    counter: Counter = field(default_factory=Counter)

    def __call__(self, global_batch: int, learning_rate: float, seed: int) -> Lawful:
        return Lawful(self, global_batch, learning_rate, 0.0, np.random.default_rng(seed))

    def loss_at(self, progress: float) -> float:
        """F(p)."""
        return 3.0 * (1 + progress) ** -self.power

    def extra(self, batch: int, rate: float) -> float:
        """w(B, η)."""
        at, with_rate = np.log([float(batch)]), np.log([rate])
        return float(log_extra_steps(self.prior, self.law, at, with_rate, from_fresh=1.0)[0, 0])

    def cost(self, batch: int, rate: float, price: Price) -> float:
        """Of one cell, up to a constant factor."""
        at, with_rate = np.log([float(batch)]), np.log([rate])
        steps = relative_log_steps(self.prior, self.law, at, with_rate)
        return math.exp(float(steps[0, 0])) * price(batch)

    def best(self, price: Price, sizes: Sequence[int] = SIZES) -> tuple[int, float]:
        """The cheapest cell, on a fine grid of learning rates."""
        centre = math.exp(self.law[0, 2])
        rates = [centre * 2.0 ** (k / 8) for k in range(-96, 97)]
        cells = [(size, rate) for size in sizes for rate in rates]
        return min(cells, key=lambda cell: self.cost(*cell, price))

    def regret(self, price: Price, batch: int, rate: float) -> float:
        """Cost of a choice over that of the cheapest cell, − 1."""
        return self.cost(batch, rate, price) / self.cost(*self.best(price), price) - 1


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
        settings=settings or RaceSettings(max_baseline_examples=2_000_000),
        target_loss=target_loss,
        seed=seed,
        **more,
    )


def cells_run(record: RaceRecord) -> set[tuple[int, float]]:
    """The cells that a race trained in to some length: its baseline's and its fresh runs'."""
    return {
        (t.global_batch, t.learning_rate)
        for t in record.trials
        if t.kind in {"baseline", "run"} and t.steps > 0
    }
