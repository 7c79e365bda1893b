"""The compiled engine does what the plain loop does, or says why it cannot."""

from __future__ import annotations

import gc
import random
import re
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

pytest.importorskip("jax")

from tests.engines.small import (
    OPTIMIZERS,
    OPTIONS,
    RATES,
    SEEDS,
    TRAIN_ONLY,
    Params,
)
from tests.engines.small import assert_same_evaluation as _assert_same_evaluation
from tests.engines.small import assert_same_weights as _assert_same_weights
from tests.engines.small import blobs as _blobs
from tests.engines.small import make_workload as _workload

from rightbatch import Workload, catalog
from rightbatch.engines import Copies, make_copies
from rightbatch.engines import compiler as compiler_module
from rightbatch.engines import make as make_module
from rightbatch.errors import MissingExtraError, RecipeError, UsageError


def _both(workload: Workload, global_batch: int = 8, **options: Any) -> tuple[Copies, Copies]:
    arguments = {"learning_rates": RATES, "seeds": SEEDS, **options}
    compiled = make_copies(workload, global_batch=global_batch, engine="compiled", **arguments)
    loop = make_copies(workload, global_batch=global_batch, engine="loop", **arguments)
    return compiled, loop


def _assert_agree(workload: Workload, **options: Any) -> tuple[Copies, Copies]:
    compiled, loop = _both(workload, **options)
    for copies in (compiled, loop):
        copies.advance(6)  # two epochs of 8 + 8 + 5 examples
    _assert_same_evaluation(compiled, loop)
    _assert_same_weights(compiled, loop)  # after evaluation, which must change no buffer
    return compiled, loop


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("model", ["mlp", "cnn", "gpt"])
def test_weights_and_losses_are_the_loops(model: str, optimizer: str) -> None:
    # Validation is the same whatever the optimizer, so it is compiled with one of them only.
    without = {} if optimizer == "sgd" else TRAIN_ONLY
    _assert_agree(_workload(model, OPTIMIZERS[optimizer], **without))


@pytest.mark.parametrize("options", OPTIONS)
def test_every_optimizer_option_is_the_loops(options: str) -> None:
    _assert_agree(_workload("mlp", OPTIONS[options], **TRAIN_ONLY))


@pytest.mark.parametrize("global_batch", [1, 7, 21, 100])
def test_every_batch_size_is_the_loops(global_batch: int) -> None:
    _assert_agree(_workload("mlp", **TRAIN_ONLY), global_batch=global_batch)


def test_large_steps_run_one_copy_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    from rightbatch.engines import program

    monkeypatch.setattr(program, "MAX_SHARED_STEP_BYTES", 0)
    _assert_agree(_workload("mlp", OPTIMIZERS["momentum"], **TRAIN_ONLY))


def test_cutting_a_run_changes_nothing_and_compiles_nothing() -> None:
    workload = _workload("mlp", OPTIMIZERS["adam"], **TRAIN_ONLY)
    whole, pieces = (
        make_copies(workload, global_batch=8, learning_rates=RATES, seeds=SEEDS) for _ in range(2)
    )
    whole.advance(11)
    (compiled,) = compiler_module.compiler_of(workload).program(workload, 8)._compiled.values()
    before = compiled._cache_size()  # pyright: ignore[reportFunctionMemberAccess]
    for num_steps in (1, 2, 0, 3, 5):
        pieces.advance(num_steps)
    assert pieces.steps == whole.steps == 11
    for copy in range(3):
        for name, value in whole.state_dict(copy).items():
            assert torch.equal(value, pieces.state_dict(copy)[name])
    assert compiled._cache_size() == before  # pyright: ignore[reportFunctionMemberAccess]


def test_a_run_longer_than_one_call_is_the_loops(monkeypatch: pytest.MonkeyPatch) -> None:
    from rightbatch.engines import compiled

    monkeypatch.setattr(compiled, "_STEPS_PER_CALL", 5)
    ours, theirs = _both(_workload("mlp", **TRAIN_ONLY))
    for copies in (ours, theirs):
        copies.advance(2)
        copies.advance(17)
    _assert_same_weights(ours, theirs)
    _assert_same_evaluation(ours, theirs)


def test_a_copy_that_diverged_stays_diverged_and_harms_no_other() -> None:
    workload = Workload(
        name="steep",
        make_model=lambda: nn.Linear(2, 1),
        train_data=(torch.ones(6, 2), torch.zeros(6, 1)),
        val_data=(torch.ones(3, 2), torch.zeros(3, 1)),
        loss=F.mse_loss,
    )
    ours, theirs = _both(workload, global_batch=2, learning_rates=[0.01, 1.5, 1e30], seeds=[0] * 3)
    for copies in (ours, theirs):
        copies.advance(40)
    _assert_same_evaluation(ours, theirs)
    for copies in (ours, theirs):
        copies.advance(3)
        evaluation = copies.evaluate()
        assert evaluation.diverged.tolist() == [False, True, True]
        assert evaluation.val_loss is not None
        assert np.isnan(evaluation.val_loss).tolist() == [False, True, True]
        assert np.isnan(evaluation.train_loss).tolist() == [False, True, True]
    _assert_same_weights_of_first(ours, theirs)


