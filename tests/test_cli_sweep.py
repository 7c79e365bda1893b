"""`rightbatch study` over label noise and dataset sizes, and of two models."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rightbatch import Sweep, compare_choices, load_workload, run_sweep
from rightbatch.cli import main
from rightbatch.cli.render_carry_over import carry_over_text
from rightbatch.cli.render_sweep import sweep_text
from rightbatch.errors import ProbeError
from rightbatch.laws.estimate import Estimate
from rightbatch.store import read_record
from rightbatch.study import runner
from rightbatch.study.carry_over import CARRY_OVER_SCHEMA, CarryOver
from rightbatch.study.sweep import SWEEP_SCHEMA

Captured = pytest.CaptureFixture[str]
SMALL = ("study", "max3", "--batch-sizes", "50,full", "--learning-rates", "0.1,1", "--seeds", "2",
         "--epochs", "2", "--engine", "loop", "--quiet", "--threads", "1")  # fmt: skip


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture(autouse=True, scope="module")
def no_step_times() -> Iterator[None]:
    """Timing takes two seconds for each study."""

    def refuse(*_: Any, **__: Any) -> None:
        raise ProbeError("not timed")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "measure_throughput", refuse)
        yield


@pytest.fixture(scope="module")
def sweep(no_step_times: None) -> Sweep:
    return run_sweep(
        load_workload("max3"), dataset_sizes=[200, "full"], batch_sizes=[20, 100],
        learning_rates=[0.1, 1.0], seeds=2, epochs=2, engine="loop",
    )  # fmt: skip


def test_a_sweep_is_told_kept_and_gone_on_with(capsys: Captured) -> None:
    assert main([*SMALL, "--label-noise", "0,0.4", "--run", "here"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("max3: the best batch, with the ")
    assert "from 0 % label\nnoise to 40 % label noise" in text or "40 % label noise" in text
    assert "At equal epochs (2 epochs), 40 % label noise against 0 % label noise:" in text
    assert all(len(line) <= 80 for line in text.splitlines())
    first = read_record("here/sweep.json", Sweep, schema=SWEEP_SCHEMA)
    assert main(["study", "max3", "--resume", "here", "--quiet", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert (data["schema"], data["run_directory"]) == ("rightbatch.sweep/1", "here")
    assert [level["level"] for level in data["levels"]] == [0.0, 0.4]
    again = read_record("here/sweep.json", Sweep, schema=SWEEP_SCHEMA)
    assert (again.contrasts, again.design) == (first.contrasts, first.design)
    assert main([*SMALL[:2], "--label-noise", "0,0.1", "--resume", "here"]) == 2
    assert "Drop --label-noise" in capsys.readouterr().err


def test_dataset_sizes_in_words(sweep: Sweep) -> None:
    text = sweep_text(sweep)
    assert "From 1,000 examples to 200 examples, after 2 epochs each" in text
    assert all(len(line) <= 80 for line in text.splitlines())


def test_verdicts_in_words(sweep: Sweep) -> None:
    def said(low: float, high: float, verdict: Any) -> str:
        difference = Estimate(value=(low + high) / 2, low=low, high=high, n=5)
        contrast = replace(sweep.contrasts[0], difference=difference, verdict=verdict)
        return " ".join(sweep_text(replace(sweep, contrasts=(contrast,))).split())

    assert "the loss of batch 20 rises by 0.2 more (0.1 to 0.3) than that of 100." in said(
        0.1, 0.3, "small"
    )
    assert "the loss of batch 100 rises by 0.2 more (0.1 to 0.3) than that of 20." in said(
        -0.3, -0.1, "large"
    )
    assert "rises more is not told apart; the difference is 0.1 (-0.1 to 0.3)." in said(
        -0.1, 0.3, "not told apart"
    )
    stopped = sweep_text(replace(sweep, state="stopped", contrasts=()))
    assert stopped.startswith("The sweep was stopped before its end, with 2 of 2 levels begun.")


def test_harm_of_trainings_that_came_unequally_far_is_qualified(sweep: Sweep) -> None:
    first = sweep.contrasts[0]
    ends = [Estimate(value=v, low=v - 0.1, high=v + 0.1, n=3) for v in (0.2, 1.0)]
    harms = tuple(replace(h, before=e) for h, e in zip(first.harms, ends, strict=True))
    text = sweep_text(replace(sweep, contrasts=(replace(first, harms=harms),)))
    assert "come equally far before, to 0.2 and 1:" in " ".join(text.split())


def test_two_models_and_two_finished_studies(capsys: Captured) -> None:
    Path("wide.py").write_text(
        "import dataclasses\nfrom torch import nn\nfrom rightbatch import load_workload\n"
        "net = dataclasses.replace(load_workload('max3'), name='wide', make_model=lambda:\n"
        "    nn.Sequential(nn.Linear(3, 32), nn.ReLU(), nn.Linear(32, 3)))\n"
    )
    assert main([*SMALL, "--carries-over-to", "wide.py:net", "--target", "val_loss<=1.09",
                 "--run", "both"]) == 0  # fmt: skip
    text = capsys.readouterr().out
    assert "the best on max3 in" in " ".join(text.split()) and "Kept in both" in text
    assert all(len(line) <= 80 for line in text.splitlines())
    kept = read_record("both/carry-over.json", CarryOver, schema=CARRY_OVER_SCHEMA)
    assert (kept.small, kept.large, kept.batch_sizes) == ("max3", "wide", (50, 1000))
    assert main(["study", "both/small", "--carries-over-to", "both/large", "--json", "-q"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["schema"] == CARRY_OVER_SCHEMA and data["run_directory"] is None
    assert data["goals"][0]["agreement"]["value"] == kept.goals[0].agreement.value
    assert main(["study", "both/small", "--carries-over-to", "max3"]) == 2
    assert "'both/small' is a finished study, and 'max3' is not" in capsys.readouterr().err


def test_a_choice_in_words(sweep: Sweep) -> None:
    carried = compare_choices(sweep.levels[0].study, sweep.levels[1].study)
    assert "training sets differ in size: 200 and 1,000" in " ".join(
        carry_over_text(carried).split()
    )


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--label-noise", "0,0.2", "--dataset-sizes", "100,full"], "are two sweeps. Give one"),
        (["--label-noise", "0.2"], "needs two or more shares of label noise"),
        (["--label-noise", "0,much"], "A share of label noise is 'much'"),
        (["--dataset-sizes", "100,2000"], "A dataset size is '2000'"),
        (["--label-noise", "0,1", "--carries-over-to", "max3"], "Drop --label-noise"),
        (["--carries-over-to", "max3", "--resume", "."], "Drop --resume"),
    ],
)
def test_wrong_arguments_are_told(arguments: list[str], said: str, capsys: Captured) -> None:
    assert main([*SMALL, *arguments]) == 2
    assert said in capsys.readouterr().err
