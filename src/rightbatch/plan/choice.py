"""What each way to choose comes to: batch and learning rate, why, and how sure."""

from __future__ import annotations

from dataclasses import dataclass

from rightbatch.plan.records import NearBest, Prediction, Reason
from rightbatch.study.records import Cell


@dataclass(frozen=True, kw_only=True)
class Choice:
    """Batch and learning rate, and what is known of them.

    Attributes:
        cell: The pair.
        near_best: Sizes among which the best probably is.
        prediction: What training should take, or None.
        batch_reason: Why this batch.
        rate_reason: Why this learning rate.
        warnings: What the user should know before relying on it.
        one_training: Examples that batch 32 takes to the target, or None.
    """

    cell: Cell
    near_best: NearBest
    prediction: Prediction | None
    batch_reason: Reason
    rate_reason: Reason
    warnings: tuple[str, ...]
    one_training: float | None = None
