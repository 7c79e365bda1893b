"""The one training loop that probes, studies, plans and adapters share."""

from rightbatch.training.data.order import epoch_order
from rightbatch.training.loop import Training
from rightbatch.training.rates import Horizon
from rightbatch.training.run import Run, train
from rightbatch.training.streams.online import OnlineLearner, OnlineStats
from rightbatch.training.streams.stream import train_stream
from rightbatch.training.watching.callbacks import Callback, Point, StepRecord, StepRecords
from rightbatch.training.watching.watch import Distance, Watch

__all__ = [
    "Callback",
    "Distance",
    "Horizon",
    "OnlineLearner",
    "OnlineStats",
    "Point",
    "Run",
    "StepRecord",
    "StepRecords",
    "Training",
    "Watch",
    "epoch_order",
    "train",
    "train_stream",
]
