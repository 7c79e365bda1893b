"""Whether the choice of a batch size carries over from one model to another.

"Try a few sizes on a toy model and keep the fastest" is advice that can be tested: two studies of
the same batch sizes, one of a small model and one of a larger, say how far their orders agree and
what the larger model pays for the small one's choice.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from rightbatch.errors import UsageError
from rightbatch.laws.estimate import Estimate, unresolved
from rightbatch.laws.ranks import (
    as_regret,
    best_rate_of,
    estimate_best_size,
    estimate_excess,
    estimate_rank_agreement,
)
from rightbatch.laws.seeds import geometric_mean_over_seeds, mean_over_seeds
from rightbatch.study.size_costs import GOALS, Goal, SizeCosts, size_costs
from rightbatch.study.study import Study

CARRY_OVER_SCHEMA = "rightbatch.carry-over/1"
_LEAST_SEEDS = 5


@dataclass(frozen=True, kw_only=True)
class CarriedSize:
    """One batch size in both studies.

    Attributes:
        batch_size: Examples per update.
        small: Its cost at its best learning rate on the small model; without a value where a
            training at every rate missed the target.
        large: On the larger one.
        regret: Of taking this size on the larger model, its learning rate tuned there: cost ÷ that
            of the best − 1, or, under the goal `loss`, the difference of the losses.
    """

    batch_size: int
    small: Estimate
    large: Estimate
    regret: Estimate


@dataclass(frozen=True, kw_only=True)
class GoalCarried:
    """How the choice carries over under one goal.

    Attributes:
        goal: Modelled seconds, examples or steps to the target, or the loss at the end.
        agreement: Kendall's τ_b of the order of the sizes: 1 the same, 0 unrelated, −1 reversed.
        small_best: The best size on the small model, and from which to which it may lie.
        large_best: On the larger one.
        learning_rate: The small model's best at its best size; None where no size arrived.
        regret: Of the small model's best size and learning rate on the larger model, against the
            best pair there.
        regret_retuned: Of its size with the learning rate tuned on the larger model.
        regret_blind: Of taking any of the sizes blindly, the learning rate tuned: the mean over
            the sizes; a lower bound where a size did not arrive.
        sizes: Each size in both.
    """

    goal: Goal
    agreement: Estimate
    small_best: Estimate
    large_best: Estimate
    learning_rate: float | None
    regret: Estimate
    regret_retuned: Estimate
    regret_blind: Estimate
    sizes: tuple[CarriedSize, ...]


@dataclass(frozen=True, kw_only=True)
class CarryOver:
    """How the choice carries over from a small model to a larger one.

    Attributes:
        small: Name of the small workload.
        large: Of the larger.
        batch_sizes: Those that both studies have.
        goals: Under each goal that both studies can tell of.
        warnings: What a reader should know.
    """

    small: str
    large: str
    batch_sizes: tuple[int, ...]
    goals: tuple[GoalCarried, ...]
    warnings: tuple[str, ...]

    def under(self, goal: Goal) -> GoalCarried | None:
        """What holds under one goal.

        Args:
            goal: Which.

        Returns:
            It, or None where the studies cannot tell.
        """
        return next((found for found in self.goals if found.goal == goal), None)


def compare_choices(small: Study, large: Study) -> CarryOver:
    """Whether the batch size that is best on one model is best on another.

    Args:
        small: A study of the model that the choice is made on.
        large: One of the model it is carried to; of the same batch sizes, two or more, and of the
            same learning rates if the rate is to be carried as well.

    Returns:
        Agreement of the orders and the regret of the carried choice, with intervals over seeds.

    Raises:
        UsageError: If a study was stopped, or they have fewer than two sizes in common.

    Example:
        >>> from rightbatch import load_workload, run_study
        >>> study = run_study(
        ...     load_workload("max3"), batch_sizes=[50, "full"], learning_rates=[0.5, 1.0],
        ...     seeds=2, epochs=4,
        ... )
        >>> compare_choices(study, study).under("loss").agreement.value
        1.0
    """
    for role, study in (("small", small), ("larger", large)):
        if study.state == "stopped":
            raise UsageError(
                f"The study of the {role} model, {study.workload!r}, was stopped before its end. "
                "Go on with it first."
            )
    own = [{trial.batch_size for trial in study.trials} for study in (small, large)]
    common = sorted(own[0] & own[1])
    if len(common) < 2:
        raise UsageError(
            f"The studies have {len(common)} batch sizes in common: {sorted(own[0])} and "
            f"{sorted(own[1])}. Run both with the same two or more; full differs where the "
            "training sets do."
        )
    found: list[GoalCarried] = []
    for goal in GOALS:
        tables = [
            [table for table in size_costs(study, goal) if table.batch_size in common]
            for study in (small, large)
        ]
        if all(tables):
            found.append(_carry(goal, tables[0], tables[1]))
    return CarryOver(
        small=small.workload,
        large=large.workload,
        batch_sizes=tuple(common),
        goals=tuple(found),
        warnings=tuple(_warnings(small, large, common)),
    )


def _carry(goal: Goal, small: Sequence[SizeCosts], large: Sequence[SizeCosts]) -> GoalCarried:
    sizes = [table.batch_size for table in small]
    ours, theirs = [t.scores for t in small], [t.scores for t in large]
    small_best = estimate_best_size(sizes, ours)
    agreement = estimate_rank_agreement(ours, theirs)
    nothing = unresolved(small_best.n, "no size arrived on the small model")
    regret, retuned, rate = nothing, nothing, None
    each = [_regret(goal, large, i) for i in range(len(sizes))]
    if small_best.value is not None:
        chosen = sizes.index(int(small_best.value))
        best = best_rate_of(small[chosen].scores)
        assert best is not None  # it is the best size
        rate, retuned = small[chosen].rates[best], each[chosen]
        regret = _regret_at_rate(goal, large, chosen, rate)
    return GoalCarried(
        goal=goal,
        agreement=agreement,
        small_best=small_best,
        large_best=estimate_best_size(sizes, theirs),
        learning_rate=rate,
        regret=regret,
        regret_retuned=retuned,
        regret_blind=_blind(each),
        sizes=tuple(
            CarriedSize(
                batch_size=size,
                small=_cost(goal, small[i]),
                large=_cost(goal, large[i]),
                regret=each[i],
            )
            for i, size in enumerate(sizes)
        ),
    )


def _regret(goal: Goal, large: Sequence[SizeCosts], size: int, rate: int | None = None) -> Estimate:
    excess = estimate_excess(
        [table.scores for table in large], size, rate, gave_up=large[size].gave_up
    )
    return excess if goal == "loss" else as_regret(excess)


def _regret_at_rate(goal: Goal, large: Sequence[SizeCosts], size: int, rate: float) -> Estimate:
    for index, own in enumerate(large[size].rates):
        if math.isclose(own, rate, rel_tol=1e-6):
            return _regret(goal, large, size, index)
    return unresolved(0, f"learning rate {rate:.3g} was not tried on the larger model")


def _blind(each: Sequence[Estimate]) -> Estimate:
    """The mean regret over the sizes."""
    count, method = each[0].n, "mean over the sizes"
    values = [regret.value for regret in each]
    if any(value is None for value in values):
        known = [regret.low if regret.value is None else regret.value for regret in each]
        low = sum(value or 0.0 for value in known) / len(each)
        return unresolved(count, f"{method}, of which some did not arrive", low=low)
    # The sizes share their seeds: ends of the mean are at most the means of the ends.
    lows, highs = [r.low for r in each], [r.high for r in each]

    def mean(of: Sequence[float | None]) -> float | None:
        there = [value for value in of if value is not None]
        return sum(there) / len(each) if len(there) == len(each) else None

    return Estimate(value=mean(values), low=mean(lows), high=mean(highs), n=count, method=method)


def _cost(goal: Goal, table: SizeCosts) -> Estimate:
    """A size at its best rate, in the unit of its goal."""
    best = best_rate_of(table.scores)
    if best is None:
        low = None if table.gave_up is None else math.exp(table.gave_up)
        return unresolved(table.scores.shape[1], "some seeds missed it at every rate", low=low)
    scores = [float(score) for score in table.scores[best]]
    if goal == "loss":
        return mean_over_seeds(scores)
    return geometric_mean_over_seeds([math.exp(score) for score in scores])


def _warnings(small: Study, large: Study, common: Sequence[int]) -> list[str]:
    found: list[str] = []
    seeds = min(len(small.design.seeds), len(large.design.seeds))
    if seeds < _LEAST_SEEDS:
        found.append(
            f"{seeds} seed{'s' * (seeds > 1)}: the intervals are wide, and close sizes cannot be "
            f"ranked. Use {_LEAST_SEEDS} or more."
        )
    if len(common) < 4:
        found.append(f"{len(common)} sizes have few orders: agreement by chance is likely.")
    if small.design.target != large.design.target:
        found.append(
            f"The targets differ: {small.design.target} and {large.design.target}. Each model is "
            "judged by its own."
        )
    if small.design.budget != large.design.budget:
        found.append("The lengths of the trainings differ: their last losses are no equal cost.")
    if small.num_examples != large.num_examples:
        found.append(
            f"The training sets differ in size: {small.num_examples:,} and "
            f"{large.num_examples:,} examples."
        )
    return found
