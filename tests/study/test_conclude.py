"""From a record to a choice: what is seen of a size, which run is taken, and what is near it."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
from tests.study.fakes import SIZES, PlantedProblem, linear_price

from rightbatch.laws.critical_batch import infer_critical_batch
from rightbatch.study.conclude import (
    CHOOSABLE_SHARE,
    Outlook,
    SizeSeen,
    choose_trial,
    conclude,
    near_best,
    own_share,
    trial_curve,
    trial_curves,
)
from rightbatch.study.records import RaceRecord, TrialPoint, TrialRecord
from rightbatch.study.runs import look_steps

TIME = linear_price(1e-3, 1e-5)
PROBLEM = PlantedProblem(critical=100.0, target=3 * 61**-0.5)


def trial(
    batch: int,
    *,
    share: float = 1.0,
    off: float = 0.0,
    slower: float = 1.0,
    problem: PlantedProblem = PROBLEM,
) -> TrialRecord:
    """A run at a rate `off` octaves from the best, to a share of the way of that best.

    `slower` stretches it: it takes that many times the steps of what is planted.
    """
    assert problem.target is not None
    rate = problem.best_rate(batch) * 2.0**off
    goal = math.ceil(slower * share * problem.steps(batch, problem.best_rate(batch)))
    steps = sorted({*(s for s in islice(look_steps(), 200) if s < goal), goal})
    made = problem.progress_rate(batch, rate) / slower
    points = tuple(TrialPoint(steps=s, loss=problem.loss_at(s * made)) for s in steps)
    met = [p.steps for p in points if p.loss is not None and p.loss <= problem.target]
    return TrialRecord(
        global_batch=batch,
        learning_rate=rate,
        seed=0,
        state="reached" if met else "stopped",
        steps_to_target=met[0] if met else None,
        points=points,
    )


def record(*trials: TrialRecord, problem: PlantedProblem = PROBLEM) -> RaceRecord:
    """A race that the first of them leads."""
    assert problem.target is not None
    return RaceRecord(
        leader=0,
        leader_share=1.0,
        target_loss=problem.target,
        target_reached=trials[0].state == "reached",
        normalised=False,
        usual_batch=100.0,
        sizes=SIZES,
        trials=trials,
        examples=sum(t.examples for t in trials),
        evaluation_examples=0,
        seconds=0.0,
        stopped_by="done",
    )


def chosen(race: RaceRecord, outlook: Outlook) -> int:
    return choose_trial(outlook, trial_curves(race), race.leader)


def exact(batch: int, reference: int = 32) -> float:
    return math.log((1 + 100.0 / batch) / (1 + 100.0 / reference))


# ---------------------------------------------------------------------------------- what is seen


def test_the_same_record_gives_the_same_outlook_bit_for_bit() -> None:
    race = record(trial(32), trial(128, share=0.5), trial(256, share=0.3))
    one, again = conclude(race, TIME), conclude(race, TIME)
    assert one.log_cost.tobytes() == again.log_cost.tobytes()
    assert one.log_steps.tobytes() == again.log_steps.tobytes()
    assert one.critical_batch.weight.tobytes() == again.critical_batch.weight.tobytes()
    assert one.seen == again.seen
    assert conclude(race, TIME, seed=1).log_cost.tobytes() != one.log_cost.tobytes()


def test_without_other_sizes_the_usual_critical_batch_decides() -> None:
    race = record(trial(32), trial(32, off=0.5, share=0.3))
    outlook = conclude(race, TIME)
    assert outlook.seen == ()
    usual = infer_critical_batch([], 32, usual=100.0)
    np.testing.assert_array_equal(outlook.critical_batch.weight, usual.weight)


def test_sizes_that_arrived_are_seen_exactly_and_their_price_is_added() -> None:
    race = record(trial(32), trial(128), trial(512))
    outlook = conclude(race, TIME)
    assert outlook.leader == 32
    for seen, batch in zip(outlook.seen, (128, 512), strict=True):
        assert seen.measured.global_batch == batch
        assert seen.share > 0.95
        assert seen.measured.log_ratio == pytest.approx(exact(batch), abs=0.05)
        assert outlook.step_ratio(batch) == pytest.approx(math.exp(exact(batch)), rel=0.1)
        price = math.log(TIME(batch) / TIME(32))
        assert outlook.expected(batch) == pytest.approx(exact(batch) + price, abs=0.1)
    assert outlook.expected(32) == 0.0
    assert outlook.step_ratio(32) == 1.0
    assert 70 < outlook.critical_batch.median < 140


def test_another_price_leaves_the_steps_as_they_are() -> None:
    race = record(trial(32), trial(128))
    by_example, by_step = (conclude(race, price) for price in (float, lambda _: 1.0))
    np.testing.assert_array_equal(by_example.log_steps, by_step.log_steps)
    np.testing.assert_array_equal(by_step.log_steps, by_step.log_cost)
    assert by_example.expected(1) < by_example.expected(1024)
    assert by_step.expected(1) > by_step.expected(1024)


@pytest.mark.parametrize("batch", [8, 128, 512])
def test_sizes_measured_early_are_corrected_for_the_early_bias(batch: int) -> None:
    """Larger ones look slower early than they are, smaller ones faster; by octave and rest."""
    late = conclude(record(trial(32), trial(batch)), TIME).seen[0]
    early = conclude(record(trial(32), trial(batch, share=0.4)), TIME).seen[0]
    assert early.share == pytest.approx(0.4, abs=0.05)
    correction = late.measured.log_ratio - early.measured.log_ratio
    rest = late.share - early.share
    assert correction == pytest.approx(0.13 * math.log2(batch / 32) * rest, abs=0.03)
    assert early.measured.deviation > late.measured.deviation


def test_a_run_that_ended_too_soon_or_diverged_is_not_compared() -> None:
    dead = replace(
        trial(128), state="diverged", steps_to_target=None, points=(TrialPoint(steps=1, loss=None),)
    )
    short = replace(trial(256), points=trial(256).points[:2])
    outlook = conclude(record(trial(32), dead, short, trial(512, share=0.05)), TIME)
    assert outlook.seen == ()


def test_of_several_runs_of_a_size_the_fastest_speaks_for_it() -> None:
    outlook = conclude(
        record(trial(32), trial(128, off=-2.0), trial(128), trial(128, off=-1)), TIME
    )
    (seen,) = outlook.seen
    assert seen.trial == 2


def test_how_far_a_run_came_is_known_by_arrival_or_by_the_targets_loss() -> None:
    curve = trial_curve(trial(32, share=0.5))
    assert own_share(curve, arrived=True, target_loss=None) == 1.0
    assert own_share(curve, arrived=False, target_loss=None) == 0.0
    assert own_share(curve, arrived=False, target_loss=0.0) == 0.0
    assert own_share(curve, arrived=False, target_loss=PROBLEM.target) == pytest.approx(
        0.5, abs=0.05
    )


# ---------------------------------------------------------------------------------- what is chosen


def test_a_cheaper_size_is_chosen_and_a_dearer_one_is_not() -> None:
    """At 1e-3 + 1e-5 B a step of 128 costs 1.7 times one of 32 and 0.43 times as many do."""
    race = record(trial(32), trial(128), trial(1024))
    outlook = conclude(race, TIME)
    assert outlook.expected(128) < -0.2
    assert chosen(race, outlook) == 1
    assert chosen(race, conclude(race, float)) == 0


@pytest.mark.parametrize("share", [0.16, 0.2, 0.3, 0.6])
def test_a_cheaper_size_is_chosen_only_when_it_came_far_enough(share: float) -> None:
    race = record(trial(32), trial(128, share=share))
    outlook = conclude(race, lambda _: 1.0)
    assert outlook.expected(128) < -0.3
    assert chosen(race, outlook) == int(outlook.seen[0].share >= CHOOSABLE_SHARE)


def test_the_share_of_a_size_counts_the_leaders_own_way() -> None:
    """A leader half way was itself compared with only half of what there is to come."""
    half = record(trial(32, share=0.5), trial(128, share=0.5))
    outlook = conclude(replace(half, leader_share=0.5), TIME)
    assert outlook.seen[0].share == pytest.approx(0.5, abs=0.08)


def test_a_run_of_a_few_steps_is_not_chosen_over_one_that_arrived() -> None:
    """However good its first steps look, unless the leader itself took no more."""
    race = record(trial(32), trial(128, share=0.5))
    short = replace(race.trials[1], points=race.trials[1].points[:8])
    curves = trial_curves(replace(race, trials=(race.trials[0], short)))
    outlook = conclude(race, TIME)
    assert choose_trial(outlook, trial_curves(race), 0) == 1
    assert choose_trial(outlook, curves, 0) == 0


@pytest.mark.parametrize(("extra", "index"), [(1.0, 1), (1.1, 1), (1.25, 0), (1.41, 0)])
def test_the_safe_side_of_the_cliff_is_taken_where_it_costs_little(
    extra: float, index: int
) -> None:
    """Half an octave below, a run that takes hardly more steps than the leader."""
    below = replace(trial(32, slower=extra), learning_rate=trial(32).learning_rate / math.sqrt(2))
    race = record(trial(32), below)
    assert chosen(race, conclude(race, TIME)) == index


@pytest.mark.parametrize(
    ("above", "extra", "index"),
    [
        (2.5, 1.25, 0),  # a cliff: much is worth being farther away
        (2.5, 1.45, 1),
        (1.3, 1.05, 0),  # a slope: little is
        (1.3, 1.13, 1),
        (1.05, 1.05, 1),  # the flat of the valley: nothing is
        (None, 1.25, 0),  # diverged
    ],
)
def test_the_rate_above_tells_what_the_safe_side_may_cost(
    above: float | None, extra: float, index: int
) -> None:
    rate = trial(32).learning_rate
    below = replace(trial(32, slower=extra), learning_rate=rate / math.sqrt(2))
    higher = fallen(trial(32, share=0.5)) if above is None else trial(32, slower=above)
    race = record(below, trial(32), replace(higher, learning_rate=rate * math.sqrt(2)))
    race = replace(race, leader=1)
    assert chosen(race, conclude(race, TIME)) == index


def test_on_the_planted_cliff_the_lower_of_two_near_equals_is_taken() -> None:
    """A quarter octave either side of the best: nearly the same steps, one nearer to the cliff."""
    race = record(trial(32, off=0.25), trial(32, off=-0.25))
    assert chosen(race, conclude(race, TIME)) == 1
    below = record(trial(32, off=-0.5), trial(32, off=-1.0))
    assert chosen(below, conclude(below, TIME)) == 0


def test_a_lower_rate_that_was_hardly_tried_is_no_safe_side() -> None:
    below = replace(trial(32), learning_rate=trial(32).learning_rate / math.sqrt(2))
    short = replace(below, points=below.points[:12], state="stopped", steps_to_target=None)
    race = record(trial(32), short)
    assert chosen(race, conclude(race, TIME)) == 0


def test_the_safe_side_is_of_the_chosen_size_and_not_of_the_leaders() -> None:
    below = replace(trial(32), learning_rate=trial(32).learning_rate / math.sqrt(2))
    safe = replace(trial(128), learning_rate=trial(128).learning_rate / math.sqrt(2))
    race = record(trial(32), below, trial(128))
    assert chosen(race, conclude(race, TIME)) == 2
    race = record(
        trial(32), below, trial(128), replace(safe, points=trial(128, slower=1.01).points)
    )
    assert chosen(race, conclude(race, TIME)) == 3


@pytest.mark.parametrize(
    ("octaves", "normalised", "index"),
    [(2.0, False, 1), (2.5, False, 0), (1.0, True, 1), (1.5, True, 0)],
)
def test_a_learning_rate_beyond_what_the_leaders_would_be_there_is_not_chosen(
    octaves: float, normalised: bool, index: int
) -> None:
    """In proportion to the batch at most, or to its root; however far ahead the run is."""
    other = replace(trial(128), learning_rate=trial(32).learning_rate * 2**octaves)
    race = replace(record(trial(32), other), normalised=normalised)
    outlook = conclude(race, TIME)
    assert outlook.was_seen(128), "what it says of the critical batch still counts"
    assert outlook.expected(128) < -0.2
    assert chosen(race, outlook) == index


def test_a_run_within_reach_speaks_for_its_size_before_a_faster_one_beyond() -> None:
    beyond = replace(trial(128, slower=0.8), learning_rate=trial(32).learning_rate * 8)
    race = record(trial(32), beyond, trial(128))
    (seen,) = conclude(race, TIME).seen
    assert seen.trial == 2 and seen.within_reach


def fallen(run: TrialRecord) -> TrialRecord:
    """The same run, diverged at its next step."""
    end = TrialPoint(steps=run.steps + 1, loss=None)
    return replace(run, state="diverged", steps_to_target=None, points=(*run.points, end))


def test_a_run_that_diverged_in_the_end_is_never_chosen() -> None:
    below = replace(trial(32, share=0.9), learning_rate=trial(32).learning_rate / math.sqrt(2))
    for other in (trial(128, share=0.7), below):
        alive, dead = record(trial(32), other), record(trial(32), fallen(other))
        assert chosen(alive, conclude(alive, TIME)) == 1
        assert chosen(dead, conclude(dead, TIME)) == 0


# -------------------------------------------------------------------------------------- near best


def made_up(
    log_cost: np.ndarray, sizes: tuple[int, ...], seen: tuple[SizeSeen, ...] = ()
) -> Outlook:
    critical = infer_critical_batch([], sizes[0], usual=100.0)
    return Outlook(sizes, sizes[0], seen, critical, log_cost, log_cost)


def test_near_best_is_the_sizes_within_5_percent_when_all_is_known() -> None:
    cost = np.log(np.array([[1.5, 1.04, 1.0, 1.04, 1.06, 2.0]])) * np.ones((100, 1))
    known = made_up(cost, (8, 16, 32, 64, 128, 256))
    assert near_best(known, 32) == (16, 64)


def test_near_best_holds_what_may_be_best() -> None:
    """Two laws, equally likely: one says 16, one says 64."""
    cost = np.log(np.array([[1.0, 1.3, 1.6], [1.6, 1.3, 1.0]] * 50))
    assert near_best(made_up(cost, (16, 32, 64)), 32) == (16, 64)


def test_a_span_of_more_than_8_is_narrowed_from_the_less_likely_side() -> None:
    cost = np.full((100, 5), 1.0)
    cost[:20, 0], cost[20:50, 4], cost[50:, 2] = 0.0, 0.0, 0.0
    assert near_best(made_up(cost, (4, 8, 16, 32, 64)), 16) == (8, 64)


@pytest.mark.parametrize("seed", range(20))
def test_near_best_holds_the_chosen_size_and_spans_at_most_8(seed: int) -> None:
    rng = np.random.default_rng(seed)
    sizes = tuple(sorted({*SIZES, 1000}))
    cost = rng.exponential(rng.choice([0.05, 0.5, 3.0]), size=(200, len(sizes)))
    taken = int(rng.choice(sizes))
    low, high = near_best(made_up(cost, sizes), taken)
    assert low <= taken <= high <= 8 * low
    assert {low, high} <= set(sizes)


def test_near_best_of_planted_evidence_holds_the_best_size() -> None:
    race = record(trial(32), trial(128), trial(512))
    best = min(SIZES, key=lambda size: exact(size) + math.log(TIME(size)))
    low, high = near_best(conclude(race, TIME), 128)
    assert low <= best <= high
