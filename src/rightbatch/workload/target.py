"""The target: which loss or metric counts as trained."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal

from rightbatch.errors import WorkloadError

_PATTERN = re.compile(r"\s*(?P<quantity>[A-Za-z_]\w*)\s*(?P<op><=|>=|<|>)\s*(?P<value>\S+)\s*")


@dataclass(frozen=True, kw_only=True)
class Target:
    """A threshold on a quantity that evaluation reports.

    Attributes:
        quantity: `train_loss`, `val_loss`, or `val_<metric name>`.
        op: `<=` (lower is better) or `>=` (higher is better).
        value: The threshold.
    """

    quantity: str
    op: Literal["<=", ">="]
    value: float

    @property
    def lower_is_better(self) -> bool:
        """Whether the quantity has to fall to reach the target."""
        return self.op == "<="

    def reached(self, value: float) -> bool:
        """Whether a value of the quantity meets the target (NaN never does)."""
        return value <= self.value if self.lower_is_better else value >= self.value

    def __str__(self) -> str:
        return f"{self.quantity}{self.op}{self.value:g}"


def parse_target(text: str) -> Target:
    """Reads a target such as `val_loss<=0.15` or `val_accuracy>=0.97`.

    Args:
        text: Quantity, `<=` or `>=`, number.

    Returns:
        The target.

    Raises:
        WorkloadError: If the text has another form or the quantity is none that is evaluated.

    Example:
        >>> parse_target("val_loss<=0.15")
        Target(quantity='val_loss', op='<=', value=0.15)
    """
    match = _PATTERN.fullmatch(text)
    remedy = "Write it like 'val_loss<=0.15', 'val_accuracy>=0.97' or 'train_loss<=0.1'."
    if match is None:
        raise WorkloadError(f"The target {text!r} cannot be read. {remedy}")
    try:
        value = float(match["value"])
    except ValueError:
        raise WorkloadError(f"The target {text!r} has no number on its right. {remedy}") from None
    quantity = match["quantity"]
    if not math.isfinite(value):
        raise WorkloadError(f"The target {text!r} is not finite. {remedy}")
    if quantity != "train_loss" and not quantity.startswith("val_"):
        raise WorkloadError(
            f"The target {text!r} names {quantity!r}, which is not evaluated. {remedy}"
        )
    lower = match["op"].startswith("<")
    if quantity.endswith("_loss") and not lower:
        raise WorkloadError(f"The target {text!r} asks for a loss to rise. {remedy}")
    return Target(quantity=quantity, op="<=" if lower else ">=", value=value)
