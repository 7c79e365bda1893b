"""Keskar's φ: the highest loss in a small box around the weights.

φ(x, ε, A) = 100 · (max_{y ∈ C_ε} f(x + Ay) − f(x)) / (1 + f(x)),
C_ε = {y : |y_i| ≤ ε(|(A⁺x)_i| + 1)},   ε = 1e-3 and 5e-4,

over all directions (A = I) and in a random subspace (A an n × 100 matrix of independent standard
normal numbers, A⁺ its pseudo-inverse; n columns where n < 100). The maximum is searched by ten
iterations of L-BFGS-B. At a minimum the gradient at x is about 0 and tells no direction, so each
search starts from a random point of the box; there are several, and their spread is kept. The
search works on u = y/half width ∈ [−1, 1], with the loss in units of its mean slope at the start,
so that a step of length 1 crosses the box whatever ε and the curvature are.

*A lower bound*: what was found is in the box, and something higher may be. In a random subspace it
depends on A, which is drawn anew for each start; the mean over these is reported. A has columns of
norm √n, so Ay is about √n times as long as y: the two kinds of φ are on different scales.

*Not invariant*: a ReLU network computes the same function when the weights into a unit are
multiplied and those out of it divided by the same number; φ changes, and so do λ_max, the trace and
the SAM rise (Dinh et al. 2017). It compares trainings of one model from like initial weights, and
nothing else.

Closed form: for f = ½yᵀHy with diagonal H ≥ 0 at x = 0 the corners are highest: φ = 50ε²Σh_i.

Cost: up to 10 iterations of one gradient or a few per search.

References:
    Keskar, Mudigere, Nocedal, Smelyanskiy, Tang 2017, "On Large-Batch Training for Deep Learning:
    Generalization Gap and Sharp Minima".
    Dinh, Pascanu, Bengio, Bengio 2017, "Sharp Minima Can Generalize For Deep Nets".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from scipy import optimize
from torch import Tensor

from rightbatch.laws.estimate import Estimate, unresolved
from rightbatch.laws.seeds import mean_over_seeds
from rightbatch.laws.sharpness import keskar_box, keskar_sharpness
from rightbatch.probes.sharpness.fixed_loss import FixedLoss
from rightbatch.probes.sharpness.records import Directions, KeskarSharpness

EPSILONS = (1e-3, 5e-4)
COLUMNS = 100
ITERATIONS = 10
NUM_STARTS = 3
_MOST_BYTES = 2**30
"""Of the matrix A."""


def measure_keskar(
    fixed: FixedLoss,
    loss: float,
    *,
    epsilon: float,
    directions: Directions,
    num_starts: int,
    generator: torch.Generator,
) -> KeskarSharpness:
    """Keskar's φ at the present weights, which are put back.

    Args:
        fixed: The loss.
        loss: f(x).
        epsilon: ε.
        directions: `all`, or `random` for random subspaces.
        num_starts: Searches; in random subspaces, each in one of its own.
        generator: Draws starts and subspaces.

    Returns:
        φ with its starts; unresolved where the rise is within rounding, or losses are below −1.
    """
    weights = fixed.weights
    columns = fixed.num_weights if directions == "all" else min(COLUMNS, fixed.num_weights)
    method = f"L-BFGS-B, {ITERATIONS} iterations from {num_starts} starts"
    nothing = KeskarSharpness(
        epsilon=epsilon,
        directions=directions,
        dimension=columns,
        phi=unresolved(0, "not measured"),
        starts=(),
    )
    if directions == "random" and 4 * columns * fixed.num_weights > _MOST_BYTES:
        gigabytes = 4 * columns * fixed.num_weights / 2**30
        return _because(nothing, f"A would take {gigabytes:.1f} GiB, more than 1")
    if keskar_sharpness(loss, loss) is None:
        return _because(nothing, f"the loss {loss:.3g} is not above −1")
    highest = list[float]()
    for _ in range(num_starts):
        matrix = None if directions == "all" else _draw_subspace(weights, columns, generator)
        highest.append(_highest_loss(fixed, weights, matrix, loss, epsilon, generator))
    fixed.place(weights)
    if not all(math.isfinite(found) for found in highest):
        return _because(nothing, "the loss is not finite in the box")
    values = [keskar_sharpness(found, loss) or 0.0 for found in highest]
    phi = _estimate(values, directions, method)
    if max(highest) - loss <= fixed.rounding(loss):
        phi = unresolved(num_starts, f"{method}: the rise is within rounding")
    return KeskarSharpness(
        epsilon=epsilon, directions=directions, dimension=columns, phi=phi, starts=tuple(values)
    )


def _because(nothing: KeskarSharpness, reason: str) -> KeskarSharpness:
    return KeskarSharpness(
        epsilon=nothing.epsilon,
        directions=nothing.directions,
        dimension=nothing.dimension,
        phi=unresolved(0, f"not measured: {reason}"),
        starts=(),
    )


def _estimate(values: Sequence[float], directions: Directions, method: str) -> Estimate:
    if directions == "random":
        return mean_over_seeds(values, f"{method}, each in its own random subspace, a lower bound")
    best = max(values)
    return Estimate(value=best, low=best, n=len(values), method=f"{method}, a lower bound")


def _draw_subspace(weights: Tensor, columns: int, generator: torch.Generator) -> Tensor:
    drawn = torch.randn(len(weights), columns, generator=generator)
    return drawn.to(weights.device)


def _highest_loss(
    fixed: FixedLoss,
    weights: Tensor,
    matrix: Tensor | None,
    loss: float,
    epsilon: float,
    generator: torch.Generator,
) -> float:
    """The highest loss of one search, the centre included."""
    if matrix is None:
        coordinates = weights
    else:
        coordinates = torch.linalg.lstsq(matrix.double(), weights[:, None]).solution[:, 0]
    half = torch.from_numpy(keskar_box(coordinates.cpu().numpy(), epsilon)).to(weights.device)

    def at(u: np.ndarray) -> tuple[float, np.ndarray]:
        y = half * torch.from_numpy(u).to(weights.device)
        fixed.place(weights + (y if matrix is None else (matrix @ y.float()).double()))
        value, gradient = fixed.loss_and_gradient()
        slope = gradient if matrix is None else (matrix.T @ gradient.float()).double()
        return value, (half * slope).cpu().numpy()

    start = 2 * torch.rand(len(half), generator=generator, dtype=torch.float64).numpy() - 1
    return _maximise(at, start, loss)


def _maximise(
    at: Callable[[np.ndarray], tuple[float, np.ndarray]], start: np.ndarray, centre: float
) -> float:
    """The highest value seen by a search of [−1, 1]ⁿ; NaN where one is not finite."""
    first, slope = at(start)
    scale = float(np.abs(slope).mean())
    if not (math.isfinite(first) and math.isfinite(scale)):
        return math.nan
    seen = [centre, first]
    if scale == 0:
        return max(seen)

    def falling(u: np.ndarray) -> tuple[float, np.ndarray]:
        value, gradient = at(u)
        seen.append(value)
        return (first - value) / scale, -gradient / scale

    optimize.minimize(
        falling,
        start,
        jac=True,
        method="L-BFGS-B",
        bounds=optimize.Bounds(-1.0, 1.0),
        # It ends earlier where an iteration gains less than a millionth: at a corner.
        options={"maxiter": ITERATIONS, "ftol": 1e-6, "gtol": 0.0},
    )
    return max(seen) if all(math.isfinite(value) for value in seen) else math.nan
