"""A real training as a contestant: what is compared, on which examples, and when it has arrived."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from rightbatch import Recipe, Workload, accuracy
from rightbatch.study.contestant import MOST_LOOKED_AT, TrainingContestant, looked_at
from rightbatch.training import Training
from rightbatch.workload.target import parse_target

X = torch.randn(300, 4, generator=torch.Generator().manual_seed(0))
Y = (X[:, 0] > 0).long()


def make(**changes: Any) -> Workload:
    given: dict[str, Any] = {
        "name": "toy",
        "make_model": lambda: nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 2)),
        "train_data": (X[:200], Y[:200]),
        "val_data": (X[200:], Y[200:]),
        "loss": F.cross_entropy,
        "metric": accuracy,
    }
    return Workload(**{**given, **changes})


def recipe(global_batch: int, learning_rate: float) -> Recipe:
    return Recipe(global_batch=global_batch, learning_rate=learning_rate)


def contestant(
    workload: Workload, target: str | None, *, learning_rate: float = 0.1
) -> tuple[TrainingContestant, Training]:
    training = Training(workload, recipe(20, learning_rate))
    parsed = None if target is None else parse_target(target)
    return TrainingContestant(training, parsed), training


def loss_on(training: Training, part: slice) -> float:
    training.model.eval()
    with torch.no_grad():
        return float(F.cross_entropy(training.model(X[part]), Y[part]))


def test_the_validation_loss_is_compared_dropout_off() -> None:
    runner, training = contestant(make(), "val_loss<=0.01")
    runner.advance(7)
    assert training.steps == 7
    look = runner.look()
    assert look.reached is False
    assert look.loss == pytest.approx(loss_on(training, slice(200, 300)), rel=1e-5)
    assert runner.look() == look, "looking changed something"


def test_without_validation_data_the_training_set_is() -> None:
    runner, training = contestant(make(val_data=None, metric=None), None)
    look = runner.look()
    assert look.loss == pytest.approx(loss_on(training, slice(0, 200)), rel=1e-5)
    assert look.reached is None


def test_a_target_on_the_training_loss_looks_at_training_examples() -> None:
    runner, training = contestant(make(), "train_loss<=0.01")
    assert runner.look().loss == pytest.approx(loss_on(training, slice(0, 200)), rel=1e-5)


@pytest.mark.parametrize(
    ("target", "reached"), [("val_accuracy>=0", True), ("val_accuracy>=2", False)]
)
def test_a_target_on_a_metric_is_judged_by_the_metric(target: str, *, reached: bool) -> None:
    runner, training = contestant(make(), target)
    look = runner.look()
    assert look.reached is reached
    assert look.loss == pytest.approx(loss_on(training, slice(200, 300)), rel=1e-5)


def test_a_target_on_the_loss_is_met_where_the_loss_is_below() -> None:
    runner, _ = contestant(make(), "val_loss<=0.3")
    seen = []
    for _ in range(40):
        runner.advance(10)
        seen.append(runner.look())
    assert [look.reached for look in seen] == [look.loss <= 0.3 for look in seen]
    assert seen[-1].reached


def test_a_run_that_diverged_has_an_infinite_loss_and_has_not_arrived() -> None:
    runner, training = contestant(make(), "val_loss<=0.3", learning_rate=1e30)
    runner.advance(30)
    assert training.diverged
    look = runner.look()
    assert look.loss == math.inf
    assert not look.reached


def test_looking_does_not_change_how_training_goes_on() -> None:
    alone, watched = (contestant(make(), "val_loss<=0.3")[0] for _ in range(2))
    alone.advance(12)
    for _ in range(12):
        watched.advance(1)
        watched.look()
    assert watched.look() == alone.look()


def test_large_sets_are_looked_at_in_part_always_the_same() -> None:
    num = MOST_LOOKED_AT + 500
    data = (torch.arange(float(num))[:, None], torch.zeros(num))
    workload = make(train_data=data, val_data=data, metric=None, loss=F.mse_loss)
    torch.manual_seed(1)
    first, again = looked_at(workload, None), looked_at(workload, None)
    assert first.num_examples == MOST_LOOKED_AT
    everything = torch.arange(MOST_LOOKED_AT)
    batches: list[Any] = [part.batch(everything) for part in (first, again)]
    names = [batch[0].flatten().tolist() for batch in batches]
    assert names[0] == names[1]
    assert len(set(names[0])) == MOST_LOOKED_AT
    # A random part, not the beginning: data are often sorted.
    assert sum(names[0]) / MOST_LOOKED_AT == pytest.approx((num - 1) / 2, rel=0.05)
    assert max(names[0]) > MOST_LOOKED_AT


def test_small_sets_are_looked_at_whole() -> None:
    assert looked_at(make(), None).num_examples == 100
    assert looked_at(make(), parse_target("train_loss<=1")).num_examples == 200
    assert looked_at(make(val_data=None, metric=None), None).num_examples == 200
