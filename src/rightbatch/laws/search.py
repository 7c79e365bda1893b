"""Find the largest size that fits, by running few sizes, and answer only with one that ran.

The search knows three things: sizes that fitted, sizes that did not, and, where memory is measured,
each fitting size's peak. Fitting is taken to be monotone. So the truth lies in [lo, hi − 1], where
lo is the largest size that fitted and hi the smallest that did not; with lo ≥ 90 % of hi − 1 the
answer lo is *proven* to be good enough, whatever the law of memory is.

The law only chooses where to look, by the secant through the last two fitting sizes:

1. a small size; the secant from what is fixed (libraries, data, parameters, optimizer state) leads
   to a second size;
2. a little below the predicted ceiling, so that the answer keeps some headroom; in the geometric
   middle of what is possible, as long as the noise of an allocator leaves much possible;
3. just above lo / 0.9, whose failure proves the answer;
4. where a failure has refuted the law, the geometric middle of lo and hi.

Without peaks it is doubling, then the geometric middle.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from rightbatch.errors import UsageError

ALLOCATOR_NOISE_BYTES = 1 << 20
_AIM = 0.97
_NOISE = 0.01
_VAGUE = 1.5
_PEAK_PER_KEPT = 3.0
"""A guess, until two sizes have run: a peak grows by this many times what is kept for backward."""
_STRIDE = 128


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One size that was run.

    Attributes:
        size: Examples.
        fits: Whether it ran within the limit.
        peak_bytes: Its peak memory, where it fitted and was measured.
        fixed_bytes: How much of it is known not to depend on the size (a lower bound).
        growth_bytes: How much each further example is known to need (a lower bound).
    """

    size: int
    fits: bool
    peak_bytes: int | None = None
    fixed_bytes: int | None = None
    growth_bytes: float | None = None


