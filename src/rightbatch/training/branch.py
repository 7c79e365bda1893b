"""Branched warm-up of the batch: at intervals, the largest batch that costs no progress is kept.

From where a training stands, branches go on at k times its batch, with k times (SGD) or √k times
(optimizers that divide by the gradient's size) its learning rate. After equally many examples, the
same ones in the same order, the largest k is kept whose loss is within a tolerance of that of the
branch at k = 1. Below the critical batch all of them are; so the batch follows the critical batch
up, measured where the training is, with no noise scale in between.

A branch's loss is the mean over the second half of its updates, of examples that it has not been
trained on in this epoch: early in a branch the larger step has yet to act, and one update's loss is
mostly noise.

References:
    Merrill et al. 2025, "Critical Batch Size Revisited: A Simple Empirical Approach to Large-Batch
    Language Model Training".
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from rightbatch.errors import UsageError
from rightbatch.laws.scaling import scale_learning_rate
from rightbatch.recipe import RateRule, Recipe
from rightbatch.training.loop import Training


@dataclass(frozen=True, kw_only=True)
class Branch:
    """One branch.

    Attributes:
        multiple: k, times the batch that the training had.
        global_batch: Examples per update.
        learning_rate: At this batch.
        loss: Mean training loss over the second half of the branch; None where it diverged.
        examples: What it took.
        within: Whether the loss is within the tolerance.
    """

    multiple: int
    global_batch: int
    learning_rate: float
    loss: float | None
    examples: int
    within: bool


@dataclass(frozen=True, kw_only=True)
class BranchRound:
    """One point of the training at which branches were compared.

    Attributes:
        at: Examples consumed when they began.
        branches: By batch, smallest first; the first is the training as it was.
        kept: The multiple that the training went on with.
    """

    at: int
    branches: tuple[Branch, ...]
    kept: int


@dataclass(frozen=True, kw_only=True)
class BranchedWarmUp:
    """A ramp of the batch that was found along a training, and what it rests on.

    Attributes:
        recipe: The training's, with the ramp in it: it trains as the training did.
        rounds: The comparisons, in order.
        examples: What the branches took that were not kept: the price of knowing.
        training: The training, at the end of its last round.
    """

    recipe: Recipe
    rounds: tuple[BranchRound, ...]
    examples: int
    training: Training = field(repr=False, compare=False)

    @property
    def batch_ramp(self) -> tuple[tuple[int, int], ...]:
        """Phases for a recipe: (from so many examples on, this batch)."""
        return self.recipe.batch_ramp


def warm_up_by_branches(
    training: Training,
    *,
    branch_examples: int,
    rounds: int,
    examples_between: int = 0,
    multiples: Sequence[int] = (2, 4),
    tolerance: float = 0.01,
    largest: int | None = None,
    rate_rule: RateRule | None = None,
) -> BranchedWarmUp:
    """Raises the batch of a running training as far as its losses allow.

    Args:
        training: Goes on from where it stands; it is not touched itself, its copy is returned.
        branch_examples: Examples of each branch, at least four updates of the largest.
        rounds: How often branches are compared.
        examples_between: Examples from the end of one comparison to the beginning of the next.
        multiples: k of the branches beside k = 1, each above 1.
        tolerance: A loss may be higher by this share of the loss at k = 1.
        largest: No batch above this is tried. Default: the training set.
        rate_rule: How the learning rate follows. Default: `linear` for SGD, otherwise `sqrt`.

    Returns:
        The ramp, its evidence, and the training.

    Raises:
        UsageError: If the training's batch changes already, or a number means nothing.
    """
    recipe = training.recipe
    _check(recipe, multiples, branch_examples, rounds)
    if largest is None:
        largest = training.workload.num_examples
    if rate_rule is None:
        rate_rule = "linear" if isinstance(training.optimizer, torch.optim.SGD) else "sqrt"
    first = recipe
    ramp: list[tuple[int, int]] = []
    done: list[BranchRound] = []
    for index in range(rounds):
        if index and examples_between:
            _advance(training, training.consumed + examples_between)
        if training.diverged:
            break
        found, runs = _compare(
            training, first, rate_rule, (1, *sorted(multiples)), branch_examples, tolerance, largest
        )
        done.append(found)
        training = runs[found.kept]
        if found.at == 0:
            first = training.recipe  # a ramp begins with its first batch, and not at 0
        elif found.kept > 1:
            ramp.append((found.at, training.recipe.global_batch))
    return BranchedWarmUp(
        recipe=first.replace(batch_ramp=tuple(ramp), rate_rule=rate_rule if ramp else "none"),
        rounds=tuple(done),
        examples=sum(b.examples for r in done for b in r.branches if b.multiple != r.kept),
        training=training,
    )


def _check(recipe: Recipe, multiples: Sequence[int], branch_examples: int, rounds: int) -> None:
    if recipe.changes_batch:
        raise UsageError(
            f"The training's batch changes by itself (batch_ramp {recipe.batch_ramp}, batch_policy "
            f"{recipe.batch_policy!r}). Branch from one with a fixed batch."
        )
    if not multiples or min(multiples) < 2 or rounds < 1:
        raise UsageError(
            f"multiples is {tuple(multiples)} and rounds {rounds}; give multiples of at least 2 "
            "and at least one round."
        )
    needed = 4 * max(multiples) * recipe.global_batch
    if branch_examples < needed:
        raise UsageError(
            f"branch_examples is {branch_examples}; a branch at {max(multiples)} × the batch "
            f"{recipe.global_batch} needs at least {needed}, four updates, to have a loss."
        )


def _compare(
    training: Training,
    first: Recipe,
    rate_rule: RateRule,
    multiples: Sequence[int],
    branch_examples: int,
    tolerance: float,
    largest: int,
) -> tuple[BranchRound, dict[int, Training]]:
    """Runs the branches; the comparison, and the branches' trainings by their multiples."""
    batch = training.recipe.global_batch
    runs: dict[int, Training] = {}
    branches: list[Branch] = []
    limit = math.inf
    for multiple in multiples:
        # A larger batch than the first is tried only with enough updates left to see its loss.
        if multiple > 1 and (multiple * batch > largest or 4 * multiple * batch > branch_examples):
            continue
        run = training.fork(_recipe_at(training.recipe, first, multiple * batch, rate_rule))
        before = run.examples
        loss = _loss_of(run, branch_examples)
        if multiple == 1 and loss is not None:
            limit = loss + tolerance * abs(loss)
        runs[multiple] = run
        branches.append(
            Branch(
                multiple=multiple,
                global_batch=run.recipe.global_batch,
                learning_rate=run.recipe.learning_rate,
                loss=loss,
                examples=run.examples - before,
                within=multiple == 1 or (loss is not None and loss <= limit),
            )
        )
    kept = max(branch.multiple for branch in branches if branch.within)
    return BranchRound(at=training.consumed, branches=tuple(branches), kept=kept), runs


