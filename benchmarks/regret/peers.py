"""Who chooses: our plans, and what people use today. Each returns a batch and a learning rate.

Every method sees the workload only, with two exceptions in Optuna's favour: its search space for
the learning rate is the range of the workload's own grid, and it may spend what our race spent.
"""

from __future__ import annotations

import contextlib
import io
import logging
import math
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

import rightbatch
from rightbatch.errors import RightbatchError
from rightbatch.isolate import preserved_state
from rightbatch.laws.progress import examples_after
from rightbatch.recipe import Recipe
from rightbatch.workload import Workload

from .running import Arrival, run_cells
from .truth import Truth

TYPICAL_BATCH = 32
SKLEARN_BATCH, SKLEARN_RATE = 200, 1e-3
BAR_TRAININGS = 5.0
"""What Optuna may spend, in full trainings, where our race was not run."""
FIRST_TRIAL_SHARE = 0.25
"""No trial of Optuna's takes more than this share of its cost before one has arrived."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What a method chose.

    Attributes:
        row: The method.
        seed: With which it chose.
        recipe: How to train, or None where it gave no answer.
        near_low: Lower end of the batches it takes to be near the best, or None.
        near_high: Upper end, or None.
        examples: Training examples it processed to choose.
        seconds: Wall time it took to choose, as far as it says so.
        note: What else to know.
    """

    row: str
    seed: int
    recipe: Recipe | None
    near_low: int | None = None
    near_high: int | None = None
    examples: float = 0.0
    seconds: float | None = None
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Situation:
    """What methods are given.

    Attributes:
        workload: What to train.
        truth: Its grid: the step-time law for Optuna's objective, and its range of rates.
        race_examples: What our race cost with the same seed; None where it was not run.
    """

    workload: Workload
    truth: Truth
    race_examples: float | None = None


def choose_by_plan(situation: Situation, seed: int, effort: str) -> Choice:
    """Our plan, at an effort.

    Args:
        situation: The workload.
        seed: Of the plan.
        effort: `probe` or `race`.

    Returns:
        The choice.
    """
    make_plan: Any = rightbatch.make_plan
    try:
        plan = make_plan(situation.workload, effort=effort, seed=seed)
    except RightbatchError as error:
        return Choice(row=effort, seed=seed, recipe=None, note=str(error))
    return Choice(
        row=effort,
        seed=seed,
        recipe=plan.recipe,
        near_low=plan.near_best.low,
        near_high=plan.near_best.high,
        examples=plan.cost.examples,
        seconds=round(plan.cost.seconds, 2),
        note="; ".join(plan.warnings),
    )


def choose_by_range_test(situation: Situation, seed: int, suggestion: str) -> Choice:
    """Batch 32 and a suggestion of its own range test (three ramps of 100 steps).

    Args:
        situation: The workload.
        seed: Of the first ramp.
        suggestion: `steepest` (the default of Lightning and torch-lr-finder) or `valley`
            (fastai's).

    Returns:
        The choice.
    """
    row = f"batch 32, {suggestion}"
    batch = min(TYPICAL_BATCH, situation.workload.num_examples)
    found = rightbatch.find_learning_rate(situation.workload, global_batch=batch, seed=seed)
    value = getattr(found, suggestion).value
    recipe = None if value is None else Recipe(global_batch=batch, learning_rate=value)
    return Choice(
        row=row,
        seed=seed,
        recipe=recipe,
        examples=float(found.cost_examples),
        seconds=round(found.cost_seconds, 2),
        note="" if recipe else "the range test gave no suggestion",
    )


def choose_like_sklearn(situation: Situation, seed: int) -> Choice:
    """scikit-learn's default: min(200, N) and 0.001, here with the workload's own optimizer.

    Args:
        situation: The workload.
        seed: Unused: it always chooses the same.

    Returns:
        The choice.
    """
    batch = min(SKLEARN_BATCH, situation.workload.num_examples)
    recipe = Recipe(global_batch=batch, learning_rate=SKLEARN_RATE)
    return Choice(row="scikit-learn", seed=seed, recipe=recipe, seconds=0.0)


# ---- Lightning -----------------------------------------------------------------------------------


def choose_by_lightning(situation: Situation, seed: int, batch: int | None) -> Choice:
    """Lightning's tuner pair: the largest batch that fits, then the range test at that batch.

    Args:
        situation: The workload.
        seed: Of initial weights and data order.
        batch: Only the range test, at this batch; None: the pair.

    Returns:
        The choice.
    """
    with (
        preserved_state(),
        warnings.catch_warnings(),
        contextlib.redirect_stderr(io.StringIO()),  # its progress bars cannot be turned off
        tempfile.TemporaryDirectory() as folder,
    ):
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        return _tune(situation.workload, seed, batch, folder)


def _tune(workload: Workload, seed: int, batch: int | None, folder: str) -> Choice:
    import lightning.pytorch as pl
    from lightning.pytorch.tuner.tuning import Tuner

    # Importing it sets the level.
    logging.getLogger("lightning.pytorch").setLevel(logging.CRITICAL)
    module = _make_module(workload, seed)

    def make_tuner() -> Any:
        return Tuner(
            pl.Trainer(
                accelerator="cpu",
                max_epochs=1000,
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
                default_root_dir=folder,
            )
        )

    if batch is not None:
        module.batch_size = batch
    else:
        make_tuner().scale_batch_size(module, mode="power")
    # Beyond N there is nothing to put into a batch, whatever the tuner answers.
    module.batch_size = min(module.batch_size, workload.num_examples)
    finder = make_tuner().lr_find(module)
    suggestion = None if finder is None else finder.suggestion()
    recipe = None
    if suggestion is not None and math.isfinite(suggestion) and suggestion > 0:
        recipe = Recipe(global_batch=module.batch_size, learning_rate=float(suggestion))
    return Choice(
        row="Lightning" if batch is None else f"batch {batch}, lr_find",
        seed=seed,
        recipe=recipe,
        examples=float(module.examples),
        note=f"batch {module.batch_size}, lr_find gave {suggestion}",
    )


