"""A race: the few runs that find a (batch, learning rate) close to the cheapest.

All runs start from the same weights and see the data in the same order. The learning rate is the
harder half, so it comes first, at a size that the step time and the usual critical batch suggest.

1. **Rate.** One run leads, neighbours in learning rate are tried at a share of its steps, and
   whichever is ahead leads on (`study.rate_search`).
2. **Size.** With the leader half way, runs at other sizes go a part of the way. The steps that
   each takes to the same losses give the critical batch, and with the price of a step the size
   that is expected to be cheapest (`study.conclude`). Where that is another size, it leads on.
3. **To the target.** The leader and its neighbours go on until it arrives.
4. **What is left** of the cost that was allowed tries another size half way, and on to the target
   if it promises to be better; then the learning rate below the choice, to see whether a cliff is
   near. Only what was run can be chosen.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass

from rightbatch.laws.critical_batch import infer_critical_batch
from rightbatch.laws.curve import loss_of_log
from rightbatch.laws.scaling import carry_rate
from rightbatch.study.conclude import (
    LEAST_STEPS,
    Outlook,
    choose_trial,
    look_at_sizes,
    own_share,
)
from rightbatch.study.rate_search import Track, search_rate
from rightbatch.study.records import Cell, RaceRecord
from rightbatch.study.runs import Contestant, OutOfBudgetError, Purse, Run

UNIT_BATCH = 32
"""Costs are told in trainings at this batch: the usual default."""
_FIRST_SIZES = {"plain": (32, 64), "averaging": (64, 128)}
"""The search begins between these: smaller batches waste steps, larger ones examples."""
_SPEND, _SPEND_AGAIN = 2.2, 1.3
"""Examples of a search for a learning rate, in units of its leader's; less at a second size."""
_HALF_WAY = 0.5
_FIRST_LOOK, _LATER_LOOK = 0.6, 0.5
"""How far runs at another size go, as a share of the leader's steps so far, or to the target."""
_WORTH_A_LOOK, _WORTH_CHANGING = 0.12, 0.02
"""A size is looked at if it is expected to cost at most e^0.12 times the best so far, the first
time; it must be cheaper by e^−0.02 after that, and to lead."""
_FIRST_LOOK_PAYS = 2.0
"""The first look is at a size that takes at most this many times the leader's examples."""
_WORTH_MUCH = 0.1
"""What a size must save if the search there costs more than was allowed."""
_BELOW = 0.7
"""How far the learning rate below the choice goes, as a share of the choice's steps."""
_MOST_LOOKS = 3
_FARTHEST = 4
_FARTHEST_BELOW = 16
_LEFT_OVER = 1.5
"""A size is only looked at if this many of its trainings could be paid for."""


@dataclass(frozen=True, kw_only=True)
class RaceSettings:
    """How a race spends its cost.

    Attributes:
        most_examples: One run goes no further; without a target this is how far runs go.
        max_share: Total cost in examples, in units of a training at batch 32.
        least_share: The race may spend this much, whatever the probes took.
        spent_examples: What probes have already used of it.
        seconds: Wall time, or None.
    """

    most_examples: int
    max_share: float = 4.7
    least_share: float = 3.5
    spent_examples: int = 0
    seconds: float | None = None


