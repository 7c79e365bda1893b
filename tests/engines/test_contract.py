"""What every engine promises, whichever was taken."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest
import torch
from tests.engines.small import (
    OPTIMIZERS,
    TRAIN_ONLY,
    assert_same_evaluation,
    assert_same_weights,
    make_workload,
)
from torch import nn
from torch.nn import functional as F

from rightbatch import Workload
from rightbatch.engines import Copies, make_copies
from rightbatch.engines.make import Engine
from rightbatch.training import epoch_order

ENGINES = [
    pytest.param(
        "compiled", marks=pytest.mark.skipif(find_spec("jax") is None, reason="needs JAX")
    ),
    "vmapped",
    "loop",
]
every_engine = pytest.mark.parametrize("engine", ENGINES)


def _make(engine: Engine, workload: Workload, **options: Any) -> Copies:
    arguments = {"global_batch": 8, "learning_rates": [0.05, 0.1, 0.05], "seeds": [0, 0, 1]}
    return make_copies(workload, engine=engine, **{**arguments, **options})


@every_engine
def test_it_tells_who_runs_and_what_was_asked(engine: Engine) -> None:
    copies = _make(engine, make_workload("mlp", **TRAIN_ONLY))
    assert (copies.engine, copies.steps) == (engine, 0)
    assert "was asked for" in copies.reason
    assert copies.learning_rates.tolist() == [0.05, 0.1, 0.05]
    assert copies.seeds.tolist() == [0, 0, 1]


@every_engine
def test_cutting_a_run_changes_nothing(engine: Engine) -> None:
    workload = make_workload("mlp", OPTIMIZERS["adam"], **TRAIN_ONLY)
    whole, pieces = (_make(engine, workload) for _ in range(2))
    whole.advance(9)
    for num_steps in (1, 0, 3, 5):
        pieces.advance(num_steps)
        pieces.wait()
    assert pieces.steps == whole.steps == 9
    for copy in range(3):
        for name, value in whole.state_dict(copy).items():
            assert torch.equal(value, pieces.state_dict(copy)[name])


@every_engine
def test_evaluating_closes_the_interval_and_changes_no_weight(engine: Engine) -> None:
    copies = _make(engine, make_workload("mlp"))
    copies.advance(4)
    before = copies.state_dict(1)
    first, again = copies.evaluate(), copies.evaluate()
    assert np.isfinite(first.train_loss).all()
    assert np.isnan(again.train_loss).all()
    for ours, theirs in ((first.val_loss, again.val_loss), (first.val_metric, again.val_metric)):
        assert ours is not None
        assert theirs is not None
        assert (ours == theirs).all()
    assert all(torch.equal(value, copies.state_dict(1)[name]) for name, value in before.items())


@every_engine
def test_what_state_dict_returns_is_the_callers(engine: Engine) -> None:
    copies = _make(engine, make_workload("mlp", **TRAIN_ONLY))
    for value in copies.state_dict(0).values():
        value.fill_(7.0)
    assert not any((value == 7).any() for value in copies.state_dict(0).values())
    assert copies.state_dict(-1).keys() == copies.state_dict(2).keys()
    with pytest.raises(IndexError):
        copies.state_dict(3)


@every_engine
def test_retired_copies_are_gone_and_the_others_go_on_as_in_the_loop(engine: Engine) -> None:
    workload = make_workload("mlp", OPTIMIZERS["momentum"])
    rates = [0.01, 0.02, 0.03, 0.04, 0.05]
    ours, loop = (
        _make(which, workload, learning_rates=rates, seeds=[0, 1, 2, 0, 3])
        for which in (engine, "loop")
    )
    for copies in (ours, loop):
        copies.advance(3)
        copies.keep([True, False, False, True, True])
        copies.advance(4)
    assert ours.seeds.tolist() == [0, 0, 3]
    assert ours.learning_rates.tolist() == [0.01, 0.04, 0.05]
    assert_same_evaluation(ours, loop)
    assert_same_weights(ours, loop)


@every_engine
def test_all_copies_may_be_retired(engine: Engine) -> None:
    copies = _make(engine, make_workload("mlp"))
    copies.keep([False] * 3)
    copies.advance(2)
    evaluation = copies.evaluate()
    assert evaluation.train_loss.shape == (0,)
    assert evaluation.val_loss is not None
    assert evaluation.val_loss.shape == (0,)
    assert copies.steps == 2


@every_engine
def test_a_copy_that_diverged_stays_so_and_harms_no_other(engine: Engine) -> None:
    workload = Workload(
        name="steep",
        make_model=lambda: nn.Linear(2, 1),
        train_data=(torch.ones(6, 2), torch.zeros(6, 1)),
        val_data=(torch.ones(3, 2), torch.zeros(3, 1)),
        loss=F.mse_loss,
    )
    copies = _make(
        engine, workload, global_batch=2, learning_rates=[0.01, 1.5, 1e30], seeds=[0] * 3
    )
    copies.advance(40)
    for _ in range(2):
        evaluation = copies.evaluate()
        assert evaluation.diverged.tolist() == [False, True, True]
        assert evaluation.val_loss is not None
        assert np.isnan(evaluation.val_loss).tolist() == [False, True, True]
        copies.advance(3)


@every_engine
def test_one_exploding_batch_in_the_middle_is_seen(engine: Engine) -> None:
    workload = Workload(
        name="one outlier",
        make_model=lambda: nn.Linear(1, 1),
        train_data=(torch.tensor([1e9, 1.0, 1.0, 1.0]),),
        compute_loss=lambda model, batch: (0 * model(batch[0][:, None]).sum() + batch[0].sum(), 1),
    )
    place = epoch_order(4, seed=0, epoch=0).tolist().index(0)
    copies = _make(engine, workload, global_batch=1, learning_rates=[0.1], seeds=[0])
    copies.advance(place)
    assert not copies.evaluate().diverged[0]
    copies.advance(4 - place)
    assert copies.evaluate().diverged[0]


@every_engine
def test_the_callers_random_state_and_settings_are_left_alone(engine: Engine) -> None:
    torch.manual_seed(5)
    state, fast_path = torch.random.get_rng_state(), torch.backends.mha.get_fastpath_enabled()
    attention, grad = torch.backends.cuda.flash_sdp_enabled(), torch.is_grad_enabled()
    copies = _make(engine, make_workload("mlp"))
    copies.advance(3)
    copies.evaluate()
    assert torch.equal(state, torch.random.get_rng_state())
    assert torch.backends.mha.get_fastpath_enabled() == fast_path
    assert torch.backends.cuda.flash_sdp_enabled() == attention
    assert torch.is_grad_enabled() == grad
