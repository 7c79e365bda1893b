"""A race: the few runs that find a (batch, learning rate) close to the cheapest.

A plain halving race from fresh weights compares arms early, where small batches look best and
large learning rates have not yet paid for their noise. This one spends its runs where they tell
most:

1. **Ladder.** Very short runs at the baseline's batch (32) climb to a learning rate that trains.
2. **Baseline.** One run at that batch goes to the target. It is the ruler for all others, the
   default that the user would have run, and the unit of cost. Now and then the doubled learning
   rate is tried next to it, and kept where the noise it adds costs less than the speed it gives.
3. **Branches.** From the half-trained baseline, short runs at other batches and learning rates
   show how much noise each adds and how fast it goes, late in training, for a fraction of a run.
   The posterior of a law of progress (`laws.progress`) picks each next one.
4. **Runs.** The few cells that together promise most start from fresh weights, side by side at
   equal modelled cost; the worse drop out; the rest go on to the target. Only what reached the
   target can be chosen.

Runs that are compared with each other share the seed of initial weights and data order; the fresh
runs have another one than the baseline and its branches, so that no choice rests on one draw.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from rightbatch.study.conclude import Cell, Outlook, conclude
from rightbatch.study.records import Kind, RaceRecord, State, TrialPoint, TrialRecord


@dataclass(frozen=True)
class Look:
    """One evaluation: the loss the race compares (inf when not finite), and the target's verdict.

    `reached` is None when no target was given.
    """

    loss: float
    reached: bool | None


class Contestant(Protocol):
    """A run that can be advanced, looked at, and copied under another batch and learning rate."""

    def fork(self, global_batch: int, learning_rate: float) -> Contestant:
        """A copy that goes on with another batch and learning rate; the original is untouched."""
        ...

    def advance(self, num_steps: int) -> None:
        """Does `num_steps` updates."""
        ...

    def look(self) -> Look:
        """Evaluates."""
        ...


@dataclass(frozen=True, kw_only=True)
class RaceSettings:
    """How a race spends its cost.

    Attributes:
        baseline_batch: The baseline's batch.
        first_steps: Steps of the ladder's first rungs.
        max_baseline_examples: The baseline stops here, target or not.
        max_share: Total cost in examples, in units of the baseline's run.
        spent_examples: What probes have already used of that.
        branch_share: Examples for branches, in the same unit.
        num_runs: Fresh runs that start side by side.
        seconds: Wall time, or None.
    """

    baseline_batch: int = 32
    first_steps: int = 10
    max_baseline_examples: int
    max_share: float = 4.8
    spent_examples: int = 0
    branch_share: float = 0.7
    num_runs: int = 2
    seconds: float | None = None


class _OutOfBudgetError(Exception):
    """The race has to end now; carries why."""


@dataclass
class _Trial:
    """A run under way and what was seen of it."""

    kind: Kind
    cell: Cell
    contestant: Contestant
    seed: int = 0
    start_progress: float = 0.0
    steps: int = 0
    progress: float = 0.0
    state: State = "stopped"
    first_met: int | None = None
    steps_to_target: int | None = None
    points: list[TrialPoint] = field(default_factory=list[TrialPoint])

    @property
    def dead(self) -> bool:
        return self.state == "diverged"


@dataclass(frozen=True)
class _Checkpoint:
    """The baseline at one moment."""

    progress: float
    steps: int
    num_points: int
    contestant: Contestant


_WORTH_DOUBLING = 0.35
"""e-folds of progress that the noise of a doubled learning rate may cost: half of what it saves,
since noise goes on growing for a while."""
_MOST_ALLOWANCE = 1.5
_FEWEST_RUNS = 3.0
_FINALS_SEED = 7919
_MOST_FALLS = 3
"""How often the baseline may diverge before it is given up."""


class Race:
    """One race. `run` does it; `record` gives what is known at any moment.

    Args:
        fresh: Makes a contestant from fresh weights: `fresh(global_batch, learning_rate, seed)`.
        sizes: Batch sizes open to choice, ascending.
        price: Cost of one step at a batch: modelled seconds, examples, or 1.
        first_lr: Where the ladder starts.
        normalised: Whether the optimizer divides by the gradient's size.
        settings: How to spend.
        target_loss: The loss that counts as trained, where the target is a loss; otherwise what
            the baseline has when it meets the target, or when it ends.
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
        settings: RaceSettings,
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
        self._settings = settings
        self._seed = seed
        self._say = progress or (lambda _: None)
        self._clock = clock
        self._started = clock()
        self._trials: list[_Trial] = []
        self._baseline: _Trial | None = None
        self._initial_loss = math.inf
        self._asked_loss = target_loss
        self._target_loss: float | None = None
        self._target_reached = False
        self._max_examples = math.inf
        self._examples = 0
        self._looks = 0
        self._stopped_by = "done"
        self._cached: tuple[object, Outlook] | None = None

    # ---- what is known -------------------------------------------------------------------------

    @property
    def has_ruler(self) -> bool:
        """Whether the baseline has finished, so that conclusions can be drawn."""
        return self._target_loss is not None

    def record(self, evaluation_size: int) -> RaceRecord:
        """The race so far.

        Args:
            evaluation_size: Examples looked at by one evaluation.

        Returns:
            Its record.

        Raises:
            ValueError: If the baseline has not finished: nothing can be concluded.
        """
        if self._target_loss is None:
            raise ValueError("The race ended before its baseline; there is nothing to record.")
        return RaceRecord(
            baseline_batch=self._settings.baseline_batch,
            target_loss=self._target_loss,
            target_reached=self._target_reached,
            normalised=self._normalised,
            sizes=self._sizes,
            trials=self._records(),
            examples=self._examples,
            evaluation_examples=self._looks * evaluation_size,
            seconds=self._clock() - self._started,
            stopped_by=self._stopped_by,
        )

    def _records(self) -> tuple[TrialRecord, ...]:
        return tuple(
            TrialRecord(
                kind=t.kind,
                global_batch=t.cell.global_batch,
                learning_rate=t.cell.learning_rate,
                seed=self._seed if t.kind != "run" else t.seed,
                start_progress=t.start_progress,
                state=t.state,
                steps_to_target=t.steps_to_target,
                points=tuple(t.points),
            )
            for t in self._trials
        )

    def _outlook(self) -> Outlook:
        """What the runs say by now; computed again when one of them has gone on by a fifth."""
        assert self._target_loss is not None  # the ladder and the baseline come first
        seen = tuple((t.state, round(4 * math.log2(t.steps))) for t in self._trials if t.steps)
        if self._cached is None or self._cached[0] != seen:
            self._cached = (seen, self._conclude(self._target_loss))
        return self._cached[1]

    def _conclude(self, target_loss: float) -> Outlook:
        return conclude(
            self._records(),
            target_loss=target_loss,
            normalised=self._normalised,
            sizes=self._sizes,
            price=self._price,
            seed=self._seed,
        )

    # ---- running -------------------------------------------------------------------------------

    def run(self) -> None:
        """Runs the race to its end, or until its cost, its time or the user ends it.

        Ctrl-C ends it at once and is not passed on: what is known so far is worth having.
        """
        try:
            self._run_ladder_and_baseline()
            self._run_branches()
            self._run_finals()
        except _OutOfBudgetError as stop:
            self._stopped_by = str(stop)
        except KeyboardInterrupt:
            self._stopped_by = "interrupt"

    @property
    def stopped_by(self) -> str:
        """What ended the race: `done`, `cost`, `time`, `diverged` or `interrupt`."""
        return self._stopped_by

    def _advance(self, trial: _Trial, num_steps: int) -> float:
        """Goes on with a run and evaluates it; returns the loss."""
        cost = num_steps * trial.cell.global_batch
        if self._examples + cost > self._max_examples:
            raise _OutOfBudgetError("cost")
        limit = self._settings.seconds
        if limit is not None and self._clock() - self._started > limit:
            raise _OutOfBudgetError("time")
        trial.contestant.advance(num_steps)
        self._examples += cost
        trial.steps += num_steps
        trial.progress += num_steps * trial.cell.learning_rate
        return self._look(trial)

    def _look(self, trial: _Trial) -> float:
        look = trial.contestant.look()
        self._looks += 1
        finite = math.isfinite(look.loss)
        if not finite or look.loss > 1.5 * self._initial_loss:
            trial.state = "diverged"
        elif trial.kind in {"baseline", "run"} and self._arrived(look):
            # Twice in a row: a noisy loss dips below the target by luck long before it stays there.
            if trial.first_met is None:
                trial.first_met = trial.steps
            else:
                trial.state, trial.steps_to_target = "reached", trial.first_met
        else:
            trial.first_met = None
        trial.points.append(
            TrialPoint(
                steps=trial.steps, progress=trial.progress, loss=look.loss if finite else None
            )
        )
        return look.loss if finite else math.inf

    def _arrived(self, look: Look) -> bool:
        """Whether a look meets the target; where that was out of reach, the baseline's loss."""
        if self._target_loss is None or self._target_reached:
            return bool(look.reached)
        return look.loss <= self._target_loss

    def _advance_to(self, trial: _Trial, steps: int, cuts: Sequence[float]) -> None:
        """Goes on to `steps`, evaluating at the given shares of the way."""
        begin = trial.steps
        for cut in cuts:
            goal = begin + max(1, round((steps - begin) * cut))
            if goal > trial.steps and trial.state == "stopped":
                self._advance(trial, goal - trial.steps)

    # ---- 1. ladder -----------------------------------------------------------------------------

    def _run_ladder_and_baseline(self) -> None:
        batch = self._settings.baseline_batch
        start = self._fresh(batch, self._first_lr, self._seed)
        self._initial_loss = start.look().loss
        self._looks += 1
        self._say("race: looking for a learning rate at which the baseline trains")
        rungs: dict[int, _Trial] = {}
        short = self._settings.first_steps

        def loss(octave: int, steps: int) -> float:
            if octave not in rungs:
                cell = Cell(global_batch=batch, learning_rate=self._first_lr * 2.0**octave)
                rungs[octave] = _Trial("ladder", cell, start.fork(batch, cell.learning_rate))
                self._trials.append(rungs[octave])
            self._advance_to(rungs[octave], steps, (0.6, 0.8, 1.0))
            return self._ladder_loss(rungs[octave])

        for octave in (0, 2, -2):
            loss(octave, short)
        while True:
            best = min(rungs, key=lambda k: loss(k, short))
            missing = [k for k in (best + 2, best - 2) if k not in rungs and -24 <= k <= 24]
            if not missing:
                break
            loss(missing[0], short)
        near = [best - 1, best, best + 1]
        best = min(near, key=lambda k: loss(k, 3 * short))
        if best == near[-1]:
            best = min(best, best + 1, key=lambda k: loss(k, 3 * short))
        self._run_baseline(rungs[best])

    def _ladder_loss(self, rung: _Trial) -> float:
        """Geometric mean of the last looks; a rung that did not get below the start is hopeless."""
        tail = [p.loss for p in rung.points if p.steps >= 0.6 * rung.steps]
        if rung.dead:
            # Among rates that are all too high, the lowest leads the way down.
            return 1e12 * rung.cell.learning_rate / self._first_lr
        if any(x is None or x >= self._initial_loss for x in tail):
            return 1e6 + (tail[-1] or 0.0)
        return math.exp(float(np.mean(np.log([x for x in tail if x]))))

    # ---- 2. baseline ---------------------------------------------------------------------------

    def _run_baseline(self, rung: _Trial) -> None:
        batch = self._settings.baseline_batch
        trial = _Trial(
            "baseline",
            rung.cell,
            rung.contestant.fork(batch, rung.cell.learning_rate),
            steps=rung.steps,
            progress=rung.progress,
            points=list(rung.points),
        )
        self._baseline = trial
        self._trials.append(trial)
        self._checkpoints: list[_Checkpoint] = []
        self._say("race: running the baseline to the target")
        next_test, best_loss, best_step = 2 * trial.steps, math.inf, trial.steps
        limit = self._settings.max_baseline_examples // batch
        falls = 0
        self._keep_checkpoint(trial)
        while trial.steps < limit and trial.state != "reached":
            if trial.dead:
                falls += 1
                if falls > _MOST_FALLS:
                    break
                self._return_to_checkpoint(trial)
            if trial.steps >= next_test:
                next_test = int(1.7 * trial.steps)
                self._try_doubled_rate(trial)
                continue
            loss = self._advance(trial, max(1, round(0.07 * trial.steps)))
            self._keep_checkpoint(trial)
            if loss < 0.99 * best_loss:
                best_loss, best_step = loss, trial.steps
            elif trial.steps > 1.35 * best_step:
                # It stalls on its own noise: half the learning rate brings the floor down.
                self._change_rate(trial, 0.5)
                best_step = trial.steps
        self._finish_baseline(trial)

    def _keep_checkpoint(self, trial: _Trial) -> None:
        """Keeps copies of the last part of the run, to branch from the middle of it later."""
        batch, rate = trial.cell.global_batch, trial.cell.learning_rate
        kept = self._checkpoints
        if trial.dead:
            return
        if not kept or trial.progress > 1.1 * kept[-1].progress:
            copied = trial.contestant.fork(batch, rate)
            kept.append(_Checkpoint(trial.progress, trial.steps, len(trial.points), copied))
        self._checkpoints = [c for c in kept if c.progress >= 0.4 * trial.progress]

    def _return_to_checkpoint(self, trial: _Trial) -> None:
        """Goes back to before a divergence, with half the learning rate."""
        last = self._checkpoints[-1]
        trial.contestant, trial.state = last.contestant, "stopped"
        trial.progress, trial.steps = last.progress, last.steps
        del trial.points[last.num_points :]
        self._change_rate(trial, 0.5)

    def _change_rate(self, trial: _Trial, factor: float) -> None:
        trial.cell = Cell(
            global_batch=trial.cell.global_batch, learning_rate=trial.cell.learning_rate * factor
        )
        trial.contestant = trial.contestant.fork(trial.cell.global_batch, trial.cell.learning_rate)

    def _try_doubled_rate(self, trial: _Trial) -> None:
        """Runs a little with the rate and with its double; goes on with the better.

        At equal progress the doubled rate has a higher loss, by its noise. Doubling saves 0.69
        e-folds of steps; it pays where the noise costs clearly less.
        """
        batch, rate = trial.cell.global_batch, trial.cell.learning_rate
        steps = trial.steps + max(4, round(0.15 * trial.steps))
        ways = []
        for factor in (2.0, 1.0):
            cell = Cell(global_batch=batch, learning_rate=rate * factor)
            way = _Trial(
                "baseline",
                cell,
                trial.contestant.fork(batch, cell.learning_rate),
                steps=trial.steps,
                progress=trial.progress,
                points=list(trial.points),
            )
            self._advance_to(way, steps, (0.6, 0.8, 1.0))
            ways.append(way)
        doubled, same = ways
        chosen = same
        if not doubled.dead and not same.dead:
            slope = _log_slope(trial.points)
            higher = _log_tail(doubled) - _log_tail(same)
            lead = math.log(_mean_progress(doubled) / _mean_progress(same))
            if higher / slope + lead < _WORTH_DOUBLING:
                chosen = doubled
        if doubled.state == "reached" and same.state != "reached":
            chosen = doubled
        for name in ("cell", "contestant", "steps", "progress", "points", "state", "first_met"):
            setattr(trial, name, getattr(chosen, name))
        trial.steps_to_target = chosen.steps_to_target
        self._keep_checkpoint(trial)

    def _finish_baseline(self, trial: _Trial) -> None:
        """Fixes the target's loss and the budget, and looks a little beyond the target."""
        tail = [p.loss for p in trial.points[-3:] if p.loss is not None]
        if trial.dead or not tail:
            raise _OutOfBudgetError("diverged")
        self._target_reached = trial.state == "reached"
        run_examples = trial.steps * trial.cell.global_batch
        # The probes and the baseline are paid for; branches and one more run must be affordable.
        allowed = self._settings.max_share * run_examples - self._settings.spent_examples
        self._max_examples = max(allowed, self._examples + _FEWEST_RUNS * run_examples)
        reached_loss = math.exp(float(np.mean(np.log(tail))))
        asked = self._asked_loss if self._target_reached else None
        self._target_loss = asked if asked is not None else reached_loss
        state, steps_to_target = trial.state, trial.steps_to_target
        trial.state = "stopped"
        try:
            for _ in range(2):
                self._advance(trial, max(1, round(0.05 * trial.steps)))
        finally:
            if trial.dead:
                trial.points.pop()
            trial.state, trial.steps_to_target = state, steps_to_target

    # ---- 3. branches ---------------------------------------------------------------------------

    def _run_branches(self) -> None:
        baseline = self._baseline
        assert baseline is not None
        reach = baseline.steps_to_target or baseline.steps
        total = next(p.progress for p in baseline.points if p.steps >= reach)
        halfway = min(self._checkpoints, key=lambda c: abs(c.progress - 0.5 * total))
        one_run = reach * baseline.cell.global_batch
        allowed = self._examples + self._settings.branch_share * one_run
        rng = np.random.default_rng(self._seed)
        tried: set[Cell] = set()
        while self._examples < allowed and len(tried) < 8:
            outlook = self._outlook()
            # Alternate between what looks best and what one plausible law says is best.
            draw = int(rng.integers(len(outlook.log_cost)))
            worth = outlook.expected if len(tried) % 2 == 0 else outlook.log_cost[draw]
            order = np.argsort(worth, kind="stable")
            cell = next(outlook.cells[i] for i in order if outlook.cells[i] not in tried)
            tried.add(cell)
            steps = int(min(0.25 * total / cell.learning_rate, 0.3 * one_run / cell.global_batch))
            if steps < 5:
                continue
            self._say(
                f"race: branching off at batch {cell.global_batch}, "
                f"learning rate {cell.learning_rate:.3g}"
            )
            contestant = halfway.contestant.fork(cell.global_batch, cell.learning_rate)
            trial = _Trial(
                "branch",
                cell,
                contestant,
                start_progress=halfway.progress,
                progress=halfway.progress,
            )
            self._trials.append(trial)
            self._advance_to(trial, steps, (0.3, 0.4, 0.5, 0.7, 0.8, 0.9, 1.0))

    # ---- 4. fresh runs -------------------------------------------------------------------------

    def _run_finals(self) -> None:
        self._allow_for_a_lucky_baseline()
        outlook = self._outlook()
        # What cannot be afforded to the target cannot be confirmed: leave it out.
        cells = outlook.portfolio(
            self._settings.num_runs, most_examples=self._max_examples - self._examples
        )
        finalists = [self._start(cell) for cell in cells]
        for share in (0.25,):
            outlook = self._outlook()
            best = outlook.best([t.cell for t in finalists])
            cost = outlook.steps_to_target(best) * self._price(best.global_batch) * share
            for trial in finalists:
                self._go(trial, int(cost / self._price(trial.cell.global_batch)))
            outlook = self._outlook()
            alive = [t for t in finalists if not t.dead]
            alive.sort(key=lambda t: float(outlook.expected[outlook.index(t.cell)]))
            finalists = alive[: max(1, len(finalists) - 1)] or [self._start(self._best_untried())]
        self._finish(finalists)

    def _allow_for_a_lucky_baseline(self) -> None:
        """Measures the budget in trainings at one learning rate, as a user would run them.

        The baseline's learning rate was changed on the way; that can make it quicker than any
        training at its batch with a constant one.
        """
        outlook, batch = self._outlook(), self._settings.baseline_batch
        at_baseline = [c for c in outlook.cells if c.global_batch == batch]
        one_run = batch * outlook.steps_to_target(outlook.best(at_baseline))
        allowed = self._settings.max_share * one_run - self._settings.spent_examples
        self._max_examples = min(
            max(self._max_examples, allowed), _MOST_ALLOWANCE * self._max_examples
        )

    def _start(self, cell: Cell) -> _Trial:
        # Another seed than the baseline's: a learning rate next to the cliff should not pass
        # twice by luck.
        seed = self._seed + _FINALS_SEED
        contestant = self._fresh(cell.global_batch, cell.learning_rate, seed)
        trial = _Trial("run", cell, contestant, seed=seed)
        self._trials.append(trial)
        return trial

    def _go(self, trial: _Trial, steps: int) -> None:
        if trial.state == "stopped" and steps > trial.steps:
            self._say(
                f"race: batch {trial.cell.global_batch}, learning rate "
                f"{trial.cell.learning_rate:.3g}, from fresh weights to step {steps}"
            )
            self._advance_to(trial, steps, (0.3, 0.6, 0.75, 0.85, 0.92, 1.0))

    def _finish(self, finalists: list[_Trial]) -> None:
        """Takes the best to the target; one that does not arrive in time gives way to the next."""
        waiting = list(finalists)
        while waiting:
            outlook = self._outlook()
            waiting.sort(key=lambda t: float(outlook.expected[outlook.index(t.cell)]))
            trial = waiting[0]
            expected = outlook.steps_to_target(trial.cell)
            self._go(trial, max(trial.steps + 2, round(1.08 * trial.steps)))
            late = trial.steps > 1.5 * expected and trial.steps > 8
            if trial.state != "stopped" or late:
                waiting.remove(trial)
            if trial.state == "reached":
                waiting = [t for t in waiting if self._still_promises(t, trial)]
            elif not waiting:
                waiting = [self._start(self._best_untried())]

    def _best_untried(self) -> Cell:
        """The most promising cell that no fresh run has tried."""
        outlook = self._outlook()
        tried = {t.cell for t in self._trials if t.kind == "run"}
        untried = [cell for cell in outlook.cells if cell not in tried]
        if not untried:
            raise _OutOfBudgetError("done")
        return outlook.best(untried)

    def _still_promises(self, trial: _Trial, reached: _Trial) -> bool:
        """Whether a waiting run is expected to beat the one that arrived, and can be afforded."""
        outlook = self._outlook()
        gain = (
            outlook.expected[outlook.index(reached.cell)]
            - outlook.expected[outlook.index(trial.cell)]
        )
        rest = (outlook.steps_to_target(trial.cell) - trial.steps) * trial.cell.global_batch
        return bool(gain > -0.05 and self._examples + rest <= self._max_examples)


