"""What the noise scale predicts: the error and direction of a batch's gradient, the best step.

McCandlish, Kaplan, Amodei et al. 2018, "An Empirical Model of Large-Batch Training".
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike


def gradient_variance(trace: float, *, global_batch: float, population: int | None = None) -> float:
    """E|g_B − G|² = S(1/B − 1/N): its root, the standard error, has slope −½ until N matters.

    Args:
        trace: S.
        global_batch: B.
        population: N when drawn without replacement, else None.

    Returns:
        The variance; 0 at B = N.

    Example:
        >>> gradient_variance(6.0, global_batch=3, population=6)
        1.0
    """
    return trace * (1 / global_batch - (0.0 if population is None else 1 / population))


def predicted_cosine_squared(
    noise_scale: float, *, global_batch: float, population: int | None = None
) -> float:
    """E cos²(g_B, G) ≈ 1/(1 + B_simple/B), in high effective dimension.

    Args:
        noise_scale: B_simple.
        global_batch: B.
        population: N when drawn without replacement, else None.

    Returns:
        The expected squared cosine between the batch's gradient and the full one.

    Example:
        >>> predicted_cosine_squared(30.0, global_batch=10)
        0.25
    """
    return 1 / (
        1 + gradient_variance(noise_scale, global_batch=global_batch, population=population)
    )


def curvature_noise_scale(hessian: ArrayLike, gradient: ArrayLike, covariance: ArrayLike) -> float:
    """B_noise = tr(HΣ)/GᵀHG, the batch at which the best step is half the largest.

    McCandlish et al. 2018, eq. 2.8. Equal to B_simple when H is a multiple of the identity.

    Args:
        hessian: H, shape (d, d).
        gradient: G, shape (d,).
        covariance: Σ, shape (d, d).

    Returns:
        The noise scale in examples.
    """
    h, g, sigma = (np.asarray(x, dtype=float) for x in (hessian, gradient, covariance))
    return float(np.sum(h * sigma.T) / (g @ h @ g))


def best_learning_rate(
    max_learning_rate: float, *, noise_scale: float, global_batch: float
) -> float:
    """ε(B) = ε_max/(1 + B_noise/B): linear in B while B is small, flat beyond B_noise.

    McCandlish et al. 2018, eq. 2.6. The gain of one step, ΔL(B) = ΔL_max/(1 + B_noise/B), has the
    same form.

    Args:
        max_learning_rate: ε_max = |G|²/GᵀHG, the best step along the exact gradient.
        noise_scale: B_noise.
        global_batch: B.

    Returns:
        The best learning rate (or gain) at B.

    Example:
        >>> best_learning_rate(0.5, noise_scale=100, global_batch=100)
        0.25
    """
    return max_learning_rate / (1 + noise_scale / global_batch)
