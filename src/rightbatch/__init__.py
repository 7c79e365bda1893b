"""rightbatch finds the batch size a neural network should be trained with, and shows why.

Names are imported when they are first used, so that `rightbatch --help` is instant.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rightbatch.catalog import load_workload as load_workload
    from rightbatch.laws.scaling import scale_learning_rate as scale_learning_rate
    from rightbatch.laws.split import split_batch as split_batch
    from rightbatch.plan import Plan as Plan
    from rightbatch.plan import make_plan as make_plan
    from rightbatch.plan import probe as probe
    from rightbatch.probes.find_max_micro_batch import find_max_micro_batch as find_max_micro_batch
    from rightbatch.probes.learning_rate import find_learning_rate as find_learning_rate
    from rightbatch.probes.memory import measure_memory as measure_memory
    from rightbatch.probes.noise import measure_noise_scale as measure_noise_scale
    from rightbatch.probes.sharpness import measure_sharpness as measure_sharpness
    from rightbatch.probes.throughput import measure_throughput as measure_throughput
    from rightbatch.recipe import Recipe as Recipe
    from rightbatch.report.write import write_report as write_report
    from rightbatch.study.carry_over import CarryOver as CarryOver
    from rightbatch.study.carry_over import compare_choices as compare_choices
    from rightbatch.study.export_optuna import export_to_optuna as export_to_optuna
    from rightbatch.study.sharpness import compare_sharpness as compare_sharpness
    from rightbatch.study.study import Study as Study
    from rightbatch.study.study import run_study as run_study
    from rightbatch.study.sweep import Sweep as Sweep
    from rightbatch.study.sweep import run_sweep as run_sweep
    from rightbatch.training import OnlineLearner as OnlineLearner
    from rightbatch.training import Run as Run
    from rightbatch.training import Watch as Watch
    from rightbatch.training import train as train
    from rightbatch.training import train_stream as train_stream
    from rightbatch.workload import Workload as Workload
    from rightbatch.workload import accuracy as accuracy
    from rightbatch.workload import check_workload as check_workload
    from rightbatch.workload import with_examples as with_examples
    from rightbatch.workload import with_label_noise as with_label_noise

_HOME = {
    "CarryOver": "rightbatch.study.carry_over",
    "OnlineLearner": "rightbatch.training",
    "Plan": "rightbatch.plan",
    "Recipe": "rightbatch.recipe",
    "Run": "rightbatch.training",
    "Study": "rightbatch.study.study",
    "Sweep": "rightbatch.study.sweep",
    "Watch": "rightbatch.training",
    "Workload": "rightbatch.workload",
    "accuracy": "rightbatch.workload",
    "check_workload": "rightbatch.workload",
    "export_to_optuna": "rightbatch.study.export_optuna",
    "compare_sharpness": "rightbatch.study.sharpness",
    "compare_choices": "rightbatch.study.carry_over",
    "find_max_micro_batch": "rightbatch.probes.find_max_micro_batch",
    "load_workload": "rightbatch.catalog",
    "measure_memory": "rightbatch.probes.memory",
    "measure_noise_scale": "rightbatch.probes.noise",
    "measure_sharpness": "rightbatch.probes.sharpness",
    "find_learning_rate": "rightbatch.probes.learning_rate",
    "measure_throughput": "rightbatch.probes.throughput",
    "make_plan": "rightbatch.plan",
    "probe": "rightbatch.plan",
    "run_study": "rightbatch.study.study",
    "run_sweep": "rightbatch.study.sweep",
    "scale_learning_rate": "rightbatch.laws.scaling",
    "split_batch": "rightbatch.laws.split",
    "train": "rightbatch.training",
    "train_stream": "rightbatch.training",
    "with_examples": "rightbatch.workload",
    "with_label_noise": "rightbatch.workload",
    "write_report": "rightbatch.report.write",
}

__all__ = [
    "CarryOver",
    "OnlineLearner",
    "Plan",
    "Recipe",
    "Run",
    "Study",
    "Sweep",
    "Watch",
    "Workload",
    "accuracy",
    "check_workload",
    "compare_choices",
    "compare_sharpness",
    "export_to_optuna",
    "find_learning_rate",
    "find_max_micro_batch",
    "load_workload",
    "make_plan",
    "measure_memory",
    "measure_noise_scale",
    "measure_sharpness",
    "measure_throughput",
    "probe",
    "run_study",
    "run_sweep",
    "scale_learning_rate",
    "split_batch",
    "train",
    "train_stream",
    "with_examples",
    "with_label_noise",
    "write_report",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'rightbatch' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
