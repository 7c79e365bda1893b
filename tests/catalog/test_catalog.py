"""Every built-in workload: what the list says of it, and that it can be trained to its target."""

from __future__ import annotations

import subprocess
import sys

import cloudpickle
import pytest
import torch

from rightbatch import Recipe, catalog, train
from rightbatch.catalog.entries import find_entry
from rightbatch.errors import WorkloadError
from rightbatch.workload import Workload

NAMES = catalog.names()

GOOD_RATES = {
    "max3": 0.4,
    "digits": 0.8,
    "digits-cnn": 0.01,
    "breast-cancer": 0.2,
    "diabetes": 0.15,
    "quadratic": 0.13,
}
"""Learning rates found by trying a few at batch 32."""


@pytest.fixture(scope="module", params=NAMES)
def workload(request: pytest.FixtureRequest) -> Workload:
    return catalog.get(request.param)


def test_the_catalog_is_the_one_that_was_asked_for() -> None:
    assert sorted(NAMES) == sorted(
        ["max3", "digits", "digits-cnn", "breast-cancer", "diabetes", "source-lm", "quadratic"]
    )


def test_the_list_says_what_the_workload_is(workload: Workload) -> None:
    entry = find_entry(workload.name)
    assert entry is not None
    assert workload.num_examples == entry.num_examples
    assert workload.target == entry.target
    optimizer = workload.make_optimizer(workload.build_model(0).parameters(), 0.1)
    assert type(optimizer).__name__ == entry.optimizer.split(",")[0]
    assert 0 < len(entry.description) <= 65
    assert "\n" not in entry.description


def test_building_twice_gives_the_same_bits(workload: Workload) -> None:
    again = catalog.get(workload.name)
    everything = torch.arange(workload.num_examples)
    first, second = (
        workload.train_examples.batch(everything),
        again.train_examples.batch(everything),
    )
    for a, b in zip(_tensors(first), _tensors(second), strict=True):
        assert torch.equal(a, b)
    for a, b in zip(
        workload.build_model(3).parameters(), again.build_model(3).parameters(), strict=True
    ):
        assert torch.equal(a, b)


def test_validation_examples_are_not_trained_on(workload: Workload) -> None:
    assert workload.val_examples is not None
    rows = _rows(workload.train_examples)
    held_out = _rows(workload.val_examples)
    # A few windows of source code (blank ones) do occur twice in any text.
    assert len(held_out & rows) <= 0.01 * len(held_out)


def test_it_crosses_into_another_process_small(workload: Workload) -> None:
    data = cloudpickle.dumps(workload)
    assert len(data) < 2**21
    there = cloudpickle.loads(data)
    assert there.name == workload.name
    assert there.num_examples == workload.num_examples


@pytest.mark.parametrize("name", GOOD_RATES)
@pytest.mark.parametrize("seed", [0, 1])
def test_batch_32_reaches_the_target(name: str, seed: int) -> None:
    workload = catalog.get(name)
    recipe = Recipe(global_batch=32, learning_rate=GOOD_RATES[name])
    run = train(workload, recipe, epochs=30, seed=seed, until_target=True)
    assert run.reached_target
    assert run.epochs > 1.5, "a target met in the first epoch tells batch sizes apart badly"


def test_source_lm_learns() -> None:
    workload = catalog.get("source-lm")
    recipe = Recipe(global_batch=32, learning_rate=0.01)
    run = train(workload, recipe, steps=60, evaluate_every=60)
    assert run.val_loss is not None
    assert run.val_loss < 3.0 < torch.tensor(128.0).log()


def test_source_lm_looks_only_at_the_past() -> None:
    model = catalog.get("source-lm").build_model(0)
    read = torch.randint(0, 128, (1, 32), generator=torch.Generator().manual_seed(0))
    changed = read.clone()
    changed[0, 20] = (changed[0, 20] + 1) % 128
    before, after = model(read), model(changed)
    torch.testing.assert_close(before[:, :20], after[:, :20])
    assert not torch.allclose(before[:, 20:], after[:, 20:])


def test_digits_cnn_has_no_batch_norm() -> None:
    model = catalog.get("digits-cnn").build_model(0)
    assert not any("BatchNorm" in type(module).__name__ for module in model.modules())


def test_listing_the_catalog_imports_no_torch() -> None:
    code = (
        "import sys, rightbatch.catalog as c; c.names(); c.entries(); "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("digit", r"no built-in workload 'digit'\. Did you mean digits or digits-cnn\?"),
        ("breastcancer", r"Did you mean breast-cancer\?"),
        ("xyz", r"There are: max3, digits, .*quadratic\."),
    ],
)
def test_a_wrong_name_gives_near_matches(wrong: str, message: str) -> None:
    with pytest.raises(WorkloadError, match=message):
        catalog.get(wrong)


def _tensors(batch: object) -> list[torch.Tensor]:
    if isinstance(batch, torch.Tensor):
        return [batch]
    assert isinstance(batch, tuple)
    return list(batch)


def _rows(examples: object) -> set[bytes]:
    batch = examples.batch(torch.arange(examples.num_examples))  # pyright: ignore[reportAttributeAccessIssue]
    inputs = _tensors(batch)[0].flatten(1)
    return {row.numpy().tobytes() for row in inputs}