def _recipe_at(current: Recipe, first: Recipe, global_batch: int, rate_rule: RateRule) -> Recipe:
    """The recipe at another batch: micro-batches stay, since they are what memory holds."""
    times, none_left = divmod(global_batch, current.global_batch)
    assert none_left == 0
    # From the first batch, as a ramp's rule does it, so that the ramp gives the same bits.
    rate = scale_learning_rate(
        first.learning_rate,
        first.global_batch,
        global_batch,
        rule="linear" if rate_rule == "linear" else "sqrt" if rate_rule == "sqrt" else "none",
    )
    return current.replace(
        global_batch=global_batch,
        micro_batch=current.micro_batch,
        replica_batches=tuple(times * batch for batch in current.replica_batches),
        learning_rate=rate,
    )


def _loss_of(run: Training, branch_examples: int) -> float | None:
    """Trains a branch; its mean loss over the second half."""
    end = run.consumed + branch_examples
    _advance(run, run.consumed + branch_examples // 2)
    run.recent_train_loss()
    _advance(run, end)
    loss = run.recent_train_loss()
    return None if run.diverged or not math.isfinite(loss) else loss


def _advance(run: Training, consumed: int) -> None:
    """Goes on to a place in the data, or where the run ends by itself."""
    while run.consumed < consumed and not run.over:
        run.advance(max((consumed - run.consumed) // run.recipe.global_batch, 1))
