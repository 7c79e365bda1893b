"""`rightbatch study`: the answer first, one JSON object, kept and gone on with."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rightbatch import Study, load_workload, run_study
from rightbatch.cli import main
from rightbatch.cli.render_study import answer, study_text
from rightbatch.laws.estimate import Estimate, unresolved
from rightbatch.store import read_record
from rightbatch.study.design import sizes_around
from rightbatch.study.study import SCHEMA

Captured = pytest.CaptureFixture[str]
SMALL = ("study", "max3", "--batch-sizes", "full,50", "--learning-rates", "0.1,1", "--seeds", "2",
         "--epochs", "3", "--quiet", "--threads", "1")  # fmt: skip


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def study() -> Study:
    return run_study(
        load_workload("max3"), batch_sizes=[1, 10, 50, "full"], learning_rates="0.02:2:6", seeds=3,
        epochs=10, target="val_loss<=0.6",
    )  # fmt: skip


def test_the_answer_comes_first_and_lines_fit(study: Study) -> None:
    text = study_text(study)
    assert text.startswith("Best for max3: batch")
    assert all(len(line) <= 80 for line in text.splitlines())
    assert "To val_loss<=0.6, each at its best learning rate" in text
    assert "After 10 epochs, each at the rate that is best there" in text
    assert re.search(r"Cost: 72 trainings(, \d+ of which diverged)?, 720,000 examples", text)


def test_sizes_that_cannot_be_told_apart_are_named(study: Study) -> None:
    first, *others = study.sizes
    wide = Estimate(value=1.0, low=0.1, high=9.0, n=3)
    sizes = (replace(first, seconds_to_target=wide), replace(others[0], seconds_to_target=wide))
    best = replace(study.best, batch_size=1) if study.best else None
    text = answer(replace(study, sizes=sizes, best=best))
    assert "Batch 10 cannot be told from it: the intervals overlap." in text
    apart = replace(sizes[1], seconds_to_target=Estimate(value=20.0, low=10.0, high=30.0, n=3))
    assert "cannot be told" not in answer(replace(study, sizes=(sizes[0], apart), best=best))


def test_nothing_known_is_said_to_be_nothing(study: Study) -> None:
    empty = replace(study, best=None, sizes=(), comparisons=(), state="stopped")
    text = study_text(empty)
    assert text.startswith("The study was stopped before its end. No training of max3 ended")


def test_without_a_target_the_table_has_rates(study: Study) -> None:
    design = replace(study.design, target=None)
    text = study_text(replace(study, design=design))
    assert "The best learning rate of each batch size" in text and "stable to" in text


@pytest.mark.parametrize(
    ("exponent", "said"),
    [
        ((0.4, 0.6), "square-root scaling."),
        ((0.9, 1.1), "linear scaling."),
        ((0.4, 1.1), "linear and square-root scaling cannot be told apart"),
        ((0.1, 0.3), "neither linear (1) nor square-root scaling (0.5)"),
    ],
)
def test_the_law_of_the_learning_rate_in_words(
    study: Study, exponent: tuple[float, float], said: str
) -> None:
    low, high = exponent
    fitted = Estimate(value=(low + high) / 2, low=low, high=high, n=4)
    text = study_text(replace(study, fits=replace(study.fits, rate_exponent=fitted)))
    assert said in " ".join(text.split())
    nothing = replace(study.fits, rate_exponent=unresolved(2))
    assert "to the power" not in study_text(replace(study, fits=nothing))


def test_json_is_one_object_as_designed(capsys: Captured) -> None:
    assert main([*SMALL, "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["schema"] == SCHEMA
    fields = "batch_size learning_rate seed state steps examples seconds train_loss val_loss"
    fields = {*fields.split(), "val_metric", "steps_to_target"}
    assert fields <= set(data["trials"][0])
    assert {t["batch_size"] for t in data["trials"]} == {50, 1000}
    assert {"batch_size", "learning_rate", "because"} == set(data["best"])
    assert "critical_batch" in data["fits"]
    folder = Path(data["run_directory"])
    names = {path.name for path in folder.iterdir()}
    assert {"study.db", "study.json", "trials.csv", "points.csv"} <= names
    read_record(folder / "study.json", Study, schema=SCHEMA)


def test_gone_on_with_and_not_kept(capsys: Captured, tmp_path: Path) -> None:
    assert main([*SMALL, "--run", "here"]) == 0
    assert "Kept in here" in capsys.readouterr().out
    first = json.loads(Path("here/study.json").read_text())
    # With the design that it was begun with, without repeating it.
    assert main(["study", "max3", "--resume", "here", "--quiet"]) == 0
    again = json.loads(Path("here/study.json").read_text())
    assert main([*SMALL, "--resume", "here"]) == 2
    assert "Drop --batch-sizes, --learning-rates, --seeds, --epochs" in capsys.readouterr().err
    assert (again["design"], again["trials"]) == (first["design"], first["trials"])
    assert main([*SMALL, "--no-run"]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["here"]


def test_sizes_around_the_answer_of_a_plan(capsys: Captured) -> None:
    assert main(["plan", "max3", "--effort", "probe", "--out", "plan.json", "--quiet"]) == 0
    near = json.loads(Path("plan.json").read_text())["near_best"]
    capsys.readouterr()
    command = ["study", "max3", "--batch-sizes", "plan.json", "--learning-rates", "0.1", "--steps",
               "2", "--no-run", "--json"]  # fmt: skip
    assert main(command) == 0
    sizes = json.loads(capsys.readouterr().out)["design"]["batch_sizes"]
    assert sizes == list(sizes_around(near["low"], near["high"], 1000))
    assert main(["study", "max3", "--batch-sizes", "none.json"]) != 0
    assert "none.json" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--batch-sizes", "0"], "A batch size is '0'"),
        (["--learning-rates", "1:2"], "first:last:count"),
        (["--steps", "5"], "Give exactly one of epochs, steps, examples and seconds"),
        (["--no-run", "--run", "x"], "--no-run keeps nothing"),
        (["--target", "loss"], "cannot be read"),
        (["--storage", "nonsense://x"], "no URL that can be read"),
        (["--resume", "."], "There is no study in '.'"),
        (["--resume", ".", "--run", "x"], "--resume already says where"),
    ],
)
def test_wrong_arguments_are_told_in_a_sentence(
    arguments: list[str], said: str, capsys: Captured
) -> None:
    assert main([*SMALL, *arguments]) == 2
    assert said in capsys.readouterr().err


def test_ctrl_c_prints_what_is_known_and_can_be_gone_on_with(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "rightbatch", "study", "max3", "--batch-sizes", "full,100,1",
               "--learning-rates", "0.1,0.3", "--seeds", "2", "--epochs", "30", "--engine", "loop",
               "--run", "here"]  # fmt: skip
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path
    ) as running:
        assert running.stderr is not None and running.stdout is not None
        for line in running.stderr:
            if '"batch 1:' in line:
                break
        time.sleep(0.5)
        running.send_signal(signal.SIGINT)
        text = running.stdout.read()
        running.stderr.read()
    assert running.returncode == 130
    assert text.startswith("The study was stopped before its end. Best for max3")
    study: Any = read_record(tmp_path / "here" / "study.json", Study, schema=SCHEMA)
    states = {t.batch_size: t.state for t in study.trials}
    assert states == {1: "stopped", 100: "complete", 1000: "complete"}


def test_a_race_says_what_it_dropped_and_what_it_cost(capsys: Captured) -> None:
    asked = (*SMALL[:4], "--learning-rates", "0.02:20:9", "--seeds", "2", "--epochs", "60",
             "--quiet", "--search", "race")  # fmt: skip
    assert main([*asked, "--run", "here", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    rungs = data["race"]["rungs"]
    assert rungs[0]["cells"] == 18 and rungs[0]["dropped"] > 5
    shares = [trial["share"] for trial in data["trials"]]
    assert min(shares) < 1.0 and max(shares) == 1.0
    assert main(["study", "max3", "--resume", "here", "--quiet"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert re.search(r"The race: of 18 pairs it dropped \d+ after", text)
    assert re.search(r"it took \d+ % of the modelled seconds and \d+ % of the examples", text)


def test_a_sampler_and_its_export(capsys: Captured) -> None:
    optuna = pytest.importorskip("optuna")
    asked = [*SMALL, "--search", "random", "--trials", "4", "--export-optuna", "sqlite:///o.db"]
    assert main([*asked, "--run", "here"]) == 0
    assert "Cost: 8 trainings" in capsys.readouterr().out
    made = optuna.load_study(study_name="max3", storage="sqlite:///o.db")
    assert len(made.trials) == 8 and made.trials[0].intermediate_values
    assert main([*asked, "--run", "there"]) == 2  # before anything is run
    assert "sqlite:///o.db holds a study 'max3'" in capsys.readouterr().err
    assert not Path("there").exists()
    assert main(["study", "max3", "--resume", "here", "--quiet", "--trials", "4"]) == 2
    assert "Drop --trials" in capsys.readouterr().err
    assert main([*SMALL, "--trials", "4"]) == 2
    assert "the search 'grid' decides itself" in capsys.readouterr().err
