"""Whether accumulation is the same as the whole batch: what breaks it is found and named."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm

from rightbatch.errors import ProbeError
from rightbatch.recipe import Recipe
from rightbatch.training.data.order import epoch_order
from rightbatch.training.ghost_norm import use_ghost_norm
from rightbatch.training.preflight import check as preflight
from rightbatch.training.preflight.check import Preflight, check_accumulation
from rightbatch.workload import Workload

X = torch.randn(100, 5, generator=torch.Generator().manual_seed(0))
Y = torch.arange(100) % 3
RECIPE = Recipe(global_batch=32, micro_batch=8, learning_rate=0.1)


def mlp(*between: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(
        nn.Linear(5, 8), *(make() for make in between), nn.Tanh(), nn.Linear(8, 3)
    )


def make(**changes: Any) -> Workload:
    given: dict[str, Any] = {
        "name": "toy",
        "make_model": mlp(),
        "train_data": (X, Y),
        "loss": F.cross_entropy,
    }
    return Workload(**{**given, **changes})


def batch_norm() -> nn.Module:
    return nn.BatchNorm1d(8)


def contrastive(outputs: Tensor, targets: Tensor) -> Tensor:
    similar = F.normalize(outputs, dim=1) @ F.normalize(outputs, dim=1).T
    return F.cross_entropy(5 * similar, targets.argsort())


def squares(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, int]:
    return model(batch["x"]).square().sum(), len(batch["x"])


def agrees(result: Preflight) -> None:
    assert result.agrees, result
    assert result.causes == ()
    assert result.warning is None
    assert result.difference <= result.tolerance


# --- what is the same -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)]
)
def test_a_mean_over_examples_agrees(dtype: torch.dtype, tolerance: float) -> None:
    workload = make(make_model=lambda: mlp()().to(dtype), train_data=(X.to(dtype), Y))
    result = check_accumulation(workload, RECIPE)
    agrees(result)
    assert result.difference > 0
    assert result.tolerance == tolerance
    assert result.compared == (8, 8)
    assert result.draws == "none"


def test_bfloat16_autocast_is_judged_as_bfloat16() -> None:
    result = check_accumulation(make(), RECIPE.replace(precision="bfloat16"))
    agrees(result)
    assert result.tolerance == 2e-2
    assert result.difference > 1e-5


def test_the_last_window_may_be_short() -> None:
    result = check_accumulation(make(train_data=(X[:13], Y[:13])), RECIPE)
    agrees(result)
    assert result.compared == (8, 5)


def fails(*_: Any) -> Any:
    raise AssertionError("nothing has to be run")


@pytest.mark.parametrize(
    ("num_examples", "micro_batch"), [(100, 32), (8, 8), (7, 8)], ids=["one", "all", "fewer"]
)
def test_one_micro_batch_costs_nothing(num_examples: int, micro_batch: int) -> None:
    data = (X[:num_examples], Y[:num_examples])
    workload = make(make_model=fails, loss=fails, train_data=data)
    recipe = Recipe(global_batch=32, micro_batch=micro_batch, learning_rate=0.1)
    result = check_accumulation(workload, recipe)
    agrees(result)
    assert (result.compared, result.difference) == ((), 0.0)


def test_a_dict_of_tokens_with_unequal_and_zero_counts_agrees() -> None:
    order = epoch_order(100, seed=0, epoch=0)
    lengths = torch.arange(100) % 4 + 1
    lengths[order[8:16]] = 0  # the second micro-batch has no token at all

    def compute_loss(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        return (model(batch["x"]).square().sum(1) * batch["n"]).sum(), batch["n"].sum()

    data = {"x": X, "n": lengths}
    workload = make(train_data=data, loss=None, compute_loss=compute_loss)
    agrees(check_accumulation(workload, RECIPE))
    # With no token in both of the first two, the next two are compared.
    lengths[order[:8]] = 0
    agrees(check_accumulation(workload, RECIPE))


def test_micro_batches_padded_to_their_own_length_agree() -> None:
    """A batch of all examples is longer than its micro-batches, and cannot be joined from them."""

    long = epoch_order(100, seed=0, epoch=0)[:2].tolist()

    def collate(items: list[int]) -> tuple[Tensor, Tensor]:
        rows = [torch.arange(1, 8 if i in long else 2 + i % 4) for i in items]
        padded = nn.utils.rnn.pad_sequence(rows, batch_first=True)
        return padded, torch.where(padded == 0, -100, padded % 3)

    workload = make(
        make_model=lambda: nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 3)),
        train_data=[*range(100)],
        collate=collate,
        loss=lambda outputs, targets: F.cross_entropy(outputs.transpose(1, 2), targets),
    )
    agrees(check_accumulation(workload, RECIPE.replace(micro_batch=2)))


def test_padded_and_augmented_micro_batches_agree() -> None:
    """Fetched twice, but from the same random state: the same draws for every example."""

    class Cropped(torch.utils.data.Dataset[Tensor]):
        def __len__(self) -> int:
            return 100

        def __getitem__(self, index: int) -> Tensor:
            return torch.arange(1, 2 + random.randrange(7))

    def compute_loss(model: nn.Module, batch: Tensor) -> tuple[Tensor, Tensor]:
        counted = batch > 0
        return (model(batch).square().sum(2) * counted).sum(), counted.sum()

    workload = make(
        make_model=lambda: nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 3)),
        train_data=Cropped(),
        collate=lambda rows: nn.utils.rnn.pad_sequence(rows, batch_first=True),
        loss=None,
        compute_loss=compute_loss,
    )
    result = check_accumulation(workload, RECIPE.replace(micro_batch=2), seed=1)
    agrees(result)
    assert result.draws == "left on"  # so it was fetched twice


class Augmented(torch.utils.data.Dataset[Any]):
    """Every look at an example is another one."""

    def __len__(self) -> int:
        return 100

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return X[index] + torch.randn(5) + np.random.rand() + random.random(), index % 3


def test_augmentation_is_drawn_once_for_both() -> None:
    agrees(check_accumulation(make(train_data=Augmented()), RECIPE))


# --- dropout --------------------------------------------------------------------------------------


class FunctionalDropout(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, 0.3, self.training)


class Noise(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 0.01 * torch.randn(x.shape)


@pytest.mark.parametrize(
    ("layer", "draws"),
    [(lambda: nn.Dropout(0.3), "dropout off"), (FunctionalDropout, "evaluation mode")],
)
def test_dropout_is_switched_off_and_batch_norm_is_not(
    layer: Callable[[], nn.Module], draws: str
) -> None:
    result = check_accumulation(make(make_model=mlp(layer)), RECIPE)
    agrees(result)
    assert (result.draws, result.tolerance) == (draws, 1e-5)
    result = check_accumulation(make(make_model=mlp(layer, batch_norm)), RECIPE)
    assert result.causes == ("2 (BatchNorm1d)",)
    assert result.draws == draws


def test_draws_that_stay_on_leave_it_open() -> None:
    # Two layers draw in turn, so that no two cuts of a batch get the same numbers.
    result = check_accumulation(make(make_model=mlp(Noise, Noise)), RECIPE)
    assert result.agrees
    assert result.draws == "left on"
    assert 1e-3 < result.difference < result.tolerance < 0.2
    assert result.warning is not None
    assert f"could be told only to {100 * result.tolerance:.3g} %" in result.warning


def test_what_draws_do_not_explain_is_still_found() -> None:
    summed = make(
        make_model=mlp(Noise, Noise), loss=lambda o, t: F.cross_entropy(o, t, reduction="sum")
    )
    result = check_accumulation(summed, RECIPE)
    assert result.causes == ("the loss is a sum",)
    assert result.warning is not None
    assert "more than random draws explain" in result.warning
    normed = check_accumulation(make(make_model=mlp(Noise, Noise, batch_norm)), RECIPE)
    assert normed.causes == ("3 (BatchNorm1d)",)


def test_dropout_inside_recurrent_layers_and_attention_is_switched_off() -> None:
    class Sequence(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(5, 8, num_layers=2, dropout=0.5, batch_first=True)
            self.attend = nn.MultiheadAttention(8, 2, dropout=0.5, batch_first=True)
            self.out = nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            h, _ = self.lstm(x[:, None].expand(-1, 4, -1))
            return self.out(self.attend(h, h, h)[0].mean(1))

    result = check_accumulation(make(make_model=Sequence), RECIPE)
    agrees(result)
    assert result.draws == "dropout off"


# --- what is not the same -------------------------------------------------------------------------


def test_batch_norm_is_named_with_its_size_and_remedy() -> None:
    workload = make(make_model=mlp(batch_norm))
    result = check_accumulation(workload, RECIPE)
    assert not result.agrees
    assert result.causes == ("1 (BatchNorm1d)",)
    assert result.warning == (
        "Accumulating 4 × 8 is not the same as 32 here: the gradients of 2 × 8 examples and of "
        f"16 at once differ by {100 * result.difference:.3g} %, because layer 1 (BatchNorm1d) "
        "averages over the micro-batch. Use one micro-batch, GroupNorm, or ghost_batch=8 "
        "in the recipe, with which every size sees the same."
    )


def test_the_difference_is_what_autograd_says() -> None:
    """By hand: the mean loss of 16 examples at once, and of 8 and 8."""
    workload = make(make_model=mlp(batch_norm))
    first = epoch_order(100, seed=3, epoch=0)[:16]

    def gradient(parts: list[Tensor]) -> Tensor:
        model = workload.build_model(3)
        losses = [F.cross_entropy(model(X[part]), Y[part]) for part in parts]
        torch.stack(losses).mean().backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    whole = gradient([first])
    expected = (gradient([first[:8], first[8:]]) - whole).norm() / whole.norm()
    result = check_accumulation(workload, RECIPE, seed=3)
    assert result.difference == pytest.approx(float(expected), rel=1e-4)


def test_replicas_count_as_micro_batches() -> None:
    recipe = Recipe(global_batch=32, micro_batch=8, replicas=4, learning_rate=0.1)
    result = check_accumulation(make(make_model=mlp(batch_norm)), recipe)
    assert result.causes == ("1 (BatchNorm1d)",)
    assert result.warning is not None
    assert result.warning.startswith("Accumulating 1 × 8 on 4 replicas is not the same as 32 here")
    assert "Use SyncBatchNorm without accumulation, GroupNorm" in result.warning


def test_many_layers_are_all_in_the_record_and_few_in_the_sentence() -> None:
    result = check_accumulation(make(make_model=mlp(*[batch_norm] * 5)), RECIPE)
    assert len(result.causes) == 5
    assert result.warning is not None
    assert "layers 1 (BatchNorm1d), 2 (BatchNorm1d), 3 (BatchNorm1d) and 2 more" in result.warning


def test_batch_norm_of_single_examples_fails_and_is_told() -> None:
    recipe = Recipe(global_batch=4, micro_batch=1, learning_rate=0.1)
    result = check_accumulation(make(make_model=mlp(batch_norm)), recipe)
    assert result.difference == float("inf")
    assert result.causes == ("1 (BatchNorm1d)",)
    assert result.warning is not None
    assert "2 × 1 examples fail where 2 at once do not (Expected more than 1" in result.warning
    assert "Use larger micro-batches" in result.warning


@pytest.mark.parametrize("ghost", [8, 4])
def test_ghost_batches_that_divide_the_micro_batch_agree(ghost: int) -> None:
    model = mlp(batch_norm)
    agrees(check_accumulation(make(make_model=lambda: use_ghost_norm(model(), ghost)), RECIPE))


def test_ghost_batches_that_do_not_are_named() -> None:
    model = mlp(batch_norm)
    result = check_accumulation(make(make_model=lambda: use_ghost_norm(model(), 5)), RECIPE)
    assert result.causes == ("1 (GhostBatchNorm1d)",)


def frozen_norm() -> nn.Module:
    class Frozen(nn.BatchNorm1d):
        def train(self, mode: bool = True) -> Any:
            return super().train(False)

    return Frozen(8)


@pytest.mark.parametrize("norm", [frozen_norm, lambda: use_ghost_norm(batch_norm(), 8)])
def test_a_norm_that_does_not_mix_is_not_accused(norm: Callable[[], nn.Module]) -> None:
    result = check_accumulation(make(make_model=mlp(norm), loss=contrastive), RECIPE)
    assert result.causes == ("the loss",)


def test_frozen_batch_norm_agrees() -> None:
    agrees(check_accumulation(make(make_model=mlp(frozen_norm)), RECIPE))


def test_batch_norm_without_running_statistics_is_the_only_cause() -> None:
    def norm() -> nn.Module:
        return nn.BatchNorm1d(8, track_running_stats=False)

    result = check_accumulation(make(make_model=mlp(norm)), RECIPE)
    assert result.causes == ("1 (BatchNorm1d)",)


def test_a_batch_norm_whose_output_is_zero_at_the_start_is_seen() -> None:
    """Residual branches often start at zero: outputs agree, gradients do not."""

    def zero_norm() -> nn.Module:
        norm = nn.BatchNorm1d(8)
        nn.init.zeros_(norm.weight)
        return norm

    result = check_accumulation(make(make_model=mlp(zero_norm)), RECIPE)
    assert result.causes == ("1 (BatchNorm1d)",)


class CentresBatch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0)


@pytest.mark.parametrize(
    ("changes", "cause", "words"),
    [
        ({"loss": contrastive}, "the loss", "contrastive"),
        (
            {"loss": lambda o, t: F.cross_entropy(o, t, weight=torch.tensor([1.0, 5, 20]))},
            "the loss",
            "class weights",
        ),
        (
            {"loss": lambda o, t: F.cross_entropy(o, t, reduction="sum")},
            "the loss is a sum",
            "Return the mean: reduction='mean'",
        ),
        ({"make_model": mlp(CentresBatch)}, "the model", "depends on how the batch is cut"),
        (
            # Each forward pass takes it one power iteration further.
            {"make_model": mlp(lambda: spectral_norm(nn.Linear(8, 8)))},
            "the model",
            "depends on how the batch is cut",
        ),
        (
            {"train_data": {"x": X}, "make_model": mlp(CentresBatch), "compute_loss": squares},
            "the model or the loss",
            "Use one micro-batch",
        ),
        (
            {
                "train_data": {"x": X},
                "compute_loss": lambda m, b: (m(b["x"]).square().mean(), len(b["x"])),
            },
            "compute_loss returns a mean as its sum",
            "reduction='sum'",
        ),
    ],
    ids=["contrastive", "class weights", "sum", "model", "state", "compute_loss", "mean as sum"],
)
def test_what_mixes_the_examples_is_told_apart(
    changes: dict[str, Any], cause: str, words: str
) -> None:
    if "compute_loss" in changes:
        changes = {**changes, "loss": None}
    result = check_accumulation(make(**changes), RECIPE)
    assert not result.agrees
    assert result.causes == (cause,)
    assert result.warning is not None
    assert words in result.warning


def test_a_sum_makes_the_gradient_smaller_by_the_number_of_micro_batches() -> None:
    summed = make(loss=lambda o, t: F.cross_entropy(o, t, reduction="sum"))
    assert check_accumulation(summed, RECIPE).difference == pytest.approx(0.5, rel=1e-4)


def test_two_causes_are_both_named() -> None:
    result = check_accumulation(make(make_model=mlp(batch_norm), loss=contrastive), RECIPE)
    assert result.causes == ("1 (BatchNorm1d)", "the loss")
    assert result.warning is not None
    assert ", and the loss of a batch is not the mean" in result.warning


def test_batch_norm_under_compute_loss_is_named_alone() -> None:
    workload = make(
        train_data={"x": X}, make_model=mlp(batch_norm), loss=None, compute_loss=squares
    )
    assert check_accumulation(workload, RECIPE).causes == ("1 (BatchNorm1d)",)


def test_a_micro_batch_of_padding_alone_agrees() -> None:
    targets = Y[:, None].repeat(1, 2)
    targets[epoch_order(100, seed=0, epoch=0)[8:16]] = -100
    workload = make(
        train_data=(X, targets),
        loss=lambda o, t: F.cross_entropy(o[:, :, None].expand(-1, -1, 2), t),
    )
    agrees(check_accumulation(workload, RECIPE))


# --- rounding, memory, traces ---------------------------------------------------------------------


def test_rounding_where_gradients_cancel_is_no_difference() -> None:
    """Examples in pairs with opposite gradients leave next to nothing but rounding."""
    x = torch.cat([X, X + 1e-3]) * 100
    y = torch.cat([torch.ones(100), -torch.ones(100)])
    workload = make(
        make_model=lambda: nn.Linear(5, 1, bias=False),
        train_data=(x, y),
        loss=lambda outputs, targets: (outputs[:, 0] * targets).mean(),
    )
    recipe = Recipe(global_batch=200, micro_batch=100, learning_rate=0.1)
    result = check_accumulation(workload, recipe)
    agrees(result)
    assert result.difference > 1e-5
    assert result.tolerance < 1e-3


class LimitedMemory(nn.Linear):
    """Runs out of memory above a number of examples."""

    def forward(self, input: Tensor) -> Tensor:
        if len(input) > 8:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return super().forward(input)


def test_where_two_do_not_fit_the_halves_of_one_are_compared() -> None:
    result = check_accumulation(make(make_model=mlp(lambda: LimitedMemory(8, 8))), RECIPE)
    agrees(result)
    assert result.compared == (4, 4)
    model = mlp(lambda: LimitedMemory(8, 8), batch_norm)
    assert check_accumulation(make(make_model=model), RECIPE).causes == ("2 (BatchNorm1d)",)
    agrees(check_accumulation(make(make_model=lambda: use_ghost_norm(model(), 8)), RECIPE))


def test_no_more_than_two_micro_batches_are_ever_together() -> None:
    seen: list[int] = []

    class Seen(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(len(x))
            return x

    check_accumulation(make(make_model=mlp(Seen, batch_norm)), RECIPE)
    assert max(seen) == 16


def test_not_even_two_examples_fit() -> None:
    def model() -> nn.Module:
        class Tiny(nn.Linear):
            def forward(self, input: Tensor) -> Tensor:
                if len(input) > 1:
                    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
                return super().forward(input)

        return Tiny(5, 3)

    with pytest.raises(ProbeError, match="Two examples do not fit in memory together"):
        check_accumulation(make(make_model=model), RECIPE.replace(micro_batch=1))


def test_without_a_gradient_there_is_nothing_to_compare() -> None:
    workload = make(loss=lambda outputs, targets: 0 * outputs.sum())
    with pytest.raises(ProbeError, match="'toy' is zero or not finite, so there is nothing"):
        check_accumulation(workload, RECIPE)


def test_an_error_of_the_workload_is_not_hidden() -> None:
    def broken(outputs: Tensor, targets: Tensor) -> Tensor:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        check_accumulation(make(loss=broken), RECIPE)


@pytest.mark.parametrize("seed", [0, 2**40])
def test_it_leaves_no_trace(seed: int) -> None:
    def state() -> Any:
        _, keys, *rest = np.random.get_state()
        torch_state = torch.get_rng_state().tolist()
        return random.getstate(), np.asarray(keys).tolist(), rest, torch_state

    model = mlp(lambda: nn.Dropout(0.5), Noise, batch_norm)
    workload = make(make_model=model, train_data=Augmented(), loss=contrastive)
    before = state()
    with torch.no_grad():
        result = check_accumulation(workload, RECIPE, seed=seed)
        assert not torch.is_grad_enabled()
    assert not result.agrees
    assert state() == before
    with torch.inference_mode():
        assert check_accumulation(workload, RECIPE, seed=seed) == result


def test_the_record_is_frozen() -> None:
    result = check_accumulation(make(), RECIPE)
    with pytest.raises(AttributeError):
        result.agrees = False  # pyright: ignore[reportAttributeAccessIssue]
    assert preflight.Preflight is type(result)


def test_the_ghost_batch_of_the_recipe_counts() -> None:
    ghostly = RECIPE.replace(ghost_batch=8)
    assert not check_accumulation(make(make_model=mlp(batch_norm)), RECIPE).agrees
    agrees(check_accumulation(make(make_model=mlp(batch_norm)), ghostly))
