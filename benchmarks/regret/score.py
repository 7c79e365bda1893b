"""The score: every choice is run on fresh seeds, like the grid's best, and compared with it.

The grid's best was chosen on the grid's seeds, our plans and the peers chose on theirs; all are
run again on seeds that nobody has seen, so that nobody is credited with a lucky run.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from pydantic import TypeAdapter

from rightbatch.errors import UsageError
from rightbatch.recipe import Recipe
from rightbatch.store import safe_name
from rightbatch.workload import Workload

from .peers import ROWS, Choice, Situation
from .running import Arrival, run_recipe
from .truth import RESULTS, Truth, check_truth, load_truth, write_rows

SCHEMA = "rightbatch.grid-scores/2"
FIRST_FRESH_SEED = 100
CUT = 8.0
"""A run on a fresh seed is given up at this many times what the grid's best takes."""
NEVER = CUT - 1
"""The regret of what never arrives is at least this."""
DRAWS = 2000


@dataclass(frozen=True, kw_only=True)
class Scored:
    """A choice and what came of it.

    Attributes:
        choice: The choice.
        seconds: Modelled seconds to target on each fresh seed; None where it did not arrive.
    """

    choice: Choice
    seconds: tuple[float | None, ...]


@dataclass(frozen=True, kw_only=True)
class Scores:
    """The scores of one workload.

    Attributes:
        workload: Its name.
        target: What counted as trained.
        fresh_seeds: On which everything was run.
        best_batch: The grid's best.
        best_rate: Its learning rate.
        best_seconds: Of the grid's best on each fresh seed; None where it did not arrive.
        cap_seconds: Where runs were given up.
        scored: The choices.
    """

    workload: str
    target: str
    fresh_seeds: tuple[int, ...]
    best_batch: int
    best_rate: float
    best_seconds: tuple[float | None, ...]
    cap_seconds: float
    scored: tuple[Scored, ...]


@dataclass(frozen=True, kw_only=True)
class Regret:
    """Seconds of a choice ÷ those of the grid's best − 1, over fresh seeds.

    Attributes:
        mean: Of mean seconds; a lower bound where not all arrived.
        median: Of median seconds.
        low: Lower end of the 95 % interval of the mean (bootstrap over seeds).
        high: Upper end.
        reached: Share of the seeds on which the choice arrived.
    """

    mean: float
    median: float
    low: float
    high: float
    reached: float


def estimate_regret(
    seconds: Sequence[float | None], best: Sequence[float | None], cap: float
) -> Regret:
    """The regret of a choice; runs that did not arrive count as the cap.

    Args:
        seconds: Of the choice on each fresh seed.
        best: Of the grid's best on the same seeds.
        cap: Where runs were given up.

    Returns:
        The regret.

    Example:
        >>> regret = estimate_regret([2.0, 3.0], [1.0, 1.5], cap=8.0)
        >>> regret.mean, regret.low, regret.high, regret.reached
        (1.0, 1.0, 1.0, 1.0)
    """
    ours = np.array([cap if value is None else value for value in seconds])
    theirs = np.array([cap if value is None else value for value in best])
    # The same seeds for both: what a seed does to all choices alike cancels.
    draws = np.random.default_rng(0).integers(len(ours), size=(DRAWS, len(ours)))
    ratios = ours[draws].mean(axis=1) / theirs[draws].mean(axis=1) - 1
    low, high = np.quantile(ratios, [0.025, 0.975])
    return Regret(
        mean=float(ours.mean() / theirs.mean() - 1),
        median=float(np.median(ours) / np.median(theirs) - 1),
        low=float(low),
        high=float(high),
        reached=sum(value is not None for value in seconds) / len(seconds),
    )


def regret_of(scored: Scored, scores: Scores) -> Regret | None:
    """The regret of a choice, or None where there was no choice."""
    if scored.choice.recipe is None:
        return None
    return estimate_regret(scored.seconds, scores.best_seconds, scores.cap_seconds)


def scores_path(name: str) -> Path:
    """Where the scores of a workload are kept."""
    return RESULTS / f"{safe_name(name)}.scores.json"


def save_scores(scores: Scores) -> None:
    """Writes the scores of a workload."""
    content = {"schema": SCHEMA, **TypeAdapter(Scores).dump_python(scores, mode="json")}
    write_rows(scores_path(scores.workload), content, "scored")


def load_scores(name: str) -> Scores | None:
    """The scores of a workload so far, or None.

    Raises:
        UsageError: If the file is of another schema.
    """
    path = scores_path(name)
    if not path.exists():
        return None
    content = json.loads(path.read_text())
    if content.pop("schema", None) != SCHEMA:
        raise UsageError(f"{path.name} is not of schema {SCHEMA}. Delete it and score again.")
    return TypeAdapter(Scores).validate_python(content)


