"""A run in MLflow."""

from __future__ import annotations

import importlib
import time
from collections.abc import Mapping
from typing import Any, ClassVar, final

from rightbatch.training.sinks.sink import Sink


@final
class MlflowSink(Sink):
    """Logs a run to MLflow, in a run of its own there.

    Args:
        experiment: The experiment's name; made where there is none.
        run_name: What the run is called there. Default: MLflow chooses.
        tracking_uri: Where to. Default: as MLflow is set up.
        **thinning: As for `Sink`.
    """

    name: ClassVar[str] = "MLflow"
    package: ClassVar[str] = "mlflow"
    extra: ClassVar[str] = "mlflow"

    def __init__(
        self,
        experiment: str = "rightbatch",
        *,
        run_name: str | None = None,
        tracking_uri: str | None = None,
        **thinning: Any,
    ) -> None:
        super().__init__(**thinning)
        self._experiment = experiment
        self._run_name = run_name
        self._tracking_uri = tracking_uri

    def open_writer(self, settings: Mapping[str, Any]) -> _MlflowRun:
        """Makes the run, with the recipe as its parameters."""
        # By the client, and not by `mlflow.start_run`: that would be the caller's active run.
        mlflow: Any = importlib.import_module("mlflow")
        client = mlflow.MlflowClient(tracking_uri=self._tracking_uri)
        found = client.get_experiment_by_name(self._experiment)
        experiment_id = (
            client.create_experiment(self._experiment) if found is None else found.experiment_id
        )
        run_id = client.create_run(experiment_id, run_name=self._run_name).info.run_id
        entities: Any = importlib.import_module("mlflow.entities")
        parameters = [entities.Param(key, str(value)) for key, value in settings.items()]
        client.log_batch(run_id, params=parameters)
        return _MlflowRun(client, run_id, entities.Metric)


class _MlflowRun:
    def __init__(self, client: Any, run_id: str, make_metric: Any) -> None:
        self._client = client
        self._run_id = run_id
        self._make_metric = make_metric

    def write(self, values: Mapping[str, float], step: int) -> None:
        now = round(time.time() * 1000)
        metrics = [self._make_metric(name, value, now, step) for name, value in values.items()]
        self._client.log_batch(self._run_id, metrics=metrics)

    def close(self) -> None:
        self._client.set_terminated(self._run_id)
