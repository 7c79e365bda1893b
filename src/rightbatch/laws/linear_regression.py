"""Gaussian linear regression: everything about SGD on it is known exactly.

The examples are x ~ N(0, C), y = xᵀw* + noise of variance s², the loss of one example is
½(xᵀw − y)². Write δ = w − w* and work in the eigenbasis of C, with eigenvalues λ_i and
m_i = E[δ_i²]. Then

    G = Cδ,    tr Σ = (s² + δᵀCδ) tr C + |Cδ|²,                           (gradient and noise)
    m_i' = m_i(1 − 2ηλ_i + η²λ_i²(1 + 1/B)) + η²λ_i(s² + Σ_j λ_j m_j)/B     (one step of SGD)

from E[xxᵀAxxᵀ] = 2CAC + C tr(CA). The expected loss, the number of steps to a target, the best
learning rate, the edge of divergence and the critical batch follow without any sampling. This is
the truth that the estimators and the planner are tested against.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]

_GRID = 65
"""Learning rates looked at in each round of the search for the best one."""
_ROUNDS = 5
"""Rounds of that search; each narrows the range 32 times."""


@dataclass(frozen=True, kw_only=True)
class LinearRegression:
    """A linear regression problem and where training starts, in the eigenbasis of C.

    Attributes:
        eigenvalues: λ_i of the covariance C of the inputs, all positive, length d.
        offsets: δ_i = (w − w*)_i at the start, length d.
        noise_variance: s², the variance of the targets about their mean.

    Raises:
        ValueError: If lengths differ, an eigenvalue is not positive or s² is negative.

    Example:
        >>> simple_noise_scale(LinearRegression(eigenvalues=(1.0,) * 5, offsets=(1.0,) * 5))
        6.0
    """

    eigenvalues: tuple[float, ...]
    offsets: tuple[float, ...]
    noise_variance: float = 0.0

    def __post_init__(self) -> None:
        if len(self.eigenvalues) != len(self.offsets) or not self.eigenvalues:
            raise ValueError(
                f"There are {len(self.eigenvalues)} eigenvalues and {len(self.offsets)} offsets; "
                "give one of each per dimension."
            )
        if min(self.eigenvalues) <= 0:
            raise ValueError(f"The smallest eigenvalue is {min(self.eigenvalues)}; make it > 0.")
        if self.noise_variance < 0:
            raise ValueError(f"noise_variance is {self.noise_variance}; make it ≥ 0.")

    @property
    def dimension(self) -> int:
        """Number of weights d."""
        return len(self.eigenvalues)


def from_covariance(
    covariance: ArrayLike, offset: ArrayLike, *, noise_variance: float = 0.0
) -> LinearRegression:
    """The problem of a full covariance matrix, turned into its eigenbasis.

    Args:
        covariance: C, shape (d, d), symmetric positive definite.
        offset: w − w* at the start, shape (d,).
        noise_variance: s².

    Returns:
        The problem with λ = eig(C) and δ = Qᵀ(w − w*).
    """
    eigenvalues, vectors = np.linalg.eigh(np.asarray(covariance, dtype=float))
    rotated = vectors.T @ np.asarray(offset, dtype=float)
    return LinearRegression(
        eigenvalues=tuple(eigenvalues.tolist()),
        offsets=tuple(rotated.tolist()),
        noise_variance=noise_variance,
    )


def _eigenvalues(problem: LinearRegression) -> Array:
    return np.asarray(problem.eigenvalues)


def _start(problem: LinearRegression) -> Array:
    return np.asarray(problem.offsets) ** 2


def gradient_norm_squared(problem: LinearRegression) -> float:
    """|G|² = δᵀC²δ at the start.

    Args:
        problem: The problem.

    Returns:
        The squared norm of the expected gradient.
    """
    return float(np.sum(_eigenvalues(problem) ** 2 * _start(problem)))


def gradient_trace(problem: LinearRegression) -> float:
    """Tr Σ = (s² + δᵀCδ) tr C + |Cδ|² at the start.

    Args:
        problem: The problem.

    Returns:
        The trace of the covariance of single-example gradients.
    """
    eigenvalues = _eigenvalues(problem)
    spread = problem.noise_variance + float(np.sum(eigenvalues * _start(problem)))
    return spread * float(np.sum(eigenvalues)) + gradient_norm_squared(problem)


def simple_noise_scale(problem: LinearRegression) -> float:
    """B_simple = tr Σ / |G|² at the start (McCandlish et al. 2018, eq. 2.9).

    Args:
        problem: The problem.

    Returns:
        The noise scale in examples.
    """
    return gradient_trace(problem) / gradient_norm_squared(problem)


def curvature_noise_scale(problem: LinearRegression) -> float:
    """B_noise = tr(HΣ)/GᵀHG = [(s² + δᵀCδ) tr C² + δᵀC³δ] / δᵀC³δ at the start.

    The Hessian-weighted noise scale (McCandlish et al. 2018, eq. 2.8).

    Args:
        problem: The problem.

    Returns:
        The noise scale in examples.
    """
    eigenvalues, moments = _eigenvalues(problem), _start(problem)
    spread = problem.noise_variance + float(np.sum(eigenvalues * moments))
    cubic = float(np.sum(eigenvalues**3 * moments))
    return (spread * float(np.sum(eigenvalues**2)) + cubic) / cubic


def initial_loss(problem: LinearRegression) -> float:
    """L₀ = ½ Σ λ_i δ_i², the expected loss above its floor s²/2 at the start.

    Args:
        problem: The problem.

    Returns:
        The excess loss.
    """
    return 0.5 * float(np.sum(_eigenvalues(problem) * _start(problem)))


def loss_by_recursion(
    problem: LinearRegression, *, learning_rates: ArrayLike, global_batch: float, num_steps: int
) -> Array:
    """The expected excess loss after each step, by the recursion for m_i itself.

    Args:
        problem: The problem.
        learning_rates: η, shape (r,).
        global_batch: B, examples per step (drawn with replacement).
        num_steps: T.

    Returns:
        ½ Σ λ_i m_i after 0 … T steps, shape (r, T + 1), the floor s²/2 left out; infinite
            where training diverged beyond the floats.
    """
    eta = np.atleast_1d(np.asarray(learning_rates, dtype=float))[:, None]
    eigenvalues = _eigenvalues(problem)
    keep = 1 - 2 * eta * eigenvalues + (eta * eigenvalues) ** 2 * (1 + 1 / global_batch)
    moments = np.broadcast_to(_start(problem), (len(eta), problem.dimension))
    losses = np.empty((len(eta), num_steps + 1))
    losses[:, 0] = moments @ eigenvalues / 2
    with np.errstate(over="ignore", invalid="ignore"):
        for step in range(1, num_steps + 1):
            spread = problem.noise_variance + (moments @ eigenvalues)[:, None]
            moments = keep * moments + eta**2 * eigenvalues * spread / global_batch
            losses[:, step] = moments @ eigenvalues / 2
    return np.nan_to_num(losses, nan=np.inf, posinf=np.inf)


@dataclass(frozen=True, kw_only=True)
class _Modes:
    """L(t) = Σ_k (decaying_k ρ_k^t + driven_k (1 − ρ_k^t)/(1 − ρ_k)), one row per η."""

    rho: Array
    decaying: Array
    driven: Array

    def loss(self, steps: Array) -> Array:
        """Excess loss at `steps`, shape (r, t) or broadcastable, for each of the r rows."""
        rho, steps = self.rho[:, :, None], np.asarray(steps)[..., None, :]
        with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
            # log1p keeps 1 − ρ^t exact where ρ is close to 1.
            power = np.where(rho > 0, rho**steps, np.where(steps == 0, 1.0, 0.0))
            geometric = np.where(np.abs(1 - rho) < 1e-13, steps, (1 - power) / (1 - rho))
            terms = self.decaying[:, :, None] * power
            if np.any(self.driven):
                terms = terms + self.driven[:, :, None] * geometric
            return np.nan_to_num(terms.sum(axis=1), nan=np.inf, posinf=np.inf)


def _modes(problem: LinearRegression, eta: Array, global_batch: float) -> _Modes:
    """Diagonalises the step m' = Mm + g; M = diag(…) + η²λλᵀ/B is symmetric and has ρ ≥ 0."""
    eigenvalues = _eigenvalues(problem)
    scaled = eta[:, None] * eigenvalues
    diagonal = (1 - scaled) ** 2 + scaled**2 / global_batch
    matrix = scaled[:, :, None] * scaled[:, None, :] / global_batch
    matrix = matrix + diagonal[:, :, None] * np.eye(problem.dimension)
    rho, vectors = np.linalg.eigh(matrix)
    readout = np.einsum("i,rik->rk", eigenvalues / 2, vectors)
    drive = eta[:, None] ** 2 * eigenvalues * problem.noise_variance / global_batch
    return _Modes(
        rho=np.maximum(rho, 0.0),
        decaying=readout * np.einsum("i,rik->rk", _start(problem), vectors),
        driven=readout * np.einsum("ri,rik->rk", drive, vectors),
    )


