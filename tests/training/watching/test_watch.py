"""Watching: records, paths of weights, distances, curves, and that watching changes nothing."""

from __future__ import annotations

import itertools
import math
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rightbatch import Recipe, Workload, accuracy, train
from rightbatch.errors import UsageError
from rightbatch.training import Callback, StepRecord, StepRecords, Training, Watch
from rightbatch.training.watching import telling
from rightbatch.training.watching.norms import LARGEST_KEPT, norms_of_kept, parameters_to_keep
from rightbatch.training.watching.watched_weight import find_weight

X = torch.randn(105, 4, generator=torch.Generator().manual_seed(0))
Y = (X[:, 0] > 0).long()


def make_net() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 2))


def make(**changes: Any) -> Workload:
    given: dict[str, Any] = {
        "name": "toy",
        "make_model": make_net,
        "train_data": (X, Y),
        "val_data": (X[:33], Y[:33]),
        "loss": F.cross_entropy,
        "metric": accuracy,
    }
    return Workload(**{**given, **changes})


def recipe(global_batch: int = 10, learning_rate: float = 0.1, **changes: Any) -> Recipe:
    return Recipe(global_batch=global_batch, learning_rate=learning_rate, **changes)


def flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


class Reference(Callback):
    """What a watch should find, by the plainest means: a copy of all weights at every update."""

    def __init__(self) -> None:
        self.weights: list[Tensor] = []
        self.norms: list[float] = []
        self.records: list[StepRecord] = []

    def on_start(self, training: Training) -> None:
        self.weights.append(flat(training.model).clone())

    def on_step(self, training: Training) -> None:
        self.weights.append(flat(training.model).clone())
        gradients = [p.grad.flatten() for p in training.model.parameters() if p.grad is not None]
        if gradients:
            self.norms.append(torch.cat(gradients).double().norm().item())

    def on_records(self, training: Training, records: StepRecords) -> None:
        self.records.extend(records)


# ---------------------------------------------------------------------------------------- records


def test_paths_distances_and_norms_are_those_of_the_plain_way() -> None:
    reference = Reference()
    watch = Watch(weights=["first", "3.bias[1]"], distance_every=4)
    train(make(), recipe(), epochs=3, callbacks=[reference, watch])
    weights = torch.stack(reference.weights)
    assert watch.weights == {"first": "0.weight[0,0]", "3.bias[1]": "3.bias[1]"}
    assert np.array_equal(watch.paths["first"], weights[:, 0].double())
    assert np.array_equal(watch.paths["3.bias[1]"], weights[:, -1].double())
    assert list(watch.records) == reference.records
    assert [r.step for r in watch.records] == list(range(1, 34))
    assert [r.examples for r in watch.records][:11] == [*range(10, 101, 10), 105]
    assert [r.gradient_norm for r in watch.records] == pytest.approx(reference.norms, rel=1e-5)
    steps = [d.step for d in watch.distances]
    assert steps == [0, 4, 8, 11, 12, 16, 20, 22, 24, 28, 32, 33]
    assert [d.value for d in watch.distances] == pytest.approx(
        [(weights[s] - weights[0]).norm().item() for s in steps], rel=1e-5
    )


def test_a_distance_is_measured_once_where_an_evaluation_and_the_interval_meet() -> None:
    watch = Watch(distance_every=11)
    train(make(), recipe(), epochs=3, callbacks=[watch])
    assert [distance.step for distance in watch.distances] == [0, 11, 22, 33]


def test_watching_does_not_change_a_bit() -> None:
    plain = train(make(), recipe(), epochs=2, seed=1)
    watched = train(
        make(), recipe(), epochs=2, seed=1, callbacks=[Watch(["first"], distance_every=1)]
    )
    assert torch.equal(flat(plain.model), flat(watched.model))
    assert plain.history == watched.history


