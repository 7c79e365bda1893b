"""`rightbatch probe sharpness` as a user meets it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import rightbatch as rb
from rightbatch.cli import main
from rightbatch.cli.render_sharpness import as_text
from rightbatch.probes.sharpness import measure_sharpness

Captured = pytest.CaptureFixture[str]
PROBE = ["probe", "sharpness", "max3", "--examples", "100"]
COMPARE = [*PROBE, "--compare", "50,full", "--epochs", "1", "--seeds", "1"]


def test_json(capsys: Captured) -> None:
    assert main([*PROBE, "--steps", "0,20", "--learning-rate", "0.1", "--json"]) == 0
    captured = capsys.readouterr()
    data = json.loads(captured.out)
    assert data["schema"] == "rightbatch.sharpness/1"
    assert data["weights"] == "trained" and data["recipe"]["global_batch"] == 32
    assert [point["step"] for point in data["points"]] == [0, 20]
    for name in ("largest_eigenvalue", "trace", "sam_rise"):
        assert {"value", "low", "high", "n", "method"} <= set(data["points"][0][name])
    assert {k["directions"] for k in data["points"][0]["keskar"]} == {"all", "random"}
    assert all("progress" in json.loads(line) for line in captured.err.splitlines())


def test_text_opens_with_the_answer_and_states_the_caveats(capsys: Captured) -> None:
    assert main([*PROBE, "--steps", "0,20", "--learning-rate", "0.1", "-q"]) == 0
    captured = capsys.readouterr()
    text = " ".join(captured.out.split())
    assert text.startswith("max3: after 20 steps the training loss has a curvature of at most")
    for words in ("a lower bound", "None of these is invariant", "100 of 1,000 training", "Cost: "):
        assert words in text
    assert max(len(line) for line in captured.out.splitlines()) <= 80
    assert captured.err == ""


def test_text_of_initial_and_given_weights() -> None:
    workload = rb.load_workload("quadratic")
    assert " at the initial weights " in as_text(measure_sharpness(workload, max_examples=50))
    given = measure_sharpness(workload, model=workload.build_model(0), max_examples=50)
    assert " at the given weights " in as_text(given)


def test_a_comparison_with_the_rates_of_a_study(tmp_path: Path, capsys: Captured) -> None:
    folder = tmp_path / "study"
    rb.run_study(
        rb.load_workload("max3"),
        batch_sizes=[50, "full"],
        learning_rates=[0.1, 0.3],
        seeds=1,
        epochs=1,
        run_directory=folder,
    )
    arguments = [*COMPARE, "--study", str(folder), "--learning-rate", "0.2", "--seed", "3"]
    assert main([*arguments, "--json"]) == 0
    captured = capsys.readouterr()
    data = json.loads(captured.out)
    assert data["schema"] == "rightbatch.sharpness-comparison/1"
    assert data["seeds"] == [3] and data["learning_rate"] == 0.2 and data["steps"] == 20
    assert [(s["matched"], s["rate"]) for s in data["settings"]] == [
        ("epochs", "fixed"),
        ("epochs", "tuned"),
        ("steps", "fixed"),
        ("steps", "tuned"),
    ]
    told = [json.loads(line)["progress"] for line in captured.err.splitlines()]
    assert told[1].startswith("cost: ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*PROBE, "--steps", "5"], "--steps needs a --learning-rate to train with"),
        ([*PROBE, "--steps", "a,b", "--learning-rate", "1"], "--steps is 'a,b'; give numbers"),
        ([*PROBE, "--batch-size", "8"], "--batch-size means nothing without --steps"),
        ([*PROBE, "--seeds", "8", "--epochs", "2"], "--epochs and --seeds means nothing without"),
        ([*COMPARE, "--steps", "5"], "--steps means nothing with --compare"),
        ([*PROBE, "--compare", "8"], "a comparison needs at least two"),
        ([*PROBE, "--compare", "8,none"], "none"),
        ([*COMPARE, "--study", "."], "There is no study in '.': it has no study.json"),
    ],
)
def test_mistakes_of_use_exit_2(
    arguments: list[str],
    message: str,
    capsys: Captured,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert message in " ".join(captured.err.split())
    assert captured.out == ""
