"""Making a plan: it leaves no trace, keeps to its budget, and refuses what makes no sense."""

from __future__ import annotations

import math
import time
from typing import Any

import pytest
import torch
from tests.plan.conftest import Made
from torch import nn
from torch.nn import functional as F

from rightbatch import Workload, catalog
from rightbatch.cli.render_plan import plan_text
from rightbatch.errors import RightbatchError, UsageError, WorkloadError
from rightbatch.plan import make_plan, probe, replay_plan
from rightbatch.plan.make import parse_seconds

# --------------------------------------------------------------------------------- no trace left


def test_making_a_plan_with_a_race_leaves_no_trace(made: Made) -> None:
    assert made.after.keys() == made.before.keys()
    for name in made.before:
        assert made.after[name] == made.before[name], name


def test_it_says_what_it_does_in_order(made: Made) -> None:
    order = [
        next(i for i, text in enumerate(made.said) if text.startswith(words))
        for words in ("memory", "throughput", "noise", "learning rate", "race")
    ]
    assert order == sorted(order)


def test_the_evidence_says_where_and_how_it_was_measured(made: Made) -> None:
    evidence = made.plan.evidence
    assert evidence.setting.num_examples == 1024
    assert evidence.setting.optimizer == "SGD"
    assert not evidence.setting.normalised
    assert not evidence.setting.averaging
    assert evidence.setting.target == catalog.get("quadratic").target
    assert evidence.setting.budget_seconds is None
    assert evidence.environment.torch == torch.__version__
    assert evidence.environment.num_threads == 1


# ------------------------------------------------------------------------------ small workloads


def small(num_examples: int = 20, **changes: Any) -> Workload:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(num_examples, 3, generator=generator)
    targets = inputs @ torch.tensor([1.0, -2.0, 0.5])
    given: dict[str, Any] = {
        "name": "small",
        "make_model": lambda: nn.Sequential(nn.Linear(3, 1), nn.Flatten(0)),
        "train_data": (inputs, targets),
        "loss": F.mse_loss,
        "make_optimizer": lambda params, lr: torch.optim.Adam(params, lr=lr),
    }
    return Workload(**{**given, **changes})


def test_fewer_examples_than_the_usual_batch_and_no_validation_set() -> None:
    plan = make_plan(small(), effort="race")
    assert plan.recipe.global_batch <= 20
    assert plan.near_best.high <= 20
    assert plan.evidence.setting.normalised
    assert plan.effort == "race"
    assert any("No target was given" in w for w in plan.warnings)


def test_more_replicas_than_the_usual_batch_are_compared_with_nothing() -> None:
    """Batch 32 is not open to 64 workers: no speed-up over it, no cost in its trainings."""
    plan = make_plan(small(256), effort="race", replicas=64, target="train_loss<=0.2")
    race = plan.evidence.race
    assert race is not None
    assert race.sizes == (64, 128, 256)
    assert race.target_reached
    assert plan.recipe.replicas == 64
    assert plan.recipe.micro_batch * plan.recipe.accumulation * 64 == plan.recipe.global_batch
    assert plan.near_best.low >= 64
    assert plan.prediction is not None
    assert plan.prediction.steps.value is not None
    assert plan.prediction.speedup is None
    assert plan.cost.full_trainings is None
    text = plan_text(plan)
    assert "batch 32 at" not in text
    assert "full trainings" not in text
    assert replay_plan(plan) == plan


def test_a_target_that_no_run_reaches_is_planned_up_to_the_loss_that_was() -> None:
    plan = make_plan(small(), effort="race", target="train_loss<=1e-30")
    race = plan.evidence.race
    assert race is not None
    assert not race.target_reached
    assert race.target_loss > 1e-30
    assert any("train_loss<=1e-30 was not reached" in w for w in plan.warnings)
    assert plan.prediction is not None
    assert "to a loss of" in plan_text(plan)


def test_the_setting_says_whether_the_optimizer_averages_gradients() -> None:
    def momentum(params: Any, lr: float) -> torch.optim.Optimizer:
        return torch.optim.SGD(params, lr=lr, momentum=0.9)

    adam = probe(small(8)).setting
    assert (adam.normalised, adam.averaging) == (True, True)
    heavy = probe(small(8, make_optimizer=momentum)).setting
    assert (heavy.normalised, heavy.averaging) == (False, True)


