"""What engines see of the weights on their way: the same as the plain loop, in constant memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from tests.engines.small import OPTIMIZERS, RATES, SEEDS, make_workload
from torch import nn

from rightbatch import Recipe, Watch, train
from rightbatch.engines import make_copies
from rightbatch.errors import UsageError
from rightbatch.laws.path import path_roughness

ENGINES: list[Any] = ["compiled", "vmapped", "loop"]
WATCHED = ("distance", "relative_distance", "weight", "roughness")


@pytest.mark.parametrize("engine", ["compiled", "vmapped"])
@pytest.mark.parametrize(
    ("model", "batch", "watch"),
    [
        ("mlp", 1, "0.weight[3,1]"),
        ("mlp", 8, "first"),
        ("mlp", 8, "2.bias[1]"),
        ("cnn", 8, "4.weight[0,1,2,0]"),
        ("gpt", 8, "head.weight[3,2]"),
    ],
)
def test_every_engine_sees_the_weights_go_the_same_way(
    engine: Any, model: str, batch: int, watch: str
) -> None:
    copies, loop = (
        make_copies(
            make_workload(model, OPTIMIZERS["momentum"]), global_batch=batch, learning_rates=RATES,
            seeds=SEEDS, engine=name, watch=watch,
        )
        for name in (engine, "loop")
    )  # fmt: skip
    assert copies.watching == loop.watching
    for steps in (0, 1, 30):
        copies.advance(steps)
        loop.advance(steps)
        ours, theirs = copies.evaluate().watched, loop.evaluate().watched
        assert ours is not None and theirs is not None
        for name in WATCHED:
            np.testing.assert_allclose(
                getattr(ours, name), getattr(theirs, name), rtol=2e-3, atol=1e-6, err_msg=name
            )
        assert np.isnan(ours.roughness).all() == (steps == 0)
    assert (ours.roughness > 1.05).any() or batch > 1, "the path of online learning turns round"
    keep = [False, True, True]
    copies.keep(keep)
    loop.keep(keep)
    again, others = copies.evaluate().watched, loop.evaluate().watched
    assert again is not None and others is not None
    for name in WATCHED:
        np.testing.assert_array_equal(getattr(again, name), getattr(ours, name)[keep])
        np.testing.assert_array_equal(getattr(others, name), getattr(theirs, name)[keep])


@pytest.mark.parametrize("engine", ENGINES)
def test_what_is_watched_is_what_torch_does(engine: Any) -> None:
    watch = Watch(weights=["0.weight[2,1]"])
    recipe = Recipe(global_batch=8, learning_rate=0.1)
    train(make_workload("mlp"), recipe, epochs=4, seed=3, callbacks=[watch])
    copies = make_copies(
        make_workload("mlp"), global_batch=8, learning_rates=[0.1], seeds=[3], engine=engine,
        watch="0.weight[2,1]",
    )  # fmt: skip
    copies.advance(12)
    seen, path = copies.evaluate().watched, watch.paths["0.weight[2,1]"]
    assert seen is not None
    assert seen.weight[0] == pytest.approx(path[-1], rel=1e-4)
    assert seen.roughness[0] == pytest.approx(path_roughness(path), rel=1e-3)
    distance = watch.distances[-1].value
    assert seen.distance[0] == pytest.approx(distance, rel=1e-4)
    initial = torch.cat(
        [p.detach().flatten() for p in make_workload("mlp").build_model(3).parameters()]
    )
    assert seen.relative_distance[0] == pytest.approx(distance / float(initial.norm()), rel=1e-4)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_weight_that_does_not_train_never_moves_and_one_that_diverged_is_nowhere(
    engine: Any,
) -> None:
    def frozen() -> nn.Module:
        model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
        model[0].weight.requires_grad_(False)  # pyright: ignore
        return model

    copies = make_copies(
        make_workload("mlp", make_model=frozen), global_batch=8, learning_rates=[0.1, 1e30],
        seeds=[0, 0], engine=engine, watch="first",
    )  # fmt: skip
    copies.advance(6)
    seen = copies.evaluate().watched
    assert seen is not None and np.isnan(seen.roughness).all()
    assert seen.weight[0] == float(frozen_weight(frozen)) and np.isnan(seen.weight[1])
    assert seen.distance[0] > 0 and np.isnan(seen.distance[1])


def frozen_weight(make: Callable[[], nn.Module]) -> float:
    model = make_workload("mlp", make_model=make).build_model(0)
    return next(model.parameters())[0, 0].item()


def test_nothing_is_watched_unless_it_is_asked_for() -> None:
    for engine in ENGINES:
        copies = make_copies(
            make_workload("mlp"), global_batch=8, learning_rates=[0.1], seeds=[0], engine=engine
        )
        assert copies.watching is None and copies.evaluate().watched is None
        with pytest.raises(UsageError, match="has no weight"):
            make_copies(
                make_workload("mlp"), global_batch=8, learning_rates=[0.1], seeds=[0],
                engine=engine, watch="nowhere[0]",
            )  # fmt: skip