def test_the_curves_against_all_four() -> None:
    watch = Watch(weights=["first"])
    run = train(make(), recipe(), epochs=3, callbacks=[watch])
    assert list(watch.evaluations) == run.history
    x, y = watch.curve("val_loss", against="epochs")
    assert x.tolist() == [1, 2, 3]
    assert y.tolist() == [point.val_loss for point in run.history]
    assert watch.curve("val_loss", against="steps")[0].tolist() == [11, 22, 33]
    x, y = watch.curve("train_loss", against="examples")
    assert x.tolist() == [105, 210, 315]
    steps, losses = watch.curve("loss", against="steps")
    assert steps.tolist() == list(range(1, 34))
    assert losses[:11].mean() == pytest.approx(y[0])
    seconds, _ = watch.curve("loss", against="seconds")
    assert (np.diff(seconds) > 0).all()
    assert seconds[10] == pytest.approx(run.history[0].seconds)
    x, path = watch.curve("first", against="epochs")
    assert (x[0], x[11], len(x)) == (0, 1, len(path))
    x, distances = watch.curve("distance", against="steps")
    assert x.tolist() == [0, 11, 22, 33]
    assert distances[0] == 0
    assert watch.roughness("first") >= 1


def test_what_is_read_is_frozen() -> None:
    watch = Watch(weights=["first"])
    train(make(), recipe(), steps=3, callbacks=[watch])
    with pytest.raises(ValueError, match="read-only"):
        watch.paths["first"][0] = 1
    with pytest.raises(ValueError, match="read-only"):
        watch.curve("loss")[1][0] = 1
    assert isinstance(watch.records, tuple)


@pytest.mark.parametrize(("name", "reason"), [("loss2", "not watched"), ("distance", "not watch")])
def test_a_curve_that_was_not_watched(name: str, reason: str) -> None:
    watch = Watch(distance=False)
    train(make(), recipe(), steps=2, callbacks=[watch])
    with pytest.raises(UsageError, match=f"'{name}' was {reason}.* There are: loss, gradient_norm"):
        watch.curve(name)
    with pytest.raises(UsageError, match=r"against is 'minutes'\. Give one of: epochs, steps"):
        watch.curve("loss", against="minutes")  # pyright: ignore[reportArgumentType]


def test_without_a_validation_set_there_is_an_empty_curve() -> None:
    watch = Watch()
    train(make(val_data=None, metric=None), recipe(), epochs=2, callbacks=[watch])
    assert [len(values) for values in watch.curve("val_loss")] == [0, 0]
    assert len(watch.curve("train_loss")[0]) == 2


@pytest.mark.parametrize("pieces", [[100], [7] * 14, [1] * 60])
def test_the_kept_updates_are_every_second_of_every_second(pieces: list[int]) -> None:
    whole, bounded = Watch(["first"]), Watch(["first"], keep=16)
    training = Training(make(), recipe(), callbacks=[whole, bounded])
    whole.on_start(training)
    bounded.on_start(training)
    for piece in pieces:
        training.advance(piece)
    steps = [record.step for record in bounded.records]
    stride = steps[0]
    assert len(steps) <= 16
    assert steps == list(range(stride, training.steps + 1, stride))
    assert stride == 8 if training.steps > 64 else stride == 4
    assert bounded.paths["first"].tolist() == whole.paths["first"][::stride].tolist()
    assert list(bounded.records) == list(whole.records[stride - 1 :: stride])
    both = [watch.curve("first", against="seconds")[0] for watch in (whole, bounded)]
    assert both[1].tolist() == both[0][::stride].tolist()


def test_a_resumed_run_is_as_far_from_its_first_weights() -> None:
    watch = Watch(["first"])
    training = Training(make(), recipe(), seed=4, callbacks=[watch])
    training.callbacks = ()
    training.advance(20)
    watch.on_start(training)
    start = flat(make().build_model(4))
    assert watch.distances[0].value == pytest.approx((flat(training.model) - start).norm().item())
    assert watch.curve("first", against="steps")[0].tolist() == [20]