def test_a_race_that_is_interrupted_is_the_best_so_far() -> None:
    """Ctrl-C while the leader is on its way, at a step that is always the same."""

    def stop(text: str, *_: Any) -> None:
        if "on to the target" in text:
            raise KeyboardInterrupt

    plan = make_plan(small(64), effort="race", target="train_loss<=0.001", progress=stop)
    race = plan.evidence.race
    assert race is not None
    assert race.stopped_by == "interrupt"
    assert any("ended early (interrupted)" in w for w in plan.warnings)
    assert plan.recipe.learning_rate in {t.learning_rate for t in race.trials}
    assert plan.prediction is not None
    assert replay_plan(plan) == plan


def test_auto_with_a_tiny_budget_is_a_probe_and_says_what_more_would_take() -> None:
    begin = time.monotonic()
    plan = make_plan(small(64), effort="auto", budget=0.5)
    assert plan.effort == "probe"
    assert plan.evidence.race is None
    (said,) = [w for w in plan.warnings if w.startswith("No race was run")]
    assert "minute" in said
    assert "effort='race'" in said
    assert plan.cost.seconds < time.monotonic() - begin


def test_probes_alone_are_evidence_without_a_race() -> None:
    evidence = probe(small(64))
    assert evidence.race is None
    assert evidence.memory is not None
    assert evidence.memory.ceiling.micro_batch == 64
    assert evidence.throughput.step_time.seconds(8) > 0


# ---------------------------------------------------------------------------------- bad arguments


@pytest.mark.parametrize(
    ("argument", "value", "error", "words"),
    [
        ("goal", "fast", UsageError, r"goal is 'fast'; choose one of time, examples, steps"),
        ("effort", "max", UsageError, r"effort is 'max'; choose one of auto, probe, race, study"),
        ("budget", "soon", UsageError, r"budget 'soon' is no duration. Write it like '30s'"),
        ("budget", 0, UsageError, r"budget 0 is no duration"),
        ("budget", -3.0, UsageError, r"budget -3.0 is no duration"),
        ("budget", math.nan, UsageError, r"budget nan is no duration"),
        ("budget", math.inf, UsageError, r"budget inf is no duration"),
        ("target", "val_loss", WorkloadError, r"target 'val_loss' cannot be read"),
        ("target", "loss<=1", WorkloadError, r"names 'loss', which is not evaluated"),
        ("target", "val_accuracy>=1", WorkloadError, r"names 'val_accuracy', but this workload"),
        ("memory_limit", "lots", UsageError, r"memory size 'lots' cannot be read"),
        ("memory_limit", 0, UsageError, r"memory size is 0 bytes. It must be positive"),
        ("replicas", 0, UsageError, r"replicas is 0; it must be at least 1"),
        ("replicas", 5000, UsageError, r"replicas is 5000.*1,?024 examples"),
        ("seed", -1, UsageError, r"seed is -1"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_measured(
    argument: str, value: Any, error: type[RightbatchError], words: str
) -> None:
    said: list[str] = []
    arguments: dict[str, Any] = {"effort": "probe", argument: value}
    with pytest.raises(error, match=words):
        make_plan(
            catalog.get("quadratic"), progress=lambda text, *_: said.append(text), **arguments
        )
    assert not [text for text in said if not text.startswith("memory")]


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("30s", 30.0),
        ("30 s", 30.0),
        ("1.5sec", 1.5),
        ("2min", 120.0),
        ("2 m", 120.0),
        ("0.5h", 1800.0),
        ("45", 45.0),
        (45, 45.0),
        (0.5, 0.5),
        (1e-5, 1e-5),
        (1e6, 1e6),
    ],
)
def test_durations(text: str | float, seconds: float) -> None:
    assert parse_seconds(text) == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["", "2 days", "-3s", "s", "1:30", "0s", "1e999"])
def test_what_is_no_duration(text: str) -> None:
    with pytest.raises(UsageError, match=r"is no duration. Write it like '30s', '2min' or '1h'"):
        parse_seconds(text)