def _assert_same_weights_of_first(ours: Copies, theirs: Copies) -> None:
    for copies in (ours, theirs):
        copies.keep([True, False, False])
    _assert_same_weights(ours, theirs)


def test_an_explosion_that_stays_finite_counts_from_ten_thousand_times_the_first_loss() -> None:
    # One weight at 1, loss w²/2: each step multiplies the loss by (1 − lr)².
    def one() -> nn.Module:
        model = nn.Linear(1, 1, bias=False)
        nn.init.ones_(model.weight)
        return model

    workload = Workload(
        name="one weight",
        make_model=one,
        train_data=(torch.ones(2, 1),),
        compute_loss=lambda model, batch: (model(batch[0]).square().sum() / 2, len(batch[0])),
    )
    rate = 1 + 10**0.5  # the loss grows tenfold a step: the fifth is 10⁴ times the first
    copies = make_copies(
        workload, global_batch=2, learning_rates=[rate * 0.999, rate * 1.001], seeds=[0, 0]
    )
    assert copies.engine == "compiled"
    copies.advance(5)
    assert copies.evaluate().diverged.tolist() == [False, True]


def test_a_mean_over_many_steps_keeps_its_digits() -> None:
    workload = Workload(
        name="constant",
        make_model=lambda: nn.Linear(1, 1),
        train_data=(torch.ones(100, 1),),
        compute_loss=lambda model, batch: (0 * model(batch[0]).sum() + 0.1, 1),
    )
    copies = make_copies(workload, global_batch=1, learning_rates=[0.1], seeds=[0])
    copies.advance(200_000)
    np.testing.assert_allclose(copies.evaluate().train_loss, np.float32(0.1), rtol=1e-7)
    assert np.isnan(copies.evaluate().train_loss).all()


def test_parameter_groups_frozen_unused_and_double_precision_buffers() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Linear(4, 5), nn.Linear(5, 3)
            self.frozen, self.unused = nn.Linear(4, 5), nn.Linear(2, 2)
            self.frozen.requires_grad_(False)
            self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
            self.register_buffer("hidden", torch.ones(5), persistent=False)

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return self.head((self.body(x) + self.frozen(x) * self.hidden).relu())

    def groups(params: Params, lr: float) -> torch.optim.Optimizer:
        every = list(params)
        return torch.optim.SGD(
            [
                {"params": every[:2]},
                {"params": every[2:], "lr": 0.5 * lr + 0.01, "momentum": 0.5, "weight_decay": 0.1},
            ],
            lr=lr,
        )

    ours, _ = _assert_agree(_workload("mlp", groups, make_model=Mixed, **TRAIN_ONLY))
    assert ours.state_dict(0)["calls"] == 6


def test_a_validation_set_larger_than_one_batch_is_the_loops() -> None:
    _assert_agree(_workload("mlp", val_data=_blobs(1100, 3, 4)))


def test_map_style_datasets_are_collated_once() -> None:
    inputs, targets = _blobs(21, 1, 4)
    items = [{"x": x, "y": int(y)} for x, y in zip(inputs, targets, strict=True)]

    def loss(model: nn.Module, batch: Any) -> tuple[Tensor, int]:
        return F.cross_entropy(model(batch["x"]), batch["y"], reduction="sum"), len(batch["y"])

    changes = {"loss": None, "metric": None, "compute_loss": loss}
    _assert_agree(_workload("mlp", train_data=items, val_data=items[:5], **changes))


@pytest.mark.parametrize("name", catalog.names())
def test_every_catalog_workload_can_be_lowered(name: str) -> None:
    import jax

    from rightbatch.engines.lowering.dtypes import to_jax

    workload = catalog.get(name)
    compiler = compiler_module.compiler_of(workload)
    held = dict(workload.build_model(0).state_dict())
    trained, carried = (
        [to_jax(held[n]) for n in names]
        for names in (compiler.layout.trained, compiler.layout.carried)
    )
    batch = [leaf[:16] for leaf in compiler.data.leaves]
    graph = compiler.program(workload, 16)._full
    loss, gradients, _ = jax.eval_shape(graph, trained, carried, batch)
    assert loss.shape == ()
    assert [g.shape for g in gradients] == [t.shape for t in trained]


class _Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) if x.sum() > 0 else -self.layer(x)


