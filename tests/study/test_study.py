"""`run_study`: the same trainings as the plain loop, nothing lost or repeated, honest warnings."""

from __future__ import annotations

import csv
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from rightbatch import Recipe, Study, Watch, Workload, accuracy, load_workload, run_study, train
from rightbatch.errors import ProbeError, UsageError
from rightbatch.laws.path import path_roughness
from rightbatch.store import read_record
from rightbatch.study import group, runner
from rightbatch.study.database import StudyDatabase
from rightbatch.study.executors import run_task as study_module
from rightbatch.study.group import most_together, run_group
from rightbatch.study.study import SCHEMA
from rightbatch.study.trials import TrialKey

X = torch.randn(60, 4, generator=torch.Generator().manual_seed(0))
Y = (X @ torch.tensor([1.0, -2.0, 0.5, 0.0]) > 0).long()


def make(**changes: Any) -> Workload:
    made = {
        "name": "small",
        "make_model": lambda: nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)),
        "train_data": (X[:40], Y[:40]),
        "val_data": (X[40:], Y[40:]),
        "loss": F.cross_entropy,
        "make_optimizer": lambda p, lr: torch.optim.SGD(p, lr=lr),
        **changes,
    }
    return Workload(**made)


def small(workload: Workload | None = None, **changes: Any) -> Study:
    asked = {
        "batch_sizes": [5, "full"], "learning_rates": [0.05, 0.5], "seeds": 2, "epochs": 3,
        "engine": "loop", **changes,
    }  # fmt: skip
    return run_study(workload or make(), **asked)


def without_cost(study: Study) -> dict[str, Any]:
    return {k: v for k, v in vars(study).items() if k not in ("cost", "comparisons", "sizes")}


@pytest.mark.parametrize(
    ("engine", "ran_by"),
    [
        ("loop", "loop: The loop was asked for."),
        ("compiled", "compiled: The compiled engine was asked for."),
        ("auto", "loop: Trainings so short are done before a compiler would be."),
    ],
)
def test_its_trainings_are_those_of_train(engine: str, ran_by: str) -> None:
    study = small(engine=engine)
    assert study.engines == (ran_by,)
    assert len(study.trials) == 8 and study.state == "complete"
    for trial in study.trials:
        recipe = Recipe(global_batch=trial.batch_size, learning_rate=trial.learning_rate)
        run = train(make(), recipe, epochs=3, seed=trial.seed)
        assert (trial.steps, trial.examples) == (run.steps, run.examples)
        assert trial.val_loss == pytest.approx(run.val_loss, rel=1e-4)
    assert study.cost.examples == 8 * 120


def test_what_is_kept_can_be_read_again(tmp_path: Path) -> None:
    study = small(run_directory=tmp_path)
    assert read_record(tmp_path / "study.json", Study, schema=SCHEMA) == study
    with (tmp_path / "trials.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["val_loss"]) for row in rows] == [t.val_loss for t in study.trials]
    with (tmp_path / "points.csv").open() as file:
        points = list(csv.DictReader(file))
    last = [p for p in points if (p["batch_size"], p["learning_rate"], p["seed"]) ==
            ("5", "0.05", "1")][-1]  # fmt: skip
    assert (int(last["step"]), float(last["epochs"])) == (24, 3)
    (trial,) = [t for t in study.trials_at(5, 0.05) if t.seed == 1]
    assert float(last["val_loss"]) == trial.val_loss


def test_a_finished_study_runs_nothing_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = small(run_directory=tmp_path)

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("it trained again")

    monkeypatch.setattr(study_module, "run_group", refuse)
    monkeypatch.setattr(runner, "measure_throughput", refuse)
    again = small(run_directory=tmp_path)
    assert without_cost(again) == without_cost(study) and again.sizes == study.sizes
    with pytest.raises(UsageError, match="another design"):
        small(run_directory=tmp_path, seeds=3)
    with pytest.raises(UsageError, match="another task"):
        small(make(name="other"), run_directory=tmp_path)


@pytest.mark.parametrize("groups_before", [0, 1])
def test_an_interrupted_study_goes_on_and_repeats_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, groups_before: int
) -> None:
    whole = small()
    run_group, ran = study_module.run_group, list[TrialKey]()

    def interrupted(workload: Workload, keys: Any, *rest: Any, **options: Any) -> Any:
        if len(ran) == 4 * groups_before:
            raise KeyboardInterrupt
        ran.extend(keys)
        return run_group(workload, keys, *rest, **options)

    monkeypatch.setattr(study_module, "run_group", interrupted)
    stopped = small(run_directory=tmp_path)
    assert stopped.state == "stopped"
    states = [trial.state for trial in stopped.trials]
    assert states.count("complete") == 4 * groups_before and states.count("stopped") >= 4
    monkeypatch.setattr(study_module, "run_group", lambda *a, **k: ran.extend(a[1]) or
                        run_group(*a, **k))  # fmt: skip
    again = small(run_directory=tmp_path)
    assert again.state == "complete" and len(ran) == len(set(ran)) == 8
    assert [vars(t) | {"seconds": 0} for t in again.trials] == [
        vars(t) | {"seconds": 0} for t in whole.trials
    ]


