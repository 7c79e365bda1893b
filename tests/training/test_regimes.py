"""The notebook's three regimes: one axis, from the full batch to online learning."""

from __future__ import annotations

import statistics

import pytest

import rightbatch as rb


def accuracies(global_batch: int, *, epochs: float, seeds: int) -> list[float]:
    workload = rb.load_workload("max3")
    recipe = rb.Recipe(global_batch=global_batch, learning_rate=0.01)
    runs = [rb.train(workload, recipe, epochs=epochs, seed=seed) for seed in range(seeds)]
    assert all(run.examples == epochs * 1000 for run in runs)
    assert all(run.steps == epochs * 1000 // global_batch for run in runs)
    return [run.val_metric or 0.0 for run in runs]


def test_the_full_batch_has_too_few_updates_at_equal_epochs() -> None:
    """100 updates: near guessing, and a draw of the seed (the notebook's 33 to 36 %)."""
    found = accuracies(1000, epochs=100, seeds=8)
    assert 0.25 < statistics.median(found) < 0.6
    assert max(found) - min(found) > 0.1


def test_mini_batches_learn_it() -> None:
    assert min(accuracies(10, epochs=60, seeds=2)) > 0.93


def test_online_learning_learns_it_in_fewer_epochs() -> None:
    assert min(accuracies(1, epochs=10, seeds=2)) > 0.9


@pytest.mark.slow
def test_all_three_as_in_the_notebook() -> None:
    full, mini, online = (accuracies(batch, epochs=100, seeds=3) for batch in (1000, 10, 1))
    assert statistics.median(full) < 0.6
    assert min(mini) > 0.95
    assert min(online) > 0.95
