"""Runs what a study's design asks for, and keeps it in its database as it ends."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from typing import Any

import torch

from rightbatch.device.out_of_memory import is_out_of_memory
from rightbatch.errors import RightbatchError, UsageError
from rightbatch.probes.throughput import measure_throughput
from rightbatch.recipe import Recipe
from rightbatch.store import hash_tensors
from rightbatch.study.auto_rates import farther_rates, first_rates
from rightbatch.study.contestant import MOST_LOOKED_AT
from rightbatch.study.database import StudyDatabase
from rightbatch.study.design import StudyDesign
from rightbatch.study.group import Engine, Finished, cut_into_groups, run_group
from rightbatch.study.judging import Setting
from rightbatch.study.size_table import tables_of
from rightbatch.study.trials import FINAL, EvaluationPoint, TrialKey
from rightbatch.training import Training
from rightbatch.training.evaluate import has_metric
from rightbatch.training.model import smallest_pass
from rightbatch.workload import Workload, accuracy
from rightbatch.workload.data import DatasetExamples
from rightbatch.workload.target import Target, parse_target

Progress = Callable[..., None]
_TIMING_SECONDS = 2.0
_STEP_TIME, _FIRST_RATES, _ENGINE = "step time", "first rates", "engine"
"""Kinds of events whose text is read again."""


class StudyRunner:
    """Runs one study.

    Args:
        workload: What to train.
        design: What to run.
        database: Where it is kept.
        engine: What runs the trainings.
        threads: For the compiled engine; None: one per core.
        progress: Told what is being done.

    Attributes:
        setting: What the numbers are about; with the step times once they are measured.

    Raises:
        UsageError: If the target is not evaluated.
    """

    def __init__(
        self,
        workload: Workload,
        design: StudyDesign,
        database: StudyDatabase,
        *,
        engine: Engine,
        threads: int | None,
        progress: Progress,
    ) -> None:
        self._workload = workload
        self._design = design
        self._database = database
        self._engine: Engine = engine
        self._threads = threads
        self._say = progress
        target = None if design.target is None else parse_target(design.target)
        _check_target(target, workload)
        on_training = workload.val_examples is None or (
            target is not None and target.quantity == "train_loss"
        )
        # The losses of the updates themselves depend on their batch: one example's is chance.
        self._judged = with_training_part(workload) if on_training else workload
        model = workload.build_model(0)
        self._num_weights = sum(p.numel() for p in model.parameters())
        self.setting = Setting(
            num_examples=workload.num_examples,
            target=target,
            seconds_of=None,
            has_validation=not on_training,
            smallest=_smallest(workload, model),
            metric_is_share=workload.metric is accuracy,
        )

    def task(self) -> dict[str, Any]:
        """What tells this workload from another of the same name: a study is of one."""
        workload, model = self._workload, self._workload.build_model(0)
        optimizer = workload.make_optimizer(model.parameters(), 1e-3)
        settings = {k: v for k, v in optimizer.defaults.items() if k != "lr"}
        return {
            "workload": workload.name,
            "num_examples": workload.num_examples,
            "initial weights": hash_tensors(model.state_dict().items())[:16],
            "optimizer": f"{type(optimizer).__name__} {settings}",
            "metric": metric_name(workload),
            "first losses": self._first_losses(),
        }

    def _first_losses(self) -> list[str]:
        """Of two updates, to three digits: they change with data, loss and what draws at random."""
        batch = min(8, self._workload.num_examples)
        try:
            training = Training(self._workload, Recipe(global_batch=batch, learning_rate=1e-3))
            training.advance(1)
            first = training.recent_train_loss()
            training.advance(1)
            return [f"{loss:.3g}" for loss in (first, training.recent_train_loss())]
        except RightbatchError:  # of a batch that this model cannot take: no reason not to begin
            return []

    def run(self) -> None:
        """Runs all that has not ended; those that failed before get another chance."""
        failed = [t.key for t in self._database.trials() if t.state == "failed"]
        self._database.set_state(failed, "waiting")
        self._measure_step_time()
        self._run_rounds()

    def stop(self) -> None:
        """Marks what was not run."""
        left = [t.key for t in self._database.trials() if t.state not in FINAL]
        self._database.set_state(left, "stopped")

    @property
    def engines(self) -> tuple[str, ...]:
        """What ran the trainings, and why."""
        return tuple(dict.fromkeys(self._told(_ENGINE)))

    def _told(self, kind: str) -> list[str]:
        return [text for _, own, text in self._database.events() if own == kind]

    def _measure_step_time(self) -> None:
        """The step time of every size; of a study that is gone on with, the one it began with."""
        known, sizes = self._told(_STEP_TIME), self._design.batch_sizes
        if known:
            times = {int(size): seconds for size, seconds in json.loads(known[-1]).items()}
        else:
            self._say("step time: how long an update takes at each batch size")
            try:
                record = measure_throughput(
                    self._workload,
                    micro_batches=sizes,
                    budget_seconds=_TIMING_SECONDS,
                    powers_of_two=False,
                )
            except RightbatchError:
                if self._design.budget.unit == "seconds":
                    raise
                return  # nothing is told in seconds then
            times = {size: record.step_time.seconds(size) for size in sizes}
            self._database.tell(_STEP_TIME, json.dumps(times))
        self.setting = dataclasses.replace(self.setting, seconds_of=times.__getitem__)

    # ---- rounds --------------------------------------------------------------------------------

    def _run_rounds(self) -> None:
        """Runs what the design asks for, and what its rates at the edge ask for after that."""
        asked = self._first_keys()
        while asked:
            self._database.add(asked)
            waiting = [t.key for t in self._database.trials() if t.state not in FINAL]
            # One after the other gains nothing from a group, which is kept only when it ends.
            most = 1 if self._engine == "loop" else None
            for group in cut_into_groups(waiting, self._num_weights, most=most):
                self._run_group(group)
            there = {trial.key for trial in self._database.trials()}
            asked = [key for key in self._farther_keys() if key not in there]

    def _keys(self, batch_size: int, rates: Sequence[float]) -> list[TrialKey]:
        return [
            TrialKey(batch_size=batch_size, learning_rate=rate, seed=seed)
            for rate in rates
            for seed in self._design.seeds
        ]

    def _first_keys(self) -> list[TrialKey]:
        rates = self._design.learning_rates
        if rates is not None:
            return [key for size in self._design.batch_sizes for key in self._keys(size, rates)]
        known = self._told(_FIRST_RATES)
        found: dict[str, Sequence[float]] = json.loads(known[-1]) if known else {}
        if not known:
            for size in self._design.batch_sizes:
                self._say(f"learning rate: range test at batch {size:,}")
                found[str(size)] = first_rates(self._workload, size)
            self._database.tell(_FIRST_RATES, json.dumps(found))
        return [key for size, own in found.items() for key in self._keys(int(size), own)]

    def _farther_keys(self) -> list[TrialKey]:
        if self._design.learning_rates is not None:
            return []
        tables = tables_of(self._database.trials(), self.setting)
        return [
            key for table in tables for key in self._keys(table.batch_size, farther_rates(table))
        ]

    def _run_group(self, keys: Sequence[TrialKey]) -> None:
        size, database = keys[0].batch_size, self._database
        states = [trial.state for trial in database.trials()]
        ended = sum(state in FINAL for state in states)
        seconds_of = self.setting.seconds_of
        step_seconds = None if seconds_of is None else seconds_of(size)
        smallest = self.setting.smallest
        N = self._workload.num_examples
        steps = self._design.budget.steps(size, N, step_seconds, smallest)

        def tell(share: float) -> None:
            done = (ended + share * len(keys)) / len(states)
            self._say(f"batch {size:,}: {len(keys)} trainings of {steps:,} updates", done)

        tell(0.0)
        database.set_state(keys, "running")
        try:
            finished, ran_by = run_group(
                self._judged,
                keys,
                steps,
                engine=self._engine,
                step_seconds=step_seconds,
                smallest=smallest,
                threads=self._threads,
                progress=tell,
            )
        except UsageError:  # the engine that was asked for cannot: neither can it at other sizes
            database.set_state(keys, "waiting")
            raise
        except Exception as error:
            self._run_alone(keys, error)
            return
        if ran_by not in self.engines:
            database.tell(_ENGINE, ran_by)
        database.write([self._row(training) for training in finished])

    def _run_alone(self, keys: Sequence[TrialKey], error: Exception) -> None:
        """After an error in a group: whose it was, unless there is no room for any of them."""
        if len(keys) > 1 and not is_out_of_memory(error):
            for key in keys:
                self._run_group([key])
            return
        note = f"{type(error).__name__}: {error}"[:500]
        self._database.set_state(keys, "failed", note)

    def _row(self, training: Finished) -> tuple[TrialKey, Any, Sequence[EvaluationPoint], str]:
        points = training.points
        if not self.setting.has_validation:
            points = [
                dataclasses.replace(p, train_loss=p.val_loss, val_loss=None, val_metric=None)
                for p in points
            ]
        return training.key, "diverged" if training.diverged else "complete", points, ""


def with_training_part(workload: Workload) -> Workload:
    """The workload with part of its training set in place of validation data.

    Args:
        workload: Any.

    Returns:
        Another that trains alike and evaluates on at most 2,048 training examples.
    """
    examples = workload.train_examples
    generator = torch.Generator().manual_seed(0)
    chosen = torch.randperm(examples.num_examples, generator=generator)[:MOST_LOOKED_AT]
    part: Any = examples.batch(chosen)
    if isinstance(examples, DatasetExamples):
        part = torch.utils.data.Subset(examples.dataset, chosen.tolist())
    return dataclasses.replace(workload, val_data=part, target=None)


def metric_name(workload: Workload) -> str | None:
    """The name of the metric that is evaluated, such as `val_accuracy`, or None."""
    there = has_metric(workload) and workload.val_examples is not None
    return workload.metric_name if there else None


def _smallest(workload: Workload, model: torch.nn.Module) -> int:
    batch = workload.num_examples
    try:
        return smallest_pass(workload, model, Recipe(global_batch=batch, learning_rate=1.0), "cpu")
    except RightbatchError:
        return 1


def _check_target(target: Target | None, workload: Workload) -> None:
    if target is None or target.quantity == "train_loss":
        return
    own, there = metric_name(workload), workload.val_examples is not None
    if not there or target.quantity not in ("val_loss", own):
        raise UsageError(
            f"The target {target} needs {target.quantity}, which this workload does not "
            "evaluate. Use train_loss"
            + (f", val_loss{f' or {own}' if own else ''}." if there else ".")
        )
