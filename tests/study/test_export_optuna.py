"""A study as one of Optuna's: read back by Optuna itself."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest

from rightbatch import Study, export_to_optuna, load_workload, run_study
from rightbatch.errors import UsageError
from rightbatch.study.export_optuna import check_optuna_place
from rightbatch.study.study import read_trials

optuna = pytest.importorskip("optuna")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("study")
    asked: dict[str, Any] = {"batch_sizes": [50, "full"], "learning_rates": [0.1, 1, 1e9]}
    run_study(load_workload("max3"), **asked, seeds=2, epochs=4, target="val_loss<=0.9",
              run_directory=place, engine="loop")  # fmt: skip
    return place


@pytest.fixture(scope="module")
def study(folder: Path) -> Study:
    return run_study(load_workload("max3"), batch_sizes=[50, "full"], learning_rates=[0.1, 1, 1e9],
                     seeds=2, epochs=4, target="val_loss<=0.9", run_directory=folder,
                     engine="loop")  # fmt: skip


def load(url: str, name: str) -> Any:
    if "://" in url:
        return optuna.load_study(study_name=name, storage=url)
    backend = optuna.storages.journal.JournalFileBackend(url)
    return optuna.load_study(study_name=name, storage=optuna.storages.JournalStorage(backend))


@pytest.mark.parametrize("kind", ["sqlite", "journal"])
def test_optuna_reads_what_was_written(
    folder: Path, study: Study, tmp_path: Path, kind: str
) -> None:
    url = f"sqlite:///{tmp_path}/o.db" if kind == "sqlite" else str(tmp_path / "o.log")
    assert export_to_optuna(folder, url, name="mine") == 12
    made = load(url, "mine")
    assert made.user_attrs["value"] == "modelled seconds to val_loss<=0.9"
    points = {trial.key: trial.points for trial in read_trials(folder)}
    there = {(t.batch_size, t.learning_rate, t.seed): t for t in study.trials}
    states = optuna.trial.TrialState
    for trial in made.trials:
        key = (trial.params["batch_size"], trial.params["learning_rate"], trial.user_attrs["seed"])
        ours = there.pop(key)
        assert trial.user_attrs["state"] == ours.state and trial.system_attrs == {}
        if ours.state == "diverged":
            assert trial.state == states.FAIL
        elif ours.steps_to_target is None:
            assert trial.state == states.PRUNED
        else:
            assert trial.state == states.COMPLETE and ours.seconds is not None
            assert trial.value == pytest.approx(ours.steps_to_target * ours.seconds / ours.steps)
        (own,) = [p for k, p in points.items() if (k.batch_size, k.learning_rate, k.seed) == key]
        assert trial.intermediate_values == {p.step: p.val_loss for p in own}
        assert all(math.isfinite(x) for x in trial.intermediate_values.values())
    assert not there
    assert {t.state for t in made.trials} == {states.FAIL, states.PRUNED, states.COMPLETE}
    assert made.best_trial.user_attrs["state"] == "complete"


def test_dropped_and_unended_trainings_are_no_results(study: Study, tmp_path: Path) -> None:
    first, second, *others = study.trials
    states = optuna.trial.TrialState
    trials = (
        dataclasses.replace(first, state="complete", share=1 / 3, steps_to_target=1.0),
        dataclasses.replace(second, state="stopped"),
        *others,
    )
    changed = dataclasses.replace(study, trials=trials)
    url = f"sqlite:///{tmp_path}/o.db"
    assert export_to_optuna(changed, url) == 11
    assert load(url, "max3").trials[0].state == states.PRUNED
    plain = dataclasses.replace(study, design=dataclasses.replace(study.design, target=None))
    export_to_optuna(plain, url, name="loss")
    values = [t.value for t in load(url, "loss").trials if t.state == states.COMPLETE]
    assert values == [t.val_loss for t in study.trials if t.state == "complete"]


def test_what_is_there_is_not_overwritten(study: Study, tmp_path: Path) -> None:
    url, journal = f"sqlite:///{tmp_path}/o.db", tmp_path / "o.log"
    export_to_optuna(study, url)
    with pytest.raises(UsageError, match=r"holds a study 'max3'\. Give this one another name"):
        export_to_optuna(study, url)
    with pytest.raises(UsageError, match="holds a study 'max3'"):
        check_optuna_place(url, "max3")
    check_optuna_place(url, "other")
    export_to_optuna(study, url, name="other")
    assert len(load(url, "max3").trials) == 12
    export_to_optuna(study, str(journal))
    with pytest.raises(UsageError, match=r"There is a file .*o\.log' already"):
        export_to_optuna(study, str(journal))
    assert {path.name for path in tmp_path.iterdir()} == {"o.db", "o.log"}


def test_a_study_that_cannot_be_written_whole_is_not_there(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError("no space left")

    url, journal = f"sqlite:///{tmp_path}/o.db", tmp_path / "o.log"
    with monkeypatch.context() as patch:
        patch.setattr(optuna.Study, "add_trials", full)
        for place in (url, str(journal)):
            with pytest.raises(OSError, match="no space left"):
                export_to_optuna(study, place)
    assert not journal.exists() and optuna.get_all_study_names(url) == []


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("sqlite:////not/there/o.db", "cannot be opened"),
        ("nonsense://x", "cannot be opened"),
        ("/not/there/o.log", "There is no folder '/not/there'"),
    ],
)
def test_a_place_that_cannot_be_written_is_said(study: Study, url: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        check_optuna_place(url, "name")
    with pytest.raises(UsageError, match=said):
        export_to_optuna(study, url)


def test_a_folder_without_a_study_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"it has no study\.json"):
        export_to_optuna(tmp_path, f"sqlite:///{tmp_path}/o.db")
