"""The model as a recipe prepares it: recomputed activations, compiled, and its smallest pass."""

from __future__ import annotations

import copy
import pickle
import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rightbatch import Recipe, Workload
from rightbatch.errors import RecipeError
from rightbatch.training import Training
from rightbatch.training.activations import (
    checkpoint_activations,
    keep_activations,
    segments_of,
)
from rightbatch.training.step import compute_gradients

X = torch.randn(105, 6, generator=torch.Generator().manual_seed(0))
Y = (X[:, 0] > 0).long()


class Block(nn.Module):
    """With all that recomputing can get wrong: buffers, dropout, a keyword, two inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(6, 6), nn.BatchNorm1d(6)
        self.dropout = nn.Dropout(0.4)

    def forward(self, x: Tensor, *, scale: float = 1.0) -> Tensor:
        return x + scale * self.dropout(self.norm(self.linear(x)).relu())


class Listed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers, self.last = nn.ModuleList(Block() for _ in range(3)), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x, scale=0.5)
        return self.last(x)


class Children(nn.Module):
    """Neither Sequential nor ModuleList: its own children are the blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.last = Block(), Block(), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.two(self.one(x), scale=2.0))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "blocks": lambda: nn.Sequential(Block(), Block(), nn.Linear(6, 2)),
    "chain": lambda: nn.Sequential(
        nn.Linear(6, 8), nn.BatchNorm1d(8), nn.SiLU(inplace=True), nn.Dropout(0.3),
        nn.Linear(8, 8), nn.ELU(inplace=True), nn.Linear(8, 8), nn.Dropout(0.2, inplace=True),
        nn.Linear(8, 2),
    ),
    "nested": lambda: nn.Sequential(nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6)),
                                    nn.Dropout(0.3), nn.Linear(6, 2)),
    "list": Listed,
    "children": Children,
}  # fmt: skip
each_model = pytest.mark.parametrize("make_model", MODELS.values(), ids=MODELS.keys())


def make(make_model: Callable[[], nn.Module] = MODELS["chain"], **changes: Any) -> Workload:
    given: dict[str, Any] = {
        "name": "toy", "make_model": make_model, "train_data": (X, Y), "loss": F.cross_entropy
    }  # fmt: skip
    return Workload(**{**given, **changes})


def recipe(**changes: Any) -> Recipe:
    return Recipe(**{"global_batch": 20, "micro_batch": 10, "learning_rate": 0.1, **changes})


def same_state(one: nn.Module, other: nn.Module, tolerance: float = 0.0) -> None:
    assert list(one.state_dict()) == list(other.state_dict())
    for name, tensor in one.state_dict().items():
        torch.testing.assert_close(tensor, other.state_dict()[name], rtol=tolerance, atol=tolerance)


# ------------------------------------------------------------------------- recomputed activations


@each_model
def test_recomputing_changes_no_bit(make_model: Callable[[], nn.Module]) -> None:
    """Weights after many updates: the same dropout masks; running statistics updated once."""
    plain = Training(make(make_model), recipe())
    recomputing = Training(make(make_model), recipe(activation_checkpointing=True))
    for training in (plain, recomputing):
        training.advance(13)
    same_state(recomputing.model, plain.model)


def check_that_running_statistics_are_updated_once() -> None:
    training = Training(make(MODELS["blocks"]), recipe(activation_checkpointing=True))
    training.advance(5)
    norms = [m for m in training.model.modules() if isinstance(m, nn.BatchNorm1d)]
    assert [int(norm.num_batches_tracked or 0) for norm in norms] == [10, 10]


def test_running_statistics_are_updated_once() -> None:
    check_that_running_statistics_are_updated_once()


