"""Which engine a group of trainings is run by, and that all give the same."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from rightbatch import Workload
from rightbatch.study.group import Engine, run_group
from rightbatch.study.trials import TrialKey

STEPS = 12


def _workload() -> Workload:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(30, 4, generator=generator)
    targets = (inputs.sum(1) > 0).long()
    return Workload(
        name="halves",
        make_model=lambda: nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)),
        train_data=(inputs, targets),
        val_data=(inputs[:10], targets[:10]),
        loss=F.cross_entropy,
    )


KEYS = [
    TrialKey(batch_size=7, learning_rate=rate, seed=seed)
    for rate in (0.01, 0.1, 0.3, 1.0)
    for seed in range(4)
]


@pytest.mark.parametrize(
    ("seconds", "engine"), [(0.5, "loop"), (4.0, "vmapped"), (100.0, "compiled")]
)
def test_the_longer_trainings_take_the_more_is_prepared(seconds: float, engine: str) -> None:
    if engine == "compiled":
        pytest.importorskip("jax")
    step_seconds = seconds / (STEPS * len(KEYS))
    _, ran_by = run_group(_workload(), KEYS, STEPS, step_seconds=step_seconds, threads=1)
    assert ran_by.startswith(f"{engine}: ")


@pytest.mark.parametrize("threads", [1, 2])
def test_stacked_trainings_in_threads_are_the_loops(threads: int) -> None:
    def losses(engine: Engine) -> list[list[float | None]]:
        finished, _ = run_group(_workload(), KEYS, STEPS, engine=engine, threads=threads)
        assert [f.key for f in finished] == KEYS
        return [[point.val_loss for point in f.points] for f in finished]

    for ours, theirs in zip(losses("vmapped"), losses("loop"), strict=True):
        assert ours == pytest.approx(theirs, rel=2e-5)
        assert all(loss is not None and math.isfinite(loss) for loss in ours)