class _Moody(nn.Module):
    """Draws from Python's own random numbers, which tracing does not see."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self._mood = nn.Linear(4, 3), random.Random(0)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) * self._mood.random()


class _Determinant(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) * torch.linalg.det(self.layer.weight @ self.layer.weight.T)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"make_model": lambda: nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.1))}, "random numbers"),
    ({"make_model": _Branching}, "cannot be traced"),
    ({"make_model": _Determinant}, r"no lowering for aten\._linalg_det"),
    ({"make_model": _Moody}, "after 3 steps its training loss is"),
    ({"make_model": lambda: nn.Linear(4, 3).double()}, "float64"),
    ({"make_optimizer": lambda p, lr: torch.optim.RMSprop(p, lr=lr)}, "the optimizer RMSprop"),
    (
        {"make_optimizer": lambda p, lr: torch.optim.SGD(p, lr=lr, momentum=lr)},
        "settings change with the learning rate",
    ),
    ({"metric": lambda outputs, targets: 0.5}, "metric returns a Python number"),
]


@pytest.mark.parametrize(("changes", "reason"), REFUSED)
def test_what_cannot_be_compiled_runs_in_the_loop_and_says_why(
    changes: dict[str, Any], reason: str
) -> None:
    if reason.startswith("float64"):
        inputs, targets = _blobs(21, 1, 4)
        changes = {**changes, "train_data": (inputs.double(), targets), "val_data": None}
        changes["metric"] = None
    workload = _workload("mlp", **changes)
    arguments: dict[str, Any] = {"global_batch": 8, "learning_rates": [0.1, 0.2], "seeds": [0, 1]}
    copies = make_copies(workload, **arguments)
    assert copies.engine == "loop"
    assert re.search(reason, copies.reason)
    with pytest.raises(UsageError, match=reason):
        make_copies(workload, engine="compiled", **arguments)
    copies.advance(2)
    assert np.isfinite(copies.evaluate().train_loss).all()


def test_a_hook_on_the_optimizer_is_refused() -> None:
    def hooked(params: Params, lr: float) -> torch.optim.Optimizer:
        optimizer = torch.optim.SGD(params, lr=lr)
        optimizer.register_step_post_hook(lambda *_: None)
        return optimizer

    copies = make_copies(_workload("mlp", hooked), global_batch=8, learning_rates=[0.1], seeds=[0])
    assert "scheduler or a hook" in copies.reason


def test_batches_that_are_not_rows_are_refused() -> None:
    def padded(items: list[Any]) -> tuple[Tensor, Tensor]:
        xs = nn.utils.rnn.pad_sequence([x for x, _ in items], batch_first=True)
        return xs.mean(dim=1, keepdim=True), torch.tensor([y for _, y in items])

    items = [(torch.ones(1 + i % 3), i % 3) for i in range(21)]
    workload = _workload(
        "mlp", train_data=items, collate=padded, make_model=lambda: nn.Linear(1, 3), val_data=None,
        metric=None,
    )  # fmt: skip
    copies = make_copies(workload, global_batch=8, learning_rates=[0.1], seeds=[0])
    assert "not rows of fixed tensors" in copies.reason


def test_data_too_large_for_the_device_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from rightbatch.engines import whole_set

    monkeypatch.setattr(whole_set, "MAX_SET_BYTES", 100)
    copies = make_copies(_workload("mlp"), global_batch=8, learning_rates=[0.1], seeds=[0])
    assert "MiB on the device" in copies.reason


def test_without_jax_the_loop_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(make_module, "find_spec", lambda name: None)
    arguments: dict[str, Any] = {"global_batch": 8, "learning_rates": [0.1], "seeds": [0]}
    copies = make_copies(_workload("mlp"), **arguments)
    assert copies.engine == "loop"
    assert "JAX is not installed" in copies.reason
    with pytest.raises(MissingExtraError, match=r"rightbatch\[fast\]"):
        make_copies(_workload("mlp"), engine="compiled", **arguments)


def test_wrong_arguments_are_told() -> None:
    workload = _workload("mlp")
    with pytest.raises(UsageError, match="2 learning rates and 1 seeds"):
        make_copies(workload, global_batch=8, learning_rates=[0.1, 0.2], seeds=[0])
    with pytest.raises(RecipeError, match="global_batch is 0"):
        make_copies(workload, global_batch=0, learning_rates=[0.1], seeds=[0])
    with pytest.raises(UsageError, match="engine is 'fast'"):
        make_copies(workload, global_batch=8, learning_rates=[0.1], seeds=[0], engine="fast")  # pyright: ignore[reportArgumentType]


def test_the_callers_random_state_and_settings_are_left_alone() -> None:
    import jax

    torch.manual_seed(5)
    state, fast_path = torch.random.get_rng_state(), torch.backends.mha.get_fastpath_enabled()
    grad, wide = torch.is_grad_enabled(), jax.config.jax_enable_x64  # pyright: ignore[reportAttributeAccessIssue]
    copies = make_copies(_workload("mlp"), global_batch=8, learning_rates=[0.1], seeds=[0])
    copies.advance(3)
    copies.evaluate()
    assert torch.equal(state, torch.random.get_rng_state())
    assert torch.backends.mha.get_fastpath_enabled() == fast_path
    assert torch.is_grad_enabled() == grad
    assert jax.config.jax_enable_x64 == wide  # pyright: ignore[reportAttributeAccessIssue]


def test_what_was_compiled_is_freed_with_its_workload() -> None:
    workload = _workload("mlp")
    copies = make_copies(workload, global_batch=8, learning_rates=[0.1], seeds=[0])
    before = len(compiler_module._compilers)
    del workload, copies
    gc.collect()
    assert len(compiler_module._compilers) < before