KILLED = """
import sys, time, torch
sys.path.insert(0, sys.argv[2])
from test_study import make, small
from rightbatch.study.executors import run_task as module
run_group = module.run_group
def slow(workload, keys, *rest, **options):
    found = run_group(workload, keys, *rest, **options)
    print(keys[0].batch_size, flush=True)
    time.sleep(0.1)
    return found
module.run_group = slow
small(run_directory=sys.argv[1], batch_sizes=[5, 10, 20, "full"])
print("end", flush=True)
"""


def check_a_kill(folder: Path, seed: int) -> None:
    """T4: what was written stays, what was running is run again, nothing twice."""
    draw = random.Random(seed)
    ended, delay = draw.randrange(12), draw.uniform(0.0, 0.25)
    command = [sys.executable, "-c", KILLED, str(folder), str(Path(__file__).parent)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as running:
        assert running.stdout is not None
        for _ in range(ended + 1):
            running.stdout.readline()
        time.sleep(delay)
        os.kill(running.pid, signal.SIGKILL)
    about = f"seed {seed}: killed after {ended} trainings and {delay:.3f} s"
    sizes: dict[str, Any] = {"batch_sizes": [5, 10, 20, "full"]}
    before = StudyDatabase(str(folder / "study.db"), "study")
    before.open()
    kept = [trial for trial in before.trials() if trial.state == "complete"]
    before.close()
    assert len(kept) >= ended, about
    again = small(run_directory=folder, **sizes)
    assert [t.state for t in again.trials] == ["complete"] * 16, about
    whole = small(**sizes)
    assert [t.val_loss for t in again.trials] == [t.val_loss for t in whole.trials], about


@pytest.mark.parametrize("seed", range(2))
def test_a_study_survives_being_killed(tmp_path: Path, seed: int) -> None:
    check_a_kill(tmp_path, seed)


@pytest.mark.faults
@pytest.mark.parametrize("seed", range(50))
def test_a_study_survives_fifty_kills(tmp_path: Path, seed: int) -> None:
    check_a_kill(tmp_path, 100 + seed)


def test_rates_that_it_finds_itself_are_extended_until_the_best_is_inside() -> None:
    study = run_study(
        load_workload("max3"), batch_sizes=[100], seeds=2, epochs=5, target="val_loss<=0.6"
    )
    (size,) = study.sizes
    assert size.at_edge is None and len(size.rates) >= 6
    ratios = [
        b.learning_rate / a.learning_rate for a, b in zip(size.rates, size.rates[1:], strict=False)
    ]
    assert ratios == pytest.approx([2.0] * len(ratios))


def test_divergence_is_a_state_and_kept_out_of_means() -> None:
    regression = make(
        loss=F.mse_loss, train_data=(X[:40], X[:40, :2]), val_data=(X[40:], X[40:, :2])
    )
    study = small(regression, learning_rates=[0.05, 1e9])
    wild = [t for t in study.trials if t.learning_rate == 1e9]
    assert {t.state for t in wild} == {"diverged"}
    assert all(t.val_loss is None for t in wild)
    for size in study.sizes:
        assert size.learning_rate.value == 0.05 and size.stable_edge == 0.05
        assert [rate.diverged for rate in size.rates] == [0, 2]


def test_a_size_that_fails_is_told_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    run_group = study_module.run_group

    def failing(workload: Workload, keys: Any, *rest: Any, **options: Any) -> Any:
        if keys[0].batch_size == 40:
            raise MemoryError("no room")
        return run_group(workload, keys, *rest, **options)

    monkeypatch.setattr(study_module, "run_group", failing)
    study = small()
    assert [t.state for t in study.trials_at(40)] == ["failed"] * 4
    assert any("4 trainings failed; at batch 40: MemoryError: no room" in w for w in study.warnings)
    assert study.best is not None and study.best.batch_size == 5
    with pytest.raises(
        ProbeError, match=r"Every training failed\. The first: MemoryError: no room"
    ):
        small(batch_sizes=["full"])


@pytest.mark.parametrize(
    ("changes", "target", "said"),
    [
        ({}, "val_accuracy>=0.9", "Use train_loss, val_loss"),
        ({"metric": accuracy}, "val_other>=0.9", "val_loss or val_accuracy"),
        ({"val_data": None}, "val_loss<=0.5", "Use train_loss"),
    ],
)
def test_a_target_that_is_not_evaluated_is_refused(
    changes: dict[str, Any], target: str, said: str
) -> None:
    with pytest.raises(UsageError, match=said):
        small(make(**changes), target=target)


def test_without_validation_data_training_losses_are_compared() -> None:
    study = small(make(val_data=None))
    assert study.best is not None and study.best.because == "least training loss at the end"
    assert {s.val_loss.value for s in study.sizes} == {None}
    epochs = next(c for c in study.comparisons if c.unit == "epochs")
    assert all(size.loss.resolved for size in epochs.sizes)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_share_the_trainings_and_change_nothing(threads: int) -> None:
    keys = [
        TrialKey(batch_size=7, learning_rate=2.0**k, seed=s) for k in range(-4, 4) for s in range(3)
    ]
    shares: list[float] = []
    found, _ = run_group(make(), keys, 30, engine="compiled", threads=threads,
                         progress=shares.append)  # fmt: skip
    alone, _ = run_group(make(), keys, 30, engine="loop")
    assert [f.key for f in found] == keys and shares[-1] == 1.0
    for ours, theirs in zip(found, alone, strict=True):
        assert ours.diverged == theirs.diverged
        assert [p.step for p in ours.points] == [p.step for p in theirs.points]
        assert ours.points[-1].val_loss == pytest.approx(theirs.points[-1].val_loss, rel=1e-3)


def test_what_a_thread_raises_reaches_the_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Any:
        raise MemoryError("no room")

    monkeypatch.setattr(group._Part, "_evaluate", broken)
    keys = [TrialKey(batch_size=7, learning_rate=0.1, seed=s) for s in range(16)]
    with pytest.raises(MemoryError, match="no room"):
        run_group(make(), keys, 30, engine="compiled", threads=2)


def test_large_models_run_alone_and_small_ones_together() -> None:
    assert most_together(10**10) == 1
    assert most_together(10) == group._MOST_TOGETHER
    assert 1 < most_together(10**6) < group._MOST_TOGETHER


def test_long_trainings_that_run_one_by_one_are_kept_as_they_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Dropping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.dropout(self.layer(x), 0.1, self.training)

    groups: list[int] = []

    def seen(workload: Workload, keys: Any, *rest: Any, **options: Any) -> Any:
        groups.append(len(keys))
        return run_group(workload, keys, *rest, **options)

    monkeypatch.setattr(study_module, "run_group", seen)
    options: dict[str, Any] = {"engine": "auto", "batch_sizes": [5], "seeds": 3}
    small(make(make_model=Dropping), **options)
    monkeypatch.setattr(runner, "_MOST_LOST_SECONDS", 1e-9)
    small(make(make_model=Dropping), **options)
    assert groups == [6] + [1] * 6
    groups.clear()
    small(**options)  # which the compiled engine could run
    assert groups == [6]


def test_an_error_at_some_rates_does_not_take_the_others_along() -> None:
    class Touchy(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            found = super().forward(input)
            if found.abs().max() > 20:
                raise ValueError("too large")
            return found

    touchy = make(make_model=lambda: Touchy(4, 2))
    for engine in ("loop", "auto"):
        study = small(touchy, learning_rates=[0.05, 1e4], engine=engine)
        states = {t.learning_rate: t.state for t in study.trials}
        assert states == {0.05: "complete", 1e4: "failed"}
        assert study.warnings[0].startswith("4 trainings failed; at batch 5: ValueError: too large")
    found = run_study(
        touchy, batch_sizes=[5], seeds=2, epochs=3, engine="loop"
    )  # it comes to an end
    assert found.best is not None


def test_a_size_that_the_model_cannot_take_is_left_out() -> None:
    def make_model() -> nn.Module:
        return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))

    study = small(make(make_model=make_model), batch_sizes=[1, 13], epochs=2)
    assert {t.state for t in study.trials_at(1)} == {"failed"}
    # 13, 13 and 14 examples: the last one joins, since BatchNorm needs two.
    assert [(t.steps, t.examples) for t in study.trials_at(13)] == [(6, 80)] * 4
    assert any("No training ended with a loss at batch 1." in w for w in study.warnings)


