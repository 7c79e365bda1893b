import math
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter
from torch import Tensor, nn

from rightbatch.errors import NoBatchFitsError, ProbeError, UsageError
from rightbatch.laws.estimate import Estimate
from rightbatch.probes.throughput import ThroughputRecord, measure_throughput
from rightbatch.probes.timing_session import plan_rounds
from rightbatch.workload import Workload

NUM_EXAMPLES = 600


class FakeDevice:
    """A clock that moves only when the planted workload does something on it."""

    def __init__(
        self, seconds_per_step: Callable[[int], float], *, capacity_examples: int | None = None
    ) -> None:
        self.seconds_per_step = seconds_per_step
        self.capacity_examples = capacity_examples
        self.elapsed = 0.0
        self.steps: list[int] = []
        self.load_per_example, self.load_per_step = 0.0, 0.0

    def now(self) -> float:
        return self.elapsed

    def step(self, size: int) -> None:
        if self.capacity_examples is not None and size > self.capacity_examples:
            raise MemoryError(f"{size} examples")
        self.steps.append(size)
        self.elapsed += self.seconds_per_step(size)

    def collate(self, items: list[Tensor]) -> Tensor:
        self.elapsed += self.load_per_step + self.load_per_example * len(items)
        return torch.stack(items)

    def workload(self, **changes: Any) -> Workload:
        def compute_loss(model: nn.Module, batch: Tensor) -> tuple[Tensor, int]:
            if torch.is_grad_enabled():
                self.step(len(batch))
            else:
                self.elapsed += 2e-6 * len(batch)
            return model(batch).sum(), len(batch)

        fields: dict[str, Any] = {
            "name": "planted",
            "make_model": lambda: nn.Linear(1, 1),
            "train_data": list(torch.ones(NUM_EXAMPLES, 1)),
            "compute_loss": compute_loss,
            "collate": self.collate,
        }
        return Workload(**{**fields, **changes})

    def measure(self, **arguments: Any) -> ThroughputRecord:
        return measure_throughput(self.workload(), clock=self, **arguments)


def near(estimate: Estimate, truth: float, rel: float) -> bool:
    return estimate.value is not None and abs(estimate.value / truth - 1) <= rel


def test_a_planted_law_is_found_apart_from_loading() -> None:
    device = FakeDevice(lambda B: 1e-3 + 1e-5 * B)
    device.load_per_step, device.load_per_example = 2e-4, 5e-6
    record = device.measure()
    assert near(record.law.alpha_seconds, 1e-3, 1e-3)
    assert near(record.law.beta_seconds, 1e-5, 1e-3)
    assert near(record.law.knee, 100, 1e-3)
    assert near(record.loader_seconds_per_step, 2e-4, 1e-3)
    assert near(record.loader_seconds_per_example, 5e-6, 1e-3)
    assert near(record.evaluation_seconds_per_example, 2e-6 + 5e-6 + 2e-4 / 512, 1e-3)
    assert [size.micro_batch for size in record.sizes] == [
        1,
        2,
        4,
        8,
        16,
        32,
        64,
        128,
        256,
        512,
        600,
    ]
    # Planning uses what a step of training costs: loading and computing.
    assert record.step_time.seconds(50) == pytest.approx(1.2e-3 + 50 * 1.5e-5, rel=1e-3)
    assert record.notes == ()
    assert record.cost_seconds < 4.0


def test_noise_outliers_and_drift_do_not_tilt_the_law() -> None:
    rng = np.random.default_rng(0)

    def slow_and_noisy(B: int) -> float:
        noise = math.exp(0.05 * rng.standard_normal() + 0.3 * device.elapsed)
        stall = 5.0 if rng.random() < 0.02 else 1.0
        return (1e-3 + 1e-5 * B) * noise * stall

    device = FakeDevice(slow_and_noisy)
    knee = device.measure().law.knee
    assert near(knee, 100, 0.1)
    assert knee.low is not None and knee.high is not None and knee.low <= 100 <= knee.high


def test_a_drift_read_in_ascending_order_would_have_tilted_it() -> None:
    # What the probe avoids: timing sizes one after the other while the machine slows down.
    device = FakeDevice(lambda B: (1e-3 + 1e-5 * B) * math.exp(0.3 * device.elapsed))
    naive = {}
    for B in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512):
        start = device.now()
        for _ in range(max(1, int(0.4 / device.seconds_per_step(B)))):
            device.step(B)
        naive[B] = (device.now() - start) / max(1, len([b for b in device.steps if b == B]))
    slope = (naive[512] - naive[1]) / 511
    assert naive[1] / slope < 60
    device = FakeDevice(lambda B: (1e-3 + 1e-5 * B) * math.exp(0.3 * device.elapsed))
    assert near(device.measure().law.knee, 100, 0.03)


