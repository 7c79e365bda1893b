"""The course of a throughput measurement: pilot, rounds in random order, comparisons.

What is timed when is decided here, from the budget; what it means, in laws/timing.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from rightbatch.device.out_of_memory import is_out_of_memory
from rightbatch.errors import NoBatchFitsError, ProbeError
from rightbatch.laws.power_of_two import PowerOfTwo, compare_power_of_two
from rightbatch.laws.timing import StepTimeLaw, fit_step_time
from rightbatch.probes.step_timer import StepTimer, TimedBlock

Progress = Callable[[str, float], None]
"""Called with what is being measured now, and the share of the work that is done."""

MIN_ROUNDS, MAX_ROUNDS = 3, 9
BLOCK_SECONDS = 0.003
"""A block of steps lasts at least this long, so that reading the clock does not matter."""
MAX_BLOCK_STEPS = 64
EVALUATION_EXAMPLES = 512

# Shares of the budget. What the pilot leaves over goes to the rounds.
_DEAREST_SIZE, _ROUNDS, _POWERS = 0.25, 0.7, 0.2


class TimingSession:
    """One measurement: its budget, its random order, and what was timed so far.

    Args:
        timer: Does and times the steps.
        budget_seconds: About how long everything may take.
        budget_examples: About how many examples everything may process; None for any number.
        seed: Of the order of sizes.
        progress: Called with what is being measured and the share done.
        powers_of_two: Whether to compare powers of two with their neighbours.
    """

    def __init__(
        self,
        timer: StepTimer,
        *,
        budget_seconds: float,
        budget_examples: int | None = None,
        seed: int,
        progress: Progress | None = None,
        powers_of_two: bool = True,
    ) -> None:
        self.timer = timer
        self.blocks: list[TimedBlock] = []
        self.power_answers: list[PowerOfTwo] = []
        self.evaluations: list[float] = []
        self.notes: list[str] = []
        self._budget = budget_seconds
        self._budget_examples = math.inf if budget_examples is None else budget_examples
        self._start = timer.clock.now()
        self._rng = np.random.default_rng(seed)
        self._progress = progress
        self._powers_wanted = powers_of_two

    @property
    def spent_seconds(self) -> float:
        """Seconds since the session began."""
        return self.timer.clock.now() - self._start

    def run(self, sizes: Sequence[int]) -> None:
        """Does the whole measurement.

        Args:
            sizes: Micro-batches wanted, ascending.
        """
        pilot = self._pilot(sizes)
        self._time_rounds(pilot)
        self._time_evaluation()
        if self._powers_wanted:
            self._ask_powers_of_two(max(pilot))
        self._tell("Throughput measured", 1.0)

    def _tell(self, what: str, share: float) -> None:
        if self._progress is not None:
            self._progress(what, min(max(share, 0.0), 1.0))

    def _left(self) -> float:
        return max(self._budget - self.spent_seconds, 0.0)

    def _examples_left(self) -> float:
        return max(self._budget_examples - self.timer.examples, 0.0)

    def _pilot(self, sizes: Sequence[int]) -> dict[int, float]:
        """Seconds of one step of each size, as far up as the budget can repeat it."""
        cost: dict[int, float] = {}
        for size in sizes:
            self._tell(f"Warming up at micro-batch {size}", 0.0)
            if self._is_too_dear(size, cost):
                self.notes.append(
                    f"Micro-batches from {size} on were not timed: the budget does not allow "
                    "three repeats of them. The law extends to them."
                )
                break
            try:
                cost[size] = self._try_size(size, is_first=not cost)
            except (ProbeError, NoBatchFitsError):
                raise
            except Exception as error:
                if not self._go_on_without(size, error, is_first=not cost):
                    break
        if not cost:
            raise ProbeError("No training step could be timed. " + " ".join(self.notes))
        return cost

    def _is_too_dear(self, size: int, cost: dict[int, float]) -> bool:
        """Whether a pilot step and three repeats, each warmed up, would eat the budget."""
        if len(cost) < MIN_ROUNDS:
            return False
        largest = max(cost)
        # At most proportional: what does not grow with the size has been paid already.
        expected = cost[largest] * size / largest
        steps = 1 + 2 * MIN_ROUNDS
        return (
            steps * expected > _DEAREST_SIZE * self._left()
            or steps * size > 2 * _DEAREST_SIZE * self._examples_left()
        )

    def _try_size(self, size: int, *, is_first: bool) -> float:
        block = self.timer.time_block(size, 1, warm_up=is_first)
        if block.compute_seconds < 0.05:
            # Cheap enough to look twice: the first step of a size pays for its set-up.
            block = self.timer.time_block(size, 1)
        return max(block.seconds, 1e-9)

    def _go_on_without(self, size: int, error: Exception, *, is_first: bool) -> bool:
        """Judges a failed size: whether larger ones may still be tried."""
        if is_out_of_memory(error):
            if is_first:
                raise NoBatchFitsError(
                    f"A training step with micro-batch {size} does not fit in memory ({error}). "
                    "Lower the precision, or make the model smaller."
                ) from error
            self.notes.append(f"Micro-batch {size} ran out of memory; larger ones were left out.")
            return False
        # A BatchNorm layer refuses a single example; that is no reason to give up on two.
        if size == 1:
            self.notes.append(f"Micro-batch 1 cannot be trained and was left out: {error}")
            return True
        raise ProbeError(
            f"A training step with micro-batch {size} failed with {type(error).__name__}: {error}. "
            "Train one such step by hand and mend what it says."
        ) from error

    def _time_rounds(self, pilot: dict[int, float]) -> None:
        budget = _ROUNDS * self._left()
        plan = plan_rounds(pilot, budget, _ROUNDS * self._examples_left())
        num_rounds = max(size.repeats for size in plan.values())
        # The plan rests on single steps; where they misled, the last rounds are given up.
        deadline = self.spent_seconds + 1.5 * budget
        for index in range(num_rounds):
            if index >= MIN_ROUNDS and self.spent_seconds > deadline:
                self.notes.append("Steps took longer than the warm-up said; rounds were cut.")
                return
            self._tell("Timing steps", index / num_rounds * (1 - _POWERS))
            for size in self._rng.permutation(list(plan)).tolist():
                if plan[size].takes_part(index, num_rounds):
                    self.blocks.append(self._block(size, plan[size].num_steps, index))

    def _block(self, size: int, num_steps: int, index: int) -> TimedBlock:
        return self.timer.time_block(size, num_steps, round_index=index, warm_up=True)

    def _time_evaluation(self) -> None:
        self._tell("Timing evaluation", 1 - _POWERS)
        start = self.spent_seconds
        self.timer.time_evaluation(EVALUATION_EXAMPLES)
        once = max(self.spent_seconds - start, 1e-9)
        repeats = min(max(int(0.05 * self._budget / once), MIN_ROUNDS), MAX_ROUNDS)
        self.evaluations = [self.timer.time_evaluation(EVALUATION_EXAMPLES) for _ in range(repeats)]

    def _ask_powers_of_two(self, largest: int) -> None:
        law = fit_step_time(
            [block.micro_batch for block in self.blocks],
            [max(block.compute_seconds, 1e-9) for block in self.blocks],
            [block.round for block in self.blocks],
            num_draws=2,
        ).law
        powers = powers_worth_asking(law, largest)
        for asked, power in enumerate(powers):
            self._tell(f"Is {power} faster than {power - 1} and {power + 1}?", 1 - _POWERS)
            num_steps = steps_per_block(law.predict(power))
            share = 1 / (len(powers) - asked)
            round_steps = 3 * (num_steps + 1)
            affordable = min(
                share * self._left() / (round_steps * law.predict(power)),
                share * self._examples_left() / (round_steps * power),
                MAX_ROUNDS + 2,
            )
            repeats = int(affordable)
            if repeats < MIN_ROUNDS:
                self.notes.append(f"No budget was left to compare {power} with its neighbours.")
            else:
                self.power_answers.append(self._compare(power, num_steps, repeats))

    def _compare(self, power: int, num_steps: int, repeats: int) -> PowerOfTwo:
        sizes = [power - 1, power, power + 1]
        times: dict[int, list[float]] = {size: [] for size in sizes}
        for index in range(repeats):
            for size in self._rng.permutation(sizes).tolist():
                times[size].append(max(self._block(size, num_steps, index).compute_seconds, 1e-9))
        return compare_power_of_two(power, *(times[size] for size in sizes))


@dataclass(frozen=True, kw_only=True)
class SizePlan:
    """How often a size is timed, and in blocks of how many steps."""

    repeats: int
    num_steps: int

    def takes_part(self, index: int, num_rounds: int) -> bool:
        """Whether the size is timed in this round; its repeats are evenly spread over all."""
        offset = num_rounds // 2
        before = (index * self.repeats + offset) // num_rounds
        return ((index + 1) * self.repeats + offset) // num_rounds > before


def plan_rounds(
    seconds_per_step: dict[int, float], budget_seconds: float, budget_examples: float = math.inf
) -> dict[int, SizePlan]:
    """Shares a budget out: every size at least 3 times, and as equal in cost as possible.

    Where even 3 blocks of a size cost more than its share, the blocks become shorter.

    Args:
        seconds_per_step: Of each size.
        budget_seconds: For all rounds together.
        budget_examples: For all rounds together.

    Returns:
        Repeats and steps per block of each size.

    Example:
        >>> plan = plan_rounds({1: 0.001, 64: 0.1}, 1.0)
        >>> plan[1].repeats, plan[64].repeats
        (9, 4)
    """
    # What one step costs, as a share of whichever budget it strains more.
    cost = {
        size: max(seconds / max(budget_seconds, 1e-9), size / max(budget_examples, 1e-9))
        for size, seconds in seconds_per_step.items()
    }
    wanted = {size: steps_per_block(seconds) for size, seconds in seconds_per_step.items()}
    plan: dict[int, SizePlan] = {}
    left = 1.0
    # Cheapest first: what they do not use of their share goes to the dearer ones.
    for num_done, size in enumerate(sorted(cost, key=lambda each: (wanted[each] + 1) * cost[each])):
        share = max(left, 0.0) / (len(cost) - num_done)
        affordable = int(share / (MIN_ROUNDS * cost[size])) - 1  # one step warms up
        num_steps = min(wanted[size], max(affordable, 1))
        block = (num_steps + 1) * cost[size]
        repeats = min(max(int(share / block), MIN_ROUNDS), MAX_ROUNDS)
        left -= repeats * block
        plan[size] = SizePlan(repeats=repeats, num_steps=num_steps)
    return plan


def steps_per_block(seconds_per_step: float) -> int:
    """How many steps make a block long enough to be timed.

    Args:
        seconds_per_step: Of one step.

    Returns:
        At least 1.

    Example:
        >>> steps_per_block(0.001), steps_per_block(1.0)
        (3, 1)
    """
    return min(max(math.ceil(BLOCK_SECONDS / seconds_per_step), 1), MAX_BLOCK_STEPS)


def powers_worth_asking(law: StepTimeLaw, largest: int) -> list[int]:
    """The powers of two to compare with their neighbours: 64, and the one nearest the knee.

    Args:
        law: The step-time law.
        largest: The largest size that was run; neighbours stay below it.

    Returns:
        Up to two powers of two, ascending; the largest possible one where neither was run; none
        where there is no room for a neighbour on both sides of 4.
    """
    possible = [1 << k for k in range(2, largest.bit_length()) if (1 << k) + 1 <= largest]
    knee = law.knee.value
    wanted = {64} if knee is None or knee < 1 else {64, 1 << round(math.log2(knee))}
    return [power for power in possible if power in wanted] or possible[-1:]