def _make_module(workload: Workload, seed: int) -> Any:
    """The workload as a LightningModule that counts the examples it is trained on."""
    import lightning.pytorch as pl

    source = workload.train_examples

    class Dataset(torch.utils.data.Dataset[Any]):
        def __len__(self) -> int:
            return source.num_examples

        def __getitem__(self, index: int) -> int:
            return index

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = workload.build_model(seed)
            self.batch_size, self.lr, self.examples = 2, SKLEARN_RATE, 0

        def train_dataloader(self) -> Any:
            return torch.utils.data.DataLoader(
                Dataset(),
                batch_size=self.batch_size,
                shuffle=True,
                collate_fn=lambda rows: (len(rows), source.batch(torch.tensor(rows))),
            )

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            count, examples = batch
            self.examples += count
            loss_sum, terms = workload.loss_sum(self.model, examples)
            return loss_sum / terms

        def configure_optimizers(self) -> Any:
            return workload.make_optimizer(self.model.parameters(), self.lr)

    return Module()


# ---- Optuna --------------------------------------------------------------------------------------


def choose_by_optuna(situation: Situation, seed: int) -> Choice:
    """Optuna's TPE over (log2 batch, log lr), for as many examples as our race took.

    A trial trains until the target, or until it has taken twice the modelled seconds of the best
    trial. One that does not arrive is told as four times what it was allowed.

    Args:
        situation: The workload, its grid and the race's cost.
        seed: Of the sampler and of the trials' weights and data order.

    Returns:
        The choice: the best trial that arrived.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    truth, workload = situation.truth, situation.workload
    baseline = truth.baseline()
    budget = situation.race_examples
    if budget is None:
        budget = BAR_TRAININGS * (baseline[1] if baseline else 10.0 * truth.num_examples)
    rates = [2.0**cell.log2_lr for cell in truth.cells]
    sizes = round(math.log2(workload.num_examples))
    search = OptunaSearch(situation, budget)
    sampler = optuna.samplers.TPESampler(seed=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        study = optuna.create_study(sampler=sampler)
    while search.spent < budget:
        trial = study.ask()
        batch = min(2 ** trial.suggest_int("log2_batch", 0, sizes), workload.num_examples)
        rate = trial.suggest_float("learning_rate", min(rates), max(rates), log=True)
        study.tell(trial, search.run(batch, rate, seed))
    return Choice(
        row="Optuna",
        seed=seed,
        recipe=search.best,
        examples=search.spent,
        note=f"{len(study.trials)} trials",
    )


class OptunaSearch:
    """The objective: modelled seconds to target, with a budget in examples.

    Args:
        situation: The workload and its step-time law.
        budget: Examples.
        run: Runs cells; replaced in tests.
    """

    def __init__(
        self,
        situation: Situation,
        budget: float,
        run: Callable[..., Sequence[Arrival]] = run_cells,
    ) -> None:
        self._situation = situation
        self._budget = budget
        self._run = run
        self.spent = 0.0
        self.best: Recipe | None = None
        self.best_seconds = math.inf

    def run(self, batch: int, rate: float, seed: int) -> float:
        """Runs one trial.

        Args:
            batch: Global batch.
            rate: Learning rate.
            seed: Of the trial.

        Returns:
            Modelled seconds to target, or a multiple of what it took without arriving.
        """
        truth = self._situation.truth
        step_seconds = truth.step_time.seconds(batch)
        allowed = self._budget - self.spent
        if math.isinf(self.best_seconds):
            allowed = min(allowed, FIRST_TRIAL_SHARE * self._budget)
        limit = max(1, math.ceil(allowed / batch))
        if math.isfinite(self.best_seconds):
            limit = min(limit, max(1, math.ceil(2 * self.best_seconds / step_seconds)))
        arrival = self._run(self._situation.workload, batch, [rate], [seed], lambda _: limit)[0]
        self.spent += examples_after(arrival.steps_run, batch, truth.num_examples)
        if arrival.steps_to_target is None:
            # Diverging early must not look better than coming close.
            return 4.0 * limit * step_seconds
        seconds = arrival.steps_to_target * step_seconds
        if seconds < self.best_seconds:
            self.best_seconds = seconds
            self.best = Recipe(global_batch=batch, learning_rate=rate)
        return seconds


ROWS: dict[str, Callable[[Situation, int], Choice]] = {
    "race": lambda situation, seed: choose_by_plan(situation, seed, "race"),
    "probe": lambda situation, seed: choose_by_plan(situation, seed, "probe"),
    "batch 32, steepest": lambda s, seed: choose_by_range_test(s, seed, "steepest"),
    "batch 32, valley": lambda s, seed: choose_by_range_test(s, seed, "valley"),
    "batch 32, lr_find": lambda s, seed: choose_by_lightning(s, seed, TYPICAL_BATCH),
    "scikit-learn": choose_like_sklearn,
    "Lightning": lambda s, seed: choose_by_lightning(s, seed, None),
    "Optuna": choose_by_optuna,
}
"""The rows of the table. The race comes first: Optuna may spend what it did."""
