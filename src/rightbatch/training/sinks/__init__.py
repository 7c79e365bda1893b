"""Callbacks that show a run elsewhere, and can never stop it."""

from rightbatch.training.sinks.mlflow import MlflowSink
from rightbatch.training.sinks.sink import Sink, Writer
from rightbatch.training.sinks.tensorboard import TensorBoardSink
from rightbatch.training.sinks.wandb import WandbSink

__all__ = ["MlflowSink", "Sink", "TensorBoardSink", "WandbSink", "Writer"]
