"""The best learning rate at one batch, found by runs that are compared at equal steps.

One run leads. Its neighbours are tried at a share of the leader's steps, on the same weights and
data; whichever is ahead at equal steps leads on, from where it is, as long as it stays ahead.
Learning rates an octave away are tried early, where it shows soon that they are hopeless, half an
octave away late. A larger learning rate shows its noise late, so the lower neighbour is tried the
longest; as long as it falls behind as much as its smaller steps say, it is not. By the time the
leader arrives, its neighbours have been seen on most of the way that decides, for less than two
runs more.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from rightbatch.study.runs import Run

_FIRST_STEPS = 8
"""The first comparison: below it everything depends on the first few batches."""
_PACE = 1.15
"""The leader goes on by this factor between two comparisons."""
_OCTAVE_SHARE, _OCTAVE_SHARE_EARLY = 0.1, 0.2
_LOWER_SHARE, _LOWER_FIRST_SHARE = 0.5, 0.2
_UPPER_SHARE, _UPPER_SHARE_EARLY = 0.35, 0.5
_EARLY = 0.25
"""Before this share of the leader's way, steps are cheap and a change is better made at once."""
_PLATEAU = 0.05
"""While the leader's ln loss has fallen by less than this it tells nothing of its neighbours: it
may be several octaves too low, or so high that the units have died."""
_PLATEAU_OFFSETS = (-2, 2, -4, 4, -8)
_SURE = 0.2
"""A higher learning rate must be ahead by this share of what its longer steps promise: next to
the cliff, the lower of two equals is the better choice."""
_HOPELESS = 0.7
"""A lower one that is behind by this share of what its shorter steps take is tried no longer."""
_MOST_OCTAVES = 24


@dataclass(frozen=True)
class Track:
    """The runs at one batch, by learning rate: octave / 2 steps from the first.

    Attributes:
        run_at: Gives the run at a half octave, begun when first asked for.
        global_batch: The batch of all of them.
    """

    run_at: Callable[[int], Run]
    global_batch: int


def search_rate(
    track: Track,
    start: int,
    *,
    spend: float,
    share: Callable[[Run], float],
    until: float = 1.0,
    carried: bool = False,
) -> int:
    """Finds the best learning rate and takes it to the target.

    Args:
        track: Runs at one batch.
        start: Half octave to begin at.
        spend: Most examples of all runs, in units of the leader's; more only to replace it.
        share: How far a run has come, as a share of its way to the target; 0 where unknown.
        until: Ends the search when the leader has come this far.
        carried: Whether `start` was found at another batch, so that it is not octaves away.

    Returns:
        Half octave of the leader: finished, unless `until` ended the search or all diverged.
    """
    return _Search(track, start, spend, share, until, carried=carried).search()


class _Trial(NamedTuple):
    """A neighbour, and at what share of the leader's steps it is tried."""

    offset: int
    share: float
    only_if_hopeful: bool = False


class _Search:
    def __init__(
        self,
        track: Track,
        start: int,
        spend: float,
        share: Callable[[Run], float],
        until: float,
        *,
        carried: bool,
    ) -> None:
        self._track = track
        self._lead = start
        self._first = start
        self._spend = spend
        self._share = share
        self._until = until
        self._carried = carried
        self._horizon = max(_FIRST_STEPS, track.run_at(start).steps)
        self._spent_before = track.run_at(start).purse.examples
        self._led: set[tuple[int, int]] = set()
        self._farthest = self._horizon

    @property
    def _leader(self) -> Run:
        return self._track.run_at(self._lead)

    def search(self) -> int:
        while True:
            self._leader.advance_to(self._horizon)
            self._farthest = max(self._farthest, self._horizon)
            if self._leader.dead:
                if self._first - self._lead > 2 * _MOST_OCTAVES:
                    return self._lead
                self._lead -= 2
                continue
            if self._let_others_try():
                # The new leader goes on from where it is, and has to stay ahead of the old one.
                self._horizon = max(_FIRST_STEPS, self._leader.steps)
                continue
            if self._leader.finished or self._share(self._leader) >= self._until:
                return self._lead
            self._horizon = max(self._horizon + 1, int(self._horizon * _PACE))

    def _let_others_try(self) -> bool:
        """Tries the neighbours; whether one of them leads now."""
        horizon = min(self._horizon, self._leader.steps)
        for trial in self._trials():
            steps = int(trial.share * horizon)
            octave = abs(trial.offset) > 1
            if octave and steps < _FIRST_STEPS and self._horizon <= 2 * _FIRST_STEPS:
                steps = _FIRST_STEPS
            if steps < (_FIRST_STEPS if octave else 2 * _FIRST_STEPS):
                continue
            other = self._lead + trial.offset
            if abs(other - self._first) > 2 * _MOST_OCTAVES or (horizon, other) in self._led:
                continue
            if trial.only_if_hopeful and self._hopeless(other):
                continue
            if not self._affordable(other, steps):
                continue
            if self._beats(other, steps):
                self._lead = other
                self._led.add((horizon, other))
                return True
        return False

    def _trials(self) -> list[_Trial]:
        if not self._carried and self._on_plateau(self._leader.steps):
            return [_Trial(offset, _LOWER_SHARE) for offset in _PLATEAU_OFFSETS]
        early = self._share(self._leader) < _EARLY
        octave = _OCTAVE_SHARE_EARLY if early else _OCTAVE_SHARE
        return [
            _Trial(2, octave),
            _Trial(-2, octave),
            _Trial(-1, _LOWER_FIRST_SHARE),
            _Trial(-1, _LOWER_SHARE, only_if_hopeful=True),
            _Trial(1, _UPPER_SHARE_EARLY if early else _UPPER_SHARE),
        ]

    def _on_plateau(self, step: int) -> bool:
        curve = self._leader.curve
        return bool(curve.ln_loss[0] - curve.log_loss_at(step) < _PLATEAU)

    def _affordable(self, other: int, steps: int) -> bool:
        """Whether the others together stay within what the leader's own steps allow."""
        run = self._track.run_at(other)
        allowed = self._spend * (self._farthest + 12 * _FIRST_STEPS) * self._track.global_batch
        price = run.price_to(steps)
        return price == 0 or run.purse.examples - self._spent_before + price <= allowed

    def _beats(self, other: int, steps: int) -> bool:
        """Compares at the last step that both have done."""
        run, leader = self._track.run_at(other), self._leader
        run.advance_to(steps)
        if run.dead:
            return False
        at = min(run.steps, leader.steps)
        if self._on_plateau(at):
            ahead = leader.curve.log_loss_at(at) - run.curve.log_loss_at(at)
            return ahead > _PLATEAU / 2
        # Next to the cliff, the lower of two equals is the better choice.
        earlier = max(1.0, at * 2.0 ** (-_SURE * abs(other - self._lead) / 2))
        ours, theirs = (earlier, at) if other > self._lead else (at, earlier)
        return run.curve.log_loss_at(ours) < leader.curve.log_loss_at(theirs)

    def _hopeless(self, other: int) -> bool:
        """Whether a lower learning rate is behind by about as much as its shorter steps say."""
        run, leader = self._track.run_at(other), self._leader
        if run.steps < 2 * _FIRST_STEPS or run.steps > leader.steps:
            return False
        earlier = run.steps * 2.0 ** (-_HOPELESS * abs(other - self._lead) / 2)
        ours, theirs = run.curve.log_loss_at(run.steps), leader.curve.log_loss_at(earlier)
        return math.isfinite(theirs) and ours > theirs
