"""Mistakes planted on purpose: each must make a check fail that stands elsewhere in these tests.

A check is a function of another test module. The module is loaded anew with the mistake in place,
so that it sees it wherever it imports from, and the check must then fail with an AssertionError;
without the mistake the same check passes. `pytest -s` prints which check caught what.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from rightbatch.training import (
    activations,
    evaluate,
    loop,
    random_state,
    rates,
    step,
    window_noise,
)
from rightbatch.training.data import loader
from rightbatch.training.data import windows as windows_module
from rightbatch.workload import workload as workload_module

Plant = Callable[[pytest.MonkeyPatch], None]


@dataclass(frozen=True)
class Mistake:
    """A mistake, and the check that must catch it."""

    name: str
    plant: Plant
    file: str
    check: str
    arguments: tuple[Any, ...] = ()


# ------------------------------------------------------------------------------ what is planted


def _counts(workload: Any, model: nn.Module, window: Sequence[Any]) -> list[float]:
    with torch.no_grad():
        return [float(workload.loss_sum(model, batch)[1]) for batch in window]


def divide_by_k(patch: pytest.MonkeyPatch) -> None:
    right = step.compute_gradients

    def wrong(workload: Any, model: nn.Module, window: Sequence[Any], **options: Any) -> Any:
        loss = right(workload, model, window, **options)
        if len(window) > 1:
            # The sums, over the number of micro-batches instead of that of examples.
            factor = sum(_counts(workload, model, window)) / len(window)
            for parameter in model.parameters():
                assert parameter.grad is not None
                parameter.grad.mul_(factor)
        return loss

    patch.setattr(step, "compute_gradients", wrong)


def mean_of_means(patch: pytest.MonkeyPatch) -> None:
    def wrong(workload: Any, model: nn.Module, window: Sequence[Any], **_: Any) -> Any:
        losses = [workload.loss_mean(model, batch)[0] for batch in window]
        mean = torch.stack([loss for loss in losses if bool(loss.isfinite())]).mean()
        mean.backward()
        return mean.detach()

    patch.setattr(step, "compute_gradients", wrong)


def only_the_last_micro_batch(patch: pytest.MonkeyPatch) -> None:
    right = step.compute_gradients

    def wrong(workload: Any, model: nn.Module, window: Sequence[Any], **options: Any) -> Any:
        return right(workload, model, window[-1:], **options)

    patch.setattr(step, "compute_gradients", wrong)


def clip_each_micro_batch(patch: pytest.MonkeyPatch) -> None:
    right = step.optimizer_step

    def wrong(
        workload: Any,
        model: Any,
        optimizer: Any,
        window: Any,
        *,
        clip_norm: Any = None,
        **rest: Any,
    ) -> Any:
        if clip_norm is None:
            return right(workload, model, optimizer, window, **rest)
        counts, summed = _counts(workload, model, window), None
        for batch, count in zip(window, counts, strict=True):
            optimizer.zero_grad()
            step.compute_gradients(workload, model, [batch], autocast=None)
            nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
            own = [count / sum(counts) * p.grad for p in model.parameters()]
            summed = own if summed is None else [a + b for a, b in zip(summed, own, strict=True)]
        for parameter, gradient in zip(model.parameters(), summed or [], strict=True):
            parameter.grad = gradient
        optimizer.step()
        return step.StepResult(torch.tensor(0.0), list(torch._foreach_norm(summed or [])))

    patch.setattr(step, "optimizer_step", wrong)


def leave_gradients(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(step, "_clear_gradients", lambda optimizer: None)


def drop_the_last_window(patch: pytest.MonkeyPatch) -> None:
    right = windows_module.take

    def wrong(remaining: int, global_batch: int, last_batch: Any, smallest: int) -> int:
        return right(remaining, global_batch, "drop", smallest)

    patch.setattr(windows_module, "take", wrong)


def order_by_batch(patch: pytest.MonkeyPatch) -> None:
    right = loop.plan_windows

    def wrong(num_examples: int, *, seed: int, batch_at: Any, **options: Any) -> Any:
        return right(num_examples, seed=seed + batch_at(0), batch_at=batch_at, **options)

    patch.setattr(loop, "plan_windows", wrong)


def keep_the_random_state(patch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def wrong(self: random_state.OwnRandomState) -> Iterator[None]:
        random_state.set_random_states(self.states, self.device)
        yield
        self.states = random_state.get_random_states(self.device)

    patch.setattr(random_state.OwnRandomState, "swapped_in", wrong)


def evaluate_for_good(patch: pytest.MonkeyPatch) -> None:
    right = evaluate.evaluate

    def wrong(workload: Any, model: nn.Module, examples: Any, **options: Any) -> Any:
        result = right(workload, model, examples, **options)
        model.eval()
        return result

    patch.setattr(evaluate, "evaluate", wrong)


def evaluate_in_training_mode(patch: pytest.MonkeyPatch) -> None:
    right = evaluate._evaluate

    def wrong(workload: Any, model: nn.Module, *rest: Any) -> Any:
        return right(workload, model.train(), *rest)

    patch.setattr(evaluate, "_evaluate", wrong)


def warm_up_off_by_one(patch: pytest.MonkeyPatch) -> None:
    right = rates.warmup_factor
    patch.setattr(rates, "warmup_factor", lambda done, warmup: right(done + 1, warmup))


def scale_the_next_rate_too(patch: pytest.MonkeyPatch) -> None:
    right, before = rates.Rates.set, [1.0]

    def wrong(self: rates.Rates, *, factor: float, **options: Any) -> None:
        right(self, factor=min(factor, before[0]), **options)
        before[0] = factor

    patch.setattr(rates.Rates, "set", wrong)


def count_tokens_as_examples(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(workload_module, "count_terms", len)


def draw_from_the_workers_stream(patch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def wrong(seed: int, *place: int) -> Iterator[None]:
        yield

    patch.setattr(loader, "drawing_from", wrong)


def update_statistics_twice(patch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def wrong(buffers: Any) -> Iterator[None]:
        yield

    patch.setattr(activations, "_kept", wrong)


def noise_in_tokens(patch: pytest.MonkeyPatch) -> None:
    right = window_noise.Draw.moments

    def wrong(self: Any, num_examples: int) -> Any:
        return right(self, sum(self._counts))

    patch.setattr(window_noise.Draw, "moments", wrong)


STEP, LOOP, WINDOWS = "test_step.py", "test_loop.py", "data/test_windows.py"
RATES, MODEL, NOISE = "test_rates.py", "test_model.py", "test_window_noise.py"

MISTAKES = [
    Mistake("divided by k", divide_by_k, STEP, "check_that_4_times_64_is_256"),
    Mistake("mean of means", mean_of_means, STEP,
            "check_that_a_ragged_window_is_its_examples_mean"),
    Mistake("last window dropped", drop_the_last_window, LOOP,
            "test_every_example_is_seen_once_an_epoch_the_last_window_smaller"),
    Mistake("random state not restored", keep_the_random_state, LOOP,
            "test_the_callers_random_state_is_not_touched"),
    Mistake("last micro-batch's gradient only", only_the_last_micro_batch, STEP,
            "check_that_4_times_64_is_256"),
    Mistake("clipped per micro-batch", clip_each_micro_batch, STEP,
            "check_that_clipping_comes_after_the_sum"),
    Mistake("gradients not cleared", leave_gradients, STEP,
            "test_one_step_of_sgd_is_lr_times_the_mean_gradient"),
    Mistake("model left in evaluation mode", evaluate_for_good, LOOP,
            "test_evaluation_puts_training_modes_back"),
    Mistake("warm-up off by one", warm_up_off_by_one, RATES, "check_the_warm_up"),
    Mistake("scale-lr applied to the next window too", scale_the_next_rate_too, RATES,
            "check_that_scale_lr_is_for_one_window"),
    Mistake("tokens counted as examples", count_tokens_as_examples, STEP,
            "check_that_tokens_weigh_alike"),
    Mistake("data order depends on the batch", order_by_batch, LOOP,
            "test_every_example_is_seen_once_an_epoch_the_last_window_smaller"),
    # Beyond the twelve that were asked for.
    Mistake("evaluated in training mode", evaluate_in_training_mode, LOOP,
            "test_evaluation_is_exact_whatever_its_batch", (33,)),
    Mistake("augmentation drawn from the worker's own stream", draw_from_the_workers_stream,
            WINDOWS, "check_that_draws_do_not_depend_on_the_workers"),
    Mistake("running statistics updated twice", update_statistics_twice, MODEL,
            "check_that_running_statistics_are_updated_once"),
    Mistake("noise scale in tokens", noise_in_tokens, NOISE,
            "test_a_training_measures_the_noise_scale_in_examples", (40, 10, "keep", 32)),
]  # fmt: skip


def check_of(mistake: Mistake) -> Callable[[], None]:
    """The check, from a module that is loaded anew."""
    name = f"planted_{Path(mistake.file).stem}"
    spec = importlib.util.spec_from_file_location(name, Path(__file__).parent / mistake.file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    finally:
        del sys.modules[name]
    check = getattr(module, mistake.check)
    return lambda: check(*mistake.arguments)


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.name)
def test_a_planted_mistake_is_caught(mistake: Mistake, monkeypatch: pytest.MonkeyPatch) -> None:
    check_of(mistake)()
    mistake.plant(monkeypatch)
    with pytest.raises(AssertionError) as caught:
        check_of(mistake)()
    assert caught.traceback[-1].path != Path(__file__), "the mistake itself failed, not the check"
    print(f"caught: {mistake.name:50} by {mistake.file}::{mistake.check}")


def test_twelve_mistakes_are_among_them() -> None:
    assert len({mistake.plant for mistake in MISTAKES}) == len(MISTAKES) >= 12
