"""What a step costs at a batch, by the goal, and which batches are open to choice."""

from __future__ import annotations

from collections.abc import Callable

from rightbatch.laws.efficiency import Price
from rightbatch.laws.split import split_batch
from rightbatch.plan.records import Evidence, Goal
from rightbatch.probes.throughput import ThroughputRecord

PRICES = {
    "time": Price(second=1.0),
    "quality": Price(second=1.0),
    "examples": Price(example=1.0),
    "steps": Price(step=1.0),
}


def make_price(
    goal: Goal, throughput: ThroughputRecord, max_micro_batch: int, replicas: int = 1
) -> Callable[[int], float]:
    """The cost of one step at a global batch, in the goal's unit.

    Args:
        goal: What should be least.
        throughput: The measured step time.
        max_micro_batch: The largest micro-batch that fits.
        replicas: Data-parallel workers.

    Returns:
        Global batch to modelled seconds, examples, or 1.
    """
    price = PRICES[goal]

    def cost(global_batch: int) -> float:
        return (
            price.second * step_seconds(throughput, global_batch, max_micro_batch, replicas)
            + price.example * global_batch
            + price.step
        )

    return cost


def step_seconds(
    throughput: ThroughputRecord, global_batch: int, max_micro_batch: int, replicas: int = 1
) -> float:
    """Modelled seconds of one update, its micro-batches run one after the other."""
    split = split_batch(global_batch, min(max_micro_batch, global_batch), replicas)
    return throughput.step_time.seconds(split.micro_batch, accumulation=split.accumulation)


def max_micro_batch(evidence: Evidence) -> int:
    """The largest micro-batch that was run, or N where memory was not measured."""
    if evidence.memory is None:
        return evidence.setting.num_examples
    return evidence.memory.ceiling.micro_batch


def open_sizes(num_examples: int, replicas: int = 1) -> tuple[int, ...]:
    """The batch sizes open to choice: powers of two up to N, and full batch (N) itself.

    Args:
        num_examples: N.
        replicas: The least: every worker needs an example.

    Returns:
        Sizes, ascending.
    """
    powers = [2**k for k in range(num_examples.bit_length()) if 2**k >= replicas]
    return tuple(sorted({size for size in powers if size <= num_examples} | {num_examples}))
