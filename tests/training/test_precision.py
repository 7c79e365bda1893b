"""Precision: what is computed in it, what is kept in full, and the flags of the process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rightbatch import Recipe, Workload, catalog
from rightbatch.recipe import Precision
from rightbatch.training import Training
from rightbatch.training.arithmetic import autocast_dtype, make_scaler, tensor_float_32

PRECISIONS: list[Precision] = ["float32", "bfloat16", "float16"]


def weights(training: Training) -> Tensor:
    return nn.utils.parameters_to_vector(training.model.parameters()).detach()


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_forward_pass_is_in_it_and_the_weights_are_not(precision: Precision) -> None:
    seen: list[torch.dtype] = []

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        seen.append(outputs.dtype)
        return F.cross_entropy(outputs, targets)

    x = torch.randn(40, 4)
    workload = Workload(
        name="toy", make_model=lambda: nn.Linear(4, 2), train_data=(x, (x[:, 0] > 0).long()),
        loss=loss,
    )  # fmt: skip
    training = Training(
        workload, Recipe(global_batch=20, micro_batch=10, learning_rate=0.1, precision=precision)
    )
    training.advance(4)
    assert set(seen) == {autocast_dtype(precision) or torch.float32}
    for parameter in training.model.parameters():
        assert parameter.dtype == torch.float32
        assert parameter.grad is not None
        assert parameter.grad.dtype == torch.float32
    assert (training.scaler is not None) == (precision == "float16")


@pytest.mark.parametrize("precision", PRECISIONS)
def test_4_times_64_trains_as_256_on_digits(precision: Precision) -> None:
    """Twenty updates apart by rounding alone; a lower precision is near the full one."""
    tolerance = {"float32": 1e-5, "bfloat16": 2e-2, "float16": 5e-3}[precision]
    start = weights(Training(catalog.get("digits"), Recipe(global_batch=1, learning_rate=0.1)))

    def moved(micro_batch: int, precision: Precision = precision) -> Tensor:
        recipe = Recipe(
            global_batch=256, micro_batch=micro_batch, learning_rate=0.1, precision=precision
        )
        training = Training(catalog.get("digits"), recipe)
        training.advance(20)
        return weights(training) - start

    cut, whole = moved(64), moved(256)
    assert (cut - whole).norm() <= tolerance * whole.norm()
    exact = moved(256, "float32")
    assert (cut - exact).norm() <= 2e-2 * exact.norm()


def test_half_precision_trains_from_the_first_update() -> None:
    recipe = Recipe(global_batch=256, micro_batch=64, learning_rate=0.1, precision="float16")
    training = Training(catalog.get("digits"), recipe)
    before = weights(training)
    training.advance(1)
    assert not torch.equal(weights(training), before), "the first update was left out"
    training.advance(40)
    assert training.scaler is not None
    assert training.scaler.get_scale() == 65536


def test_a_fork_in_half_precision_has_a_scaler_of_its_own() -> None:
    recipe = Recipe(global_batch=256, learning_rate=0.1, precision="float16")
    training = Training(catalog.get("digits"), recipe)
    training.advance(2)
    fork = training.fork(recipe)
    assert fork.scaler is not None
    assert fork.scaler is not training.scaler
    assert training.fork(recipe.replace(precision="float32")).scaler is None


def test_the_noise_is_measured_in_half_precision() -> None:
    """After unscaling: of the size it has in full precision."""
    scales: list[float] = []
    for precision in ("float32", "float16"):
        recipe = Recipe(
            global_batch=256, micro_batch=64, learning_rate=1e-4, precision=precision,
            batch_policy="follow-noise",
        )  # fmt: skip
        training = Training(catalog.get("digits"), recipe)
        training.advance(40)
        assert training.noise is not None
        assert training.noise.running_moments is not None
        scales += training.noise.running_moments
    assert scales[2:] == pytest.approx(scales[:2], rel=0.05)


# ----------------------------------------------------------------------------------- TensorFloat-32


def flags() -> list[Any]:
    cudnn: Any = torch.backends.cudnn
    backends = (torch.backends.cuda.matmul, cudnn.conv, cudnn.rnn)
    return [backend.fp32_precision for backend in backends]


@pytest.mark.parametrize("allowed", [True, False])
@pytest.mark.parametrize("outside", ["as it was", "older high", "newer tf32", "newer ieee"])
def test_the_flags_are_the_recipes_inside_and_the_processs_outside(
    allowed: bool, outside: str
) -> None:
    whole = flags()
    older = torch.get_float32_matmul_precision()
    cudnn: Any = torch.backends.cudnn
    try:
        if outside == "older high":
            torch.set_float32_matmul_precision("high")
        elif outside.startswith("newer"):
            torch.backends.cuda.matmul.fp32_precision = outside.split()[1]
            cudnn.conv.fp32_precision = outside.split()[1]
        before = flags()
        with tensor_float_32(allowed, "cuda"):
            assert [flag == "tf32" for flag in flags()] == [allowed] * 3
            # What compiles asks the older way, which refuses where the two disagree.
            assert torch.get_float32_matmul_precision() == ("high" if allowed else "highest")
            assert torch.backends.cudnn.allow_tf32 is allowed
        assert flags() == before
    finally:
        torch.set_float32_matmul_precision(older)
        backends = (torch.backends.cuda.matmul, cudnn.conv, cudnn.rnn)
        for backend, precision in zip(backends, whole, strict=True):
            backend.fp32_precision = precision


def test_on_the_cpu_no_flag_is_touched() -> None:
    before = flags()
    with tensor_float_32(True, "cpu"):
        assert flags() == before


def test_only_half_precision_needs_a_scaler() -> None:
    assert make_scaler("float32", "cpu") is make_scaler("bfloat16", "cpu") is None
    assert make_scaler("float16", "cpu") is not None
