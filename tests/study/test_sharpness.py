"""Sharpness over batch sizes: settings, pairs and sentences, on trainings with known answers."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import rightbatch as rb
from rightbatch.cli.render_sharpness_comparison import as_text
from rightbatch.errors import UsageError
from rightbatch.study.sharpness import compare_sharpness
from rightbatch.study.sharpness.records import (
    SharpnessComparison,
    SharpnessOfRun,
    SharpnessSetting,
)
from rightbatch.study.sharpness.verdict import judge_setting


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def regression(**changes: Any) -> rb.Workload:
    """The Hessian is 2XᵀX/N wherever a training ends: no batch size can be flatter."""
    x = torch.randn(64, 3, generator=torch.Generator().manual_seed(0))
    y = x.sum(dim=1, keepdim=True)
    settings: dict[str, Any] = {
        "name": "regression",
        "make_model": lambda: nn.Linear(3, 1, bias=False),
        "train_data": (x, y),
        "val_data": (x[:20], y[:20]),
        "loss": F.mse_loss,
    }
    return rb.Workload(**(settings | changes))


OPTIONS: dict[str, Any] = {
    "batch_sizes": [8, "full"],
    "learning_rate": 0.05,
    "tuned_rates": {8: 0.1, 64: 0.2},
    "epochs": 2,
    "seeds": 3,
}


def options(**changes: Any) -> dict[str, Any]:
    return {**OPTIONS, **changes}


@pytest.fixture(scope="module")
def found() -> SharpnessComparison:
    return compare_sharpness(regression(), **OPTIONS)


def setting_of(found: SharpnessComparison, matched: str, rate: str) -> SharpnessSetting:
    return next(s for s in found.settings if (s.matched, s.rate) == (matched, rate))


def test_four_settings(found: SharpnessComparison) -> None:
    assert found.batch_sizes == (8, 64) and found.steps == 16 and found.seeds == (0, 1, 2)
    shown = {
        (s.matched, s.rate): [(z.batch_size, z.learning_rate, z.steps, z.epochs) for z in s.sizes]
        for s in found.settings
    }
    assert shown == {
        ("epochs", "fixed"): [(8, 0.05, 16, 2.0), (64, 0.05, 2, 2.0)],
        ("epochs", "tuned"): [(8, 0.1, 16, 2.0), (64, 0.2, 2, 2.0)],
        ("steps", "fixed"): [(8, 0.05, 16, 2.0), (64, 0.05, 16, 16.0)],
        ("steps", "tuned"): [(8, 0.1, 16, 2.0), (64, 0.2, 16, 16.0)],
    }


def test_every_training_is_done_once(found: SharpnessComparison) -> None:
    assert found.trainings == 4 * 3
    assert len(found.runs) == (2 * 1 + 2 * 2) * 3
    keys = [(r.batch_size, r.learning_rate, r.seed, r.steps) for r in found.runs]
    assert len(set(keys)) == len(keys)
    trained = 3 * 2 * (16 * 8 + 16 * 64)
    assert found.cost_examples > trained


def test_what_has_the_same_hessian_everywhere_is_not_told_apart(found: SharpnessComparison) -> None:
    x = regression().train_data[0]
    top = float(torch.linalg.eigvalsh(2 * x.T @ x / 64)[-1])
    for setting in found.settings:
        for size in setting.sizes:
            assert size.largest_eigenvalue.value == pytest.approx(top, rel=0.01)
        orders = {r.measure: r.order for r in setting.ratios}
        assert orders["λ_max"] == orders["trace"] == "not told apart"


def test_numbers_are_those_of_the_trainings(found: SharpnessComparison) -> None:
    workload = regression()
    run = next(r for r in found.runs if (r.batch_size, r.steps, r.seed) == (64, 2, 1))
    recipe = rb.Recipe(global_batch=64, learning_rate=run.learning_rate)
    trained = rb.train(workload, recipe, steps=2, seed=1)
    start = workload.build_model(1)
    distance = (trained.model.weight - start.weight).detach().norm()  # pyright: ignore
    assert run.distance == pytest.approx(float(distance), rel=1e-5)
    assert run.val_loss == pytest.approx(trained.val_loss, rel=1e-5)
    x, y = workload.train_data
    assert run.train_loss == pytest.approx(
        float(F.mse_loss(trained.model(x), y).detach()), rel=1e-5
    )
    assert run.gap == pytest.approx((run.val_loss or 0) - (run.train_loss or 0))


def test_estimates_are_means_over_seeds(found: SharpnessComparison) -> None:
    size = setting_of(found, "steps", "tuned").sizes[1]
    own = [
        r.distance for r in found.runs if (r.batch_size, r.learning_rate, r.steps) == (64, 0.2, 16)
    ]
    values = [d for d in own if d is not None]
    assert size.distance.n == 3
    assert size.distance.value == pytest.approx(np.exp(np.mean(np.log(values))))
    assert size.gap.n == len(own) == 3


def test_the_learning_rate_decides_how_sharp_a_valley_can_be() -> None:
    """½(uv − 1)² has minima uv = 1 of curvature u² + v²: gradient descent stays only below 2/lr.

    All examples are alike, so that batch sizes differ in nothing but their learning rates.
    """

    class Product(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.u = nn.Parameter(torch.tensor(3.0) + 0.1 * torch.rand(()))
            self.v = nn.Parameter(torch.tensor(0.2) + 0.1 * torch.rand(()))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (self.u * self.v).expand(len(x))

    workload = rb.Workload(
        name="valley",
        make_model=Product,
        train_data=(torch.zeros(16, 1), torch.ones(16)),
        loss=lambda out, wanted: F.mse_loss(out, wanted) / 2,
    )
    own: dict[str, Any] = {"batch_sizes": [4, 16], "epochs": 20, "seeds": 3, "learning_rate": 0.3}
    found = compare_sharpness(workload, **own, tuned_rates={4: 0.3, 16: 0.05})
    tuned, fixed = setting_of(found, "steps", "tuned"), setting_of(found, "steps", "fixed")
    assert (tuned.sizes[0].largest_eigenvalue.value or 9.0) < 2 / 0.3
    assert tuned.verdict == "flatter"
    assert "batch 4 ends flatter than batch 16: λ_max" in tuned.finding
    assert fixed.ratios[0].ratio.value == pytest.approx(1.0)
    swapped = compare_sharpness(workload, **own, tuned_rates={4: 0.05, 16: 0.3})
    assert setting_of(swapped, "steps", "tuned").verdict == "sharper"


# --- verdicts -------------------------------------------------------------------------------------


def run(batch: int, seed: int, top: float, *, loss: float = 0.1, **changes: Any) -> SharpnessOfRun:
    values: dict[str, Any] = {
        "batch_size": batch,
        "learning_rate": 0.1,
        "seed": seed,
        "steps": 9,
        "diverged": False,
        "largest_eigenvalue": top,
        "trace": 2 * top,
        "phi": top / 10,
        "sam_rise": 0.01 * (1 + seed),
        "train_loss": loss,
    }
    return SharpnessOfRun(**(values | changes))


def pairs(small: list[float], large: list[float], **changes: Any) -> dict[int, Any]:
    return {
        8: [run(8, seed, top, **changes) for seed, top in enumerate(small)],
        64: [run(64, seed, top) for seed, top in enumerate(large)],
    }


@pytest.mark.parametrize(
    ("small", "large", "verdict", "words"),
    [
        ([1.0, 2.0, 3.0], [2.0, 4.1, 6.0], "flatter", "batch 8 ends flatter than batch 64: λ_max"),
        ([2.0, 4.1, 6.0], [1.0, 2.0, 3.0], "sharper", "batch 8 ends sharper than batch 64: λ_max"),
        ([1.0, 4.0, 3.0], [2.0, 2.0, 3.0], "not told apart", "are not told apart in sharpness"),
    ],
)
def test_verdicts(small: list[float], large: list[float], verdict: str, words: str) -> None:
    _, found, sentence = judge_setting(pairs(small, large), "epochs", 20, "fixed")
    assert found == verdict
    assert sentence.startswith("After 20 epochs, at one learning rate, ") and words in sentence
    if verdict != "not told apart":
        assert "SAM rise does not tell" in sentence


def test_measures_that_disagree() -> None:
    both = pairs([1.0, 2.0, 3.0], [2.0, 4.1, 6.0])
    both[8] = [run(8, r.seed, r.largest_eigenvalue, phi=9.0 + r.seed) for r in both[8]]
    _, verdict, sentence = judge_setting(both, "steps", 1, "tuned")
    assert verdict == "measures disagree"
    assert sentence.startswith("After 1 step, each at its tuned learning rate, the measures")
    assert "and sharper by φ" in sentence


def test_another_training_loss_is_said() -> None:
    both = pairs([1.0, 2.0, 3.0], [2.0, 4.1, 6.0], loss=0.01)
    both[64] = [run(64, r.seed, r.largest_eigenvalue, loss=0.1 + r.seed / 100) for r in both[64]]
    sentence = judge_setting(both, "epochs", 2, "fixed")[2]
    assert "But the training loss of batch 8 is lower, 0.091 times the other's" in sentence


def test_without_pairs_nothing_is_told() -> None:
    both = pairs([1.0, 2.0], [2.0, 4.0])
    both[64] = [SharpnessOfRun(**{**vars(both[64][0]), "diverged": True}), both[64][1]]
    _, _, sentence = judge_setting(both, "epochs", 2, "fixed")
    assert sentence.endswith("nothing can be told: only 1 seed has both batch sizes.")
    both[64] = [SharpnessOfRun(**{**vars(r), "diverged": True}) for r in both[64]]
    assert judge_setting(both, "epochs", 2, "fixed")[2].endswith("no seed has both batch sizes.")


def test_a_diverged_training_has_no_values() -> None:
    found = compare_sharpness(regression(), **options(tuned_rates={8: 0.1, 64: 50.0}))
    size = setting_of(found, "steps", "tuned").sizes[1]
    assert size.diverged == 3 and not size.largest_eigenvalue.resolved
    assert any("had diverged" in note for note in found.notes)
    assert "nothing can be told: no seed has both" in setting_of(found, "steps", "tuned").finding
    as_text(found)


# --- rates, costs, refusals -----------------------------------------------------------------------


def test_rates_of_a_study() -> None:
    workload = regression()
    study = rb.run_study(
        workload, batch_sizes=[8, 64], learning_rates=[0.1, 0.2], seeds=1, epochs=2
    )
    own = options(tuned_rates=study, learning_rate=None)
    found = compare_sharpness(workload, **own)
    assert dict(found.tuned_rates) == {s.batch_size: s.learning_rate.value for s in study.sizes}
    assert found.learning_rate == found.tuned_rates[0][1]
    assert found.rates_from == "a study of 4 trainings"
    with pytest.raises(UsageError, match="The study is of workload 'regression', and not of 'o'"):
        compare_sharpness(regression(name="o"), **own)
    with pytest.raises(
        UsageError, match=r"no tuned learning rate for batch 16 \(only for: 8, 64\)"
    ):
        compare_sharpness(workload, **{**own, "batch_sizes": [16, 64]})


def test_without_rates_a_study_is_made_and_the_cost_told_first() -> None:
    told: list[str] = []
    compare_sharpness(
        regression(),
        batch_sizes="32,full",
        epochs=1,
        seeds=2,
        progress=lambda what, *_: told.append(what),
    )
    assert told[0].startswith("tuned learning rates: ")
    cost = next(index for index, what in enumerate(told) if what.startswith("cost: "))
    assert all(what.startswith("tuned learning rates: ") for what in told[:cost])
    assert "measurements" in told[cost]


def test_matched_steps_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rightbatch.study.sharpness.compare.MAX_STEPS", 5)
    found = compare_sharpness(regression(), **OPTIONS)
    assert found.steps == 5
    assert any("fewer than batch 8 does in 2 epochs" in note for note in found.notes)


def test_wrong_arguments() -> None:
    workload = regression()
    with pytest.raises(UsageError, match=r"batch_sizes is \[8\]; a comparison needs at least two"):
        compare_sharpness(workload, **options(batch_sizes=[8]))
    with pytest.raises(UsageError, match="steps is 0; it must be at least 1"):
        compare_sharpness(workload, **OPTIONS, steps=0)
    with pytest.raises(UsageError, match="would take up to 6,912 examples, more than 100"):
        compare_sharpness(workload, **OPTIONS, max_cost_examples=100)


def test_two_seeds_are_called_too_few() -> None:
    found = compare_sharpness(regression(), **options(seeds=2))
    assert any("2 seeds: too few" in note for note in found.notes)


def test_the_comparison_leaves_no_trace() -> None:
    random.seed(5)
    np.random.seed(5)
    torch.manual_seed(5)
    before = (random.getstate(), repr(np.random.get_state()), torch.get_rng_state())
    compare_sharpness(regression(), **OPTIONS)
    assert (random.getstate(), repr(np.random.get_state())) == before[:2]
    assert torch.equal(torch.get_rng_state(), before[2])


# --- text -----------------------------------------------------------------------------------------


def test_the_text_opens_with_the_answer(found: SharpnessComparison) -> None:
    text = as_text(found)
    assert text.startswith("regression: batch 8 ends ")
    assert max(len(line) for line in text.splitlines()) <= 80
    assert "None of these is invariant" in text and "Cost: 12 trainings" in text


@pytest.mark.parametrize(
    ("verdicts", "words"),
    [
        (["flatter"] * 4, "ends flatter than batch 64, whatever is held the same."),
        (["sharper"] * 4, "ends sharper than batch 64, whatever is held the same."),
        (["not told apart"] * 4, "neither flatter nor sharper than batch 64, as far as can be"),
        (
            ["flatter", "sharper", "sharper", "measures disagree"],
            "flatter than batch 64 in 1 of 4 settings and sharper in 2; in 1 it is not told apart",
        ),
    ],
)
def test_the_first_sentence(found: SharpnessComparison, verdicts: list[Any], words: str) -> None:
    settings = tuple(
        SharpnessSetting(**{**vars(setting), "verdict": verdict})
        for setting, verdict in zip(found.settings, verdicts, strict=True)
    )
    text = as_text(SharpnessComparison(**{**vars(found), "settings": settings}))
    assert words in " ".join(text.split())
