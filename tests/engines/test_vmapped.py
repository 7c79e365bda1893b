"""The vmapped engine does what the plain loop does, or says why it cannot."""

from __future__ import annotations

import dataclasses
import gc
import random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.engines.small import (
    OPTIMIZERS,
    OPTIONS,
    RATES,
    SEEDS,
    TRAIN_ONLY,
    assert_same_evaluation,
    assert_same_weights,
    blobs,
    make_workload,
)
from torch import Tensor, nn
from torch.nn import functional as F

from rightbatch import Workload, catalog
from rightbatch.engines import Copies, make_copies, stack, stacker, vmapped
from rightbatch.engines import make as make_module
from rightbatch.engines.optimizer_plan import read_optimizer
from rightbatch.engines.stacked_update import StackedOptimizer
from rightbatch.errors import UsageError


def _both(workload: Workload, global_batch: int = 8, **options: Any) -> tuple[Copies, Copies]:
    arguments = {"learning_rates": RATES, "seeds": SEEDS, **options}
    ours = make_copies(workload, global_batch=global_batch, engine="vmapped", **arguments)
    loop = make_copies(workload, global_batch=global_batch, engine="loop", **arguments)
    return ours, loop


def _assert_agree(workload: Workload, num_steps: int = 6, **options: Any) -> None:
    ours, loop = _both(workload, **options)
    assert ours.engine == "vmapped"
    for copies in (ours, loop):
        copies.advance(num_steps)
    assert_same_evaluation(ours, loop)
    assert_same_weights(ours, loop)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("model", ["mlp", "cnn", "gpt"])
def test_weights_and_losses_are_the_loops(model: str, optimizer: str) -> None:
    _assert_agree(make_workload(model, OPTIMIZERS[optimizer]))


@pytest.mark.parametrize("options", OPTIONS)
def test_every_optimizer_option_is_the_loops(options: str) -> None:
    _assert_agree(make_workload("mlp", OPTIONS[options]))


@pytest.mark.parametrize("global_batch", [1, 7, 21, 100])
def test_every_batch_size_is_the_loops(global_batch: int) -> None:
    _assert_agree(make_workload("mlp"), global_batch=global_batch)


@pytest.mark.parametrize("name", catalog.names())
def test_the_catalog_is_the_loops(name: str) -> None:
    pairs = {"global_batch": 4, "learning_rates": [0.01, 0.02], "seeds": [0, 1]}
    # Adam turns gradients that are rounding noise into full steps: weights by plain SGD.
    _assert_agree(
        dataclasses.replace(catalog.get(name), make_optimizer=OPTIMIZERS["sgd"]), 2, **pairs
    )
    ours, loop = _both(catalog.get(name), **pairs)
    for copies in (ours, loop):
        copies.advance(2)
    assert_same_evaluation(ours, loop)


@settings(max_examples=30, deadline=None)
@given(
    kind=st.sampled_from(["sgd", "adam", "adamw"]),
    momentum=st.sampled_from([0.0, 0.5, 0.9]),
    dampening=st.sampled_from([0.0, 0.3]),
    nesterov=st.booleans(),
    decay=st.sampled_from([0.0, 0.01, 0.3]),
    maximize=st.booleans(),
    amsgrad=st.booleans(),
    gradients=st.lists(st.floats(-2, 2, width=32), min_size=1, max_size=5),
)
def test_an_update_is_the_optimizers_own(
    kind: str,
    momentum: float,
    dampening: float,
    nesterov: bool,
    decay: float,
    maximize: bool,
    amsgrad: bool,
    gradients: list[float],
) -> None:
    nesterov = nesterov and momentum > 0 and dampening == 0

    def make(params: Any, lr: float) -> torch.optim.Optimizer:
        if kind == "sgd":
            return torch.optim.SGD(
                params, lr=lr, momentum=momentum, dampening=dampening, nesterov=nesterov,
                weight_decay=decay, maximize=maximize,
            )  # fmt: skip
        rule = torch.optim.Adam if kind == "adam" else torch.optim.AdamW
        return rule(
            params, lr=lr, betas=(momentum, 0.99), weight_decay=decay, maximize=maximize,
            amsgrad=amsgrad,
        )  # fmt: skip

    workload = make_workload("mlp", make)
    rates = np.array([0.1, 0.01])
    names = ["0.weight"]
    start = torch.tensor([[0.5, -1.5], [0.25, 2.0]])
    held = [start.clone()]
    plan = read_optimizer(workload, workload.build_model(0), names, rates)
    ours = StackedOptimizer(plan, held, [0, 1])
    for gradient in gradients:
        ours.step([torch.full((2, 2), gradient) * torch.tensor([1.0, -0.5])])
    for copy, rate in enumerate(rates):
        theirs = nn.Parameter(start[copy].clone())
        optimizer = make([theirs], float(rate))
        for gradient in gradients:
            theirs.grad = torch.full((2,), gradient) * torch.tensor([1.0, -0.5])
            optimizer.step()
        torch.testing.assert_close(held[0][copy], theirs.detach(), rtol=2e-5, atol=2e-6)


def test_chunks_of_copies_are_the_loops(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vmapped, "MAX_CHUNK_BYTES", 1)
    workload = make_workload("cnn", OPTIMIZERS["momentum"])
    _assert_agree(workload)
    copies = make_copies(
        workload, global_batch=8, learning_rates=RATES, seeds=SEEDS, engine="vmapped"
    )
    assert [part.num_copies for part in copies._stacks] == [1, 1, 1]  # pyright: ignore[reportAttributeAccessIssue]


