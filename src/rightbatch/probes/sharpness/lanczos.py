"""Lanczos: the algebraically largest eigenvalue of the Hessian, from Hessian-vector products.

λ_max = max over |v| = 1 of vᵀHv.

From a random v₁, each product Hv_j, made orthogonal to v₁ … v_j, gives v_{j+1}; in this basis H is
a tridiagonal matrix T, whose largest eigenvalue θ₁ approaches λ_max from below, faster than power
iteration would, and whatever the size of the negative eigenvalues. Every vector is made orthogonal
to all before it, twice, since in floating point they would not stay so by themselves.

*Biased* downwards: θ₁ ≤ λ_max always. The interval reaches from there to the bound that only one
first vector in twenty would put below λ_max (`rightbatch.laws.lanczos`). Lanczos ends where the
interval is 1 % of λ_max wide, where the vectors fill a space that H does not leave (then
θ₁ = λ_max), or at the limit of iterations; `converged` says whether that came first.

Cost: one Hessian-vector product per iteration, and one for measuring the residual |Hv − θ₁v|. k
vectors of n weights are kept in float64.

References:
    Lanczos 1950, "An iteration method for the solution of the eigenvalue problem of linear
    differential and integral operators".
    Ghorbani, Krishnan, Xiao 2019, "An Investigation into Neural Net Optimization via Hessian
    Eigenvalue Density".
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from rightbatch.errors import ProbeError
from rightbatch.laws.estimate import Estimate
from rightbatch.laws.lanczos import TopRitzPair, top_ritz_pair

MAX_ITERATIONS = 80
TOLERANCE = 0.01
"""Width of the interval, as a share of λ_max, at which Lanczos ends."""
_MOST_BYTES = 2**30
"""Of the basis."""


@dataclass(frozen=True, kw_only=True, eq=False)
class LargestEigenvalue:
    """What Lanczos found.

    Attributes:
        estimate: λ_max.
        residual: |Hv − λv|, measured.
        iterations: Products in T.
        converged: Whether the interval is within the tolerance.
        basis: The vectors, orthonormal, float64, shape (iterations, n).
        trace_in_basis: tr T, the trace of H over the basis.
    """

    estimate: Estimate
    residual: float
    iterations: int
    converged: bool
    basis: Tensor
    trace_in_basis: float


def estimate_largest_eigenvalue(
    product: Callable[[Tensor], Tensor],
    num_weights: int,
    *,
    generator: torch.Generator,
    epsilon: float,
    device: str | torch.device = "cpu",
    max_iterations: int = MAX_ITERATIONS,
    tolerance: float = TOLERANCE,
) -> LargestEigenvalue:
    """λ_max of a symmetric matrix by Lanczos.

    Args:
        product: v ↦ Hv, for float64 vectors of shape (n,).
        num_weights: n.
        generator: Draws the first vector.
        epsilon: Relative rounding of the products.
        device: Where the vectors are.
        max_iterations: Most products.
        tolerance: Width of the interval at which to end, as a share of λ_max.

    Returns:
        The eigenvalue and the basis.

    Raises:
        ProbeError: If a product is not finite.

    Example:
        >>> diagonal = torch.tensor([2.0, -5.0, 0.5], dtype=torch.float64)
        >>> found = estimate_largest_eigenvalue(
        ...     lambda v: diagonal * v, 3, generator=torch.Generator().manual_seed(0), epsilon=1e-15
        ... )
        >>> round(found.estimate.value, 9), found.converged
        (2.0, True)
    """
    limit = min(max_iterations, num_weights, max(2, _MOST_BYTES // (8 * num_weights)))
    vector = torch.randn(num_weights, generator=generator, dtype=torch.float64).to(device)
    vector /= vector.norm()
    basis = torch.empty(limit, num_weights, dtype=torch.float64, device=device)
    alpha, beta = list[float](), list[float]()
    while True:
        basis[len(alpha)] = vector
        rest = product(vector)
        alpha.append(float(vector @ rest))
        own = basis[: len(alpha)]
        for _ in range(2):
            rest = rest - own.T @ (own @ rest)
        beta.append(float(rest.norm()))
        if not torch.isfinite(torch.tensor([alpha[-1], beta[-1]])).all():
            raise ProbeError(
                "A Hessian-vector product is not finite. Check the loss for infinite values, or "
                "whether all its operations have second derivatives."
            )
        pair = top_ritz_pair(alpha, beta, dimension=num_weights)
        # What is left is rounding: going on would begin anew in a space that was not asked for.
        invariant = beta[-1] <= 10 * epsilon * max(pair.size, 1e-300)
        tight = pair.high - pair.value <= tolerance * abs(pair.value)
        if invariant or tight or len(alpha) == limit:
            break
        vector = rest / beta[-1]
    return _result(product, pair, own, sum(alpha), epsilon, tolerance, exact=invariant)


def _result(
    product: Callable[[Tensor], Tensor],
    pair: TopRitzPair,
    basis: Tensor,
    trace: float,
    epsilon: float,
    tolerance: float,
    *,
    exact: bool,
) -> LargestEigenvalue:
    """Checks the Ritz vector by one more product, and widens the interval by what rounding did."""
    vector = basis.T @ torch.from_numpy(pair.vector).to(basis.device)
    image = product(vector)
    value = float(vector @ image)
    rounding = abs(value - pair.value) + 10 * epsilon * pair.size
    high = pair.value if exact else pair.high
    estimate = Estimate(
        value=value,
        low=min(value, pair.value) - rounding,
        high=max(value, high) + rounding,
        n=len(basis),
        method=f"Lanczos, {len(basis)} iterations",
    )
    spread = high - pair.value
    return LargestEigenvalue(
        estimate=estimate,
        residual=float((image - value * vector).norm()),
        iterations=len(basis),
        converged=exact or len(basis) == basis.shape[1] or spread <= tolerance * abs(value),
        basis=basis,
        trace_in_basis=trace,
    )