def test_sizes_come_interleaved_in_random_order() -> None:
    record = FakeDevice(lambda B: 1e-3 + 1e-5 * B).measure()
    orders = [
        [block.micro_batch for block in record.blocks if block.round == index] for index in range(3)
    ]
    assert orders[0] != orders[1] and orders[1] != orders[2]
    assert all(order != sorted(order) for order in orders)
    assert sorted(set(orders[0])) == sorted(set(orders[1]))


def test_dear_sizes_are_timed_less_often_but_three_times_and_the_budget_is_kept() -> None:
    device = FakeDevice(lambda B: 1e-3 + 1e-3 * B)
    record = device.measure(budget_seconds=10.0)
    counts = {size.micro_batch: size.n for size in record.sizes}
    assert counts[1] > counts[max(counts)] >= 3
    assert max(counts) < NUM_EXAMPLES
    assert f"Micro-batches from {2 * max(counts)} on were not timed" in record.notes[0]
    assert device.elapsed < 13
    # What was not timed follows the law.
    assert record.step_time.seconds(512) == pytest.approx(1e-3 + 0.512, rel=1e-2)


def test_a_limit_on_examples_is_kept_too() -> None:
    device = FakeDevice(lambda B: 1e-3 + 1e-5 * B)
    record = device.measure(max_examples=20_000)
    assert record.cost_examples < 1.15 * 20_000
    assert min(size.n for size in record.sizes) >= 3
    free = FakeDevice(lambda B: 1e-3 + 1e-5 * B).measure()
    assert free.cost_examples > 2 * record.cost_examples


def test_the_cost_counts_every_example_that_is_trained_on() -> None:
    device = FakeDevice(lambda B: 1e-3 + 1e-5 * B)
    record = device.measure(max_micro_batch=16)
    assert record.cost_examples == sum(device.steps)


def test_a_power_of_two_that_is_faster_is_found_where_it_is() -> None:
    def favours_64(B: int) -> float:
        return (1e-3 + 1e-5 * B) * (0.8 if B == 64 else 1.0)

    answers = {a.micro_batch: a for a in FakeDevice(favours_64).measure().powers_of_two}
    assert answers[64].verdict == "yes"
    assert answers[64].ratio.value == pytest.approx(0.8, abs=0.01)
    assert answers[128].verdict == "no"  # the one next to the knee of 100
    small = FakeDevice(lambda B: 1e-3).measure(max_micro_batch=20).powers_of_two
    assert [answer.micro_batch for answer in small] == [16]
    assert FakeDevice(lambda B: 1e-3).measure(max_micro_batch=4).powers_of_two == ()


def test_only_the_sizes_asked_for_and_never_above_the_limit() -> None:
    record = FakeDevice(lambda B: 1e-3).measure(micro_batches=[5, 50, 500], max_micro_batch=100)
    assert [size.micro_batch for size in record.sizes] == [5, 50]
    device = FakeDevice(lambda B: 1e-3)
    device.measure(max_micro_batch=24)
    assert max(device.steps) == 24


def test_memory_that_runs_out_ends_the_sizes_there() -> None:
    device = FakeDevice(lambda B: 1e-3 + 1e-5 * B, capacity_examples=100)
    record = device.measure()
    assert max(size.micro_batch for size in record.sizes) == 64
    assert "Micro-batch 128 ran out of memory" in record.notes[0]
    with pytest.raises(NoBatchFitsError, match="micro-batch 1 does not fit in memory"):
        FakeDevice(lambda B: 1e-3, capacity_examples=0).measure()


def test_a_model_that_refuses_one_example_is_timed_from_two_on() -> None:
    def refuse_one(B: int) -> float:
        if B == 1:
            raise ValueError("Expected more than 1 value per channel when training")
        return 1e-3 + 1e-5 * B

    record = FakeDevice(refuse_one).measure()
    assert record.sizes[0].micro_batch == 2
    assert "Micro-batch 1 cannot be trained and was left out" in record.notes[0]
    assert near(record.law.alpha_seconds, 1e-3, 1e-3)


def test_a_step_that_fails_is_a_probe_error() -> None:
    def fail(B: int) -> float:
        if B >= 8:
            raise ValueError("mat1 and mat2 shapes cannot be multiplied")
        return 1e-3

    with pytest.raises(ProbeError, match="micro-batch 8 failed with ValueError: mat1 and mat2"):
        FakeDevice(fail).measure()

    def only_one(B: int) -> float:
        raise ValueError("no")

    with pytest.raises(ProbeError, match=r"micro-batch 2 failed with ValueError: no"):
        FakeDevice(only_one).measure()
    with pytest.raises(ProbeError, match=r"No training step could be timed\. Micro-batch 1 cannot"):
        FakeDevice(only_one).measure(max_micro_batch=1)


