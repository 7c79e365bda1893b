"""Learning rate and batch size over a training: what is asked for at each point.

Everything is a function of how far the training is, so that a resumed run goes on exactly, and so
that the same schedule can be drawn before it is run. Batches are scheduled by *examples*, since
steps change their meaning when the batch does.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence

from rightbatch.errors import UsageError


def warmup_factor(step: int, warmup_steps: int) -> float:
    """Linear warm-up: (step + 1) / (warmup_steps + 1), and 1 from step `warmup_steps` on.

    Args:
        step: Updates already done.
        warmup_steps: Updates below the full learning rate.

    Returns:
        A factor in (0, 1].

    Example:
        >>> [warmup_factor(step, 3) for step in range(5)]
        [0.25, 0.5, 0.75, 1.0, 1.0]
    """
    return min(1.0, (step + 1) / (warmup_steps + 1))


def cosine_factor(progress: float, final: float = 0.0) -> float:
    """Half a cosine from 1 to `final`: final + (1 − final)(1 + cos πp)/2.

    Args:
        progress: Share p of the training that is done; beyond 1 counts as 1.
        final: The factor at the end.

    Returns:
        The factor.

    Example:
        >>> cosine_factor(0.0), round(cosine_factor(0.5), 6), cosine_factor(1.0)
        (1.0, 0.5, 0.0)

    References:
        Loshchilov and Hutter 2017, "SGDR", eq. 5, without restarts.
    """
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * min(max(progress, 0.0), 1.0)))


def step_factor(progress: float, decay_at: Sequence[float], decay: float) -> float:
    """`decay` once for every milestone that is passed.

    Args:
        progress: Share of the training that is done.
        decay_at: Milestones, as shares of the training.
        decay: What the learning rate is multiplied by at each.

    Returns:
        The factor.

    Example:
        >>> [round(step_factor(p, (0.5, 0.75), 0.1), 3) for p in (0.49, 0.5, 0.8)]
        [1.0, 0.1, 0.01]
    """
    return decay ** sum(progress >= milestone for milestone in decay_at)


def batch_at(examples: int, global_batch: int, ramp: Sequence[tuple[int, int]]) -> int:
    """The global batch after so many examples.

    Args:
        examples: Examples processed.
        global_batch: The batch before the first phase of the ramp.
        ramp: Phases (from this many examples on, this batch), in order.

    Returns:
        The batch.

    Example:
        >>> [batch_at(n, 32, ((1000, 64), (3000, 128))) for n in (0, 999, 1000, 5000)]
        [32, 32, 64, 128]
    """
    position = bisect_right(ramp, examples, key=lambda phase: phase[0])
    return global_batch if position == 0 else ramp[position - 1][1]


def doubling_ramp(
    global_batch: int, largest: int, *, first_examples: int, growth: float = 2.0
) -> tuple[tuple[int, int], ...]:
    """Small first, then larger: the batch doubles, each phase `growth` times as long.

    Args:
        global_batch: The batch to begin with.
        largest: The batch to end with; the last phase has exactly this.
        first_examples: Examples at the first batch.
        growth: How much longer, in examples, each phase is than the one before.

    Returns:
        Phases for `batch_at`.

    Raises:
        UsageError: If a number is not positive or the ramp does not rise.

    Example:
        >>> doubling_ramp(32, 200, first_examples=1000)
        ((1000, 64), (3000, 128), (7000, 200))
    """
    if min(global_batch, first_examples) < 1 or growth <= 0 or largest < global_batch:
        raise UsageError(
            f"A ramp from batch {global_batch} to {largest} with {first_examples} examples first "
            f"and growth {growth} does not rise. Give positive numbers and a larger last batch."
        )
    phases: list[tuple[int, int]] = []
    at, length, batch = 0.0, float(first_examples), global_batch
    while batch < largest:
        at, length, batch = at + length, length * growth, min(2 * batch, largest)
        phases.append((round(at), batch))
    return tuple(phases)


def raise_batch_instead(
    global_batch: int,
    decay_at: Sequence[float],
    decay: float,
    *,
    total_examples: int,
    largest: int,
) -> tuple[tuple[tuple[int, int], ...], float]:
    """A step schedule of the learning rate, turned into one of the batch.

    The noise of SGD goes with ε/B: multiplying the batch by 1/decay does to it what multiplying
    the learning rate by decay does, in fewer steps, until the batch nears N or the critical batch.

    Args:
        global_batch: The batch to begin with.
        decay_at: Milestones of the learning rate, as shares of the training.
        decay: What the learning rate would be multiplied by at each, below 1.
        total_examples: Examples of the whole training.
        largest: The batch is not raised beyond this.

    Returns:
        Phases for `batch_at`, and the factor by which the learning rate still has to fall at the
        end because the batch could not rise any more (1 where it could, but for the rounding of
        the batch).

    Raises:
        UsageError: If decay is not between 0 and 1.

    Example:
        >>> raise_batch_instead(32, (0.5, 0.75), 0.25, total_examples=8000, largest=256)
        (((4000, 128), (6000, 256)), 0.5)

    References:
        Smith et al. 2018, "Don't Decay the Learning Rate, Increase the Batch Size".
    """
    if not 0 < decay < 1:
        raise UsageError(f"decay is {decay}; a learning rate falls by a factor between 0 and 1.")
    phases: list[tuple[int, int]] = []
    wanted, batch = float(global_batch), global_batch
    for milestone in sorted(decay_at):
        wanted = wanted / decay
        batch = min(round(wanted), largest)
        phases.append((round(milestone * total_examples), batch))
    return tuple(phases), batch / wanted


def follow_noise_scale(
    noise_scale: float, *, reference_batch: int, reference_noise: float, largest: int
) -> int:
    """The batch that keeps its proportion to the square root of the noise scale: B ∝ √B_noise.

    Args:
        noise_scale: The noise scale now, in examples.
        reference_batch: The batch that was chosen when it was `reference_noise`.
        reference_noise: The noise scale then.
        largest: The batch is not raised beyond this.

    Returns:
        A batch, at least 1.

    Raises:
        UsageError: If a noise scale is not positive.

    Example:
        >>> follow_noise_scale(400, reference_batch=32, reference_noise=100, largest=1000)
        64

    References:
        McCandlish et al. 2018, "An Empirical Model of Large-Batch Training", section 2.4 and
        appendix C: the batch that trades time against examples at a fixed rate.
    """
    if noise_scale <= 0 or reference_noise <= 0:
        raise UsageError(
            f"The noise scales are {noise_scale} and {reference_noise}; where one is not "
            "positive it is unresolved, and the batch stays as it is."
        )
    wanted = reference_batch * math.sqrt(noise_scale / reference_noise)
    return min(max(round(wanted), 1), largest)
