"""Runs what a study's design asks for, and keeps it in its database as it ends."""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch

from rightbatch.errors import RightbatchError, UsageError
from rightbatch.probes.throughput import measure_throughput
from rightbatch.recipe import Recipe
from rightbatch.store import hash_tensors
from rightbatch.study.claims import Claim, Claims, Result
from rightbatch.study.contestant import MOST_LOOKED_AT
from rightbatch.study.database import StudyDatabase
from rightbatch.study.design import StudyDesign
from rightbatch.study.executors import (
    Executor,
    ExecutorName,
    GroupTask,
    Outcome,
    make_executor,
)
from rightbatch.study.findings import RaceFinding
from rightbatch.study.group import Engine, Finished, most_together, runs_one_by_one
from rightbatch.study.judging import Setting
from rightbatch.study.race_search import RaceSearch
from rightbatch.study.search import Search
from rightbatch.study.searches import make_search
from rightbatch.study.trials import FINAL, TrialKey, TrialState
from rightbatch.training import Training
from rightbatch.training.evaluate import has_metric
from rightbatch.training.model import smallest_pass
from rightbatch.training.watching.watched_weight import find_weight, weight_name
from rightbatch.workload import Workload, accuracy
from rightbatch.workload.data import DatasetExamples
from rightbatch.workload.target import Target, parse_target

Progress = Callable[..., None]
_TIMING_SECONDS = 2.0
_POLL_SECONDS = 0.5
_MOST_LOSSES = 3
_MOST_LOST_SECONDS = 30.0
"""Of trainings that run one by one: as much as may have to be run again after a kill."""
_OPEN: tuple[TrialState, ...] = ("waiting", "running", "stopped")
_STEP_TIME, _ENGINE = "step time", "engine"