def test_reading_losses_in_pieces_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vmapped, "_STEPS_TOGETHER", 2)
    _assert_agree(make_workload("mlp"), 7)


def test_a_validation_set_of_several_batches_is_the_loops() -> None:
    _assert_agree(make_workload("mlp", val_data=blobs(1100, 3, 4)))


def test_a_metric_may_return_a_python_number() -> None:
    def share_of_first(outputs: Tensor, targets: Tensor) -> float:
        return float((outputs.argmax(1) == targets).float().mean().item())

    _assert_agree(make_workload("mlp", metric=share_of_first))


def test_losses_over_sequences_weigh_by_the_tokens_that_count() -> None:
    def sequences(count: int, seed: int) -> tuple[Tensor, Tensor]:
        inputs, _ = blobs(count, seed, 5, 4)
        generator = torch.Generator().manual_seed(seed)
        targets = torch.randint(0, 3, (count, 5), generator=generator)
        return inputs, targets.masked_fill(torch.rand(count, 5, generator=generator) < 0.4, -100)

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs.flatten(0, 1), targets.flatten())

    _assert_agree(
        make_workload(
            "mlp", loss=loss, metric=None, train_data=sequences(21, 1), val_data=sequences(700, 2)
        )
    )


class _Determinant(nn.Module):
    """An operation that the compiled engine lacks."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) * torch.linalg.det(self.layer.weight @ self.layer.weight.T)


MANY: dict[str, Any] = {
    "global_batch": 8,
    "learning_rates": [0.01, 0.02, 0.03, 0.04],
    "seeds": [0, 0, 1, 1],
}


def test_what_cannot_be_compiled_is_mapped_and_the_operation_is_named() -> None:
    pytest.importorskip("jax")
    copies = make_copies(make_workload("mlp", make_model=_Determinant), **MANY)
    assert copies.engine == "vmapped"
    assert "no lowering for aten._linalg_det" in copies.reason
    assert "so the copies are mapped" in copies.reason


def test_without_jax_copies_are_mapped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(make_module, "find_spec", lambda name: None)
    copies = make_copies(make_workload("mlp"), **MANY)
    assert copies.engine == "vmapped"
    assert "JAX is not installed" in copies.reason


def test_trainings_too_short_to_compile_are_mapped() -> None:
    copies = make_copies(make_workload("mlp"), **MANY, worth_compiling=False)
    assert copies.engine == "vmapped"
    assert "before a compiler would be" in copies.reason


def test_few_copies_and_large_passes_are_left_to_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(make_module, "find_spec", lambda name: None)
    few = {**MANY, "learning_rates": [0.1], "seeds": [0]}
    copies = make_copies(make_workload("mlp"), **few)
    assert copies.engine == "loop"
    assert "fewer than 4 copies" in copies.reason
    monkeypatch.setattr(vmapped, "SMALL_PASS_BYTES", 1)
    copies = make_copies(make_workload("mlp"), **MANY)
    assert copies.engine == "loop"
    assert "a pass of one copy takes" in copies.reason


class _Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) if x.sum() > 0 else -self.layer(x)


class _Moody(nn.Module):
    """Draws from Python's own random numbers, which no trace sees."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self._mood = nn.Linear(4, 3), random.Random(0)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) * self._mood.random()


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"make_model": lambda: nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.1))}, "random numbers"),
    ({"make_model": _Branching}, "cannot be mapped over copies"),
    ({"make_model": _Moody}, "after 3 steps its training loss is"),
    ({"make_optimizer": lambda p, lr: torch.optim.RMSprop(p, lr=lr)}, "the optimizer RMSprop"),
]


@pytest.mark.parametrize(("changes", "reason"), REFUSED)
def test_what_cannot_be_mapped_runs_in_the_loop_and_says_why(
    changes: dict[str, Any], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    workload = make_workload("mlp", **changes)
    with pytest.raises(UsageError, match=f"vmapped engine cannot run .*{reason}"):
        make_copies(workload, engine="vmapped", **MANY)
    monkeypatch.setattr(make_module, "find_spec", lambda name: None)
    copies = make_copies(workload, **MANY)
    assert copies.engine == "loop"
    assert reason in copies.reason


def test_what_was_stacked_is_freed_with_its_workload() -> None:
    workload = make_workload("mlp")
    copies = make_copies(workload, engine="vmapped", **MANY)
    copies.evaluate()
    before = len(stacker._stackers)
    del workload, copies
    gc.collect()
    assert len(stacker._stackers) < before


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("captured", [True, False])
def test_on_a_gpu_it_is_the_loop_of_the_cpu(
    captured: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    used = []
    capture = stack._captured

    def watched(step: Any, rows: Any, state: Any) -> Any:
        made = capture(step, rows, state) if captured else step
        used.append(made is not step)
        return made

    monkeypatch.setattr(stack, "_captured", watched)
    workload = make_workload("mlp", OPTIMIZERS["adamw"], **TRAIN_ONLY)
    loop = make_copies(workload, global_batch=8, learning_rates=RATES, seeds=SEEDS, engine="loop")
    ours = vmapped.VmappedCopies(
        workload, global_batch=8, learning_rates=np.array(RATES), seeds=np.array(SEEDS),
        reason="", device="cuda",
    )  # fmt: skip
    for copies in (ours, loop):
        copies.advance(6)
    assert all(used) == captured
    for copy in range(3):
        for name, their in loop.state_dict(copy).items():
            torch.testing.assert_close(
                ours.state_dict(copy)[name].cpu(), their, rtol=1e-3, atol=1e-4
            )
