"""What a user writes becomes a design, or is refused in a sentence."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from rightbatch.errors import UsageError
from rightbatch.study.design import Budget, make_design


def design(**changes: Any) -> Any:
    asked = {"batch_sizes": [10], "learning_rates": [0.1], "seeds": 2, "epochs": 3}
    return make_design(100, **{**asked, **changes})


@pytest.mark.parametrize(
    ("asked", "sizes"),
    [
        ("full, 10,1", (1, 10, 100)),
        ([100, "full", 7], (7, 100)),
        ("powers", (1, 2, 4, 8, 16, 32, 64, 100)),
        ("auto", (8, 32, 100)),
    ],
)
def test_batch_sizes(asked: Any, sizes: tuple[int, ...]) -> None:
    assert design(batch_sizes=asked).batch_sizes == sizes


@pytest.mark.parametrize(
    ("asked", "rates"),
    [
        ("1,0.1", (0.1, 1.0)),
        ("1e-3:1:4", (0.001, 0.01, 0.1, 1.0)),
        ("0.1:10:3,5", (0.1, 1.0, 5.0, 10.0)),
        ("auto", None),
        ([0.5, 0.5], (0.5,)),
    ],
)
def test_learning_rates(asked: Any, rates: tuple[float, ...] | None) -> None:
    assert design(learning_rates=asked).learning_rates == rates


@pytest.mark.parametrize("asked", [2, np.int64(2), [0, 1], range(2), np.arange(2), [0, 1, 0]])
def test_seeds_however_they_are_counted(asked: Any) -> None:
    seeds = design(seeds=asked).seeds
    assert seeds == (0, 1) and {type(seed) for seed in seeds} == {int}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"batch_sizes": [0]}, "'0'. Give numbers from 1 to 100"),
        ({"batch_sizes": "101"}, "'101'"),
        ({"batch_sizes": "half"}, "'half'"),
        ({"batch_sizes": []}, "no batch size"),
        ({"learning_rates": "0"}, "'0'. Give positive numbers"),
        ({"learning_rates": "-1:1:3"}, "'-1'"),
        ({"learning_rates": "0.1:1"}, "first:last:count"),
        ({"learning_rates": "fast"}, "'fast'"),
        ({"learning_rates": []}, "no learning rate"),
        ({"seeds": 0}, "seeds is 0"),
        ({"seeds": [-1]}, "seeds is"),
        ({"seeds": 2.5}, "seeds is 2.5"),
        ({"epochs": 0}, "epochs is 0"),
        ({"epochs": float("nan")}, "epochs is nan"),
        ({"epochs": None}, "no length"),
        ({"steps": 5}, "epochs and steps"),
    ],
)
def test_what_cannot_be_run_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said.replace("(", r"\(")):
        design(**changes)


def test_a_budget_in_updates_of_each_batch() -> None:
    def steps(unit: Any, amount: float, batch: int) -> int:
        return Budget(unit=unit, amount=amount).steps(batch, 100, 0.5)

    assert [steps("epochs", 2, batch) for batch in (1, 30, 100)] == [200, 8, 2]
    assert steps("epochs", 0.5, 30) == 2
    assert steps("steps", 7, 30) == 7
    assert steps("examples", 130, 30) == 5  # 30, 30, 30, 10, then 30
    assert steps("seconds", 3.2, 30) == 6
    assert steps("seconds", 0.1, 30) == 1
