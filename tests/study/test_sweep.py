"""Sweeps over label noise and dataset size: paired studies, and verdicts that are true."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from rightbatch import Sweep, Workload, accuracy, run_sweep
from rightbatch.errors import ProbeError, UsageError
from rightbatch.store import read_record
from rightbatch.study import runner
from rightbatch.study import study as study_module
from rightbatch.study.database import StoredTrial
from rightbatch.study.sweep import SWEEP_SCHEMA, make_variant, read_sweep_design
from rightbatch.study.sweep_findings import LevelTrials, contrast_levels
from rightbatch.study.trials import EvaluationPoint, TrialKey

X = torch.randn(120, 4, generator=torch.Generator().manual_seed(0))
Y = (X @ torch.tensor([1.0, -2.0, 0.5, 0.0]) > 0).long()


@pytest.fixture(autouse=True, scope="module")
def no_step_times() -> Iterator[None]:
    """Timing takes two seconds for each study."""

    def refuse(*_: Any, **__: Any) -> None:
        raise ProbeError("not timed")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "measure_throughput", refuse)
        yield


@pytest.fixture(scope="module")
def plain(no_step_times: None) -> Sweep:
    return small()


def make(**changes: Any) -> Workload:
    made = {
        "name": "small",
        "make_model": lambda: nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)),
        "train_data": (X[:80], Y[:80]),
        "val_data": (X[80:], Y[80:]),
        "loss": F.cross_entropy,
        "make_optimizer": lambda p, lr: torch.optim.SGD(p, lr=lr),
        "metric": accuracy,
        **changes,
    }
    return Workload(**made)


def small(workload: Workload | None = None, **changes: Any) -> Sweep:
    asked = {
        "batch_sizes": [10, "full"], "learning_rates": [0.1, 0.5], "seeds": 3, "epochs": 2,
        "engine": "loop", **changes,
    }  # fmt: skip
    if "dataset_sizes" not in asked:
        asked = {"label_noise": [0, 0.25, 0.5], **asked}
    return run_sweep(workload or make(), **asked)


def test_each_level_is_a_study_of_its_own_that_shares_the_design(tmp_path: Path) -> None:
    sweep = small(run_directory=tmp_path / "here")
    names = [f"small, {share} % label noise" for share in (0, 25, 50)]
    assert [level.study.workload for level in sweep.levels] == names
    assert len({level.study.design for level in sweep.levels}) == 1
    assert {path.name for path in (tmp_path / "here").iterdir()} == {
        "noise-0", "noise-0.25", "noise-0.5", "sweep.json", "sweep-design.json",
    }  # fmt: skip
    again = read_record(tmp_path / "here" / "sweep.json", Sweep, schema=SWEEP_SCHEMA)
    assert again == sweep and sweep.state == "complete"
    units = {(c.unit, c.measure, c.level) for c in sweep.contrasts}
    assert len(units) == 8 and {c.against for c in sweep.contrasts} == {0.0}
    assert [h.batch_size for h in sweep.contrasts[0].harms] == [10, 80]


def test_its_harm_is_that_of_the_trainings_seed_by_seed(plain: Sweep) -> None:
    sweep = plain
    contrast = next(c for c in sweep.contrasts if (c.unit, c.measure) == ("epochs", "loss"))

    def losses(level: int, size: int) -> np.ndarray:
        rates = [
            [t.val_loss or 9.0 for t in sweep.levels[level].study.trials_at(size, rate)]
            for rate in (0.1, 0.5)
        ]
        return min((np.array(own) for own in rates), key=lambda own: own.mean())

    harms = [losses(1, size) - losses(0, size) for size in (10, 80)]
    for harm, own in zip(contrast.harms, harms, strict=True):
        assert harm.harm.value == pytest.approx(own.mean())
    difference = harms[0] - harms[1]
    half = 4.302653 * difference.std(ddof=1) / np.sqrt(3)
    assert contrast.difference.value == pytest.approx(difference.mean())
    assert contrast.difference.high == pytest.approx(difference.mean() + half, rel=1e-5)


def test_smaller_parts_leave_larger_batches_out() -> None:
    sweep = small(dataset_sizes="20,40,full", batch_sizes=[4, 16, 32], epochs=None, steps=5)
    assert [level.study.num_examples for level in sweep.levels] == [20, 40, 80]
    sizes = [{t.batch_size for t in level.study.trials} for level in sweep.levels]
    assert sizes == [{4, 16}, {4, 16, 32}, {4, 16, 32}]
    assert {c.against for c in sweep.contrasts} == {80.0}
    assert "Batch 32 is left out where there are fewer examples." in sweep.warnings


def test_it_goes_on_where_it_stopped(
    plain: Sweep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = study_module.StudyRunner.run, list[int]()

    def run(self: Any) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        real(self)

    monkeypatch.setattr(study_module.StudyRunner, "run", run)
    stopped = small(run_directory=tmp_path)
    assert (stopped.state, len(stopped.levels), stopped.contrasts) == ("stopped", 2, ())
    design = read_sweep_design(tmp_path)
    assert design is not None and design.levels == (0.0, 0.25, 0.5)
    whole = small(run_directory=tmp_path)
    assert whole.state == "complete"
    assert [x.study.trials for x in whole.levels] == [x.study.trials for x in plain.levels]
    assert whole.contrasts == plain.contrasts
    with pytest.raises(UsageError, match="holds another sweep"):
        small(run_directory=tmp_path, variant_seed=1)


def test_one_storage_holds_all_of_it(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'all.db'}"
    sweep = small(storage=url, name="mine")
    files = {path.name for path in tmp_path.iterdir()}
    assert sweep.contrasts and files == {"all.db", "all.db.lock"}
    assert small(storage=url, name="mine").contrasts == sweep.contrasts


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"label_noise": None}, "was given neither label noise nor dataset sizes"),
        ({"dataset_sizes": [10, 20], "label_noise": [0, 0.1]}, "was given both"),
        ({"label_noise": [0.1]}, "needs two or more shares of label noise, and was given 1"),
        ({"label_noise": "0,many"}, "A share of label noise is 'many'"),
        ({"label_noise": [0, -1]}, "A share of label noise is '-1'"),
        ({"label_noise": [0, 2.0]}, "at most all can be wrong"),
        ({"dataset_sizes": "10,81"}, "A dataset size is '81'. Give numbers from 1 to 80"),
        ({"dataset_sizes": [2, 40], "batch_sizes": [4, 8]}, "No batch size of 4,8 fits"),
        ({"target": "train_loss<=0.1"}, "judged by wrong labels"),
    ],
)
def test_wrong_sweeps_are_told(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        small(**changes)


def test_noise_is_not_judged_by_wrong_labels() -> None:
    with pytest.raises(UsageError, match="has no validation data"):
        small(make(val_data=None))


# ---- planted truths ----------------------------------------------------------------------------


def planted(
    sweep: Sweep, harm_small: float, harm_large: float, rng: np.random.Generator
) -> list[LevelTrials]:
    """Two levels of two sizes whose losses are known; seeds move all cells of a seed alike."""
    seeds, levels = range(5), list[LevelTrials]()
    shift = 0.5 * rng.normal(size=5)
    for level, study in enumerate(x.study for x in sweep.levels[:2]):
        trials: list[StoredTrial] = []
        for size, steps, harm in ((4, 80, harm_small), (80, 4, harm_large)):
            for rate in (0.1, 0.5):
                for seed in seeds:
                    loss = 1 + shift[seed] + level * harm + 0.2 * (rate == 0.5)
                    loss += 0.02 * rng.normal()
                    points = tuple(
                        EvaluationPoint(
                            step=step, examples=step * size, train_loss=None, val_loss=loss,
                            val_metric=None,
                        )
                        for step in (1, 2, 4, 20, 80) if step <= steps
                    )  # fmt: skip
                    key = TrialKey(batch_size=size, learning_rate=rate, seed=seed)
                    trials.append(StoredTrial(key=key, state="complete", points=points))
        levels.append(LevelTrials(level=level, study=study, trials=trials))
    return levels


def test_verdicts_on_planted_harms_are_true_and_chance_is_not_told_apart(plain: Sweep) -> None:
    sweep, rng = plain, np.random.default_rng(0)
    for harms, said in (((0.3, 0.1), "small"), ((0.1, 0.3), "large")):
        found = contrast_levels(planted(sweep, *harms, rng), 0, accuracy=False)
        assert [(c.unit, c.verdict) for c in found] == [("epochs", said), ("steps", said)]
        assert found[0].harms[0].harm.value == pytest.approx(harms[0], abs=0.05)
    told = [
        contrast_levels(planted(sweep, 0.2, 0.2, rng), 0, accuracy=False)[0].verdict
        for _ in range(100)
    ]
    assert told.count("not told apart") >= 0.91 * 100


def test_one_seed_tells_nothing_apart() -> None:
    assert {c.verdict for c in small(seeds=1).contrasts} == {"not told apart"}


def test_levels_are_paired_what_is_wrong_stays_wrong_and_parts_lie_within_each_other(
    plain: Sweep,
) -> None:
    first, second = (make_variant(make(), plain.design, level) for level in (0.25, 0.5))
    wrong = first.train_data[1] != Y[:80]
    assert int(wrong.sum()) == 20
    assert torch.equal(second.train_data[1][wrong], first.train_data[1][wrong])
    parts = replace(plain.design, kind="dataset_size")
    few, more = (make_variant(make(), parts, level).train_data[0].tolist() for level in (20, 40))
    assert len(few) == 20 and all(row in more for row in few)
