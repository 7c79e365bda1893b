"""The one training loop that probes, studies, plans and adapters share."""

from rightbatch.training.loop import Run, Training, train
from rightbatch.training.order import epoch_order

__all__ = ["Run", "Training", "epoch_order", "train"]