def expected_loss(
    problem: LinearRegression,
    *,
    learning_rates: ArrayLike,
    global_batch: float,
    steps: ArrayLike,
) -> Array:
    """The expected excess loss at any step numbers, in closed form.

    The step is linear in m, so L(t) is a sum of d exponentials: no loop over steps.

    Args:
        problem: The problem.
        learning_rates: η, shape (r,).
        global_batch: B.
        steps: t ≥ 0, shape (t,); need not be whole.

    Returns:
        Shape (r, t); infinite where training diverged beyond the floats.
    """
    eta = np.atleast_1d(np.asarray(learning_rates, dtype=float))
    return _modes(problem, eta, global_batch).loss(np.atleast_1d(np.asarray(steps, dtype=float)))


def divergence_edge(problem: LinearRegression, *, global_batch: float) -> float:
    """The learning rate above which the expected loss grows without bound.

    M has spectral radius 1 where Σ_i ηλ_i / (2B − ηλ_i(B + 1)) = 1, the only solution below
    2B/((B + 1) λ_max).

    Args:
        problem: The problem.
        global_batch: B.

    Returns:
        The edge.
    """
    eigenvalues, batch = _eigenvalues(problem), float(global_batch)
    low, high = 0.0, 2 * batch / ((batch + 1) * float(np.max(eigenvalues)))
    for _ in range(200):
        middle = (low + high) / 2
        scaled = middle * eigenvalues
        if float(np.sum(scaled / (2 * batch - scaled * (batch + 1)))) < 1:
            low = middle
        else:
            high = middle
    return low