@dataclass(frozen=True, kw_only=True)
class CeilingSearch:
    """Where to look next: a pure function of the trials so far.

    Attributes:
        max_size: The largest size that makes sense (the number of examples).
        start: The first size. Default: 8, or `max_size` if smaller.
        limit_bytes: The memory limit, where peaks are measured.
        base_bytes: Memory before anything was built, where known.
        exact: Go on until the size above the answer has failed.
        tolerance: Without `exact`, how near the answer must be to the largest that may fit.
        max_trials: Without `exact`, stop after so many trials if one fitted; None: never.

    Raises:
        UsageError: If a size or the tolerance is out of range.
    """

    max_size: int
    start: int | None = None
    limit_bytes: int | None = None
    base_bytes: int | None = None
    exact: bool = False
    tolerance: float = 0.9
    max_trials: int | None = 6

    def __post_init__(self) -> None:
        if self.max_size < 1:
            raise UsageError(f"max_size is {self.max_size}; it must be at least 1.")
        if self.start is not None and self.start < 1:
            raise UsageError(f"start is {self.start}; it must be at least 1.")
        if not 0 < self.tolerance <= 1:
            raise UsageError(f"tolerance is {self.tolerance}; it must be above 0 and at most 1.")

    def proven(self, trials: Sequence[Trial]) -> bool:
        """Whether the trials prove the answer to be within the tolerance of the truth.

        Args:
            trials: So far.

        Returns:
            True if so.
        """
        lo, hi = bracket(trials, self.max_size)
        near = 0 < self.tolerance * (hi - 1) <= lo and not self.exact
        # Without a failure the largest size itself is to be run.
        return lo >= hi - 1 or (near and hi <= self.max_size)

    def next_size(self, trials: Sequence[Trial]) -> int | None:
        """The size to run next.

        Args:
            trials: So far, in any order.

        Returns:
            A size that has not been run, in [1, max_size]; or None when the search is over.

        Example:
            >>> search = CeilingSearch(max_size=100, limit_bytes=8 << 30, base_bytes=0)
            >>> search.next_size([])
            8
            >>> search.next_size([Trial(size=8, fits=True, peak_bytes=1 << 30)])
            62
        """
        lo, hi = bracket(trials, self.max_size)
        if self.proven(trials):
            return None
        if lo == 0:
            return self._first_or_smaller(trials, hi)
        if not self.exact and self.max_trials is not None and len(trials) >= self.max_trials:
            return None
        return min(max(self._wanted(trials, lo, hi), lo + 1), hi - 1)

    def _first_or_smaller(self, trials: Sequence[Trial], hi: int) -> int:
        if not trials:
            return min(self.start or 8, self.max_size)
        return max(1, math.isqrt(hi - 1))

    def _wanted(self, trials: Sequence[Trial], lo: int, hi: int) -> int:
        failed = hi <= self.max_size
        if failed and lo >= self.tolerance * (hi - 1):  # near enough, so `exact`
            return (lo + hi) // 2
        prediction = self._predict(trials)
        if prediction is None:
            return _middle(lo, hi) if failed else 2 * lo
        low, likely, high = prediction
        if failed and likely >= hi:  # the failure refuted the law
            return _middle(lo, hi)
        if high > _VAGUE * low:
            wanted = math.isqrt(math.floor(low * min(high, hi)))
            return wanted if failed else max(2 * lo, wanted)
        if not failed and likely >= self.max_size:
            return self.max_size
        return max(math.floor(_AIM * likely), math.floor(lo / self.tolerance) + 1)

    def _predict(self, trials: Sequence[Trial]) -> tuple[float, float, float] | None:
        """The ceiling on a line through the largest size that fitted: low, likely, high.

        Its slope is that of the secant from the size before, give or take the noise of two peaks.
        From a single size it is that of the secant from what is fixed, or a multiple of what each
        example is known to need, if that is less. It is never less than the latter.

        Returns:
            Sizes, none beyond `_STRIDE` times the largest that ran; None when there is nothing to
            draw a line through.
        """
        _, failed = bracket(trials, self.max_size)
        points = sorted((t.size, t.peak_bytes) for t in trials if t.peak_bytes and t.size < failed)
        fixed = max((t.fixed_bytes or 0 for t in trials), default=0) or self.base_bytes
        if self.limit_bytes is None or len(points) + (fixed is not None) < 2:
            return None
        known = max((t.growth_bytes or 0.0 for t in trials), default=0.0)
        (size_0, peak_0), (size_1, peak_1) = [(0, fixed or 0), *points][-2:]
        likely = (peak_1 - peak_0) / (size_1 - size_0)
        noise = max(ALLOCATOR_NOISE_BYTES, _NOISE * peak_1) / (size_1 - size_0)
        low, high = likely - noise, likely + noise
        if len(points) == 1:
            # Noise and all that is fixed but not known to be are still in this secant.
            low = likely = high = min(likely, _PEAK_PER_KEPT * known) if known else likely
        room = max(0, self.limit_bytes - peak_1)

        def ceiling(slope: float) -> float:
            slope = max(slope, known)
            return min(size_1 + (room / slope if slope > 0 else math.inf), _STRIDE * size_1)

        return ceiling(high), ceiling(likely), ceiling(low)


def bracket(trials: Iterable[Trial], max_size: int) -> tuple[int, int]:
    """What the trials say about the ceiling.

    Args:
        trials: So far.
        max_size: The largest size that makes sense.

    Returns:
        `(lo, hi)`: the largest size that fitted (0: none), and the smallest that did not
        (`max_size + 1`: none). A size that fitted above one that did not does not count.
    """
    trials = list(trials)
    hi = min((t.size for t in trials if not t.fits), default=max_size + 1)
    lo = max((t.size for t in trials if t.fits and t.size < hi), default=0)
    return lo, hi


def find_ceiling(search: CeilingSearch, run: Callable[[int], Trial]) -> list[Trial]:
    """Runs a search to its end.

    Args:
        search: Decides the sizes.
        run: Runs one size.

    Returns:
        All trials, in the order in which they were run. `bracket` tells the answer.

    Example:
        >>> search = CeilingSearch(max_size=100, exact=True)
        >>> trials = find_ceiling(search, lambda n: Trial(size=n, fits=n <= 90))
        >>> bracket(trials, 100)
        (90, 91)
    """
    trials: list[Trial] = []
    while (size := search.next_size(trials)) is not None:
        trials.append(run(size))
    return trials


def _middle(lo: int, hi: int) -> int:
    return math.isqrt(lo * hi)
