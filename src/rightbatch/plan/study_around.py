"""The study of a plan: every open size around the one that probes suggest."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence

from rightbatch.plan.predict import expected_critical_batch, predict_batch
from rightbatch.plan.price import max_micro_batch, open_sizes, step_seconds
from rightbatch.plan.records import Evidence
from rightbatch.study.study import Study, run_study
from rightbatch.workload import Workload

MOST_EPOCHS = 100
"""A run gives up on the target after this many epochs when no budget ends it before."""
EPOCHS_WITHOUT_TARGET = 10.0
"""Without a target, the loss that the best run has after this many epochs is the target."""
NO_STUDY = "No study was run"
_SPAN = 8
"""The critical batch that probes expect is within this factor of what trainings show."""
_SEEDS = 3
_RATES = 8
"""Learning rates of a size: six to begin with, and two where the best is at the edge."""
_FEWEST_EPOCHS = 2.0


def sizes_around(evidence: Evidence) -> tuple[int, ...]:
    """The open sizes at most 8 × from the one that probes suggest.

    Args:
        evidence: What the probes measured.

    Returns:
        Ascending.
    """
    setting = evidence.setting
    batch = predict_batch(
        evidence.throughput,
        expected_critical_batch(evidence.noise_scale, averaging=setting.averaging),
        goal=setting.goal,
        num_examples=setting.num_examples,
        replicas=setting.replicas,
    )
    sizes = open_sizes(setting.num_examples, setting.replicas)
    return tuple(size for size in sizes if batch / _SPAN <= size <= batch * _SPAN)


def predict_seconds(evidence: Evidence, sizes: Sequence[int], epochs: float) -> float:
    """What the trainings of a study would take one after the other: at most that.

    Args:
        evidence: What the probes measured.
        sizes: Of the study.
        epochs: Of each training.

    Returns:
        Seconds.
    """
    ceiling, N = max_micro_batch(evidence), evidence.setting.num_examples
    one = sum(step_seconds(evidence.throughput, B, ceiling) * math.ceil(N / B) for B in sizes)
    return one * epochs * _RATES * _SEEDS


def study_if_wanted(
    workload: Workload, evidence: Evidence, started: float, say: Callable[..., None]
) -> tuple[Study | None, tuple[str, ...]]:
    """The study, where one was asked for or the budget is large enough.

    Args:
        workload: What to train.
        evidence: What the probes measured.
        started: When planning began, by the monotonic clock.
        say: Told what is being done.

    Returns:
        The study or None, and what the user should know.
    """
    setting = evidence.setting
    if setting.effort in ("probe", "race"):
        return None, ()
    sizes = sizes_around(evidence)
    epochs = MOST_EPOCHS if setting.target is not None else EPOCHS_WITHOUT_TARGET
    needed = predict_seconds(evidence, sizes, epochs)
    if setting.budget_seconds is not None:
        left = setting.budget_seconds - (time.monotonic() - started)
        if setting.effort == "auto" and needed > left:
            return None, (
                f"{NO_STUDY}: its {len(sizes) * _RATES * _SEEDS} trainings would take up to "
                f"{_duration(needed)}. effort='study' with a larger budget gives intervals over "
                "seeds, and may change batch size and learning rate.",
            )
        epochs = max(_FEWEST_EPOCHS, min(epochs, epochs * left / needed))
    study = run_study(
        workload,
        batch_sizes=sizes,
        seeds=_SEEDS,
        epochs=epochs,
        target=setting.target,
        progress=say,
    )
    if study.state == "stopped" or study.best is None:
        why = "it was interrupted" if study.state == "stopped" else "the loss left the numbers"
        return None, (f"{NO_STUDY} to its end: {why}.",)
    return study, ()


def _duration(seconds: float) -> str:
    minutes = math.ceil(seconds / 60)
    return f"{minutes} minutes" if minutes < 120 else f"{math.ceil(minutes / 60)} hours"