def test_a_watch_watches_one_run_from_its_start() -> None:
    watch = Watch()
    train(make(), recipe(), steps=1, callbacks=[watch])
    with pytest.raises(UsageError, match="has watched a run already"):
        train(make(), recipe(), steps=1, callbacks=[watch])
    with pytest.raises(UsageError, match="not told of the start"):
        Training(make(), recipe(), callbacks=[Watch()]).advance(1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"keep": 3}, "keep is 3. Give 16"), ({"distance_every": 0}, "distance_every is 0. Give 1")],
)
def test_numbers_out_of_range(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Watch(**arguments)


def test_weights_that_numpy_cannot_read_are_read_all_the_same() -> None:
    reference, watch = Reference(), Watch(weights=["0.weight[3,1]"])
    workload = make(
        make_model=lambda: nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)).bfloat16(),
        train_data=(X.bfloat16(), Y),
        val_data=(X[:33].bfloat16(), Y[:33]),
    )
    train(workload, recipe(), epochs=2, callbacks=[reference, watch])
    expected = [weights[13].item() for weights in reference.weights]
    assert watch.paths["0.weight[3,1]"].tolist() == expected
    assert [r.gradient_norm for r in watch.records] == pytest.approx(reference.norms, rel=1e-2)


def test_a_parameter_whose_memory_is_exchanged_is_still_read() -> None:
    class Exchange(Callback):
        def on_step(self, training: Training) -> None:
            for parameter in training.model.parameters():
                parameter.data = parameter.data.clone()

    reference, watch = Reference(), Watch(weights=["first"])
    train(make(), recipe(), steps=20, callbacks=[Exchange(), reference, watch])
    assert watch.paths["first"].tolist() == [w[0].item() for w in reference.weights]


# ---------------------------------------------------------------------------------- naming weights


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ("0.wieght[0,0]", r"no weight '0.wieght\[0,0\]'.*0.weight\[0,0\]; the nearest .*\(8, 4\)"),
        ("0.weight", r"is not one entry of 0.weight, which has the shape \(8, 4\). Give 2 whole"),
        ("0.weight[1]", r"Give 2 whole numbers, counted from 0, such as 0.weight\[0,0\]"),
        ("0.weight[8,0]", r"'0.weight\[8,0\]' is not one entry .* \(8, 4\)"),
        ("0.weight[-1,0]", "is not one entry"),
        ("0.weight[1,0", "no weight"),
        ("", "no weight"),
    ],
)
def test_a_weight_that_is_not_there(asked: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        train(make(), recipe(), steps=1, callbacks=[Watch(weights=[asked])])


def test_names_of_weights() -> None:
    net = make_net()
    assert find_weight(net, "0.weight[ 7, 3 ]") == ("0.weight", (7, 3))
    assert find_weight(nn.PReLU(), "weight[0]") == ("weight", (0,))

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))
            self.layer = nn.Conv2d(1, 2, 3)

    assert find_weight(Odd(), "scale") == ("scale", ())
    assert find_weight(Odd(), "first") == ("layer.weight", (0, 0, 0, 0))
    with pytest.raises(UsageError, match="the model has no parameters"):
        find_weight(nn.ReLU(), "first")


# ------------------------------------------------------------------------------------ dead weights


def make_dead(bias: float, optimizer: Any = torch.optim.SGD) -> Workload:
    def make_model() -> nn.Module:
        net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        with torch.no_grad():
            net[0].bias[1] = bias  # pyright: ignore[reportIndexIssue,reportOptionalSubscript]
        return net

    return make(make_model=make_model, make_optimizer=lambda p, lr: optimizer(p, lr=lr))


OPTIMIZERS = [
    torch.optim.SGD,
    lambda p, lr: torch.optim.SGD(p, lr=lr, momentum=0.9, weight_decay=1e-3),
    torch.optim.Adam,
]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_dead_unit_is_told_once_and_a_living_one_never(optimizer: Any) -> None:
    watch = Watch(weights=["0.weight[1,0]", "0.bias[1]", "2.bias[0]"])
    with pytest.warns(UserWarning, match=r"exactly 0 for .* epochs?: unit 1 is dead.* such as 0"):
        train(make_dead(-1e6, optimizer), recipe(), epochs=20, callbacks=[watch])
    assert [text.split()[3] for text in watch.warnings] == ["0.weight[1,0]", "0.bias[1]"]


