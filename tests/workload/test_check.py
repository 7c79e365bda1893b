"""Each mistake a workload can hold gets one clear sentence; right workloads pass."""

from __future__ import annotations

import copy
import random
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset

from rightbatch.errors import WorkloadError
from rightbatch.workload import Workload, accuracy, check_workload

X = torch.randn(20, 5, generator=torch.Generator().manual_seed(0))
Y = torch.arange(20) % 3


def make(**changes: Any) -> Workload:
    given: dict[str, Any] = {
        "name": "toy",
        "make_model": lambda: nn.Linear(5, 3),
        "train_data": (X, Y),
        "loss": F.cross_entropy,
    }
    given.update(changes)
    return Workload(**given)


def refuse(message: str, **changes: Any) -> None:
    with pytest.raises(WorkloadError, match=message) as caught:
        check_workload(make(**changes))
    text = str(caught.value)
    assert text.endswith((".", ")")), "a sentence ends"
    assert len(text) < 600


# ------------------------------------------------------------------------------- right workloads


def test_a_right_workload_passes_and_says_what_it_is() -> None:
    facts = check_workload(make(val_data=(X[:7], Y[:7]), metric=accuracy))
    assert facts.num_examples == 20
    assert facts.num_val_examples == 7
    assert facts.num_parameters == 18
    torch.manual_seed(0)
    first_loss = F.cross_entropy(nn.Linear(5, 3)(X[:4]), Y[:4]).item()
    assert facts.first_loss == pytest.approx(first_loss)
    assert facts.tokens_per_example is None


def test_tokens_are_counted_beside_examples() -> None:
    text = torch.randint(0, 7, (20, 9))

    def compute_loss(model: nn.Module, batch: Tensor) -> tuple[Tensor, int]:
        scores = model(batch[:, :-1])
        return F.cross_entropy(scores.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum"), 8 * (
            len(batch)
        )

    facts = check_workload(
        make(
            make_model=lambda: nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 7)),
            train_data=text,
            loss=None,
            compute_loss=compute_loss,
        )
    )
    assert facts.tokens_per_example == 8