@each_model
def test_forks_copies_and_pickles_recompute_too(make_model: Callable[[], nn.Module]) -> None:
    plain = Training(make(make_model), recipe())
    training = Training(make(make_model), recipe(activation_checkpointing=True))
    for each in (plain, training):
        each.advance(3)
    fork = training.fork(training.recipe)
    kept = training.fork(recipe())
    fork.advance(4)
    kept.advance(4)
    plain.advance(4)
    same_state(fork.model, plain.model)
    same_state(kept.model, plain.model)
    for model in (copy.deepcopy(fork.model), pickle.loads(pickle.dumps(fork.model))):
        same_state(model, fork.model)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(1.0)
            # It runs its own weights, not those of the one it was copied from.
            assert not torch.equal(model.eval()(X[:4]), fork.model.eval()(X[:4]))
        assert forward_passes(model.train()) == 2
    fork.model.train()
    assert forward_passes(kept.model.train()) == 1
    assert forward_passes(training.fork(training.recipe).model) == 2
    assert forward_passes(plain.fork(training.recipe).model) == 2


def forward_passes(model: nn.Module) -> int:
    """How often the first linear layer runs for one backward pass."""
    calls: list[int] = []
    layer = next(module for module in model.modules() if isinstance(module, nn.Linear))
    handle = layer.register_forward_hook(lambda *_: calls.append(1))
    model(X[:8]).sum().backward()
    handle.remove()
    return len(calls)


def test_less_is_kept_for_the_backward_pass() -> None:
    """Of 36 layers, those of about 6 at a time, and 6 inputs."""

    def deep() -> nn.Module:
        return nn.Sequential(*(nn.Sequential(nn.Linear(6, 6), nn.GELU())[i % 2] for i in range(36)))

    def kept(model: nn.Module) -> int:
        held: set[int] = set()

        def pack(tensor: Tensor) -> Tensor:
            if tensor.shape[0] == 500:
                held.add(tensor.data_ptr())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            output = model(torch.randn(500, 6))
        output.sum().backward()
        return len(held)

    model = deep()
    everything = kept(model)
    checkpoint_activations(model)
    assert everything >= 36
    assert kept(model) <= 6


def test_segments_do_not_begin_with_what_changes_its_input() -> None:
    layers = nn.Sequential(*(nn.ReLU(inplace=index in (2, 4, 5)) for index in range(9)))
    cuts = segments_of(layers)
    assert [first for first, _ in cuts] == [0, 3, 6]
    layers = nn.Sequential(*(nn.ReLU(inplace=index in (3, 4)) for index in range(9)))
    assert segments_of(layers) == [(0, 5), (5, 8), (8, 9)]


def test_undone_it_is_the_model_as_it_was() -> None:
    def shouting(input: Tensor) -> Tensor:
        return 2 * input

    block: Any = Block()
    block.forward = shouting
    model = nn.Sequential(block, nn.Sequential(nn.Linear(6, 2)))
    checkpoint_activations(model)
    assert torch.equal(model[0](X), 2 * X)
    keep_activations(model)
    assert model[0].forward is shouting
    assert "forward" not in model[1].__dict__


def test_evaluation_recomputes_nothing() -> None:
    workload = make(MODELS["blocks"], val_data=(X[:30], Y[:30]))
    plain = Training(workload, recipe())
    recomputing = Training(workload, recipe(activation_checkpointing=True))
    for training in (plain, recomputing):
        training.advance(4)
    assert plain.evaluate() == recomputing.evaluate()


def test_under_autocast_and_ghost_norm_too() -> None:
    changes: dict[str, Any] = {"precision": "bfloat16", "ghost_batch": 4}
    plain = Training(make(), recipe(**changes))
    recomputing = Training(make(), recipe(**changes, activation_checkpointing=True))
    for training in (plain, recomputing):
        training.advance(9)
    same_state(recomputing.model, plain.model)


def test_a_fork_cannot_leave_ghost_norm() -> None:
    training = Training(make(), recipe(ghost_batch=5))
    with pytest.raises(RecipeError, match=r"ghost_batch 5, and a fork's recipe None\. Give it one"):
        training.fork(recipe())
    assert "ghost_batch=10" in repr(training.fork(recipe(ghost_batch=10)).model)


# --------------------------------------------------------------------------------------- compiled