class Race:
    """One race. `run` does it; `record` gives what is known at any moment.

    Args:
        fresh: Makes a contestant from fresh weights: `fresh(global_batch, learning_rate, seed)`.
        sizes: Batch sizes open to choice, ascending.
        price: Cost of one step at a batch: modelled seconds, examples, or 1.
        first_lr: Where the search for a learning rate begins.
        normalised: Whether the optimizer divides by the gradient's size.
        averaging: Whether it averages gradients over steps, as momentum does.
        usual_batch: The critical batch that is expected before anything is run.
        settings: How to spend.
        has_target: Whether contestants can say that a target was reached.
        target_loss: The loss that counts as trained, where the target is a loss; otherwise what
            the leader has when it meets the target, or when it ends.
        seed: Of the runs and of the decisions.
        progress: Told what is being done, in words.
        clock: Seconds, for the wall-time limit.
    """

    def __init__(
        self,
        fresh: Callable[[int, float, int], Contestant],
        *,
        sizes: Sequence[int],
        price: Callable[[int], float],
        first_lr: float,
        normalised: bool,
        averaging: bool,
        usual_batch: float,
        settings: RaceSettings,
        has_target: bool = True,
        target_loss: float | None = None,
        seed: int = 0,
        progress: Callable[[str], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._fresh = fresh
        self._sizes = tuple(sizes)
        self._price = price
        self._first_lr = first_lr
        self._normalised = normalised
        kind = "averaging" if averaging or normalised else "plain"
        self._usual, self._first_sizes = usual_batch, _FIRST_SIZES[kind]
        self._settings = settings
        self._has_target = has_target
        self._asked_loss = target_loss
        self._seed = seed
        self._say = progress or (lambda _: None)
        self._purse = Purse(settings.seconds, clock)
        self._runs: dict[tuple[int, int], Run] = {}
        self._leader: tuple[int, int] | None = None
        self._stopped_by = "done"

    # ---- what is known -------------------------------------------------------------------------

    @property
    def has_answer(self) -> bool:
        """Whether a run has come far enough to be recommended, if only as the best so far."""
        return self._best_so_far() is not None

    def _best_so_far(self) -> tuple[int, int] | None:
        """The leader, or what stands in for one that diverged or ended without the target."""
        if self._leader is None:
            return None
        arrived = [place for place, run in self._runs.items() if run.state == "reached"]
        leader = self._runs.get(self._leader)
        if arrived and leader is not None and leader.finished and leader.state != "reached":
            return min(arrived, key=lambda place: self._runs[place].steps * self._price(place[0]))
        alive = [place for place, run in self._runs.items() if run.points and not run.dead]
        if self._leader in alive:
            return self._leader
        return min(alive, key=lambda place: self._runs[place].curve.ln_loss[-1], default=None)

    def record(self, evaluation_size: int) -> RaceRecord:
        """The race so far.

        Args:
            evaluation_size: Examples looked at by one evaluation.

        Returns:
            Its record.

        Raises:
            ValueError: If nothing was run yet, or everything diverged.
        """
        best = self._best_so_far()
        if best is None:
            raise ValueError("The race ended before it had an answer; there is nothing to record.")
        begun = {place: run for place, run in self._runs.items() if run.points}
        leader = self._runs[best]
        return RaceRecord(
            leader=list(begun).index(best),
            leader_share=max(self._share(leader), 0.01),
            target_loss=self._target_loss(leader),
            target_reached=leader.state == "reached",
            normalised=self._normalised,
            usual_batch=self._usual,
            sizes=self._sizes,
            trials=tuple(run.record() for run in begun.values()),
            examples=self._purse.examples,
            evaluation_examples=self._purse.looks * evaluation_size,
            seconds=self._purse.elapsed,
            stopped_by=self._stopped_by,
        )

    def _target_loss(self, leader: Run) -> float:
        """The loss that runs are compared to the end at."""
        if self._asked_loss is not None and leader.state == "reached":
            return self._asked_loss
        return loss_of_log(leader.curve.log_loss_at(leader.steps))

    # ---- running -------------------------------------------------------------------------------

    def run(self) -> None:
        """Runs the race to its end, or until its time or the user ends it.

        Ctrl-C ends it at once and is not passed on: what is known so far is worth having.
        """
        try:
            self._race()
        except OutOfBudgetError as stop:
            self._stopped_by = str(stop)
        except KeyboardInterrupt:
            self._stopped_by = "interrupt"

    def _race(self) -> None:
        size = self._first_size()
        self._say(f"race: looking for a learning rate at batch {size}")
        lead = (size, self._search(size, 0, spend=_SPEND, until=_HALF_WAY))
        if self._runs[lead].dead:
            self._leader = None
            self._stopped_by = "diverged"
            return
        lead, changed = self._try_sizes(lead)
        self._say(f"race: batch {lead[0]} leads, on to the target")
        again = _SPEND_AGAIN if changed else _SPEND
        lead = (lead[0], self._search(*lead, spend=again, carried=changed))
        self._try_what_is_left(lead)

    def _search(
        self,
        size: int,
        start: int,
        *,
        spend: float,
        until: float = 1.0,
        carried: bool = False,
    ) -> int:
        """Searches the learning rate at a size; the leader is known at any moment."""

        def run_at(half_octave: int) -> Run:
            return self._run_at(size, half_octave)

        def share(leader: Run) -> float:
            self._leader = (size, self._half_octave(leader))
            return self._share(leader)

        self._leader = (size, start)
        found = search_rate(
            Track(run_at, size), start, spend=spend, share=share, until=until, carried=carried
        )
        self._leader = (size, found)
        return found

    def _run_at(self, size: int, half_octave: int) -> Run:
        place = (size, half_octave)
        if place not in self._runs:
            cell = Cell(global_batch=size, learning_rate=self._first_lr * 2.0 ** (half_octave / 2))
            self._runs[place] = Run(
                cell=cell,
                seed=self._seed,
                contestant=self._fresh(size, cell.learning_rate, self._seed),
                purse=self._purse,
                most_steps=max(1, self._settings.most_examples // size),
            )
        return self._runs[place]

    def _half_octave(self, run: Run) -> int:
        return round(2 * math.log2(run.cell.learning_rate / self._first_lr))

    def _first_size(self) -> int:
        """Where the search begins: the cheapest, were the critical batch the usual one."""
        low, high = self._first_sizes
        near = [size for size in self._sizes if low <= size <= high]
        if not near:
            near = [min(self._sizes, key=lambda size: abs(math.log(size / high)))]
        usual = infer_critical_batch([], near[0], usual=self._usual)
        return min(near, key=lambda s: usual.log_steps(s, near[0]) + math.log(self._price(s)))

    def _share(self, run: Run) -> float:
        """How far a run is; unknown (0) for a target that is no loss, until it arrives."""
        if not self._has_target:
            return run.steps / run.most_steps
        return own_share(run.curve, arrived=run.finished, target_loss=self._asked_loss)

    # ---- other sizes ---------------------------------------------------------------------------

    def _outlook(self, lead: tuple[int, int]) -> Outlook:
        return look_at_sizes(
            [(run.cell, run.curve) for run in self._runs.values()],
            list(self._runs).index(lead),
            leader_share=max(self._share(self._runs[lead]), 0.01),
            sizes=self._sizes,
            price=self._price,
            usual=self._usual,
            normalised=self._normalised,
            seed=self._seed,
        )

    def _next_size(
        self, lead: tuple[int, int], outlook: Outlook, looked: Set[int], *, trainings: float
    ) -> int | None:
        """The cheapest size that was not looked at and can be paid for, if it promises enough."""
        known = {lead[0], *(seen.measured.global_batch for seen in outlook.seen)}
        total = self._total_steps(lead)
        left = self._allowed(lead, outlook, total) - self._purse.examples
        first = len(known | looked) == 1
        if first:
            # Without one other size nothing is known of the critical batch.
            left = max(left, trainings * _FIRST_LOOK_PAYS * total * lead[0])
        candidates = [
            size
            for size in self._sizes
            if size not in known | looked
            and lead[0] / _FARTHEST <= size <= lead[0] * _FARTHEST
            and trainings * total * outlook.step_ratio(size) * size <= left
        ]
        if not candidates:
            return None
        size = min(candidates, key=outlook.expected)
        best = min(outlook.expected(known_size) for known_size in known)
        worth = _WORTH_A_LOOK if first else -_WORTH_CHANGING
        return size if outlook.expected(size) <= best + worth else None

    def _allowed(self, lead: tuple[int, int], outlook: Outlook, total: float) -> float:
        """Examples that the race may take in all, given the leader's steps to the target."""
        unit_steps = total * math.exp(outlook.critical_batch.log_steps(UNIT_BATCH, lead[0]))
        unit = UNIT_BATCH * unit_steps
        settings = self._settings
        return max(settings.max_share * unit - settings.spent_examples, settings.least_share * unit)

    def _go_part_of_the_way(
        self, lead: tuple[int, int], outlook: Outlook, size: int, share: float
    ) -> tuple[int, int]:
        """Runs another size, its learning rate by the saturating law."""
        critical = outlook.critical_batch.median
        carried = carry_rate(
            1.0, at=lead[0], to=size, critical_batch=critical, normalised=self._normalised
        )
        place = (size, lead[1] + round(2 * math.log2(carried)))
        steps = math.ceil(share * self._runs[lead].steps * outlook.step_ratio(size))
        run = self._run_at(*place)
        while run.dead and lead[1] - place[1] < _FARTHEST_BELOW:
            # The learning rate that was carried here before was too high: an octave less.
            place = (size, place[1] - 2)
            run = self._run_at(*place)
        self._say(
            f"race: batch {size}, learning rate {run.cell.learning_rate:.3g}, to step {steps}"
        )
        run.advance_to(max(LEAST_STEPS, steps))
        return place

    def _try_sizes(self, lead: tuple[int, int]) -> tuple[tuple[int, int], bool]:
        """Looks at other sizes from half way; the leader, and whether it is another."""
        places: dict[int, tuple[int, int]] = {}
        for _ in range(_MOST_LOOKS):
            outlook = self._outlook(lead)
            size = self._next_size(lead, outlook, places.keys(), trainings=_LEFT_OVER)
            if size is None:
                break
            share = _LATER_LOOK if self._runs[lead].finished else _FIRST_LOOK
            places[size] = self._go_part_of_the_way(lead, outlook, size, share)
        outlook = self._outlook(lead)
        better = [
            size
            for size in places
            if outlook.was_seen(size)
            and outlook.expected(size) < -self._worth_changing(lead, outlook, size)
        ]
        if not better:
            return lead, False
        return places[min(better, key=outlook.expected)], True

    def _worth_changing(self, lead: tuple[int, int], outlook: Outlook, size: int) -> float:
        """The gain in ln cost that a search for a learning rate at another size is worth."""
        total = self._total_steps(lead)
        left = self._allowed(lead, outlook, total) - self._purse.examples
        needed = _LEFT_OVER * total * outlook.step_ratio(size) * size
        return _WORTH_CHANGING if needed <= left else _WORTH_MUCH

    def _total_steps(self, lead: tuple[int, int]) -> float:
        """Steps of a run to the target, as far as it tells."""
        run = self._runs[lead]
        return run.steps / max(0.15, self._share(run))

    def _try_what_is_left(self, lead: tuple[int, int]) -> None:
        """Spends what is left of the allowed cost on other sizes, as long as one promises."""
        looked: set[int] = set()
        while True:
            self._finish_the_best(lead)
            outlook = self._outlook(lead)
            size = self._next_size(lead, outlook, looked, trainings=_LATER_LOOK)
            if size is None:
                break
            looked.add(size)
            self._go_part_of_the_way(lead, outlook, size, _LATER_LOOK)
        self._look_below(lead)
        self._finish_the_best(lead)

    def _choice(self, lead: tuple[int, int], outlook: Outlook) -> tuple[int, int]:
        """Where the run is that would be chosen now."""
        places = list(self._runs)
        curves = [(run.cell, run.curve) for run in self._runs.values()]
        return places[choose_trial(outlook, curves, places.index(lead))]

    def _left_over(self, lead: tuple[int, int], outlook: Outlook) -> float:
        """Examples that the race may still spend, with the leader at the target."""
        return self._allowed(lead, outlook, self._runs[lead].steps) - self._purse.examples

    def _finish_the_best(self, lead: tuple[int, int]) -> None:
        """Takes a run that promises to be better to the target, if that can be paid for."""
        outlook = self._outlook(lead)
        chosen = self._runs[self._choice(lead, outlook)]
        if chosen.finished or chosen.dead:
            return
        cell = chosen.cell
        steps = self._runs[lead].steps * outlook.step_ratio(cell.global_batch)
        if (steps - chosen.steps) * cell.global_batch <= self._left_over(lead, outlook):
            self._say(
                f"race: batch {cell.global_batch}, learning rate {cell.learning_rate:.3g}, "
                "promises more: on to the target"
            )
            chosen.advance_to(math.ceil(1.3 * steps))

    def _look_below(self, lead: tuple[int, int]) -> None:
        """Runs half an octave below the choice far enough to tell whether a cliff is near."""
        outlook = self._outlook(lead)
        size, half_octave = self._choice(lead, outlook)
        below = self._run_at(size, half_octave - 1)
        steps = math.ceil(_BELOW * self._runs[size, half_octave].steps)
        if below.price_to(steps) <= self._left_over(lead, outlook):
            below.advance_to(steps)
