"""`make demo`: the main job on the digits data, and then the proof of it on fresh seeds.

Plans; trains with the recipe; trains with the usual default, batch 32, at the best learning rate
that a search of its own finds for it, and at the learning rate of the recipe; each over fresh
seeds until the target is met. Shows the three side by side.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from scipy import stats

from rightbatch.catalog import load_workload
from rightbatch.cli.output import Output
from rightbatch.cli.render_plan import plan_text
from rightbatch.cli.table import make_table, wrap
from rightbatch.laws.estimate import Estimate
from rightbatch.plan import Plan, make_plan
from rightbatch.plan.make import run_race
from rightbatch.plan.predict import starting_rate
from rightbatch.plan.price import max_micro_batch, step_seconds
from rightbatch.recipe import Recipe
from rightbatch.report.units import show_interval, show_number
from rightbatch.report.write import write_report
from rightbatch.store import make_run_directory, write_record
from rightbatch.study.race import UNIT_BATCH
from rightbatch.training import Training
from rightbatch.training.run import point_value
from rightbatch.workload import Workload

WORKLOAD = "digits"
FRESH_SEEDS = (101, 102, 103)
"""Not among those that the plan has seen."""
MOST_EPOCHS = 60
EXAMPLES_BETWEEN_LOOKS = 256
"""Finer than an epoch, and the same for every batch, so that none is favoured."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What one training took to the target.

    Attributes:
        reached: Whether the target was met.
        steps: Updates to the target, or done in all.
        examples: Training examples.
        epochs: Passes over the training set.
        measured_seconds: Wall time of the updates alone, evaluations left out.
        modelled_seconds: Steps × the step time that the plan's probe measured.
    """

    reached: bool
    steps: int
    examples: int
    epochs: float
    measured_seconds: float
    modelled_seconds: float


@dataclass(frozen=True, kw_only=True)
class Side:
    """One recipe and what came of it, a run per fresh seed."""

    title: str
    recipe: Recipe
    outcomes: tuple[Outcome, ...]


def main() -> int:
    """Runs the demonstration.

    Returns:
        The exit code, 0.
    """
    workload = load_workload(WORKLOAD)
    output = Output(as_json=False, quiet=False)
    with output.progress(f"Planning {WORKLOAD}") as report:
        plan = make_plan(workload, effort="race", progress=report)
    _show(plan_text(plan))
    folder = make_run_directory("runs", f"demo-{WORKLOAD}")
    write_record(folder / "plan.json", plan, schema="rightbatch.plan/1")
    with output.progress("Training to the target") as report:
        report(f"The best learning rate of batch {UNIT_BATCH}, to compare with")
        default_rate = find_default_rate(workload, plan)
        sides = []
        for title, recipe in contestants(plan, default_rate).items():
            report(f"Training to the target: {title}")
            sides.append(measure_side(workload, plan, title, recipe))
    _show("\n" + comparison_text(sides, str(workload.target)))
    _show(f"\nThe plan and its evidence: {folder / 'plan.json'}")
    _show(f"The report: {write_report(plan, folder / 'report.html')}")
    return 0


def find_default_rate(workload: Workload, plan: Plan) -> float:
    """The best learning rate of the default batch, found as the race finds that of any size.

    Args:
        workload: What to train.
        plan: Its probes say where to begin.

    Returns:
        The learning rate.
    """
    race = run_race(workload, plan.evidence, [UNIT_BATCH], epochs=MOST_EPOCHS)
    if race is None:
        return starting_rate(plan.evidence)
    return race.trials[race.leader].learning_rate


def contestants(plan: Plan, default_rate: float) -> dict[str, Recipe]:
    """What is compared: the recipe, and the default at its own best and at the recipe's rate.

    Args:
        plan: The plan.
        default_rate: The best learning rate that is known for the default batch.

    Returns:
        Titles and recipes; the default is left out where it is the recipe.
    """
    recipe = plan.recipe
    sides = {"the recipe": recipe}
    same = recipe.learning_rate
    for title, rate in (("default, best rate", default_rate), ("default, same rate", same)):
        default = Recipe(global_batch=UNIT_BATCH, learning_rate=rate)
        if default not in sides.values():
            sides[title] = default
    return sides


def measure_side(
    workload: Workload,
    plan: Plan,
    title: str,
    recipe: Recipe,
    *,
    seeds: Sequence[int] = FRESH_SEEDS,
) -> Side:
    """Trains with a recipe to the target, once per seed.

    Args:
        workload: What to train; it has a target.
        plan: Its step-time law gives the modelled seconds.
        title: What the recipe is called.
        recipe: How to train.
        seeds: Of the runs.

    Returns:
        What came of it.
    """
    throughput, ceiling = plan.evidence.throughput, max_micro_batch(plan.evidence)
    step = step_seconds(throughput, recipe.global_batch, ceiling)
    outcomes = tuple(_measure_run(workload, recipe, seed, step) for seed in seeds)
    return Side(title=title, recipe=recipe, outcomes=outcomes)


def _measure_run(workload: Workload, recipe: Recipe, seed: int, step: float) -> Outcome:
    target = workload.parsed_target
    assert target is not None
    training = Training(workload, recipe, seed=seed)
    between = max(1, round(EXAMPLES_BETWEEN_LOOKS / recipe.global_batch))
    seconds, reached = 0.0, False
    while not reached and not training.diverged and training.epochs < MOST_EPOCHS:
        begin = time.perf_counter()
        training.advance(between)
        seconds += time.perf_counter() - begin
        value = point_value(training.evaluate(), target.quantity)
        reached = value is not None and target.reached(value)
    return Outcome(
        reached=reached,
        steps=training.steps,
        examples=training.examples,
        epochs=training.epochs,
        measured_seconds=seconds,
        modelled_seconds=training.steps * step,
    )


def comparison_text(sides: Sequence[Side], target: str) -> str:
    """The answer in a sentence, and the trainings side by side.

    Args:
        sides: The recipe first, then what it is compared with.
        target: What counts as trained, in words.

    Returns:
        Lines of at most 80 columns.
    """
    rows = [
        ("batch size", *(show_number(s.recipe.global_batch) for s in sides)),
        ("learning rate", *(f"{s.recipe.learning_rate:.3g}" for s in sides)),
        ("target met", *(_share_reached(s) for s in sides)),
        ("steps", *(_middle(s, lambda o: o.steps) for s in sides)),
        ("examples", *(_middle(s, lambda o: o.examples, ends=False) for s in sides)),
        ("epochs", *(_middle(s, lambda o: o.epochs, ends=False) for s in sides)),
        ("measured ms", *(_middle(s, lambda o: 1e3 * o.measured_seconds) for s in sides)),
        ("modelled ms", *(_middle(s, lambda o: 1e3 * o.modelled_seconds) for s in sides)),
    ]
    num_seeds = len(sides[0].outcomes)
    header = ("to the target", *(s.title for s in sides))
    remark = (
        f"Median (least to most) of {num_seeds} fresh seeds; evaluation is not counted. Modelled: "
        "steps × the step time that the probe measured."
    )
    table = make_table(header, rows)
    return f"{wrap(verdict(sides, target))}\n\n{table}\n{wrap(remark)}"


def verdict(sides: Sequence[Side], target: str) -> str:
    """What the fresh seeds say, in a sentence.

    Args:
        sides: The recipe first, then what it is compared with.
        target: What counts as trained, in words.

    Returns:
        The sentence.
    """
    recipe = sides[0]
    missed = sum(not o.reached for o in recipe.outcomes)
    num_seeds = len(recipe.outcomes)
    if missed:
        return f"On fresh seeds the recipe did not meet {target} in {missed} of {num_seeds} runs."
    if len(sides) == 1:
        return f"The recipe is the usual default; it met {target} on all {num_seeds} fresh seeds."
    other = sides[1]
    name = f"batch {other.recipe.global_batch} at learning rate {other.recipe.learning_rate:.3g}"
    if not all(o.reached for o in other.outcomes):
        return f"On fresh seeds the recipe met {target} in all runs; {name} did not."
    modelled = speedup(recipe, other, lambda o: o.modelled_seconds)
    measured = speedup(recipe, other, lambda o: o.measured_seconds)
    disagreement = (
        ""
        if _overlap(modelled, measured, slack=_TOLERANCE)
        else " The two disagree: the machine was busy with other work during the plan's probe or "
        "now. Repeat it on a quiet one."
    )
    return (
        f"On {num_seeds} fresh seeds the recipe met {target} {_times(modelled)} times as fast as "
        f"{name} in modelled seconds{_doubt(modelled)}; in measured ones {_times(measured)} times."
        f"{disagreement}{_against_same_rate(sides)}"
    )


def _against_same_rate(sides: Sequence[Side]) -> str:
    """How much of the gain is the learning rate's and not the batch's."""
    if len(sides) < 3:
        return ""
    recipe, _, same = sides
    where = f"batch {same.recipe.global_batch} at the recipe's own learning rate"
    if not all(o.reached for o in same.outcomes):
        return f" With {where} not all runs met it."
    ratio = speedup(recipe, same, lambda o: o.modelled_seconds)
    return f" Against {where} it is {_times(ratio)} times as fast{_doubt(ratio)}."


def _doubt(ratio: Estimate) -> str:
    no_difference = Estimate(value=1.0, low=1.0, high=1.0, n=0)
    return ": a difference within the noise" if _overlap(ratio, no_difference) else ""


_TOLERANCE = 1.25
"""Modelled seconds leave out fetching the batch, which costs small batches a little more."""


def _overlap(one: Estimate, other: Estimate, *, slack: float = 1.0) -> bool:
    """Whether two intervals meet, up to a factor."""
    ends = [(e.low or 0.0, e.high or math.inf) for e in (one, other)]
    return ends[0][0] <= ends[1][1] * slack and ends[1][0] <= ends[0][1] * slack


def _times(ratio: Estimate) -> str:
    return f"{show_number(ratio.value)} ({show_interval(ratio)})"


def speedup(recipe: Side, other: Side, seconds: Callable[[Outcome], float]) -> Estimate:
    """Geometric mean of the ratios of seconds, seed by seed, with Student's interval.

    Args:
        recipe: The faster, if all is well.
        other: What it is compared with, on the same seeds.
        seconds: Which seconds of an outcome.

    Returns:
        How many times as fast `recipe` is, to two digits.
    """
    logs = [
        math.log(seconds(b) / seconds(a))
        for a, b in zip(recipe.outcomes, other.outcomes, strict=True)
    ]
    n, mean = len(logs), statistics.fmean(logs)
    half = float(stats.t.ppf(0.975, n - 1)) * statistics.stdev(logs) / math.sqrt(n)
    value, low, high = (float(f"{math.exp(x):.2g}") for x in (mean, mean - half, mean + half))
    return Estimate(value=value, low=low, high=high, n=n, method="paired by seed, Student's t")


def _middle(side: Side, of: Callable[[Outcome], float], *, ends: bool = True) -> str:
    values = sorted(of(outcome) for outcome in side.outcomes if outcome.reached)
    if not values:
        return "–"
    middle, least, most = (
        f"{x:,.0f}" if x >= 100 else f"{x:.3g}"
        for x in (statistics.median(values), values[0], values[-1])
    )
    return f"{middle} ({least}–{most})" if ends else middle


def _share_reached(side: Side) -> str:
    return f"{sum(o.reached for o in side.outcomes)} of {len(side.outcomes)}"


def _show(text: str) -> None:
    print(text, flush=True)  # noqa: T201


if __name__ == "__main__":
    raise SystemExit(main())