def steps_to_target(
    problem: LinearRegression,
    *,
    learning_rates: ArrayLike,
    global_batch: float,
    target_loss: float,
    max_steps: float = 1e7,
) -> Array:
    """Steps until the expected excess loss is at the target, for each learning rate.

    Between two whole steps ln L is taken as linear, which is exact for C = I and makes S(B) smooth.
    The first crossing is looked for at every step up to 100, then at steps 1 % apart.

    Args:
        problem: The problem.
        learning_rates: η, shape (r,).
        global_batch: B.
        target_loss: Excess loss to reach (the floor s²/2 left out).
        max_steps: Where the search ends.

    Returns:
        Steps, shape (r,); infinite where the target is not met within `max_steps`.
    """
    eta = np.atleast_1d(np.asarray(learning_rates, dtype=float))
    modes = _modes(problem, eta, global_batch)
    grid = _step_grid(max_steps)
    below = modes.loss(grid) <= target_loss
    met = below.any(axis=1)
    first = np.argmax(below, axis=1)
    high = grid[first]
    low = grid[np.maximum(first - 1, 0)]
    while np.any(high - low > 1):
        middle = np.floor((low + high) / 2)
        reached = modes.loss(middle[:, None])[:, 0] <= target_loss
        low, high = np.where(reached, low, middle), np.where(reached, middle, high)
    loss_low, loss_high = modes.loss(low[:, None])[:, 0], modes.loss(high[:, None])[:, 0]
    with np.errstate(divide="ignore", invalid="ignore"):
        fraction = np.log(loss_low / target_loss) / np.log(loss_low / loss_high)
    fraction = np.where(np.isfinite(fraction), fraction, 1.0)
    return np.where(met, np.where(first == 0, 0.0, low + fraction * (high - low)), np.inf)