class StudyRunner:
    """Runs one study.

    Args:
        workload: What to train.
        design: What to run.
        database: Where it is kept.
        engine: What runs the trainings.
        executor: Where they run.
        workers: In how many processes, where that is here.
        threads: For the compiled engine; None: one per core.
        progress: Told what is being done.

    Attributes:
        setting: What the numbers are about; with the step times once they are measured.
        watching: Name of the weight whose path is followed.

    Raises:
        UsageError: If the target is not evaluated, or there is no such weight to follow.
    """

    def __init__(
        self,
        workload: Workload,
        design: StudyDesign,
        database: StudyDatabase,
        *,
        engine: Engine,
        executor: ExecutorName = "local",
        workers: int = 1,
        threads: int | None = None,
        progress: Progress,
    ) -> None:
        self._workload = workload
        self._design = design
        self._database = database
        self._engine: Engine = engine
        self._executor: ExecutorName = executor
        self._workers, self._threads = workers, threads
        self._say = progress
        self._numbers = itertools.count()
        self._claimed: dict[int, Sequence[Claim]] = {}
        self._losses: Counter[TrialKey] = Counter()
        self._ended: tuple[int, int] | None = None
        self._one_by_one: bool | None = None
        self._search: Search | None = None
        target = None if design.target is None else parse_target(design.target)
        _check_target(target, workload)
        on_training = workload.val_examples is None or (
            target is not None and target.quantity == "train_loss"
        )
        # The losses of the updates themselves depend on their batch: one example's is chance.
        self._judged = with_training_part(workload) if on_training else workload
        model = workload.build_model(0)
        self._num_weights = sum(p.numel() for p in model.parameters())
        self.watching = weight_name(*find_weight(model, design.watch))
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
        self._database.set_state(["failed"], "waiting")
        self._measure_step_time()
        executor = make_executor(
            self._judged,
            executor=self._executor,
            workers=self._workers,
            threads=self._threads,
            progress=self._say_share,
        )
        claims = Claims(self._database)
        left: TrialState = "waiting"
        try:
            search = self._search = make_search(
                self._workload,
                self._design,
                self._database,
                self.setting,
                self.tell,
                at_once=executor.capacity,
            )
            self._run_rounds(search, executor, claims)
        except KeyboardInterrupt:
            left = "waiting" if self._database.shared else "stopped"  # others may go on with it
            raise
        finally:
            executor.close()
            claims.close(left)
            if left == "stopped":
                self._database.set_state(["waiting"], "stopped")

    def race(self) -> RaceFinding | None:
        """What a race dropped and what it cost; None for any other search."""
        if not isinstance(self._search, RaceSearch):
            return None
        return self._search.finding(self._database.trials())

    @property
    def engines(self) -> tuple[str, ...]:
        """What ran the trainings, and why."""
        told = [text for _, kind, text in self._database.events() if kind == _ENGINE]
        return tuple(dict.fromkeys(told))

    def _measure_step_time(self) -> None:
        """The step time of every size; of a study that is gone on with, the one it began with."""
        known, sizes = self._database.fact(_STEP_TIME), self._design.batch_sizes
        if known is None:
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
            measured = {str(size): record.step_time.seconds(size) for size in sizes}
            known = self._database.settle_fact(_STEP_TIME, measured)
        times = {int(size): seconds for size, seconds in known.items()}
        self.setting = dataclasses.replace(self.setting, seconds_of=times.__getitem__)

    # ---- rounds --------------------------------------------------------------------------------

    def _run_rounds(self, search: Search, executor: Executor, claims: Claims) -> None:
        """Runs what the search asks for, until it asks for nothing more."""
        database = self._database
        while True:
            self._submit_all(executor, claims)
            if executor.capacity > 1:  # one that runs here tells itself
                self._say_how_far()
            if executor.pending:
                for outcome in executor.wait():
                    self._take_in(outcome, executor, claims)
            elif self._count("running"):  # others are at it
                time.sleep(_POLL_SECONDS)
            elif not database.add(search.ask(database.trials())) and not self._count(*_OPEN):
                return

    def _say_how_far(self) -> None:
        ended = self._count(*FINAL)
        there = ended + self._count(*_OPEN)
        if there:
            self._say(f"{ended:,} of {there:,} trainings have ended", ended / there)

    def _count(self, *states: TrialState) -> int:
        found = self._database.count_states()
        return sum(found.get(state, 0) for state in states)

    def _submit_all(self, executor: Executor, claims: Claims) -> None:
        """Claims as many groups as can be run at once."""
        several = executor.capacity > 1
        # One after the other gains nothing from a group, which is kept only when it ends.
        most = 1 if self._engine == "loop" else most_together(self._num_weights)
        if several:
            shares = executor.capacity * len(self._design.batch_sizes)
            most = max(1, min(most, -(-self._count("waiting", "stopped") // shares)))
        while executor.pending < executor.capacity:
            # The longest first where the last one to end decides.
            claimed = claims.take(most, small_batches_first=several)
            if not claimed:
                return
            alone = [[claim] for claim in claimed if self._losses[claim.key]]
            together = [claim for claim in claimed if not self._losses[claim.key]]
            for group in [*self._cut(together), *alone]:
                self._submit(group, executor)

    def _cut(self, group: Sequence[Claim]) -> list[Sequence[Claim]]:
        """Parts whose loss, if this process is killed, is bearable: a part is kept at its end."""
        if not group:
            return []
        steps, step_seconds = self._length(group[0])
        one = 0.0 if step_seconds is None else steps * step_seconds
        most = len(group)
        if one * most > _MOST_LOST_SECONDS and self._runs_one_by_one(group):
            most = max(1, int(_MOST_LOST_SECONDS / one))
        return [group[i : i + most] for i in range(0, len(group), most)]

    def _runs_one_by_one(self, group: Sequence[Claim]) -> bool:
        if self._one_by_one is None:
            keys = [claim.key for claim in group]
            try:
                self._one_by_one = runs_one_by_one(self._judged, keys, self._engine)
            except Exception:  # what is wrong, the trainings themselves will tell
                self._one_by_one = True
        return self._one_by_one

    def _length(self, claim: Claim) -> tuple[int, float | None]:
        """Updates of a training, and what one takes in the training loop."""
        size, seconds_of = claim.key.batch_size, self.setting.seconds_of
        step_seconds = None if seconds_of is None else seconds_of(size)
        N, smallest = self._workload.num_examples, self.setting.smallest
        steps = self._design.budget.steps(size, N, step_seconds, smallest)
        return max(1, round(claim.share * steps)), step_seconds

    def _submit(self, group: Sequence[Claim], executor: Executor) -> None:
        steps, step_seconds = self._length(group[0])
        task = GroupTask(
            number=next(self._numbers),
            keys=tuple(claim.key for claim in group),
            steps=steps,
            engine=self._engine,
            step_seconds=step_seconds,
            smallest=self.setting.smallest,
            watch=self._design.watch,
        )
        self._claimed[task.number] = group
        executor.submit(task)

    def _say_share(self, task: GroupTask, share: float) -> None:
        if share == 0.0 or self._ended is None:
            ended = self._count(*FINAL)
            self._ended = ended, ended + self._count(*_OPEN)
        ended, there = self._ended
        size, count = task.keys[0].batch_size, len(task.keys)
        text = f"batch {size:,}: {count} trainings of {task.steps:,} updates"
        self._say(text, (ended + share * count) / there)

    def tell(self, what: str) -> None:
        """Says what is being done."""
        self._say(what)

    def _take_in(self, outcome: Outcome, executor: Executor, claims: Claims) -> None:
        """Writes how a group ended, or has it run again."""
        group = self._claimed.pop(outcome.task.number)
        self._ended = None
        if outcome.lost:
            self._take_in_loss(outcome.lost, group, claims)
        elif outcome.failure is None:
            if outcome.ran_by not in self.engines:
                self._database.tell(_ENGINE, outcome.ran_by)
            rows = [self._result(training) for training in outcome.finished]
            claims.settle(dict(zip(group, rows, strict=True)))
        elif outcome.failure.kind == "usage":  # what was asked for cannot be done at any size
            raise UsageError(outcome.failure.text)
        elif len(group) > 1 and outcome.failure.kind != "memory":
            for claim in group:  # whose error was it?
                self._submit([claim], executor)
        else:
            failed = Result(state="failed", note=outcome.failure.text)
            claims.settle(dict.fromkeys(group, failed))

    def _take_in_loss(self, how: str, group: Sequence[Claim], claims: Claims) -> None:
        """After a worker was lost: once more, each alone; one that was lost thrice has failed."""
        self._database.tell("lost", f"{len(group)} trainings: {how}")
        self._losses.update(claim.key for claim in group)
        given_up = [claim for claim in group if self._losses[claim.key] >= _MOST_LOSSES]
        note = f"What ran it was lost {_MOST_LOSSES} times. {how}"
        claims.settle(dict.fromkeys(given_up, Result(state="failed", note=note)))
        claims.give_back([claim for claim in group if claim not in given_up])

    def _result(self, training: Finished) -> Result:
        points = training.points
        if not self.setting.has_validation:
            points = [
                dataclasses.replace(p, train_loss=p.val_loss, val_loss=None, val_metric=None)
                for p in points
            ]
        return Result(state="diverged" if training.diverged else "complete", points=points)


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
