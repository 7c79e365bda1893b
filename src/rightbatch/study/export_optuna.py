"""A study as one of Optuna's, for its dashboard and its own tools."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy.exc import SQLAlchemyError

from rightbatch.errors import UsageError
from rightbatch.store import read_record
from rightbatch.study.database import StoredTrial
from rightbatch.study.sampler_search import load_optuna, quiet
from rightbatch.study.study import RECORD, SCHEMA, Study, read_trials
from rightbatch.study.trials import EvaluationPoint, StudyTrial, TrialKey

_OPEN = ("waiting", "running", "stopped")


def export_to_optuna(study: Study | str | Path, url: str, *, name: str | None = None) -> int:
    """Writes a study into an Optuna storage, which `optuna-dashboard URL` opens.

    Every training that ended is a trial with the parameters `batch_size` and `learning_rate`, and
    with its seed, its state and what it measured as user attributes. Its value, lower is better, is
    what was spent until the target was met (modelled seconds; examples without a step time), or
    without a target the last loss. Trainings that missed the target and those that a race dropped
    are PRUNED, those that diverged or failed are FAIL: a COMPLETE trial has a finite value. Losses
    at the evaluations are intermediate values, by step, where the study is read from its folder.

    Args:
        study: The study, or the folder it is kept in, which holds its evaluations too.
        url: Such as `sqlite:///optuna.db`; without `://` the path of a journal file, which must
            not be there yet.
        name: Of the new study. Default: the workload's.

    Returns:
        How many trials were written.

    Raises:
        MissingExtraError: If Optuna is not installed.
        UsageError: If there is a study of that name, the storage cannot be written, or the folder
            holds no study.

    Example:
        >>> import rightbatch as rb
        >>> study = rb.run_study(
        ...     rb.load_workload("max3"), batch_sizes=["full"], learning_rates=[0.1], seeds=2,
        ...     epochs=2,
        ... )
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     rb.export_to_optuna(study, f"sqlite:///{folder}/optuna.db")
        2
    """
    optuna = load_optuna()
    record, stored = (study, []) if isinstance(study, Study) else _read(Path(study))
    points = {trial.key: trial.points for trial in stored}
    name = name or record.workload
    trials = [
        _trial(optuna, record, trial, points.get(_key(trial), ()))
        for trial in record.trials
        if trial.state not in _OPEN
    ]
    with quiet(optuna), _opened(optuna, url) as storage:
        _refuse_known(optuna, storage, url, name)
        made = optuna.create_study(storage=storage, study_name=name, direction="minimize")
        try:
            for key, value in _about(record).items():
                made.set_user_attr(key, value)
            made.add_trials(trials)
        except BaseException:  # a part of a study is none
            optuna.delete_study(study_name=name, storage=storage)
            raise
    return len(trials)


def check_optuna_place(url: str, name: str) -> None:
    """Refuses a place that a study could not be exported to, before it is run.

    Args:
        url: As for `export_to_optuna`.
        name: Of the study that will be exported.

    Raises:
        MissingExtraError: If Optuna is not installed.
        UsageError: If there is a study of that name, or the storage cannot be written.
    """
    optuna = load_optuna()
    if "://" in url:
        with _opened(optuna, url) as storage:
            _refuse_known(optuna, storage, url, name)
    else:
        _journal_path(url)


def _refuse_known(optuna: Any, storage: Any, url: str, name: str) -> None:
    if name in optuna.get_all_study_names(storage):
        raise UsageError(
            f"{url} holds a study {name!r}. Give this one another name, or another place."
        )


def _journal_path(url: str) -> Path:
    path = Path(url)
    if path.exists():
        raise UsageError(f"There is a file {url!r} already. Give the journal another path.")
    if not path.parent.is_dir():
        raise UsageError(f"There is no folder {str(path.parent)!r} for {path.name!r}. Make it.")
    return path


def _read(folder: Path) -> tuple[Study, Sequence[StoredTrial]]:
    if not (folder / RECORD).exists():
        raise UsageError(f"There is no study in {str(folder)!r}: it has no {RECORD}.")
    return read_record(folder / RECORD, Study, schema=SCHEMA), read_trials(folder)


def _key(trial: StudyTrial) -> TrialKey:
    return TrialKey(batch_size=trial.batch_size, learning_rate=trial.learning_rate, seed=trial.seed)


def _about(study: Study) -> dict[str, Any]:
    target = study.design.target
    return {
        "workload": study.workload,
        "target": target,
        "search": study.design.search,
        "value": _value_name(study),
        "written by": "rightbatch",
    }


def _value_name(study: Study) -> str:
    if study.design.target is None:
        return "loss at the end"
    seconds = any(trial.seconds is not None for trial in study.trials)
    return f"{'modelled seconds' if seconds else 'examples'} to {study.design.target}"


def _value(study: Study, trial: StudyTrial) -> float | None:
    """What a training is judged by; None where it has nothing of it."""
    if trial.state != "complete" or trial.share < 1.0:
        return None
    if study.design.target is None:
        return trial.train_loss if trial.val_loss is None else trial.val_loss
    if trial.steps_to_target is None:
        return None
    if trial.seconds is None or not trial.steps:
        return trial.steps_to_target * trial.batch_size
    return trial.steps_to_target * trial.seconds / trial.steps


def _trial(optuna: Any, study: Study, trial: StudyTrial, points: Sequence[EvaluationPoint]) -> Any:
    states = optuna.trial.TrialState
    value = _value(study, trial)
    pruned = states.PRUNED if trial.state == "complete" else states.FAIL
    attributes = {
        "seed": trial.seed,
        "state": trial.state,
        "share": trial.share,
        "steps": trial.steps,
        "examples": trial.examples,
        "steps_to_target": trial.steps_to_target,
        "train_loss": trial.train_loss,
        "val_loss": trial.val_loss,
        "val_metric": trial.val_metric,
        "note": trial.note,
    }
    return optuna.create_trial(
        state=pruned if value is None else states.COMPLETE,
        value=value,
        params={"batch_size": trial.batch_size, "learning_rate": trial.learning_rate},
        distributions=_space(optuna, study),
        user_attrs={key: known for key, known in attributes.items() if known not in (None, "")},
        intermediate_values=_losses(points),
    )


def _space(optuna: Any, study: Study) -> Mapping[str, Any]:
    sizes = [trial.batch_size for trial in study.trials]
    rates = [trial.learning_rate for trial in study.trials]
    of = optuna.distributions
    return {
        "batch_size": of.IntDistribution(min(sizes), max(sizes), log=True),
        "learning_rate": of.FloatDistribution(min(rates), max(rates), log=True),
    }


def _losses(points: Sequence[EvaluationPoint]) -> dict[int, float]:
    losses = {p.step: p.train_loss if p.val_loss is None else p.val_loss for p in points}
    return {step: x for step, x in losses.items() if x is not None and math.isfinite(x)}


@contextmanager
def _opened(optuna: Any, url: str) -> Iterator[Any]:
    """A storage; a journal file is written beside its place and moved there when it is whole."""
    if "://" in url:
        try:
            storage = optuna.storages.RDBStorage(url)
        except (SQLAlchemyError, ImportError, OSError) as error:
            raise UsageError(
                f"The Optuna storage {url!r} cannot be opened ({str(error).splitlines()[0]}). "
                "Write sqlite:///optuna.db, in a folder that is there."
            ) from error
        try:
            yield storage
        finally:
            storage.remove_session()
            storage.engine.dispose()
        return
    path = _journal_path(url)
    part = path.with_name(f"{path.name}.part")
    part.unlink(missing_ok=True)
    backend = optuna.storages.journal.JournalFileBackend(str(part))
    try:
        yield optuna.storages.JournalStorage(backend)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