def test_wrong_arguments_are_refused() -> None:
    device = FakeDevice(lambda B: 1e-3)
    with pytest.raises(UsageError, match=r"micro_batches has \[0, 700\]; each must be between 1"):
        device.measure(micro_batches=[0, 4, 700])
    with pytest.raises(UsageError, match="micro_batches has no sizes"):
        device.measure(micro_batches=[])
    with pytest.raises(UsageError, match="max_micro_batch is 0; it must be at least 1"):
        device.measure(max_micro_batch=0)
    with pytest.raises(UsageError, match="budget_seconds is 0; it must be positive"):
        device.measure(budget_seconds=0)


def test_the_plan_keeps_to_its_budget_and_spreads_the_dear_sizes() -> None:
    plan = plan_rounds({1: 1e-3, 8: 2e-3, 512: 0.1, 1024: 0.2}, 3.0)
    spent = sum(
        p.repeats * (p.num_steps + 1) * s
        for p, s in zip(plan.values(), (1e-3, 2e-3, 0.1, 0.2), strict=True)
    )
    assert spent <= 3.0
    rounds = [i for i in range(9) if plan[1024].takes_part(i, 9)]
    assert len(rounds) == plan[1024].repeats >= 3
    assert np.mean(rounds) == pytest.approx(4, abs=0.7)


def test_few_examples_make_shorter_blocks_and_no_fewer_rounds() -> None:
    seconds = {1: 1e-4, 32: 2e-4, 128: 4e-4}
    free, thrifty = plan_rounds(seconds, 10.0), plan_rounds(seconds, 10.0, 2000)
    assert thrifty[128].repeats == 3 and thrifty[128].num_steps < free[128].num_steps
    assert sum(size * p.repeats * (p.num_steps + 1) for size, p in thrifty.items()) <= 2000
    assert thrifty[1] == free[1], "what costs little is timed as well as ever"


def test_progress_is_told_and_rises_to_one() -> None:
    told: list[tuple[str, float]] = []
    FakeDevice(lambda B: 1e-3).measure(progress=lambda what, share: told.append((what, share)))
    shares = [share for _, share in told]
    assert shares == sorted(shares) and shares[-1] == 1
    assert any(what.startswith("Warming up at micro-batch") for what, _ in told)


def digits_like() -> Workload:
    generator = torch.Generator().manual_seed(0)
    X, y = (
        torch.randn(256, 8, generator=generator),
        torch.randint(0, 3, (256,), generator=generator),
    )
    return Workload(
        name="small",
        make_model=lambda: nn.Sequential(
            nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 3)
        ),
        train_data=(X, y),
        loss=nn.functional.cross_entropy,
        make_optimizer=lambda params, lr: torch.optim.Adam(params, lr=lr),
    )


def test_real_steps_give_a_record_that_survives_json() -> None:
    record = measure_throughput(digits_like(), budget_seconds=0.5)
    assert record.sizes[0].micro_batch == 2  # BatchNorm
    assert record.num_threads == torch.get_num_threads()
    assert 0 < record.step_time.seconds(64) < 0.5
    update = record.update_seconds.value
    assert update is not None and 0 < update < record.step_time.seconds(64)
    adapter = TypeAdapter(ThroughputRecord)
    assert adapter.validate_json(adapter.dump_json(record)) == record


def test_bfloat16_runs_and_is_recorded() -> None:
    record = measure_throughput(digits_like(), budget_seconds=0.2, precision="bfloat16")
    assert record.precision == "bfloat16"


def test_the_probe_is_invisible() -> None:
    workload = digits_like()
    model = workload.build_model(0)
    optimizer = workload.make_optimizer(model.parameters(), 0.1)
    workload.loss_sum(model, workload.train_examples.batch(torch.arange(8)))[0].backward()
    optimizer.step()
    model.eval()
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)

    def everything() -> list[Any]:
        return [
            random.getstate(),
            [
                part if isinstance(part, int | float | str) else part.tolist()
                for part in np.random.get_state()
            ],
            torch.random.get_rng_state().tolist(),
            [tensor.tolist() for tensor in model.state_dict().values()],
            [p.grad.tolist() for p in model.parameters() if p.grad is not None],
            str(optimizer.state_dict()),
            model.training,
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
            torch.get_num_threads(),
            torch.get_default_dtype(),
            torch.are_deterministic_algorithms_enabled(),
        ]

    before = everything()
    measure_throughput(workload, budget_seconds=0.1, max_micro_batch=16)
    assert everything() == before
    with torch.no_grad():
        measure_throughput(workload, budget_seconds=0.1, max_micro_batch=16)
        assert not torch.is_grad_enabled()
    with torch.inference_mode():
        measure_throughput(workload, budget_seconds=0.1, max_micro_batch=16)
        assert torch.is_inference_mode_enabled()
    assert everything() == before