def _step_grid(max_steps: float) -> Array:
    dense = np.arange(0.0, min(100.0, max_steps) + 1)
    if max_steps <= 100:
        return dense
    points = math.ceil(math.log(max_steps / 100) / math.log(1.01)) + 1
    return np.unique(np.concatenate([dense, np.floor(np.geomspace(100, max_steps, points))]))


@dataclass(frozen=True, kw_only=True)
class BestSteps:
    """The fewest expected steps to a target at one batch, and the learning rate that does it.

    Attributes:
        steps: Fewest steps; None when no learning rate meets the target.
        learning_rate: The learning rate; None likewise.
    """

    steps: float | None
    learning_rate: float | None


def best_steps(
    problem: LinearRegression,
    *,
    global_batch: float,
    target_loss: float,
    max_steps: float = 1e7,
) -> BestSteps:
    """S(B): the fewest steps to the target with the learning rate tuned at this batch.

    Args:
        problem: The problem.
        global_batch: B.
        target_loss: Excess loss to reach.
        max_steps: Where the search ends.

    Returns:
        Steps and learning rate, to a relative error of about 1e-6 in the learning rate.
    """
    edge = divergence_edge(problem, global_batch=global_batch)
    low, high = math.log(edge) - 18.0, math.log(edge)
    best = BestSteps(steps=None, learning_rate=None)
    for _ in range(_ROUNDS):
        log_rates = np.linspace(low, high, _GRID)
        steps = steps_to_target(
            problem,
            learning_rates=np.exp(log_rates),
            global_batch=global_batch,
            target_loss=target_loss,
            max_steps=max_steps,
        )
        index = int(np.argmin(steps))
        if not math.isfinite(steps[index]):
            return best
        best = BestSteps(steps=float(steps[index]), learning_rate=math.exp(log_rates[index]))
        low, high = log_rates[max(index - 1, 0)], log_rates[min(index + 1, _GRID - 1)]
    return best


def isotropic_best_learning_rate(dimension: int, *, global_batch: float) -> float:
    """η* = 1/(1 + (d + 1)/B) for C = I, s = 0; training diverges above 2η*.

    Args:
        dimension: d.
        global_batch: B.

    Returns:
        The best learning rate of every step.
    """
    return 1 / (1 + (dimension + 1) / global_batch)


def isotropic_steps(dimension: int, *, global_batch: float, loss_ratio: float) -> float:
    """S = ln(L₀/L_T) / ln(1 + B/(d + 1)) for C = I, s = 0, at the best learning rate.

    Proportional to a hyperbola S_min(1 + B_c/B) only while B is below about d + 1: for large B it
    keeps falling, like 1/ln B.

    Args:
        dimension: d.
        global_batch: B.
        loss_ratio: L₀/L_T, how many times the loss has to fall.

    Returns:
        Steps, not rounded.
    """
    return math.log(loss_ratio) / math.log1p(global_batch / (dimension + 1))


def stationary_loss(
    problem: LinearRegression, *, learning_rate: float, global_batch: float
) -> float:
    """The expected excess loss around which SGD wavers in the end, ½ Σ λ_i m_i with m' = m.

    L = ½ s² q/(1 − q),  q = Σ_i ηλ_i / (2B − ηλ_i(B + 1))

    Args:
        problem: The problem.
        learning_rate: η.
        global_batch: B.

    Returns:
        The excess loss, the floor s²/2 left out; infinite beyond the edge of divergence.

    Example:
        >>> problem = LinearRegression(eigenvalues=(1.0,), offsets=(1.0,), noise_variance=1.0)
        >>> stationary_loss(problem, learning_rate=0.5, global_batch=1)
        0.5
    """
    if learning_rate >= divergence_edge(problem, global_batch=global_batch):
        return math.inf
    scaled = learning_rate * _eigenvalues(problem)
    share = float(np.sum(scaled / (2 * global_batch - scaled * (global_batch + 1))))
    return problem.noise_variance * share / (1 - share) / 2
