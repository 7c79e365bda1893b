"""One training of a study, as data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

TrialState = Literal["waiting", "running", "complete", "diverged", "failed", "stopped"]
FINAL: tuple[TrialState, ...] = ("complete", "diverged", "failed")
"""States that a study does not come back to."""


@dataclass(frozen=True, kw_only=True)
class TrialKey:
    """Which training: no two of a study have the same.

    Attributes:
        batch_size: Examples per update.
        learning_rate: Learning rate.
        seed: Decides initial weights and data order.
    """

    batch_size: int
    learning_rate: float
    seed: int


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A training that is to be run, and how far.

    Attributes:
        key: Which.
        share: Of the budget that the design gives every training, 0 to 1.
    """

    key: TrialKey
    share: float = 1.0


@dataclass(frozen=True, kw_only=True)
class EvaluationPoint:
    """One evaluation of a training.

    Attributes:
        step: Updates done.
        examples: Training examples processed.
        train_loss: Mean loss of the updates since the evaluation before; None without any.
        val_loss: Validation loss, or None without validation data.
        val_metric: Validation metric, or None without one.
        distance: ‖w − w₀‖ over all parameters; None where the weights were not watched.
        relative_distance: ‖w − w₀‖/‖w₀‖.
        weight: The value of the watched weight.
        roughness: Of its path over the updates so far; None where it never moved.
    """

    step: int
    examples: int
    train_loss: float | None
    val_loss: float | None
    val_metric: float | None
    distance: float | None = None
    relative_distance: float | None = None
    weight: float | None = None
    roughness: float | None = None


@dataclass(frozen=True, kw_only=True)
class StudyTrial:
    """One training and how it ended.

    Attributes:
        batch_size: Examples per update.
        learning_rate: Learning rate.
        seed: Decides initial weights and data order.
        state: How it ended; of a training that diverged, losses and metric are None.
        steps: Updates done, up to the last evaluation that had a loss.
        examples: Training examples processed by then.
        seconds: What these updates take in the training loop, by the measured step time; None
            where it was not measured.
        train_loss: At the last evaluation.
        val_loss: At the last evaluation.
        val_metric: At the last evaluation.
        steps_to_target: Where the target was first met, interpolated between evaluations; None
            where it was not, or there is none.
        distance: ‖w − w₀‖ over all parameters, at the last evaluation.
        relative_distance: ‖w − w₀‖/‖w₀‖.
        roughness: Of the watched weight's path over all updates; None where it never moved.
        dead: Whether the watched weight never moved.
        share: Of the way that the design gives every training, how much this one was asked to go;
            below 1 where a race dropped it.
        note: Why it failed, or empty.
    """

    batch_size: int
    learning_rate: float
    seed: int
    state: TrialState
    steps: int
    examples: int
    seconds: float | None
    train_loss: float | None
    val_loss: float | None
    val_metric: float | None
    steps_to_target: float | None
    distance: float | None = None
    relative_distance: float | None = None
    roughness: float | None = None
    dead: bool = False
    share: float = 1.0
    note: str = ""