def _log_tail(trial: _Trial) -> float:
    losses = [p.loss for p in trial.points[-2:] if p.loss is not None]
    return float(np.mean(np.log(losses)))


def _mean_progress(trial: _Trial) -> float:
    return float(np.mean([p.progress for p in trial.points[-2:]]))


def _log_slope(points: Sequence[TrialPoint]) -> float:
    """Local slope −d ln loss / d ln progress, at least 0.05."""
    recent = [p for p in points if p.loss and p.progress > points[-1].progress / 3.3]
    if len(recent) < 2:
        return 0.3
    x = np.log([p.progress for p in recent])
    y = np.log([float(p.loss or 1.0) for p in recent])
    return max(0.05, -float(np.polyfit(x, y, 1)[0]))


def contenders(record: RaceRecord, *, least_share: float = 0.25) -> list[Cell]:
    """The cells that may be chosen: the baseline's, and those whose fresh run arrived.

    Also those that the budget stopped when they had come far: to a loss that the baseline had
    after `least_share` of its way to the target; twice that share where another run arrived.

    Args:
        record: The race.
        least_share: Share of the baseline's progress.

    Returns:
        Cells, the baseline's first.
    """
    baseline = record.baseline
    runs = [t for t in record.trials if t.kind == "run"]
    arrived = [t for t in runs if t.state == "reached"]
    least = least_share if not arrived else 2 * least_share
    total = baseline.points[-1].progress
    before = [p.loss for p in baseline.points if p.loss and p.progress <= least * total]
    far = min(before, default=math.inf)
    unfinished = [
        t for t in runs if t.state == "stopped" and t.points and (t.points[-1].loss or far) < far
    ]
    return [
        Cell(global_batch=t.global_batch, learning_rate=t.learning_rate)
        for t in [baseline, *arrived, *unfinished]
    ]