def test_another_workload_of_the_same_name_is_refused(tmp_path: Path) -> None:
    small(run_directory=tmp_path)
    adam = {"make_optimizer": lambda p, lr: torch.optim.Adam(p, lr=lr)}
    thrice = {"loss": lambda o, t: 3 * F.cross_entropy(o, t)}
    flipped = {"train_data": (X[:40], 1 - Y[:40])}
    for changes in (adam, thrice, flipped):
        with pytest.raises(UsageError, match="another task"):
            small(make(**changes), run_directory=tmp_path)


def test_what_failed_is_tried_again_when_it_is_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: Any, **__: Any) -> Any:
        raise MemoryError("no room")

    with monkeypatch.context() as patch:
        patch.setattr(study_module, "run_group", failing)
        with pytest.raises(ProbeError):
            small(run_directory=tmp_path)
    assert {t.state for t in small(run_directory=tmp_path).trials} == {"complete"}


def test_a_metric_can_be_the_target() -> None:
    study = small(make(metric=accuracy), target="val_accuracy>=0.6", epochs=20)
    assert study.metric == "val_accuracy"
    assert all(size.reached == 2 for size in study.sizes)
    assert all((size.val_metric.low or 0) >= 0 for size in study.sizes)
    assert all((size.val_metric.high or 1) <= 1 for size in study.sizes)


