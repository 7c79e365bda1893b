"""SAM rise: how much the loss rises a small step up the gradient.

rise = f(w + ρ ∇f/|∇f|) − f(w),   ρ = 0.05

To second order it is ρ|∇f| + ½ρ²(gᵀHg)/|g|². That is what sharpness-aware minimisation
holds against a place, and not its worst rise within ρ: the gradient need not point where the loss
rises most, and at a minimum it points nowhere. Like every sharpness with a fixed radius it changes
when weights are rescaled though the function is the same.

Neither random nor biased: it is exact on its examples, to rounding.

Cost: one gradient and one loss.

References:
    Foret, Kleiner, Mobahi, Neyshabur 2021, "Sharpness-Aware Minimization for Efficiently Improving
    Generalization".
"""

from __future__ import annotations

import math

from torch import Tensor

from rightbatch.laws.estimate import Estimate, unresolved
from rightbatch.probes.sharpness.fixed_loss import FixedLoss

RADIUS = 0.05


def measure_sam_rise(
    fixed: FixedLoss, loss: float, gradient: Tensor, *, radius: float = RADIUS
) -> Estimate:
    """The rise of the loss one step of the given length up the gradient.

    Args:
        fixed: The loss; its weights are put back.
        loss: f(w).
        gradient: ∇f(w), shape (n,).
        radius: ρ, in units of the weights.

    Returns:
        The rise, with what rounding may have done to it; unresolved where there is no gradient, or
        the loss up there is not finite.
    """
    method, norm = f"loss at ρ = {radius:g} up the gradient", float(gradient.norm())
    if norm == 0:
        return unresolved(fixed.num_examples, f"{method}: the gradient is 0")
    weights = fixed.weights
    fixed.place(weights + gradient * (radius / norm))
    there = fixed.loss()
    fixed.place(weights)
    if not math.isfinite(there):
        return unresolved(fixed.num_examples, f"{method}: not finite")
    rise, rounding = there - loss, fixed.rounding(loss)
    return Estimate(
        value=rise, low=rise - rounding, high=rise + rounding, n=fixed.num_examples, method=method
    )
