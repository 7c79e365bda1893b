"""Branched warm-up: the largest batch that costs no progress, where the laws know which it is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from rightbatch import Recipe, catalog
from rightbatch.catalog.quadratic import constants
from rightbatch.errors import UsageError
from rightbatch.laws.linear_regression import divergence_edge, loss_by_recursion
from rightbatch.training import Training
from rightbatch.training.branch import BranchedWarmUp, warm_up_by_branches

PER_EXAMPLE = 0.005
"""Learning rate / batch."""


def start(global_batch: int = 4, *, workload: str = "quadratic", **changes: Any) -> Training:
    given: dict[str, Any] = {"learning_rate": PER_EXAMPLE * global_batch, **changes}
    return Training(catalog.get(workload), Recipe(global_batch=global_batch, **given), seed=1)


def branched(training: Training, **changes: Any) -> BranchedWarmUp:
    given: dict[str, Any] = {"branch_examples": 1024, "rounds": 3, "tolerance": 0.05, **changes}
    return warm_up_by_branches(training, **given)


def weights(training: Training) -> torch.Tensor:
    return nn.utils.parameters_to_vector(training.model.parameters()).detach()


@pytest.mark.parametrize("first", [2, 4, 16])
def test_it_stops_where_the_law_diverges(first: int) -> None:
    """At 0.005 per example the edge lies between batch 64 and 128."""
    stable = [
        batch
        for batch in (16, 32, 64, 128, 256)
        if PER_EXAMPLE * batch < divergence_edge(constants(), global_batch=batch)
    ]
    assert stable[-1] == 64
    training = start(first)
    training.advance(1024 // first)
    found = branched(training, multiples=(2, 4, 8, 16))
    assert found.training.recipe.global_batch == 64
    assert found.training.recipe.learning_rate == PER_EXAMPLE * 64
    assert found.batch_ramp[-1][1] == 64
    tried = {branch.global_batch for each in found.rounds for branch in each.branches}
    assert 128 in tried


def test_losses_are_those_of_the_law() -> None:
    """From the start, mean of the second half: ½Σλm + s²/2, by the exact recursion."""
    losses: list[list[float]] = []
    for seed in range(12):
        training = Training(
            catalog.get("quadratic"), Recipe(global_batch=4, learning_rate=0.02), seed=seed
        )
        (only,) = branched(training, rounds=1, multiples=(4, 8), tolerance=0.0).rounds
        losses.append([branch.loss or 0.0 for branch in only.branches])
        assert [branch.global_batch for branch in only.branches] == [4, 16, 32]
    means = torch.tensor(losses).mean(0)
    for mean, batch in zip(means.tolist(), (4, 16, 32), strict=True):
        steps = 1024 // batch
        law = loss_by_recursion(
            constants(), learning_rates=[PER_EXAMPLE * batch], global_batch=batch, num_steps=steps
        )[0][steps // 2 : steps]
        assert mean == pytest.approx(float(law.mean()) + 2, rel=0.03)
    # On the same examples differences are seen far more sharply than the losses themselves.
    law_says_worse = means[2] - means[0]
    assert 0 < law_says_worse < 0.05 * means[0]


@pytest.mark.parametrize(("tolerance", "kept"), [(10.0, 8), (-0.5, 1)])
def test_the_tolerance_decides(tolerance: float, kept: int) -> None:
    (only,) = branched(start(), rounds=1, multiples=(2, 8), tolerance=tolerance).rounds
    assert only.kept == kept
    assert [branch.within for branch in only.branches] == [True, kept == 8, kept == 8]


@pytest.mark.parametrize("begin", [0, 3])
@pytest.mark.parametrize("workload", ["quadratic", "digits", "digits-cnn"])
def test_the_recipe_trains_as_the_training_did(begin: int, workload: str) -> None:
    """Bit for bit: the ramp and the rule give what the branches that were kept did."""
    rate = {"quadratic": 0.02, "digits": 0.1, "digits-cnn": 0.002}[workload]
    training = start(8, workload=workload, learning_rate=rate, micro_batch=4, warmup_steps=2)
    training.advance(begin)
    found = branched(training, branch_examples=256, rounds=2, examples_between=100, tolerance=0.2)
    assert found.batch_ramp, "nothing rose: nothing was tested"
    assert found.recipe.rate_rule == ("sqrt" if workload == "digits-cnn" else "linear")
    assert found.training.recipe.micro_batch == 4
    again = Training(training.workload, found.recipe, seed=1)
    while again.consumed < found.training.consumed:
        again.advance(1)
    assert again.steps == found.training.steps
    assert torch.equal(weights(again), weights(found.training))


def test_the_training_that_is_given_is_not_touched() -> None:
    training = start()
    training.advance(5)
    before, steps = weights(training).clone(), training.steps
    found = branched(training, rounds=1)
    assert found.training is not training
    assert (training.steps, training.consumed) == (steps, 20)
    assert torch.equal(weights(training), before)


def test_the_price_is_counted_in_examples() -> None:
    found = branched(start(), rounds=2, multiples=(2, 4), branch_examples=512)
    total = sum(branch.examples for each in found.rounds for branch in each.branches)
    assert total == 512 * sum(len(each.branches) for each in found.rounds)
    assert found.examples == total - 512 * len(found.rounds)
    assert found.training.consumed == 512 * 2
    assert [each.at for each in found.rounds] == [0, 512]


def test_digits_stand_a_larger_batch() -> None:
    """Batch 8 at learning rate 0.05: the range where doubling is free ends well above it."""
    training = start(8, workload="digits", learning_rate=0.05)
    training.advance(to_epoch=1)
    found = branched(training, branch_examples=1024, rounds=3, tolerance=0.02)
    assert 16 <= found.training.recipe.global_batch <= 256
    assert all(before.kept >= 1 for before in found.rounds)
    assert not found.training.diverged


def test_no_branch_is_larger_than_asked_or_too_short_to_see() -> None:
    found = branched(
        start(64, learning_rate=0.05), rounds=3, multiples=(2, 4), tolerance=0.5, largest=200
    )
    tried = [[b.global_batch for b in each.branches] for each in found.rounds]
    assert tried == [[64, 128], [128], [128]]
    short = branched(start(4), rounds=3, multiples=(2, 4), tolerance=100.0, branch_examples=100)
    assert [b.global_batch for b in short.rounds[1].branches] == [16]


def test_a_branch_that_diverges_is_not_kept() -> None:
    training = start(64, learning_rate=0.3)
    (only,) = branched(training, rounds=1, multiples=(4,), branch_examples=16_384).rounds
    assert only.branches[1].loss is None
    assert only.kept == 1


@pytest.mark.parametrize(
    ("recipe", "changes", "message"),
    [
        (
            {"batch_ramp": ((100, 8),)},
            {},
            r"batch changes by itself \(batch_ramp \(\(100, 8\),\).* Branch from one with a fixed",
        ),
        ({}, {"multiples": (1, 2)}, r"multiples is \(1, 2\) and rounds 3; give multiples of at le"),
        ({}, {"rounds": 0}, r"rounds 0; give"),
        (
            {},
            {"branch_examples": 63},
            r"branch_examples is 63; a branch at 4 × the batch 4 needs at least 64, four updates",
        ),
    ],
)
def test_what_means_nothing_is_refused(
    recipe: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        branched(start(**recipe), **changes)
