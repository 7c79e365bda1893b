"""The progress of `rightbatch train`: what it says, and how often."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from typing import Any

import pytest

import rightbatch
from rightbatch import Recipe
from rightbatch.cli import main
from rightbatch.cli.train_progress import TrainProgress
from rightbatch.training import Horizon, Training
from rightbatch.training.watching import telling

Reports = list[tuple[str, float | None]]


class Clock:
    """Seconds that pass by a fixed amount at each look."""

    def __init__(self, each: float) -> None:
        self.now, self.each = 100.0, each

    def __call__(self) -> float:
        self.now += self.each
        return self.now


def watched(each: float, **options: Any) -> tuple[TrainProgress, Reports]:
    reports: Reports = []

    def report(message: str, share: float | None = None) -> None:
        reports.append((message, share))

    return TrainProgress(report, clock=Clock(each), **options), reports


def run(progress: TrainProgress, *, steps: int = 100, horizon: bool = True, begin: int = 0) -> None:
    training = Training(
        rightbatch.load_workload("max3"),
        Recipe(global_batch=50, learning_rate=0.1),
        horizon=Horizon(steps=100) if horizon else None,
        callbacks=[progress],
    )
    training.steps = begin
    progress.on_start(training)
    training.advance(steps - begin)


def test_loss_rate_and_time_left_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(telling, "_BLOCK", 10)  # else the first losses come with 64 updates
    progress, reports = watched(each=0.1)
    run(progress, steps=50)
    message, share = reports[-1]
    name, _, rest = message.partition(": ")
    loss, rate, left = rest.split(", ", 2)
    assert name == "max3"
    assert 0.5 < float(loss.removeprefix("loss ")) < 1.5
    assert rate.endswith(" examples/s")
    assert float(rate.split()[0].replace(",", "") if "," in rate else rate.split()[0]) > 0
    # Half is done after 50 looks at the clock, of 0.1 s each.
    assert (left, share) == ("5 s left", 0.5)
    assert len(message) <= 60


def test_a_loss_is_not_said_before_there_is_one() -> None:
    progress, reports = watched(each=1.0)
    run(progress, steps=3)
    assert "loss" not in reports[0][0]
    assert [share for _, share in reports] == pytest.approx([0.01, 0.02, 0.03])


@pytest.mark.parametrize(("each", "expected"), [(0.001, 0), (0.01, 9), (0.05, 49), (1.0, 100)])
def test_at_most_ten_reports_a_second(each: float, expected: int) -> None:
    progress, reports = watched(each)
    run(progress)
    assert len(reports) == pytest.approx(expected, abs=1)
    assert len(reports) <= 100 * each / 0.1 + 1 or each > 0.1


def test_a_target_makes_the_time_left_a_limit() -> None:
    progress, reports = watched(each=0.1, may_stop_early=True)
    run(progress, steps=50)
    assert reports[-1][0].endswith(", at most 5 s left")


def test_without_a_horizon_no_share_and_no_time_left() -> None:
    progress, reports = watched(each=0.1)
    run(progress, steps=50, horizon=False)
    assert all(share is None and "left" not in message for message, share in reports)


def test_a_resumed_run_counts_its_own_time_only() -> None:
    progress, reports = watched(each=0.1)
    run(progress, steps=75, begin=50)
    # 25 steps in 2.5 s; 25 are left.
    assert reports[-1][0].endswith(", 2.5 s left")


def test_adascale_is_as_far_as_its_steps_are_worth() -> None:
    progress, reports = watched(each=0.1)
    recipe = Recipe(
        global_batch=25,
        micro_batch=5,
        learning_rate=0.1,
        rate_rule="adascale",
        batch_ramp=((100, 200),),
    )
    workload = rightbatch.load_workload("max3")
    training = Training(workload, recipe, horizon=Horizon(examples=4000), callbacks=[progress])
    progress.on_start(training)
    training.advance(20)
    assert reports[-1][1] == pytest.approx(training.gained / 4000)
    assert training.gained != training.consumed


def test_the_norm_of_the_gradient_is_not_measured_for_it() -> None:
    progress, _ = watched(each=0.1)
    training = Training(
        rightbatch.load_workload("max3"),
        Recipe(global_batch=50, learning_rate=0.1),
        callbacks=[progress],
    )
    assert not training._watched


def test_the_command_says_json_lines(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["train", "max3", "--batch-size", "2", "--learning-rate", "0.01", "--epochs", "6"]
    assert main([*arguments, "--json", "--no-run"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    said = [line for line in lines if "share" in line]
    assert said, "3,000 updates take longer than a quarter of a second"
    for line in said:
        assert line["progress"].startswith("max3: loss ")
        assert "examples/s, " in line["progress"] and line["progress"].endswith(" left")
        assert 0 < line["share"] <= 1
    assert all(a["share"] <= b["share"] for a, b in pairwise(said))
    assert all(b["seconds"] - a["seconds"] >= 0.24 for a, b in pairwise(said))
    assert not any(math.isnan(line["seconds"]) for line in said)
