"""Ghost batch normalisation equals plain BatchNorm, group after group."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from rightbatch.errors import UsageError
from rightbatch.training.ghost_norm import group_sizes, use_ghost_norm
from rightbatch.training.step import compute_gradients
from rightbatch.workload import Workload

SHAPES = {"1d": (3,), "1d long": (3, 5), "2d": (3, 2, 4), "3d": (3, 2, 2, 2)}
KINDS = {1: nn.BatchNorm1d, 2: nn.BatchNorm1d, 3: nn.BatchNorm2d, 4: nn.BatchNorm3d}
OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "affine=False": {"affine": False},
    "no bias": {"bias": False},
    "no running statistics": {"track_running_stats": False},
    "momentum=None": {"momentum": None},
    "momentum=0.7": {"momentum": 0.7},
    "momentum=1": {"momentum": 1.0},
}


def draw(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def make_norm(shape: tuple[int, ...], **options: Any) -> nn.Module:
    """A layer in the middle of a training: nothing in it is 0 or 1."""
    norm = KINDS[len(shape)](shape[0], dtype=torch.float64, **options)
    for seed, parameter in enumerate(norm.parameters()):
        parameter.data = draw(parameter.shape, seed)
    norm(3 + 2 * draw((6, *shape), 9))
    return norm


def passed(norm: nn.Module, groups: list[Tensor]) -> dict[str, Tensor]:
    """Outputs, gradients and buffers after the groups went through, one after the other."""
    for group in groups:
        group.requires_grad_()
    outputs = torch.cat([norm(group) for group in groups])
    (outputs * draw(tuple(outputs.shape), 5)).sum().backward()
    return {
        "outputs": outputs.detach(),
        "inputs' gradient": torch.cat([g.grad for g in groups if g.grad is not None]),
        **{
            f"{name}'s gradient": p.grad
            for name, p in norm.named_parameters()
            if p.grad is not None
        },
        **dict(norm.named_buffers()),
    }


def same(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in actual.items():
        torch.testing.assert_close(
            tensor,
            expected[name],
            rtol=tolerance,
            atol=tolerance,
            msg=lambda m, n=name: f"{n}: {m}",
        )


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize(("num", "ghost"), [(12, 4), (14, 4), (13, 4), (5, 4), (3, 2)])
def test_equals_a_loop_over_the_groups(
    num: int, ghost: int, shape: tuple[int, ...], options: dict[str, Any]
) -> None:
    norm = make_norm(shape, **options)
    inputs = 1 + 3 * draw((num, *shape), 3)
    expected = passed(copy.deepcopy(norm), [*inputs.clone().split(group_sizes(num, ghost))])
    same(passed(use_ghost_norm(norm, ghost), [inputs]), expected, 1e-12)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("ghost", [8, 1000])
def test_a_group_as_large_as_the_batch_is_plain_batch_norm(
    ghost: int, shape: tuple[int, ...], options: dict[str, Any]
) -> None:
    norm = make_norm(shape, **options)
    inputs = draw((8, *shape), 3)
    expected = passed(copy.deepcopy(norm), [inputs.clone()])
    same(passed(use_ghost_norm(norm, ghost), [inputs]), expected, 0.0)


@given(st.integers(1, 10_000), st.integers(2, 300))
@settings(deadline=None)
def test_groups_add_up_and_none_has_one_example(num: int, ghost: int) -> None:
    sizes = group_sizes(num, ghost)
    assert sum(sizes) == num
    assert num == 1 or min(sizes) >= 2
    assert max(sizes) <= max(ghost, 3)
    assert all(size == ghost for size in sizes[:-2])


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_evaluation_is_as_always(options: dict[str, Any]) -> None:
    norm = make_norm((3,), **options).eval()
    inputs = draw((12, 3), 3)
    expected = passed(copy.deepcopy(norm), [inputs.clone()])
    same(passed(use_ghost_norm(norm, 4), [inputs]), expected, 0.0)


def make_network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(),
        nn.Linear(36, 5), nn.BatchNorm1d(5), nn.Linear(5, 3),
    ).double()  # fmt: skip


def make_workload(ghost: int | None) -> Workload:
    return Workload(
        name="toy",
        make_model=lambda: (
            make_network() if ghost is None else use_ghost_norm(make_network(), ghost)
        ),
        train_data=(draw((256, 1, 5, 5)), torch.arange(256) % 3),
        loss=F.cross_entropy,
    )


def gradient(workload: Workload, micro_batch: int) -> tuple[Tensor, dict[str, Any]]:
    model = workload.build_model(0)
    window = [workload.train_examples.batch(i) for i in torch.arange(256).split(micro_batch)]
    compute_gradients(workload, model, window, autocast=None)
    flat = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    return flat, model.state_dict()


@pytest.mark.parametrize("ghost", [64, 32])
def test_four_times_64_is_256(ghost: int) -> None:
    (parts, after_parts), (whole, after) = (gradient(make_workload(ghost), m) for m in (64, 256))
    torch.testing.assert_close(parts, whole, rtol=1e-10, atol=1e-12)
    same(after_parts, after, 1e-12)
    plain_parts, plain_whole = (gradient(make_workload(None), m)[0] for m in (64, 256))
    assert (plain_parts - plain_whole).norm() / plain_whole.norm() > 1e-3


def test_nothing_but_the_class_of_the_layers_changes() -> None:
    plain = make_network()
    model = copy.deepcopy(plain)
    tensors = {id(t) for t in [*model.parameters(), *model.buffers()]}
    seen: list[int] = []
    model[1].register_forward_hook(lambda *_: seen.append(1))
    assert use_ghost_norm(model, 4) is model
    assert {id(t) for t in [*model.parameters(), *model.buffers()]} == tensors
    model(draw((8, 1, 5, 5)))
    assert seen == [1]
    plain.load_state_dict(model.state_dict())
    inputs = draw((6, 1, 5, 5), 2)
    assert torch.equal(plain.eval()(inputs), model.eval()(inputs))


def test_a_copy_and_a_pickle_are_ghosts_too() -> None:
    model = use_ghost_norm(make_network(), 4)
    inputs = draw((8, 1, 5, 5))
    expected = copy.deepcopy(model)(inputs)
    assert torch.equal(pickle.loads(pickle.dumps(model))(inputs), expected)


def test_a_second_call_sets_another_size() -> None:
    model = use_ghost_norm(use_ghost_norm(make_network(), 4), 8)
    assert "ghost_batch=8" in repr(model)
    assert "ghost_batch=4" not in repr(model)


def test_the_model_may_be_the_layer_itself() -> None:
    norm = use_ghost_norm(nn.BatchNorm1d(3), 2)
    assert norm(torch.randn(4, 3)).shape == (4, 3)
    assert norm.num_batches_tracked == 2


def test_a_model_without_batch_norm_is_returned_unchanged() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.GroupNorm(1, 3), nn.InstanceNorm1d(3))
    before = repr(model)
    assert use_ghost_norm(model, 4) is model
    assert repr(model) == before


class OwnNorm(nn.BatchNorm1d):
    """A subclass may do anything in its forward pass."""


@pytest.mark.parametrize("layer", [nn.SyncBatchNorm(3), nn.LazyBatchNorm1d(), OwnNorm(3)])
def test_another_kind_is_refused_and_nothing_is_changed(layer: nn.Module) -> None:
    model = nn.Sequential(nn.BatchNorm1d(3), layer)
    with pytest.raises(UsageError, match=rf"Layer '1' is a {type(layer).__name__}, .* Use BatchN"):
        use_ghost_norm(model, 4)
    assert type(model[0]) is nn.BatchNorm1d


@pytest.mark.parametrize("ghost", [1, 0, -3])
def test_a_group_needs_two_examples(ghost: int) -> None:
    with pytest.raises(UsageError, match=f"ghost_batch is {ghost}; it must be at least 2"):
        use_ghost_norm(make_network(), ghost)


def test_the_wrong_number_of_dimensions_is_told_as_always() -> None:
    with pytest.raises(ValueError, match="expected 4D input"):
        use_ghost_norm(nn.BatchNorm2d(3), 2)(torch.randn(8, 3))


def test_bfloat16_inputs_keep_statistics_in_full_precision() -> None:
    norm = use_ghost_norm(nn.BatchNorm2d(3), 4)
    inputs = torch.randn(12, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    outputs = norm(inputs.bfloat16())
    assert outputs.dtype == torch.bfloat16
    assert norm.running_mean is not None
    expected = use_ghost_norm(nn.BatchNorm2d(3), 4)(inputs)
    torch.testing.assert_close(outputs.float(), expected, rtol=2e-2, atol=2e-2)
