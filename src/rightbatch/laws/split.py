"""Splitting a global batch over micro-batches and replicas, exactly or with the deviation told."""

from __future__ import annotations

from dataclasses import dataclass

from rightbatch.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class Split:
    """How one update's examples are shared out.

    `global_batch = micro_batch × accumulation × replicas` always holds.

    Attributes:
        global_batch: Examples per update that the split really has.
        micro_batch: Examples in one forward and backward pass on one device.
        accumulation: Micro-batches summed before one update.
        replicas: Data-parallel workers.
        requested: Examples per update that were asked for.
        deviation: `global_batch / requested − 1`; 0 when the split is exact.
    """

    global_batch: int
    micro_batch: int
    accumulation: int
    replicas: int
    requested: int
    deviation: float

    @property
    def exact(self) -> bool:
        """Whether the split has exactly the requested examples per update."""
        return self.global_batch == self.requested

    def __str__(self) -> str:
        product = f"{self.micro_batch} × {self.accumulation} × {self.replicas}"
        if self.exact:
            return f"{product} = {self.global_batch}"
        return (
            f"{product} = {self.global_batch}, not the {self.requested} asked for "
            f"({self.deviation:+.2%})"
        )


def split_batch(
    global_batch: int, max_micro_batch: int, replicas: int = 1, *, tolerance: float = 0.0
) -> Split:
    """Splits a global batch into micro_batch × accumulation × replicas.

    Exact whenever the replicas divide the global batch; otherwise the nearest multiple of the
    replicas, with its deviation stated. Of the splits that are equally near, the one with the
    fewest micro-batches. Nothing is ever floored away: 128 over a limit of 65 is 64 × 2, where
    `128 // 65` would silently train with 65.

    A prime share has only one exact split below itself, one example at a time. `tolerance` lets
    the global batch move by that fraction where this saves micro-batches.

    Args:
        global_batch: Examples per update wanted.
        max_micro_batch: The largest micro-batch that fits on one device.
        replicas: Data-parallel workers.
        tolerance: Largest relative deviation that may be traded for fewer micro-batches.

    Returns:
        The split. `deviation` is 0 when it is exact.

    Raises:
        UsageError: If a number is below 1 or the tolerance is not in [0, 1).

    Example:
        >>> print(split_batch(128, 65))
        64 × 2 × 1 = 128
        >>> print(split_batch(100, 64, replicas=3))
        33 × 1 × 3 = 99, not the 100 asked for (-1.00%)
        >>> print(split_batch(127, 65, tolerance=0.02))
        63 × 2 × 1 = 126, not the 127 asked for (-0.79%)
    """
    numbers = {
        "global_batch": global_batch,
        "max_micro_batch": max_micro_batch,
        "replicas": replicas,
    }
    for name, number in numbers.items():
        if number < 1:
            raise UsageError(f"{name} is {number}; it must be at least 1.")
    if not 0 <= tolerance < 1:
        raise UsageError(f"tolerance is {tolerance}; it must be at least 0 and below 1.")
    shares = _nearest_shares(global_batch, replicas)
    shares += _tolerated_shares(global_batch, replicas, tolerance)
    nearest = abs(shares[0] * replicas - global_batch)

    def order(share: int) -> tuple[int, int, int]:
        off = abs(share * replicas - global_batch)
        # Everything inside the tolerance counts as equally near.
        near = 0 if off <= max(nearest, tolerance * global_batch) else off
        return near, _fewest_micro_batches(share, max_micro_batch), off

    # Of two that are equal in all of that, the smaller batch: memory was the constraint.
    share = min(sorted(set(shares)), key=order)
    accumulation = _fewest_micro_batches(share, max_micro_batch)
    achieved = share * replicas
    return Split(
        global_batch=achieved,
        micro_batch=share // accumulation,
        accumulation=accumulation,
        replicas=replicas,
        requested=global_batch,
        deviation=achieved / global_batch - 1,
    )


def _nearest_shares(global_batch: int, replicas: int) -> list[int]:
    """Examples per replica that bring the product nearest to the global batch (one or two)."""
    below, rest = divmod(global_batch, replicas)
    if rest == 0:
        return [below]
    candidates = [share for share in (below, below + 1) if share >= 1]
    best = min(abs(share * replicas - global_batch) for share in candidates)
    return [share for share in candidates if abs(share * replicas - global_batch) == best]


def _tolerated_shares(global_batch: int, replicas: int, tolerance: float) -> list[int]:
    centre, reach = global_batch / replicas, tolerance * global_batch / replicas
    first, last = int(-((reach - centre) // 1)), int((centre + reach) // 1)
    return list(range(max(1, first), last + 1))


def _fewest_micro_batches(share: int, max_micro_batch: int) -> int:
    """The smallest count k that divides the share into equal micro-batches within the limit."""
    count = -(-share // max_micro_batch)
    while share % count:
        count += 1
    return count
