"""Throughput probe: seconds per step against micro-batch, and what follows from them.

1. *Pilot*: one step of each size, ascending, untrusted (it pays for warm-up), says what a step
   costs. Sizes that the budget cannot repeat three times are left to the law.
2. *Rounds*: every round visits the sizes in a new random order; dear sizes sit out some rounds,
   evenly spread. So a machine that slows down meanwhile slows all sizes alike (laws/timing.py).
3. *Powers of two*: B − 1, B, B + 1 in rounds of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from rightbatch.device.clock import Clock, DeviceClock
from rightbatch.errors import UsageError
from rightbatch.isolate import preserved_state
from rightbatch.laws.estimate import Estimate
from rightbatch.laws.power_of_two import PowerOfTwo
from rightbatch.laws.rounds import estimate_median
from rightbatch.laws.timing import (
    SizeTime,
    StepTime,
    StepTimeFit,
    StepTimeLaw,
    fit_step_time,
    powers_of_two,
)
from rightbatch.probes.step_timer import StepTimer, TimedBlock
from rightbatch.probes.timing_session import Progress, TimingSession
from rightbatch.recipe import Precision
from rightbatch.workload import Workload

SHORTEST_SECONDS = 1e-9
"""What a part that costs nothing measurable is taken to cost: laws live on logarithms."""


@dataclass(frozen=True, kw_only=True)
class ThroughputRecord:
    """What the throughput probe found.

    Attributes:
        workload: Name of the workload.
        device: Where it was timed.
        precision: Arithmetic of the forward pass.
        num_threads: Threads torch used; times at another number do not compare.
        seed: Of order, data and weights.
        law: The step-time law of the compute part (forward, backward, update).
        sizes: Each timed size, compute part.
        step_time: Seconds of a whole training step, loading included; what planning uses.
        loader_seconds_per_example: What each further example costs to fetch, collate and move.
        loader_seconds_per_step: What loading costs whatever the size.
        update_seconds: The optimizer's update alone.
        evaluation_seconds_per_example: Validation.
        powers_of_two: Whether a power of two is faster here, at one or two sizes.
        notes: What a reader should know: sizes left out and why, the law's misfit.
        blocks: Every timed block, in order.
        cost_examples: Examples processed.
        cost_seconds: Seconds spent.
    """

    workload: str
    device: str
    precision: Precision
    num_threads: int
    seed: int
    law: StepTimeLaw
    sizes: tuple[SizeTime, ...]
    step_time: StepTime
    loader_seconds_per_example: Estimate
    loader_seconds_per_step: Estimate
    update_seconds: Estimate
    evaluation_seconds_per_example: Estimate
    powers_of_two: tuple[PowerOfTwo, ...]
    notes: tuple[str, ...]
    blocks: tuple[TimedBlock, ...]
    cost_examples: int
    cost_seconds: float


def measure_throughput(
    workload: Workload,
    *,
    device: str = "cpu",
    micro_batches: Sequence[int] | None = None,
    max_micro_batch: int | None = None,
    budget_seconds: float = 4.0,
    max_examples: int | None = None,
    seed: int = 0,
    precision: Precision = "float32",
    powers_of_two: bool = True,
    clock: Clock | None = None,
    progress: Progress | None = None,
) -> ThroughputRecord:
    """Times real training steps at many sizes and fits t(B) = max(floor, α + βB).

    Leaves no trace: the model is a throw-away one, and random state and modes are put back.

    Args:
        workload: What to train.
        device: Where.
        micro_batches: Sizes to time. Default: 1, 2, 4, … up to the limit.
        max_micro_batch: The largest that fits in memory. Default: the training set.
        budget_seconds: About how long it may take; at least three rounds of the three smallest
            sizes are timed in any case.
        max_examples: About how many examples it may process, with the same exception. Default:
            any number.
        seed: Decides initial weights, data order and the order of sizes.
        precision: Arithmetic of the forward pass.
        powers_of_two: Whether to compare powers of two with their neighbours as well.
        clock: Tells the time. Default: the device's.
        progress: Called with what is being measured and the share done.

    Returns:
        Law, sizes and step time, each with its interval.

    Raises:
        UsageError: If a size or the budget is out of range.
        ProbeError: If steps of every size fail.
        NoBatchFitsError: If the smallest size does not fit in memory.

    Example:
        >>> from rightbatch.catalog.load import get
        >>> record = measure_throughput(get("max3"), max_micro_batch=8, budget_seconds=0.3)
        >>> [size.micro_batch for size in record.sizes]
        [1, 2, 4, 8]
    """
    num_examples = workload.num_examples
    limit = num_examples if max_micro_batch is None else min(max_micro_batch, num_examples)
    sizes = _wanted_sizes(micro_batches, limit, num_examples)
    for name, budget in (("budget_seconds", budget_seconds), ("max_examples", max_examples)):
        if budget is not None and not budget > 0:
            raise UsageError(f"{name} is {budget}; it must be positive.")
    with preserved_state(), torch.inference_mode(False), torch.enable_grad():
        torch.manual_seed(seed)
        timer = StepTimer(
            workload,
            device=device,
            precision=precision,
            seed=seed,
            clock=clock or DeviceClock(device),
        )
        session = TimingSession(
            timer,
            budget_seconds=budget_seconds,
            budget_examples=max_examples,
            seed=seed,
            progress=progress,
            powers_of_two=powers_of_two,
        )
        session.run(sizes)
    return _summarise(session, workload.name, device, precision, seed)


def _wanted_sizes(micro_batches: Sequence[int] | None, limit: int, num_examples: int) -> list[int]:
    if limit < 1:
        raise UsageError(f"max_micro_batch is {limit}; it must be at least 1.")
    if micro_batches is None:
        return list(powers_of_two(limit))
    wrong = [size for size in micro_batches if not 1 <= size <= num_examples]
    if wrong or not micro_batches:
        raise UsageError(
            f"micro_batches has {wrong if wrong else 'no sizes'}; each must be between 1 and the "
            f"{num_examples} training examples."
        )
    return sorted({size for size in micro_batches if size <= limit} or {limit})


def _summarise(
    session: TimingSession, workload: str, device: str, precision: Precision, seed: int
) -> ThroughputRecord:
    blocks = session.blocks
    update = estimate_median(
        [max(block.update_seconds, SHORTEST_SECONDS) for block in blocks], "median of blocks"
    )
    compute = _fit(blocks, [block.compute_seconds for block in blocks], seed)
    loader = _fit(blocks, [block.loader_seconds for block in blocks], seed)
    whole = [block.seconds for block in blocks]
    step_time = _fit(blocks, whole, seed, update_seconds=update.value or 0.0).step_time
    law_note = (compute.law.note,) if compute.law.note else ()
    return ThroughputRecord(
        workload=workload,
        device=device,
        precision=precision,
        num_threads=torch.get_num_threads(),
        seed=seed,
        law=compute.law,
        sizes=compute.sizes,
        step_time=step_time,
        loader_seconds_per_example=loader.law.beta_seconds,
        loader_seconds_per_step=loader.law.alpha_seconds,
        update_seconds=update,
        evaluation_seconds_per_example=estimate_median(
            [max(seconds, SHORTEST_SECONDS) for seconds in session.evaluations], "median"
        ),
        powers_of_two=tuple(session.power_answers),
        notes=(*session.notes, *law_note),
        blocks=tuple(blocks),
        cost_examples=session.timer.examples,
        cost_seconds=session.spent_seconds,
    )


def _fit(
    blocks: Sequence[TimedBlock], seconds: Sequence[float], seed: int, update_seconds: float = 0.0
) -> StepTimeFit:
    return fit_step_time(
        [block.micro_batch for block in blocks],
        [max(value, SHORTEST_SECONDS) for value in seconds],
        [block.round for block in blocks],
        update_seconds=update_seconds,
        seed=seed,
    )
