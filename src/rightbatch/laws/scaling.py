"""How a learning rate changes with the batch: the known rules, and where each may be used.

No rule is universal. Each is a first guess for a new batch, to be measured there:

| rule | lr(B') / lr(B), κ = B'/B | for | stops holding |
|---|---|---|---|
| `linear` | κ | SGD, small batches | where B nears the noise scale; needs warm-up |
| `sqrt` | √κ | SGD by gradient variance; Adam-like | as above, and for SGD at small batches |
| `adam-sde` | √κ, with the betas and eps changed too | Adam, RMSprop | where 1 − κ(1 − β) ≤ 0 |
| `saturating` | (1 + B_noise/B) / (1 + B_noise/B') | SGD, any batch | needs B_noise |
| `surge` | peaks at B_n, falls beyond it | Adam with correlated curvature | needs B_n |
| `none` | 1 | where the edge of stability already decides | |
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rightbatch.errors import UsageError

Rule = Literal["linear", "sqrt", "adam-sde", "saturating", "surge", "none"]


def scale_learning_rate(
    lr: float,
    old_batch: float,
    new_batch: float,
    *,
    rule: Rule = "linear",
    noise_scale: float | None = None,
    betas: Sequence[float] = (),
) -> float:
    """The learning rate at another batch, by a rule: a guess to start from, not a measurement.

    With κ = new_batch / old_batch:

    - `linear`: κ lr. `sqrt`: √κ lr. `none`: lr.
    - `adam-sde`: √κ lr, refused where the betas cannot be scaled along (see `scale_adam`).
    - `saturating`: lr (1 + B_noise/old) / (1 + B_noise/new), from the best one-step learning
      rate ε(B) = ε_max / (1 + B_noise/B).
    - `surge`: from ε(B) = ε_max / (½(√(B_n/B) + √(B/B_n))), which rises like √B up to B_n and
      *falls* beyond it (see `estimate_surge_batch`).

    Args:
        lr: Learning rate that suits `old_batch`.
        old_batch: Examples per update it was found at.
        new_batch: Examples per update wanted.
        rule: Which rule.
        noise_scale: B_noise (`saturating`) or B_n (`surge`), in examples.
        betas: Adam's betas, checked by `adam-sde`.

    Returns:
        The scaled learning rate.

    Raises:
        UsageError: If a number is not positive, the rule is unknown, its noise scale is missing,
            or Adam's betas cannot be scaled this far.

    Example:
        >>> scale_learning_rate(0.1, 32, 128, rule="linear")
        0.4
        >>> scale_learning_rate(0.1, 32, 128, rule="sqrt")
        0.2
        >>> round(scale_learning_rate(0.1, 32, 128, rule="saturating", noise_scale=32), 3)
        0.16

    References:
        McCandlish et al. 2018, "An Empirical Model of Large-Batch Training", appendix A
        (`saturating`).
    """
    _check_positive(lr=lr, old_batch=old_batch, new_batch=new_batch)
    known: tuple[str, ...] = get_args(Rule)
    if rule not in known:
        raise UsageError(f"The scaling rule {rule!r} is not known. Use one of: {', '.join(known)}.")
    kappa = new_batch / old_batch
    match rule:
        case "none":
            return lr
        case "linear":
            return lr * kappa
        case "sqrt":
            return lr * math.sqrt(kappa)
        case "adam-sde":
            for beta in betas:
                _scale_beta(beta, kappa)
            return lr * math.sqrt(kappa)
        case "saturating":
            noise = _needed_noise_scale(noise_scale, rule)
            return lr * (1 + noise / old_batch) / (1 + noise / new_batch)
        case "surge":
            noise = _needed_noise_scale(noise_scale, rule)
            return lr * surge_factor(new_batch, noise) / surge_factor(old_batch, noise)


@dataclass(frozen=True, kw_only=True)
class AdamSettings:
    """Adam's hyperparameters at one batch.

    Attributes:
        learning_rate: Learning rate.
        beta1: Decay of the mean of gradients, per update.
        beta2: Decay of the mean of squared gradients, per update.
        eps: Added to the root of the second moment.
    """

    learning_rate: float
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8


def carry_rate(rate: float, *, at: int, to: int, critical_batch: float, normalised: bool) -> float:
    """A learning rate carried to another batch by the saturating law.

    ε(B) ∝ 1/(1 + B_noise/B) for SGD (McCandlish et al. 2018, eq. 2.6); its square root for
    optimizers that normalise by the gradient's size.

    Args:
        rate: The learning rate.
        at: The batch it is for.
        to: The other batch.
        critical_batch: Stands for B_noise.
        normalised: Whether the optimizer divides by the gradient's size.

    Returns:
        The learning rate at the other batch.
    """
    ratio = scale_learning_rate(1.0, at, to, rule="saturating", noise_scale=critical_batch)
    return rate * (math.sqrt(ratio) if normalised else ratio)


def scale_adam(settings: AdamSettings, old_batch: float, new_batch: float) -> AdamSettings:
    """Adam's hyperparameters at another batch, so that both follow the same diffusion.

    With κ = new_batch / old_batch: lr √κ, 1 − β → κ(1 − β) for both betas, ε / √κ. Training time
    in examples is then the same continuous-time process at both batches; it stops holding where
    a beta would have to be 0 or less, which is refused.

    Args:
        settings: Hyperparameters that suit `old_batch`.
        old_batch: Examples per update they were found at.
        new_batch: Examples per update wanted.

    Returns:
        The scaled hyperparameters.

    Raises:
        UsageError: If 1 − κ(1 − β) ≤ 0 for one of the betas, or a number is not positive.

    Example:
        >>> scaled = scale_adam(AdamSettings(learning_rate=1e-3), 64, 256)
        >>> round(scaled.learning_rate, 6), round(scaled.beta1, 6), round(scaled.beta2, 6)
        (0.002, 0.6, 0.996)

    References:
        Malladi et al. 2022, "On the SDEs and Scaling Rules for Adaptive Gradient Algorithms".
    """
    _check_positive(learning_rate=settings.learning_rate, old_batch=old_batch, new_batch=new_batch)
    kappa = new_batch / old_batch
    return AdamSettings(
        learning_rate=settings.learning_rate * math.sqrt(kappa),
        beta1=_scale_beta(settings.beta1, kappa),
        beta2=_scale_beta(settings.beta2, kappa),
        eps=settings.eps / math.sqrt(kappa),
    )


def scale_beta_by_half_life(beta: float, old_batch: float, new_batch: float) -> float:
    """A decay rate that forgets half of the past after the same number of *examples*.

    β' = β^(new_batch / old_batch). Unlike 1 − β → κ(1 − β), of which it is the exact form, it
    stays between 0 and 1 at any batch.

    Args:
        beta: Decay per update at `old_batch`.
        old_batch: Examples per update it was used at.
        new_batch: Examples per update wanted.

    Returns:
        The decay per update at `new_batch`.

    Raises:
        UsageError: If a batch is not positive or beta is not in [0, 1).

    Example:
        >>> round(scale_beta_by_half_life(0.999, 1, 512), 3)
        0.599
    """
    _check_positive(old_batch=old_batch, new_batch=new_batch)
    _check_beta(beta)
    return beta ** (new_batch / old_batch)


def noise_temperature(
    lr: float, global_batch: float, num_examples: int, *, momentum: float = 0.0
) -> float:
    """The scale of SGD's random forces, g ≈ lr N / (B (1 − m)).

    Two runs of the same temperature follow about the same curve in epochs, so raising B by k can
    replace lowering lr by k, until B nears N or the critical batch.

    Args:
        lr: Learning rate.
        global_batch: Examples per update B.
        num_examples: Size of the training set N.
        momentum: Momentum coefficient m.

    Returns:
        The temperature, in units of the learning rate.

    Raises:
        UsageError: If a number is not positive or the momentum is not in [0, 1).

    Example:
        >>> noise_temperature(0.1, 50, 1000, momentum=0.5)
        4.0
    """
    _check_positive(lr=lr, global_batch=global_batch, num_examples=num_examples)
    if not 0 <= momentum < 1:
        raise UsageError(f"momentum is {momentum}; it must be at least 0 and below 1.")
    return lr * num_examples / (global_batch * (1 - momentum))


def sum_loss_learning_rate(lr: float, batch: float) -> float:
    """The learning rate for a loss summed over the batch that does what `lr` does for its mean.

    The gradient of the sum is B times the gradient of the mean, so lr_sum = lr_mean / B.

    Args:
        lr: Learning rate for the mean-reduced loss.
        batch: Examples per update B.

    Returns:
        The learning rate for the sum-reduced loss.

    Raises:
        UsageError: If a number is not positive.

    Example:
        >>> sum_loss_learning_rate(0.5, 100)
        0.005
    """
    _check_positive(lr=lr, batch=batch)
    return lr / batch


def surge_factor(global_batch: float, peak_batch: float) -> float:
    """ε(B) / ε_max = 1 / (½(√(B_n/B) + √(B/B_n))): 1 at the peak, below it on both sides.

    Args:
        global_batch: Examples per update B.
        peak_batch: B_n, where Adam's best learning rate is largest.

    Returns:
        A factor in (0, 1].

    Example:
        >>> surge_factor(64, 64), surge_factor(16, 64) == surge_factor(256, 64)
        (1.0, True)
    """
    root = math.sqrt(peak_batch / global_batch)
    return 2 / (root + 1 / root)


def sign_descent_learning_rate(
    global_batch: float, mean: ArrayLike, std: ArrayLike, hessian: ArrayLike
) -> float:
    """The best one-step learning rate of sign descent (Adam's limit) on a quadratic, exactly.

    Coordinate i of the batch gradient is normal with mean μ_i and deviation σ_i/√B, independently
    of the others, so that its sign u_i has the mean e_i = erf(√(B/2) μ_i/σ_i). The expected loss
    after a step is −ε Σ e_i μ_i + ½ε² (Σ_i H_ii + Σ_{i≠j} H_ij e_i e_j), least at

        ε(B) = Σ e_i μ_i / (tr H + Σ_{i≠j} H_ij e_i e_j).

    Args:
        global_batch: Examples per update B.
        mean: μ, the mean gradient, shape (n,).
        std: σ, the per-example deviation of each coordinate, shape (n,).
        hessian: H, shape (n, n).

    Returns:
        The learning rate of least expected loss.

    Raises:
        UsageError: If the curvature along the expected step is not positive.
    """
    mu, sigma = _floats(mean), _floats(std)
    H = _floats(hessian)
    sign_mean = np.array([math.erf(x) for x in math.sqrt(global_batch / 2) * mu / sigma])
    curvature = float(np.trace(H) + sign_mean @ _off_diagonal(H) @ sign_mean)
    if curvature <= 0:
        raise UsageError(
            f"The curvature along the step is {curvature:.3g}, so no step is the best. "
            "Pass a Hessian that is positive along the mean step."
        )
    return float(sign_mean @ mu) / curvature


def estimate_surge_batch(mean: ArrayLike, std: ArrayLike, hessian: ArrayLike) -> float | None:
    """The batch at which Adam's best learning rate peaks, B_n; None where it never does.

    For √B μ_i/σ_i ≪ 1 the sign's mean is e_i ≈ √(2B/π) μ_i/σ_i, and the exact learning rate of
    `sign_descent_learning_rate` becomes c√B / (tr H + B·(2/π) Σ_{i≠j} H_ij s_i s_j) with
    s_i = μ_i/σ_i, which is the surge law with

        B_n = (π/2) tr H / Σ_{i≠j} H_ij s_i s_j.

    A diagonal Hessian has no such sum: the learning rate then rises without a peak.

    Args:
        mean: μ, the mean gradient, shape (n,).
        std: σ, the per-example deviation of each coordinate, shape (n,).
        hessian: H, shape (n, n).

    Returns:
        B_n in examples, or None without positive off-diagonal curvature along the signal.

    Example:
        >>> H = [[1.0, 0.9], [0.9, 1.0]]
        >>> round(estimate_surge_batch([0.05, 0.05], [1.0, 1.0], H))
        698
    """
    H = _floats(hessian)
    signal = _floats(mean) / _floats(std)
    coupling = float(signal @ _off_diagonal(H) @ signal)
    return math.pi / 2 * float(np.trace(H)) / coupling if coupling > 0 else None


def _floats(values: ArrayLike) -> NDArray[np.float64]:
    return np.asarray(values, dtype=np.float64)


def _off_diagonal(matrix: NDArray[np.float64]) -> NDArray[np.float64]:
    return matrix - np.diag(np.diag(matrix))


def _scale_beta(beta: float, kappa: float) -> float:
    _check_beta(beta)
    scaled = 1 - kappa * (1 - beta)
    if scaled <= 1e-12:  # 1 - 10 × (1 - 0.9) is not quite 0 in floats
        raise UsageError(
            f"The adam-sde rule cannot scale beta {beta} by {kappa:g}: 1 − κ(1 − β) is "
            f"{scaled:.3f}. Go up by less than {1 / (1 - beta):.4g} ×, or use "
            "scale_beta_by_half_life and measure the learning rate."
        )
    return scaled


def _needed_noise_scale(noise_scale: float | None, rule: str) -> float:
    if noise_scale is None:
        raise UsageError(
            f"The rule {rule!r} needs noise_scale and got None. Measure it with "
            "rightbatch.measure_noise_scale, or use rule='linear' or 'sqrt'."
        )
    _check_positive(noise_scale=noise_scale)
    return noise_scale


def _check_beta(beta: float) -> None:
    if not 0 <= beta < 1:
        raise UsageError(f"beta is {beta}; it must be at least 0 and below 1.")


def _check_positive(**numbers: float) -> None:
    for name, number in numbers.items():
        if not (number > 0 and math.isfinite(number)):
            raise UsageError(f"{name} is {number}; it must be a positive finite number.")
