"""Which batch costs least, and what an example is worth in a larger batch.

Built on S(B) = S_min(1 + φ/B), with φ the critical batch (`rightbatch.laws.hyperbola`), and on the
step time t(B) = max(floor, α + βB). The answer depends on the price: where only examples cost, the
smallest batch wins; where only steps cost, the largest.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Price:
    """What a training costs: a price per second, per example and per step.

    Goal `time` is one per second, `examples` one per example, `steps` one per step.

    Attributes:
        second: Per second of step time.
        example: Per training example processed.
        step: Per parameter update.
    """

    second: float = 0.0
    example: float = 0.0
    step: float = 0.0

    def __post_init__(self) -> None:
        parts = (self.second, self.example, self.step)
        if min(parts) < 0 or max(parts) <= 0 or not all(math.isfinite(p) for p in parts):
            raise ValueError(
                f"The prices are {parts}; give finite ones, none negative and one above 0."
            )


def cost_optimal_batch(
    *,
    critical_batch: float | None,
    alpha_seconds: float,
    beta_seconds: float,
    largest: int,
    floor_seconds: float = 0.0,
    price: Price | None = None,
) -> int:
    """The whole B in [1, largest] with the least cost S(B) × (cost of a step at B).

    With step time t(B) = max(floor, α + βB) and only seconds priced, the least of
    (1 + φ/B)(α + βB) is at

        B* = √(φ·α/β),

    the geometric mean of the critical batch φ and the knee α/β. Prices per step and per example add
    to α and β. If only examples cost, the smallest batch wins; if only steps cost, the largest.

    Args:
        critical_batch: φ; None for perfect scaling (no critical batch found).
        alpha_seconds: α, the fixed part of a step.
        beta_seconds: β, seconds per example.
        largest: The largest batch allowed: min(N, memory ceiling × accumulation).
        floor_seconds: No step takes less.
        price: What is paid for. Default: seconds.

    Returns:
        The batch size.

    Raises:
        ValueError: If a number is negative or `largest` is below 1.

    Example:
        >>> cost_optimal_batch(
        ...     critical_batch=400, alpha_seconds=1e-3, beta_seconds=1e-5, largest=10_000
        ... )
        200
    """
    if largest < 1 or min(alpha_seconds, beta_seconds, floor_seconds) < 0:
        raise ValueError(
            f"alpha {alpha_seconds}, beta {beta_seconds}, floor {floor_seconds} and largest "
            f"{largest}: times cannot be negative and largest must be at least 1."
        )
    paid = price if price is not None else Price(second=1.0)
    fixed = paid.second * alpha_seconds + paid.step
    growing = paid.second * beta_seconds + paid.example
    candidates = [1.0, float(largest)]
    if critical_batch is not None:
        candidates.append(_stationary(critical_batch, fixed, growing))
        # Below the floor only examples cost more with B.
        held = paid.second * floor_seconds + paid.step
        candidates.append(_stationary(critical_batch, held, paid.example))
    if beta_seconds > 0:
        candidates.append((floor_seconds - alpha_seconds) / beta_seconds)

    def cost(batch: int) -> float:
        seconds = max(floor_seconds, alpha_seconds + beta_seconds * batch)
        per_step = paid.second * seconds + paid.example * batch + paid.step
        if critical_batch is None:
            return per_step / batch
        return (1 + critical_batch / batch) * per_step

    whole = {
        min(max(int(k), 1), largest)
        for c in candidates
        if math.isfinite(c)
        for k in (math.floor(c), math.ceil(c))
    }
    return min(sorted(whole), key=cost)


def _stationary(critical_batch: float, fixed: float, growing: float) -> float:
    return math.sqrt(critical_batch * fixed / growing) if growing > 0 else math.inf


def goodput(
    throughput: float, *, global_batch: float, critical_batch: float, initial_batch: float
) -> float:
    """Throughput × statistical efficiency (φ + B₀)/(φ + B) (Pollux, Qiao et al. 2021, eq. 4-6).

    Useful examples per second: those that count as much as examples at batch B₀.

    Args:
        throughput: Examples per second at B.
        global_batch: B.
        critical_batch: φ.
        initial_batch: B₀.

    Returns:
        Goodput in examples per second.

    Example:
        >>> goodput(1000.0, global_batch=300, critical_batch=100, initial_batch=100)
        500.0
    """
    return throughput * (critical_batch + initial_batch) / (critical_batch + global_batch)


def adascale_gain(scale: float, *, trace: float, gradient_norm_squared: float) -> float:
    """R = (σ² + μ²)/(σ²/s + μ²): how many steps at B₀ one step at s·B₀ is worth.

    AdaScale SGD (Johnson et al. 2020, eq. 4), with μ² = |G|² and σ² the variance of the gradient
    at B₀. Between 1 (no noise) and s (nothing but noise).

    Args:
        scale: s = B/B₀ ≥ 1.
        trace: σ² = S/B₀.
        gradient_norm_squared: μ².

    Returns:
        The gain.

    Example:
        >>> adascale_gain(4, trace=1.0, gradient_norm_squared=1.0)
        1.6
    """
    return (trace + gradient_norm_squared) / (trace / scale + gradient_norm_squared)


def adascale_efficiency(scale: float, *, trace: float, gradient_norm_squared: float) -> float:
    """R/s: what an example at s·B₀ is worth against one at B₀; 1 at s = 1 and falling.

    Args:
        scale: s = B/B₀ ≥ 1.
        trace: σ² = S/B₀.
        gradient_norm_squared: μ².

    Returns:
        The efficiency, between 1/s and 1.
    """
    gain = adascale_gain(scale, trace=trace, gradient_norm_squared=gradient_norm_squared)
    return gain / scale