def test_an_input_that_is_always_0_is_told_from_a_dead_unit() -> None:
    data = (X * torch.tensor([1.0, 0.0, 1.0, 1.0]), Y)
    watch = Watch(weights=["0.weight[1,1]"])
    with pytest.warns(UserWarning, match="what it multiplies is always 0, while other weights of"):
        train(make(train_data=data), recipe(), epochs=3, callbacks=[watch])


def test_a_parameter_that_is_not_trained_is_told() -> None:
    def make_model() -> nn.Module:
        net = make_net()
        next(net.parameters()).requires_grad_(False)
        return net

    with pytest.warns(UserWarning, match=r"no gradient reaches 0.weight at all"):
        train(make(make_model=make_model), recipe(), epochs=3, callbacks=[Watch(["first"])])


def test_no_warning_before_an_epoch_has_passed_or_without_a_step_in_the_rate() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(make_dead(-1e6), recipe(), steps=10, callbacks=[Watch(["0.bias[1]"])])
        # Nothing moves, but there are gradients.
        still = make(make_optimizer=lambda p, lr: torch.optim.SGD(p, lr=0.0))
        train(still, recipe(), epochs=3, callbacks=[Watch(["0.bias[1]"])])


# ------------------------------------------------------------------------------ norms of gradients


class Norms(Callback):
    def __init__(self) -> None:
        self.found: list[float] = []

    def on_records(self, training: Training, records: StepRecords) -> None:
        self.found += [record.gradient_norm for record in records]