def score_workload(
    workload: Workload,
    *,
    rows: Sequence[str] | None,
    method_seeds: Iterable[int],
    num_fresh: int,
    again: bool,
    say: Callable[[str], None],
) -> Scores:
    """Lets the methods choose, and runs what they chose; what was done before is kept.

    Args:
        workload: Whose grid was measured.
        rows: Methods; None: all.
        method_seeds: Each method chooses once with each.
        num_fresh: Fresh seeds that a choice is run on.
        again: Forget what these methods chose before.
        say: Told what came out.

    Returns:
        The scores; they are also on disk, and were after every choice.

    Raises:
        UsageError: If there is no grid, nothing arrived in it, or a row is unknown.
    """
    wanted = list(ROWS) if rows is None else list(rows)
    if unknown := [row for row in wanted if row not in ROWS]:
        raise UsageError(f"There is no row {unknown[0]!r}. There are: {', '.join(ROWS)}.")
    truth = load_truth(workload.name)
    if truth is None:
        raise UsageError(
            f"The grid of {workload.name!r} was not measured. Measure it first: "
            "python benchmarks/regret.py truth"
        )
    check_truth(truth, workload)
    judge = _Judge(workload, truth, num_fresh, load_scores(workload.name), say)
    if again:
        kept = [s for s in judge.scores.scored if s.choice.row not in wanted]
        judge.scores = replace(judge.scores, scored=tuple(kept))
    for seed in method_seeds:
        for row in wanted:
            judge.score(row, seed)
    return judge.scores


class _Judge:
    """Holds the scores of a workload while they are made."""

    def __init__(
        self,
        workload: Workload,
        truth: Truth,
        num_fresh: int,
        before: Scores | None,
        say: Callable[[str], None],
    ) -> None:
        self._workload, self._truth, self._say = workload, truth, say
        place = truth.grid().choose()
        if place is None:
            raise UsageError(f"Nothing in the grid of {workload.name!r} arrived with all seeds.")
        self._best = Recipe(global_batch=place[0], learning_rate=2.0 ** place[1])
        fresh = tuple(range(FIRST_FRESH_SEED, FIRST_FRESH_SEED + num_fresh))
        same = before is not None and (
            before.fresh_seeds == fresh
            and before.target == truth.target
            and before.best_batch == self._best.global_batch
            and before.best_rate == self._best.learning_rate
        )
        self.scores = before if before is not None and same else self._run_best(fresh, before)
        save_scores(self.scores)

    def _run_best(self, fresh: tuple[int, ...], before: Scores | None) -> Scores:
        """Runs the grid's best on the fresh seeds; choices made before are run again."""
        expected = self._truth.grid().best_seconds
        best_seconds = self._run(self._best, fresh, CUT * expected)
        arrived = [value for value in best_seconds if value is not None]
        if not arrived:
            raise UsageError(
                f"The best of the grid of {self._workload.name!r} arrives on no fresh seed. Its "
                "target is too close to what can be reached; choose another."
            )
        scores = Scores(
            workload=self._workload.name,
            target=self._truth.target,
            fresh_seeds=fresh,
            best_batch=self._best.global_batch,
            best_rate=self._best.learning_rate,
            best_seconds=best_seconds,
            cap_seconds=CUT * float(np.mean(arrived)),
            scored=(),
        )
        choices = [scored.choice for scored in before.scored] if before else []
        for choice in choices:
            scores = _with(scores, self._run_choice(choice, scores))
        return scores

    def score(self, row: str, seed: int) -> None:
        """Lets a method choose and runs what it chose, unless that was done."""
        if any(s.choice.row == row and s.choice.seed == seed for s in self.scores.scored):
            return
        race = [s.choice for s in self.scores.scored if s.choice.row == "race"]
        race.sort(key=lambda choice: choice.seed != seed)
        situation = Situation(
            workload=self._workload,
            truth=self._truth,
            race_examples=race[0].examples if race else None,
        )
        scored = self._run_choice(ROWS[row](situation, seed), self.scores)
        self.scores = _with(self.scores, scored)
        save_scores(self.scores)
        self._say(f"{self._workload.name}: {row} (seed {seed}): {describe(scored, self.scores)}")

    def _run_choice(self, choice: Choice, scores: Scores) -> Scored:
        if choice.recipe is None:
            return Scored(choice=choice, seconds=(None,) * len(scores.fresh_seeds))
        known = [s for s in scores.scored if _same_training(s.choice.recipe, choice.recipe)]
        if known:
            return Scored(choice=choice, seconds=known[0].seconds)
        seconds = self._run(choice.recipe, scores.fresh_seeds, scores.cap_seconds)
        return Scored(choice=choice, seconds=seconds)

    def _run(
        self, recipe: Recipe, seeds: Sequence[int], cap_seconds: float
    ) -> tuple[float | None, ...]:
        law = self._truth.step_time
        step_seconds = law.seconds(recipe.micro_batch, accumulation=recipe.accumulation)
        limit = max(1, math.floor(cap_seconds / step_seconds))
        arrivals = run_recipe(self._workload, recipe, seeds, limit)
        return tuple(_seconds(arrival, step_seconds) for arrival in arrivals)


def _with(scores: Scores, scored: Scored) -> Scores:
    return replace(scores, scored=(*scores.scored, scored))


def _seconds(arrival: Arrival, step_seconds: float) -> float | None:
    steps = arrival.steps_to_target
    return None if steps is None else float(f"{steps * step_seconds:.6g}")


def _same_training(one: Recipe | None, other: Recipe) -> bool:
    return one is not None and one == other


def describe(scored: Scored, scores: Scores) -> str:
    """A choice and its regret in words."""
    choice = scored.choice
    if choice.recipe is None:
        return f"no answer ({choice.note})"
    regret = estimate_regret(scored.seconds, scores.best_seconds, scores.cap_seconds)
    text = (
        f"batch {choice.recipe.global_batch}, lr {choice.recipe.learning_rate:.3g}: regret "
        f"{regret.mean:+.0%} [{regret.low:+.0%}, {regret.high:+.0%}]"
    )
    if regret.reached < 1:
        text += f", reached {regret.reached:.0%}"
    return f"{text}, {choice.examples:.0f} examples"
