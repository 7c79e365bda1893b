"""A run in TensorBoard."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, final

from rightbatch.training.sinks.sink import Sink


@final
class TensorBoardSink(Sink):
    """Writes a run as event files, which `tensorboard --logdir FOLDER` shows.

    Args:
        folder: Where to; one folder a run.
        **thinning: As for `Sink`.
    """

    name: ClassVar[str] = "TensorBoard"
    package: ClassVar[str] = "tensorboard"
    extra: ClassVar[str] = "tensorboard"

    def __init__(self, folder: str | Path, **thinning: Any) -> None:
        super().__init__(**thinning)
        self._folder = folder

    def open_writer(self, settings: Mapping[str, Any]) -> _Scalars:
        """Makes the event file, with the recipe as text."""
        from torch.utils.tensorboard.writer import SummaryWriter

        writer = SummaryWriter(str(self._folder))
        writer.add_text("recipe", f"```json\n{json.dumps(dict(settings), indent=2)}\n```")
        return _Scalars(writer)


class _Scalars:
    def __init__(self, writer: Any) -> None:
        self._writer = writer

    def write(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()
