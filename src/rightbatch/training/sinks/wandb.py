"""A run in Weights & Biases."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any, ClassVar, final

from rightbatch.training.sinks.sink import Sink


@final
class WandbSink(Sink):
    """Logs a run to Weights & Biases.

    Args:
        project: The project's name.
        init: Further arguments of `wandb.init`, such as `name`, `entity`, `dir` or
            `mode="offline"`.
        **thinning: As for `Sink`.
    """

    name: ClassVar[str] = "W&B"
    package: ClassVar[str] = "wandb"
    extra: ClassVar[str] = "wandb"

    def __init__(
        self,
        project: str = "rightbatch",
        *,
        init: Mapping[str, Any] | None = None,
        **thinning: Any,
    ) -> None:
        super().__init__(**thinning)
        self._project = project
        self._init = dict(init or {})

    def open_writer(self, settings: Mapping[str, Any]) -> _WandbRun:
        """Makes the run, with the recipe as its configuration."""
        wandb: Any = importlib.import_module("wandb")
        # The console belongs to the training; and a run that is there already to its owner.
        quiet = wandb.Settings(console="off", silent=True)
        options = {"settings": quiet, "reinit": "create_new", **self._init}
        return _WandbRun(wandb.init(project=self._project, config=dict(settings), **options))


class _WandbRun:
    def __init__(self, run: Any) -> None:
        self._run = run

    def write(self, values: Mapping[str, float], step: int) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()
