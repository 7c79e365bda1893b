"""What a Lanczos tridiagonal matrix tells about the largest eigenvalue of a symmetric matrix.

k products of a symmetric n × n matrix M with vectors give an orthonormal basis Q of a Krylov space
and T = QᵀMQ, tridiagonal with the diagonal α₁ … α_k and, beside it, β₁ … β_{k−1}; β_k is the norm
of what the last product had outside of the basis. The eigenvalues θ of T are the Ritz values.

*From below.* The largest Ritz value θ₁ is a Rayleigh quotient, so θ₁ ≤ λ_max, always.

*The residual.* For an eigenvector s of T, |M(Qs) − θ(Qs)| = β_k|s_k|: some eigenvalue of M is as
close to θ as that. It does not say which eigenvalue.

*From above*, with a given risk. Let the first vector be drawn evenly on the sphere, and c be its
part along the top eigenvector. Let p(t) = Π(t − θ_i), which in the measure that the first vector
puts on the spectrum has the square norm Πβ_j². The top eigenvalue alone puts c²p(λ_max)² there, so

    Σ 2 ln(λ_max − θ_i) ≤ Σ_{j≤k} 2 ln β_j − ln c².

c² follows Beta(1/2, (n−1)/2), so it is below its 5 % quantile in one draw of twenty at most; the λ
that makes both sides equal at that quantile is above λ_max in all others. It falls to θ₁ where
β_k → 0.

References:
    van Dorsselaer, Hochstenbach, van der Vorst 2000, "Computing probabilistic bounds for extreme
    eigenvalues of symmetric matrices with the Lanczos method".
    Parlett 1980, "The Symmetric Eigenvalue Problem", chapters 12 and 13.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import linalg, optimize, special  # pyright: ignore[reportMissingTypeStubs]

Array = NDArray[np.float64]
RISK = 0.05
"""How often the upper bound may be too low."""


@dataclass(frozen=True, kw_only=True, eq=False)
class TopRitzPair:
    """The largest eigenvalue of a tridiagonal matrix, and where that of the whole matrix lies.

    Attributes:
        value: θ₁, at most λ_max.
        vector: Its eigenvector in the basis, of norm 1, shape (k,).
        residual: |M(Qs) − θ₁(Qs)|.
        high: λ_max is below this, but for the risk; θ₁ itself where the Krylov space is invariant.
        size: Largest Ritz value in absolute value: the scale of rounding.
    """

    value: float
    vector: Array
    residual: float
    high: float
    size: float


def top_ritz_pair(
    diagonal: Sequence[float], beside: Sequence[float], *, dimension: int, risk: float = RISK
) -> TopRitzPair:
    """The largest Ritz value with its residual and the bound from above.

    Args:
        diagonal: α₁ … α_k.
        beside: β₁ … β_k: the last one is not in T.
        dimension: n, rows of the whole matrix.
        risk: Of the bound, over draws of the first vector.

    Returns:
        The pair.

    Raises:
        ValueError: If there are not as many of one as of the other, or more than the dimension.

    Example:
        The matrix diag(2, 1) from (1, 1)/√2: T after one step is 1.5, with 0.5 left over.

        >>> pair = top_ritz_pair([1.5], [0.5], dimension=2)
        >>> pair.value, pair.residual, 2.0 <= pair.high
        (1.5, 0.5, True)
    """
    alpha = np.asarray(diagonal, dtype=np.float64)
    beta = np.asarray(beside, dtype=np.float64)
    k = len(alpha)
    if not 1 <= k == len(beta) <= dimension:
        raise ValueError(
            f"There are {k} numbers on the diagonal and {len(beta)} beside it, of a matrix with "
            f"{dimension} rows. Give as many of both, at least 1 and at most the rows."
        )
    values, vectors = _eigen(alpha, beta[:-1])
    vector = vectors[:, -1]
    return TopRitzPair(
        value=float(values[-1]),
        vector=vector,
        residual=float(beta[-1] * abs(vector[-1])),
        high=_upper_bound(values, beta, dimension, risk),
        size=float(np.abs(values).max()),
    )


def _eigen(alpha: Array, inside: Array) -> tuple[Array, Array]:
    values, vectors = linalg.eigh_tridiagonal(alpha, inside)  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
    return np.asarray(values, dtype=np.float64), np.asarray(vectors, dtype=np.float64)


def _upper_bound(values: Array, beta: Array, dimension: int, risk: float) -> float:
    top = float(values[-1])
    if float(beta[-1]) <= 0 or dimension == len(values):
        return top
    if float(beta.min()) <= 0:  # an invariant space on the way: what follows is another start
        raise ValueError("A β before the last is 0. End where the Krylov space is invariant.")
    part = float(special.betaincinv(0.5, (dimension - 1) / 2, risk))  # pyright: ignore[reportUnknownMemberType]
    allowed = 2.0 * float(np.log(beta).sum()) - math.log(part)

    def excess(step: float) -> float:
        """Of ln(λ − θ₁) as the unknown: the root may be very close to θ₁."""
        return 2.0 * float(np.log(math.exp(step) + (top - values)).sum()) - allowed

    # Were all Ritz values at θ₁ the step would be the largest, and were they far below, θ₁ alone
    # would carry the product: the root lies between.
    most = allowed / (2.0 * len(values))
    least = most
    while excess(least) > 0:
        least -= 1.0 + abs(most - least)
    root: float = optimize.brentq(excess, least, most + 1e-9)  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType, reportAssignmentType]
    return top + math.exp(root)