class Counting:
    """A backend that counts how often it is called, and compiles nothing."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, graph: Any, inputs: list[Tensor]) -> Any:
        self.calls += 1
        return graph.forward


def plain_chain() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 2))


def compiled(backend: Any, **changes: Any) -> Recipe:
    return recipe(compile=backend, **changes)


def test_no_batch_is_compiled_anew() -> None:
    """Twelve sizes of micro-batches: once for slices of rows, once for rows, once for a single."""
    backend = Counting()
    ramp = tuple((100 + 200 * index, batch) for index, batch in enumerate((33, 64, 7, 50, 12, 2)))
    training = Training(make(plain_chain), compiled(backend, micro_batch=20, batch_ramp=ramp))
    plain = Training(make(plain_chain), recipe(micro_batch=20, batch_ramp=ramp))
    for each in (training, plain):
        each.advance(120)
    assert backend.calls <= 3
    same_state(training.model, plain.model, tolerance=1e-6)


def test_every_training_of_a_process_is_compiled() -> None:
    """Torch's limit of 8 is for one model; more trainings than that are usual in a race."""
    backend = Counting()
    for _ in range(10):
        Training(make(plain_chain), compiled(backend)).advance(2)
    assert backend.calls == 10


def test_what_recomputes_is_right_when_compiled_too() -> None:
    """Torch 2.13 draws other dropout masks in a compiled second pass."""

    def network() -> nn.Module:
        return nn.Sequential(nn.Linear(6, 6), Block(), nn.Linear(6, 2))

    backend = Counting()
    training = Training(make(network), compiled(backend, activation_checkpointing=True))
    plain = Training(make(network), recipe())
    for each in (training, plain):
        each.advance(9)
    same_state(training.model, plain.model, tolerance=1e-6)


def test_a_fork_of_a_compiled_run_is_compiled_and_the_run_itself() -> None:
    backend = Counting()
    training = Training(make(plain_chain), compiled(backend))
    training.advance(3)
    fork = training.fork(training.recipe)
    for each in (training, fork):
        each.advance(4)
    assert backend.calls == 2
    same_state(fork.model, training.model)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # its own imports
@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_inductor_gives_the_same_training() -> None:
    def network() -> nn.Module:
        return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2))

    trainings = [Training(make(network), recipe(compile=name)) for name in (None, "inductor")]
    for training in trainings:
        training.advance(25)
    same_state(trainings[1].model, trainings[0].model, tolerance=1e-5)


# ------------------------------------------------------------------------------------ smallest pass


def test_batch_norm_needs_two_and_says_so() -> None:
    workload = make(MODELS["nested"])
    with pytest.raises(RecipeError, match=r"micro_batch asks for passes of 1, but layer '0\.1' .*"):
        Training(workload, Recipe(global_batch=4, micro_batch=1, learning_rate=0.1))
    with pytest.raises(RecipeError, match=r"batch_ramp asks for passes of 1, .* Use 2 or more"):
        Training(workload, recipe(batch_ramp=((50, 1),)))


def test_batch_norm_over_positions_trains_on_one_example() -> None:
    """Sixteen values of one example do have a variance."""
    workload = Workload(
        name="toy",
        make_model=lambda: nn.Sequential(
            nn.Conv1d(1, 2, 3), nn.BatchNorm1d(2), nn.Flatten(), nn.Linear(8, 2)
        ),
        train_data=(X[:9, None], Y[:9]),
        loss=F.cross_entropy,
    )
    training = Training(workload, Recipe(global_batch=1, learning_rate=0.1))
    norm = training.model[1]  # pyright: ignore[reportIndexIssue]
    assert norm.num_batches_tracked == 0, "trying it out left a trace"
    training.advance(to_epoch=1)
    assert training.steps == 9


def test_a_model_without_batch_norm_trains_online() -> None:
    training = Training(make(plain_chain), Recipe(global_batch=1, learning_rate=0.1))
    training.advance(to_epoch=1)
    assert training.steps == 105


@pytest.mark.parametrize("cut", [[10, 10], [20]])
def test_a_recomputed_gradient_is_the_gradient(cut: list[int]) -> None:
    workload = make(lambda: nn.Sequential(*(nn.Linear(6, 6) for _ in range(5))).double())
    window = [(X[:20].double().split(cut)[i], Y[:20].split(cut)[i]) for i in range(len(cut))]
    gradients: list[Tensor] = []
    for recompute in (False, True):
        model = workload.build_model(0)
        if recompute:
            checkpoint_activations(model)
        compute_gradients(workload, model, window, autocast=None)
        gradients.append(
            torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        )
    assert torch.equal(*gradients)