class _Ghost(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Dropout(), nn.Linear(4, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


def test_batch_norm_and_dropout_pass() -> None:
    check_workload(make(make_model=_Ghost, val_data=(X, Y), metric=accuracy))


def test_regression_dicts_lambdas_and_local_classes_pass() -> None:
    class Local(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(5, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x)[:, 0]

    check_workload(make(make_model=Local, train_data=(X, X[:, 0]), loss=F.mse_loss))
    check_workload(
        make(
            make_model=lambda: Local(),
            train_data={"x": X, "y": X[:, 0]},
            loss=None,
            compute_loss=lambda m, b: ((m(b["x"]) - b["y"]).square().sum(), len(b["x"])),
        )
    )


def test_a_loss_that_depends_on_the_batch_is_left_alone() -> None:
    def contrastive(outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs @ outputs.T, torch.arange(len(outputs)))

    check_workload(make(loss=contrastive))


def test_layer_wise_learning_rates_pass() -> None:
    def by_layer(params: Any, lr: float) -> torch.optim.Optimizer:
        weight, bias = params
        return torch.optim.AdamW([{"params": [weight]}, {"params": [bias], "lr": lr / 10}], lr=lr)

    check_workload(make(make_optimizer=by_layer))


def test_the_check_leaves_no_trace() -> None:
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    before = (random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state())  # pyright: ignore[reportArgumentType,reportAttributeAccessIssue]
    x, y = X.clone(), Y.clone()
    with torch.no_grad():
        check_workload(make(train_data=(x, y), make_model=_Ghost))
        assert not torch.is_grad_enabled()
    assert random.getstate() == before[0]
    assert np.array_equal(np.random.get_state()[1], before[1])  # pyright: ignore[reportArgumentType]
    assert torch.equal(torch.get_rng_state(), before[2])
    assert torch.equal(x, X)
    assert torch.equal(y, Y)


# ------------------------------------------------------------------------------------- the model


def test_no_parameters() -> None:
    refuse(r"'toy' has no trainable parameters\. Return a", make_model=lambda: nn.Flatten())


def test_frozen_model() -> None:
    refuse(
        r"no trainable parameters",
        make_model=lambda: nn.Linear(5, 3).requires_grad_(False),
    )


def test_make_model_returns_something_else() -> None:
    refuse(r"returned a type, not a torch\.nn\.Module", make_model=lambda: nn.Linear)


def test_make_model_fails() -> None:
    refuse(
        r"make_model of workload 'toy' failed with KeyError: 'width'\. It is called without",
        make_model=lambda: nn.Linear({}["width"], 3),
    )


def test_the_same_model_twice() -> None:
    model = nn.Linear(5, 3)
    before = copy.deepcopy(model.state_dict())
    refuse(r"returned the same model twice.*Build it inside", make_model=lambda: model)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), "the check trained the user's model"


def test_two_models_that_share_parameters() -> None:
    shared = nn.Linear(5, 4)
    refuse(
        r"share 2 parameters \(0\.weight, …\).*Build all layers inside make_model",
        make_model=lambda: nn.Sequential(shared, nn.Linear(4, 3)),
    )


def test_the_model_does_not_take_the_inputs() -> None:
    refuse(
        r"failed on training inputs float32 \(4, 5\) with RuntimeError: .*Check the shape",
        make_model=lambda: nn.Linear(6, 3),
    )
    refuse(r"The inputs are float64 and the model is float32: convert", train_data=(X.double(), Y))
    refuse(r"integers and the model is float32: convert with \.float", train_data=(X.long(), Y))


# -------------------------------------------------------------------------------------- the loss


def test_loss_not_scalar() -> None:
    refuse(
        r"returned float32 \(4\), not a scalar tensor.*mean over examples: reduce it, for example",
        loss=lambda o, t: F.cross_entropy(o, t, reduction="none"),
    )
    refuse(r"returned 0\.5, not a scalar tensor", loss=lambda o, t: 0.5)


def test_loss_is_a_sum() -> None:
    refuse(
        r"doubles when the batch is doubled, so it is a sum.*reduction='mean'",
        loss=lambda o, t: F.cross_entropy(o, t, reduction="sum"),
    )


def test_nan_at_the_first_step() -> None:
    refuse(
        r"is nan at the first step.*look for a logarithm or division by zero",
        loss=lambda o, t: (o.mean() * 0).log() * 0,
    )
    broken = X.clone()
    broken[2, 3] = float("nan")
    refuse(
        r"1 of the 20 numbers in the batch's float32 \(4, 5\) are NaN.*clean the data",
        train_data=(broken, Y),
    )


def test_initial_weights_not_finite() -> None:
    def unset() -> nn.Module:
        model = nn.Linear(5, 3)
        nn.init.constant_(model.weight, float("inf"))
        return model

    refuse(r"The initial value of 'weight' is not finite", make_model=unset)


def test_gradient_not_finite() -> None:
    def zeros() -> nn.Module:
        model = nn.Linear(5, 3)
        nn.init.zeros_(model.weight)
        nn.init.zeros_(model.bias)
        return model

    refuse(
        r"gradient of 'weight'.* is not finite at the first step, though the loss is 0",
        make_model=zeros,
        loss=lambda o, t: o.square().sum(1).sqrt().mean(),
    )


def test_loss_cut_off_from_the_model() -> None:
    refuse(r"has no gradient .*without \.item\(\)", loss=lambda o, t: o.detach().mean())
    refuse(
        r"does not depend on any parameter",
        loss=lambda o, t: torch.zeros((), requires_grad=True) * 1,
    )


def test_targets_of_a_wrong_type() -> None:
    refuse(
        r"outputs float32 \(4, 3\) and targets float32 \(4\).*integer class indices",
        train_data=(X, Y.float()),
    )
    refuse(r"Class indices must be int64", train_data=(X, Y.to(torch.int16)))
    refuse(r"go from 1 to 3 but the outputs have 3 classes", train_data=(X, Y + 1))


def test_integer_targets_for_a_loss_of_numbers() -> None:
    refuse(
        r"This loss compares numbers: convert the targets with \.float",
        train_data=(X, F.one_hot(Y)),
        loss=F.binary_cross_entropy_with_logits,
    )


@pytest.mark.parametrize("loss", [F.mse_loss, lambda o, t: (o - t).abs().mean()])
def test_outputs_and_targets_that_broadcast(loss: Callable[[Tensor, Tensor], Tensor]) -> None:
    refuse(
        r"float32 \(4, 1\) and the targets float32 \(4\): the loss compares every output",
        make_model=lambda: nn.Linear(5, 1),
        train_data=(X, X[:, 0]),
        loss=loss,
    )


def test_a_loss_that_squeezes_by_itself_is_left_alone() -> None:
    check_workload(
        make(
            make_model=lambda: nn.Linear(5, 1),
            train_data=(X, X[:, 0]),
            loss=lambda o, t: (o[:, 0] - t).square().mean(),
        )
    )


# ------------------------------------------------------------------------------------ compute_loss


def _with_compute_loss(message: str, function: Callable[[nn.Module, Any], Any]) -> None:
    refuse(message, loss=None, compute_loss=function)


def _sum(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1], reduction="sum")


def test_compute_loss_returns_a_wrong_thing() -> None:
    _with_compute_loss(r"returned float32 \(\)\. .*must return \(loss_sum, count\)", _sum)
    _with_compute_loss(
        r"loss_sum of compute_loss.*float32 \(4\), not a scalar.*reduction='sum'",
        lambda m, b: (F.cross_entropy(m(b[0]), b[1], reduction="none"), 4),
    )
    _with_compute_loss(
        r"count of compute_loss.* is 0\. Return how many", lambda m, b: (_sum(m, b), 0)
    )
    _with_compute_loss(r"count of compute_loss.* is None\.", lambda m, b: (_sum(m, b), None))
    _with_compute_loss(
        r"compute_loss of workload 'toy' failed on the batch \(float32 \(4, 5\), int64 \(4\)\)",
        lambda m, b: (_sum(m, b["x"]), 4),
    )


def test_compute_loss_returns_a_mean() -> None:
    _with_compute_loss(
        r"for 4 and for 8 of the same, so it is a mean\. Return the sum",
        lambda m, b: (F.cross_entropy(m(b[0]), b[1]), len(b[1])),
    )


# -------------------------------------------------------------------------------------- the data


def test_empty_data() -> None:
    refuse(r"The data \(a tuple\) hold no examples\. Pass at least one", train_data=(X[:0], Y[:0]))
    refuse(r"The data \(a list\) hold no examples", train_data=[])
    refuse(r"The data \(a dict\) hold no examples", train_data={})


def test_mismatched_lengths() -> None:
    refuse(r"different numbers of examples \(shapes \(20, 5\), \(19,\)\)", train_data=(X, Y[:19]))


def test_batch_is_not_inputs_and_targets() -> None:
    refuse(
        r"batch of workload 'toy' is float32 \(4, 5\), not \(inputs, targets\)\..*compute_loss",
        train_data=X,
    )
    refuse(r"is \{'x': float32 \(4, 5\)\}, not \(inputs, targets\)", train_data={"x": X})
    refuse(r"is \(float32 \(4, 5\), int64 \(4\), int64 \(4\)\), not", train_data=(X, Y, Y))


def test_collate_that_puts_examples_elsewhere() -> None:
    refuse(
        r"batch of 4 examples .* has inputs float32 \(5, 4\) and targets int64 \(4\)\.",
        train_data=[(x, y) for x, y in zip(X, Y, strict=True)],
        collate=lambda items: (
            torch.stack([x for x, _ in items], dim=1),
            torch.stack([y for _, y in items]),
        ),
    )


def test_ragged_examples() -> None:
    refuse(
        r"batch of 4 training examples .* could not be made: RuntimeError: .*same shape, or pass",
        train_data=[(X[0, : 1 + i % 3], Y[i]) for i in range(20)],
    )


def test_validation_data_of_another_shape() -> None:
    refuse(
        r"validation batch, \(float32 \(4, 4\), int64 \(4\)\), does not go through .*"
        r"\(float32 \(4, 5\), int64 \(4\)\), does\. Prepare val_data exactly like",
        val_data=(X[:, :4], Y),
    )


def test_validation_data_with_nan() -> None:
    refuse(r"The validation loss of workload 'toy' is nan", val_data=(X * float("nan"), Y))


def test_metric_that_is_no_number() -> None:
    refuse(
        r"The metric of workload 'toy' returned bool \(4\)\. metric\(outputs, targets\) must",
        val_data=(X, Y),
        metric=lambda o, t: o.argmax(1) == t,
    )
    refuse(r"The metric of workload 'toy' failed with", val_data=(X, Y), metric=lambda o, t: o @ t)


# --------------------------------------------------------------------------------- the optimizer


def test_make_optimizer_returns_no_optimizer() -> None:
    refuse(
        r"returned a function, not a torch\.optim\.Optimizer",
        make_optimizer=lambda params, lr: lambda: torch.optim.SGD(params, lr=lr),
    )


def test_make_optimizer_ignores_the_learning_rate() -> None:
    refuse(
        r"gives the learning rate 0\.1 whether it is asked for 0\.001 or 0\.002\. Pass it on",
        make_optimizer=lambda params, lr: torch.optim.SGD(params, lr=0.1),
    )


def test_make_optimizer_misses_parameters() -> None:
    other = nn.Linear(5, 3)
    refuse(
        r"holds 0 of the 2 trainable parameters",
        make_optimizer=lambda params, lr: torch.optim.SGD(other.parameters(), lr=lr),
    )


def test_make_optimizer_goes_through_the_iterator_twice() -> None:
    def split(params: Any, lr: float) -> torch.optim.Optimizer:
        matrices = [p for p in params if p.ndim > 1]
        vectors = [p for p in params if p.ndim <= 1]
        return torch.optim.SGD([{"params": matrices}, {"params": vectors}], lr=lr)

    refuse(r"holds 1 of the 2 trainable parameters \('bias' is missing\)", make_optimizer=split)


def test_make_optimizer_fails() -> None:
    refuse(
        r"make_optimizer of workload 'toy' failed with TypeError",
        make_optimizer=lambda params: torch.optim.SGD(params),
    )


def test_optimizer_that_needs_a_closure() -> None:
    refuse(
        r"The optimizer LBFGS of workload 'toy' failed at its first step",
        make_optimizer=lambda params, lr: torch.optim.LBFGS(params, lr=lr),
    )


# ------------------------------------------------------------------------------ another process


class _Locked(Dataset[tuple[Tensor, Tensor]]):
    def __init__(self) -> None:
        self.lock = threading.Lock()

    def __len__(self) -> int:
        return len(X)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return X[index], Y[index]


def test_a_dataset_that_cannot_cross() -> None:
    refuse(r"train_data of workload 'toy' cannot be sent to a child process", train_data=_Locked())


def test_a_factory_that_holds_on_to_a_lock() -> None:
    lock = threading.Lock()

    def locked() -> nn.Module:
        with lock:
            return nn.Linear(5, 3)

    refuse(
        r"make_model of workload 'toy' cannot be sent .*lock.*create those inside",
        make_model=locked,
    )