def wide() -> nn.Module:
    return nn.Sequential(
        nn.Linear(4, LARGEST_KEPT // 4), nn.Tanh(), nn.Linear(LARGEST_KEPT // 4, 2)
    )


class Scribbler(torch.optim.SGD):
    """Not one of torch's own: it writes into the gradients."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.grad.mul_(2)
        return super().step(closure)


Scribbler.__module__ = "elsewhere"


@pytest.mark.parametrize(
    ("changes", "recipe_changes", "kept"),
    [
        ({}, {}, True),
        ({}, {"micro_batch": 5}, True),
        ({}, {"clip_norm": 0.1}, False),
        ({"make_model": wide}, {}, False),
        ({"make_optimizer": lambda p, lr: Scribbler(p, lr=lr)}, {}, False),
        ({"make_model": lambda: make_net().double(), "train_data": (X.double(), Y)}, {}, True),
    ],
)
def test_the_norms_are_those_before_clipping_however_they_are_measured(
    changes: dict[str, Any], recipe_changes: dict[str, Any], kept: bool
) -> None:
    # At a rate of 0 the gradients do not depend on what is done with them.
    at_rest = {"val_data": None, "metric": None, **changes}
    norms, reference = Norms(), Reference()
    plain = make(**{**at_rest, "make_optimizer": lambda p, lr: torch.optim.SGD(p, lr=0.0)})
    micro_batch = {k: v for k, v in recipe_changes.items() if k == "micro_batch"}
    train(plain, recipe(**micro_batch), epochs=3, callbacks=[reference])
    optimizer = changes.get("make_optimizer", torch.optim.SGD)
    workload = make(**{**at_rest, "make_optimizer": lambda p, lr: optimizer(p, lr=0.0)})
    training = Training(workload, recipe(**recipe_changes), callbacks=[norms])
    assert bool(training._measured_later) == kept
    training.advance(33)
    assert norms.found == pytest.approx(reference.norms, rel=1e-5)
    assert len(norms.found) == 33


def test_gradients_are_kept_only_where_nobody_writes_into_them() -> None:
    net = make_net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    assert parameters_to_keep(optimizer, "cpu") == list(net.parameters())
    assert parameters_to_keep(optimizer, "cuda") == []
    optimizer.register_step_pre_hook(lambda *_: None)
    assert parameters_to_keep(optimizer, "cpu") == []


TORCHS_OWN = [
    optimizer
    for optimizer in vars(torch.optim).values()
    if isinstance(optimizer, type)
    and optimizer not in (torch.optim.Optimizer, torch.optim.LBFGS, torch.optim.SparseAdam)
    and issubclass(optimizer, torch.optim.Optimizer)
]


@pytest.mark.parametrize("optimizer", TORCHS_OWN)
def test_torchs_own_optimizers_leave_gradients_as_they_are(optimizer: Any) -> None:
    parameters = [nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.randn(2, 3))]
    for options in ({}, {"weight_decay": 0.1}, {"maximize": True}, {"foreach": True}):
        try:
            made = optimizer(parameters, lr=0.1, **options)
        except (TypeError, ValueError):
            continue  # it has no such option
        for _ in range(3):
            for parameter in parameters:
                parameter.grad = torch.randn_like(parameter)
            before = [(p.grad, p.grad.clone()) for p in parameters if p.grad is not None]
            made.step()
            assert all(torch.equal(gradient, copy) for gradient, copy in before)


def test_norms_beyond_single_precision_and_of_odd_gradients() -> None:
    some = torch.tensor([3.0, 4.0])
    for factor in (1e-30, 1e30):
        assert norms_of_kept([[some * factor]] * 3) == pytest.approx([5 * factor] * 3)
    sparse = torch.eye(3).to_sparse()
    complexes = torch.tensor([3.0 + 4.0j])
    mixed = norms_of_kept([[some, None], [sparse, some], [None] * 2, [None] * 2, [complexes, None]])
    assert mixed[:2] + mixed[4:] == pytest.approx([5, math.sqrt(28), 5])
    assert math.isnan(mixed[2]) and math.isnan(mixed[3])
    assert math.isnan(norms_of_kept([[torch.tensor([math.nan])]])[0])
    assert norms_of_kept([[torch.zeros(2)]]) == [0.0]
    # A parameter that is never trained, and one that is left out once.
    assert norms_of_kept([[some, None]] * 2) == pytest.approx([5, 5])
    assert norms_of_kept([[some, some], [some, None]]) == pytest.approx([math.sqrt(50), 5])


def test_without_a_reader_no_norm_is_measured() -> None:
    class Careless(Norms):
        needs_gradient_norm = False

    alone, beside, reader = Careless(), Careless(), Norms()
    train(make(), recipe(), steps=20, callbacks=[alone])
    assert all(math.isnan(norm) for norm in alone.found) and len(alone.found) == 20
    train(make(), recipe(), steps=20, callbacks=[beside, reader])
    assert beside.found == reader.found
    assert not any(math.isnan(norm) for norm in reader.found)


@pytest.mark.parametrize(("at_most", "told"), [(math.inf, [11, 9]), (0.0, [1] * 20)])
def test_records_are_told_together_but_not_late(
    at_most: float, told: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(telling, "_BLOCK_SECONDS", at_most)
    counted: list[int] = []

    class Count(Callback):
        def on_records(self, training: Training, records: StepRecords) -> None:
            counted.append(len(records))

    train(make(), recipe(), steps=20, callbacks=[Count()])
    assert counted == told


def test_records_are_a_sequence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(telling, "_BLOCK_SECONDS", math.inf)
    taken: list[StepRecords] = []

    class Take(Callback):
        def on_records(self, training: Training, records: StepRecords) -> None:
            taken.append(records)

    train(make(), recipe(), steps=20, callbacks=[Take()])
    records = taken[0]
    assert [record.step for record in records] == list(range(1, 12))
    assert records[-1] == list(records)[10] and records[-1].step == 11
    assert list(records[2:5]) == list(itertools.islice(records, 2, 5))
