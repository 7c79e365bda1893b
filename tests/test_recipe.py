"""The recipe is exact: its split multiplies to the global batch, or it is refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter

from rightbatch import Recipe
from rightbatch.errors import RecipeError


@given(st.integers(1, 64), st.integers(1, 64), st.integers(1, 8))
def test_what_is_left_out_is_filled_in(micro: int, accumulation: int, replicas: int) -> None:
    total = micro * accumulation * replicas
    whole = Recipe(
        global_batch=total,
        micro_batch=micro,
        accumulation=accumulation,
        replicas=replicas,
        learning_rate=0.1,
    )
    by_micro = Recipe(global_batch=total, micro_batch=micro, replicas=replicas, learning_rate=0.1)
    by_accumulation = Recipe(
        global_batch=total, accumulation=accumulation, replicas=replicas, learning_rate=0.1
    )
    assert whole == by_micro == by_accumulation


def test_alone_the_global_batch_is_one_micro_batch() -> None:
    recipe = Recipe(global_batch=100, learning_rate=0.1)
    assert (recipe.micro_batch, recipe.accumulation, recipe.replicas) == (100, 1, 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"global_batch": 0}, "global_batch is 0; it must be at least 1"),
        ({"replicas": 0}, "replicas is 0; it must be at least 1"),
        ({"warmup_steps": -1}, "warmup_steps is -1; it cannot be negative"),
        ({"learning_rate": 0.0}, "learning_rate is 0.0; it must be a positive finite"),
        ({"learning_rate": math.nan}, "learning_rate is nan"),
        ({"learning_rate": math.inf}, "learning_rate is inf"),
        ({"micro_batch": 65}, "65 × accumulation 1 × replicas 1 = 65, which is not the global"),
        ({"micro_batch": 64, "accumulation": 2}, "= 128, which is not the global batch 100"),
        ({"replicas": 3}, "which is not the global batch 100. Use rightbatch.split_batch"),
        ({"replicas": 101}, "which is not the global batch 100"),
        ({"micro_batch": -50, "accumulation": -2}, "micro_batch is -50; it must be at least 1"),
        ({"micro_batch": 50, "accumulation": -2}, "accumulation is -2; it must be at least 1"),
    ],
)
def test_what_contradicts_itself_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message.replace(".", r"\.")):
        Recipe(**{"global_batch": 100, "learning_rate": 0.1, **changes})


def test_replace_keeps_the_split_unless_the_batch_changes() -> None:
    recipe = Recipe(global_batch=256, micro_batch=64, learning_rate=0.1)
    assert recipe.replace(learning_rate=0.2).accumulation == 4
    larger = recipe.replace(global_batch=512)
    assert (larger.micro_batch, larger.accumulation) == (512, 1)
    split = recipe.replace(global_batch=512, micro_batch=64)
    assert (split.micro_batch, split.accumulation) == (64, 8)
    with pytest.raises(RecipeError, match="must be a positive finite"):
        recipe.replace(learning_rate=-1.0)


def test_it_is_plain_data() -> None:
    recipe = Recipe(global_batch=256, micro_batch=64, learning_rate=1e-5, warmup_steps=7)
    adapter = TypeAdapter(Recipe)
    assert adapter.validate_python(adapter.dump_python(recipe, mode="json")) == recipe
    with pytest.raises(AttributeError, match="cannot assign"):
        recipe.learning_rate = 1.0  # pyright: ignore[reportAttributeAccessIssue]