def test_a_training_loss_is_that_of_the_training_set_and_not_of_one_example() -> None:
    study = small(make(val_data=None), batch_sizes=[1, "full"], target="train_loss<=0.4", epochs=20)
    for size in study.sizes:
        assert size.steps_to_target.value is None or size.steps_to_target.value > 3
    (trial,) = [t for t in study.trials_at(1, 0.05) if t.seed == 0]
    run = train(make(val_data=(X[:40], Y[:40])), Recipe(global_batch=1, learning_rate=0.05),
                epochs=20)  # fmt: skip
    assert trial.train_loss == pytest.approx(run.val_loss, rel=1e-5)


def test_a_target_met_at_once_is_told() -> None:
    study = small(target="val_loss<=9")
    assert any("was met at the first evaluation at batch 5, 40" in w for w in study.warnings)
    assert study.sizes[0].learning_rate.value == 0.5  # the lower loss decides


def test_odd_places_hold_their_own_study(tmp_path: Path) -> None:
    place = tmp_path / "a?b #1%20"
    small(run_directory=place)
    assert (place / "study.db").exists() and not (tmp_path / "a").exists()


def test_several_studies_share_a_storage_by_name(tmp_path: Path) -> None:
    storage = f"sqlite:///{tmp_path / 's.db'}"
    small(storage=storage, name="one")
    small(storage=storage, name="two", seeds=1)
    with pytest.raises(UsageError, match="another design"):
        small(storage=storage, name="two")


def test_few_seeds_and_edges_are_warned_of() -> None:
    study = small(seeds=1)
    assert any("1 seed: too few" in warning for warning in study.warnings)
    assert any("the best of all may lie beyond" in warning for warning in study.warnings)
    assert json.dumps(study.warnings)


def test_it_says_how_far_and_how_roughly_weights_went() -> None:
    study = small(seeds=3, epochs=6, watch="0.weight[1,2]")
    assert study.watching == "0.weight[1,2]"
    watch = Watch(weights=["0.weight[1,2]"])
    trial = study.trials_at(5, 0.5)[1]
    train(make(), Recipe(global_batch=5, learning_rate=0.5), epochs=6, seed=1, callbacks=[watch])
    assert trial.distance == pytest.approx(watch.distances[-1].value)
    assert trial.roughness == pytest.approx(path_roughness(watch.paths["0.weight[1,2]"]))
    for size in study.sizes:
        assert size.distance.n == 3 and (size.distance.value or 0) > 0
        assert (size.roughness.value or 0) >= 1 and size.dead == 0
        assert [rate.noise_floor.verdict for rate in size.rates]
    kinds = [(contrast.quantity, contrast.at) for contrast in study.contrasts]
    assert ("roughness", "best") in kinds and ("distance", "same") in kinds
    rough = study.contrasts[kinds.index(("roughness", "same"))]
    assert rough.sizes == (5, 40) and rough.certain is not None


def test_a_dead_weight_is_said_to_be_dead() -> None:
    def half_frozen() -> nn.Module:
        model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        model[0].weight.requires_grad_(False)  # pyright: ignore
        return model

    study = small(make(make_model=half_frozen))
    assert all(trial.dead and trial.roughness is None for trial in study.trials)
    assert all(size.dead == 2 and not size.roughness.resolved for size in study.sizes)
    assert {contrast.quantity for contrast in study.contrasts} == {"distance", "gap"}


def test_a_weight_that_is_not_there_is_refused() -> None:
    with pytest.raises(UsageError, match=r"The model has no weight '7\.bias"):
        small(watch="7.bias[0]")
