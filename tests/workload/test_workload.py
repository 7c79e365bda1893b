"""The description itself: complete, consistent, the same weights for the same seed."""

from __future__ import annotations

from typing import Any

import cloudpickle
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rightbatch.errors import WorkloadError
from rightbatch.workload import Workload, accuracy, count_terms, parse_target

X, Y = torch.randn(6, 2), torch.tensor([0, 1, 0, 1, 0, 1])


def make(**changes: Any) -> Workload:
    given: dict[str, Any] = {
        "name": "toy",
        "make_model": lambda: nn.Linear(2, 2),
        "train_data": (X, Y),
        "loss": F.cross_entropy,
    }
    return Workload(**{**given, **changes})


def test_the_seed_alone_decides_the_weights_and_the_caller_keeps_its_random_state() -> None:
    workload = make()
    torch.manual_seed(123)
    before = torch.get_rng_state()
    first = workload.build_model(7)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(5)
    for a, b in zip(first.parameters(), workload.build_model(7).parameters(), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(next(first.parameters()), next(workload.build_model(8).parameters()))


def test_loss_sum_is_the_mean_times_the_count() -> None:
    workload = make()
    model = workload.build_model(0)
    loss_sum, count = workload.loss_sum(model, (X, Y))
    assert count == 6
    torch.testing.assert_close(loss_sum, F.cross_entropy(model(X), Y, reduction="sum"))


def test_padded_sequences_are_weighted_by_their_tokens() -> None:
    """Two micro-batches with 5 and 1 tokens make the gradient of all 6, not the mean of means."""
    scores, targets = torch.randn(4, 3, 3).double(), torch.randint(0, 3, (4, 3))
    targets[2:, :] = -100
    targets[2, 0] = 1
    targets[0, 2] = -100
    workload = make(
        make_model=lambda: nn.Linear(3, 3, dtype=torch.float64),
        train_data=(scores, targets),
        loss=lambda o, t: F.cross_entropy(o.transpose(1, 2), t),
    )
    model = workload.build_model(0)
    whole, num_tokens = workload.loss_sum(model, (scores, targets))
    parts = [workload.loss_sum(model, (scores[i : i + 2], targets[i : i + 2])) for i in (0, 2)]
    assert [int(count) for _, count in parts] == [5, 1]
    torch.testing.assert_close(sum(loss for loss, _ in parts) / num_tokens, whole / num_tokens)
    mean_of_means = torch.stack([loss / count for loss, count in parts]).mean()
    assert not torch.isclose(mean_of_means, whole / num_tokens)


@pytest.mark.parametrize(
    ("targets", "terms"),
    [
        (torch.zeros(4).long(), 4),
        (torch.zeros(4, 3), 4),
        (torch.zeros(4, 3).long(), 12),
        (torch.ones(4, 3).bool(), 4),
        ([1, 2, 3], 3),
    ],
)
def test_count_terms(targets: Any, terms: int) -> None:
    assert count_terms(targets) == terms


def test_opened_data_do_not_cross() -> None:
    workload = make(val_data=(X, Y))
    size = len(cloudpickle.dumps(workload))
    assert workload.train_examples.num_examples == 6
    assert workload.val_examples is not None
    assert len(cloudpickle.dumps(workload)) == size


def test_exactly_one_of_loss_and_compute_loss() -> None:
    with pytest.raises(WorkloadError, match="'toy' has neither of `loss` and `compute_loss`"):
        make(loss=None)
    with pytest.raises(WorkloadError, match="'toy' has both of `loss` and `compute_loss`"):
        make(compute_loss=lambda m, b: (m(b), 1))


def test_factories_must_be_functions() -> None:
    with pytest.raises(WorkloadError, match="make_model is a int, not a function"):
        make(make_model=3)
    with pytest.raises(WorkloadError, match="make_optimizer is a SGD, not a function"):
        make(make_optimizer=torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=1))


@pytest.mark.parametrize(
    ("target", "changes", "message"),
    [
        ("val_loss<=0.1", {}, r"evaluates only train_loss\. Pass val_data"),
        ("val_accuracy>=0.9", {"val_data": (X, Y)}, r"only train_loss, val_loss"),
        ("val_loss=0.1", {}, r"'val_loss=0\.1' cannot be read\. Write it like"),
        ("val_loss<=low", {}, r"has no number on its right"),
        ("val_loss<=inf", {}, r"is not finite"),
        ("loss<=1", {}, r"names 'loss', which is not evaluated"),
        ("train_loss>=1", {}, r"asks for a loss to rise"),
    ],
)
def test_wrong_targets(target: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(WorkloadError, match=message):
        make(target=target, **changes)


def test_targets_are_read_and_met() -> None:
    target = make(target="val_accuracy > 0.9", val_data=(X, Y), metric=accuracy).parsed_target
    assert target == parse_target("val_accuracy>=0.9")
    assert target is not None
    assert target.reached(0.95)
    assert not target.reached(0.85)
    assert not target.reached(float("nan"))
    assert not target.lower_is_better
    assert str(target) == "val_accuracy>=0.9"


def test_accuracy_of_sequences() -> None:
    scores = torch.eye(3).repeat(2, 1, 1)
    targets: Tensor = torch.tensor([[0, 1, 2], [0, 0, 0]])
    assert float(accuracy(scores, targets)) == pytest.approx(4 / 6)
