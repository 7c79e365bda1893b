"""What each figure shows, as data: planted laws come out, and titles are findings."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
from tests.report import planted
from tests.report.planted import B_C, S_MIN, SIZES, around, rate_at, steps_at

from rightbatch import Recipe
from rightbatch.laws.estimate import Estimate, unresolved
from rightbatch.plan import Plan
from rightbatch.report.contents import collect_contents
from rightbatch.report.data import (
    cost_to_target,
    curves,
    gap,
    memory,
    noise,
    pareto,
    rate_batch_map,
    rate_loss,
    rate_rules,
    step_time,
    why,
)
from rightbatch.report.source import Source, open_source
from rightbatch.study.study import Study


def with_sizes(source: Source, **changes: Sequence[object]) -> Source:
    """The study with fields of its sizes replaced, one value per size."""
    assert source.study is not None
    sizes = tuple(
        replace(size, **{name: values[i] for name, values in changes.items()})
        for i, size in enumerate(source.study.sizes)
    )
    return replace(source, study=replace(source.study, sizes=sizes))


def test_the_cost_follows_the_planted_law(source: Source) -> None:
    data = cost_to_target.collect(source)
    assert data is not None
    assert data.finding == (
        "Beyond batch 80, doubling the batch saves under 10 % of the steps; at 20 they are twice "
        "the fewest"
    )
    assert len(data.law) > 50
    for batch, steps, examples in data.law:
        assert steps == pytest.approx(S_MIN * (1 + B_C / batch))
        assert examples == pytest.approx(S_MIN * (B_C + batch))
    # What the title says, from the law itself.
    assert 1 - steps_at(160) / steps_at(80) == pytest.approx(0.1)
    assert steps_at(20) == 2 * S_MIN


def test_sizes_that_missed_the_target_are_kept_as_such(source: Source) -> None:
    data = cost_to_target.collect(source)
    assert data is not None
    last = data.sizes[-1]
    assert (last.batch_size, last.reached, last.steps.value) == (1000, 0, None)
    assert last.given_up_steps == 50
    assert "At batch 1,000 trainings missed the target" in data.note
    assert data.table().rows[-1] == ("1,000", "at least 50", "unresolved", "unresolved", "0 of 3")


@pytest.mark.parametrize(
    ("met", "said"),
    [
        (4, "From batch 1 to 1,000 the steps to the target go from 4,200 to 204"),
        (1, "Only at batch 1 did every training meet the target"),
        (0, "At no batch size did every training meet the target"),
    ],
)
def test_without_a_critical_batch_the_title_says_what_is_known(
    source: Source, met: int, said: str
) -> None:
    steps = [around(steps_at(B)) if i < met else unresolved(3) for i, B in enumerate(SIZES)]
    changed = with_sizes(source, steps_to_target=steps)
    assert changed.study is not None
    fits = replace(changed.study.fits, critical_batch=unresolved(4))
    data = cost_to_target.collect(replace(changed, study=replace(changed.study, fits=fits)))
    assert data is not None
    assert (data.finding, data.law) == (said, ())


def test_the_front_is_the_studys(source: Source) -> None:
    data = pareto.collect(source)
    assert data is not None
    assert data.front == (1, 10, 100)
    assert [size.batch_size for size in data.sizes] == [1, 10, 100]
    assert data.finding.startswith("Fewer steps cost more examples: batch 1, 10 and 100")
    assert "trainings missed the target: batch 1,000" in data.note


def test_one_size_can_win_in_both(source: Source) -> None:
    assert source.study is not None
    fits = replace(source.study.fits, pareto=(10,))
    data = pareto.collect(replace(source, study=replace(source.study, fits=fits)))
    assert data is not None
    assert data.finding == "Batch 10 needs the fewest steps and the fewest examples"


def test_every_cell_is_on_the_map_however_it_ended(source: Source) -> None:
    data = rate_batch_map.collect(source)
    assert data is not None
    cells = data.cells.cells
    assert len(cells) == 12 and all(cell.trials == 3 for cell in cells)
    states = {(c.batch_size, c.state(has_target=True)) for c in cells}
    assert states == {
        (1, "fine"), (10, "fine"), (10, "failed"), (100, "fine"), (100, "diverged"),
        (1000, "missed"),
    }  # fmt: skip
    wild = next(c for c in cells if c.diverged)
    assert wild.outcome(has_target=True) == "1 of 3 diverged"
    assert wild.loss.n == 2  # what diverged has no loss, and is not in the mean
    assert data.edges == ((100, rate_at(100)),)
    assert data.chosen == (100, rate_at(100))
    assert data.finding.endswith("trainings diverge from 1 on, first at batch 100")


def test_the_map_names_the_least_of_the_planted_losses(source: Source) -> None:
    data = rate_batch_map.collect(source)
    assert data is not None
    least = data.cells.least()
    assert least is not None
    assert (least.batch_size, least.learning_rate) == (1, rate_at(1))
    assert least.loss.value == pytest.approx(planted.loss_at(1, rate_at(1)) * 1.01)
    assert data.finding.startswith("The validation loss is least at batch 1 with learning rate")


def test_the_loss_against_the_rate_names_the_best_of_both_ends(source: Source) -> None:
    data = rate_loss.collect(source)
    assert data is not None
    assert data.finding == "Batch 1 does best at learning rate 0.05, batch 1,000 at 1.58"


def test_curves_are_geometric_means_over_seeds(source: Source) -> None:
    data = curves.collect(source)
    assert data is not None
    assert [curve.batch_size for curve in data.curves] == list(SIZES)
    for curve in data.curves:
        assert [step.epochs for step in curve.steps] == [1, 2, 3]  # step 0 has no place
        for step in curve.steps:
            assert step.val_loss.value == pytest.approx(2 * 0.5**step.epochs)
            assert step.val_loss.n == 3 and step.val_loss.low is not None
            assert step.seconds == pytest.approx(step.step * planted.STEP_SECONDS)
            assert step.examples == step.step * curve.batch_size
    assert data.has_seconds and data.has_train_loss


def test_curves_that_cannot_be_told_apart_are_named(source: Source) -> None:
    data = curves.collect(source)
    assert data is not None
    assert data.finding.endswith("; batch 10, 100 and 1,000 cannot be told from it")


def test_a_curve_says_which_trainings_diverged(source: Source) -> None:
    assert source.study is not None
    trials = tuple(
        replace(t, state="diverged") if (t.batch_size, t.seed) == (10, 1) else t
        for t in source.study.trials
    )
    data = curves.collect(replace(source, study=replace(source.study, trials=trials)))
    assert data is not None
    assert [curve.ended for curve in data.curves] == ["", "1 of 3 diverged", "", ""]
    assert "Diverged trainings end early" in data.note


def test_without_evaluations_there_are_no_curves(source: Source) -> None:
    assert curves.collect(replace(source, points=())) is None


def test_gaps_whose_intervals_are_apart_are_a_finding(source: Source) -> None:
    data = gap.collect(source)
    assert data is not None
    assert data.finding.startswith("No difference in the generalisation gap is resolved")
    gaps = [Estimate(value=g, low=g - 0.01, high=g + 0.01, n=3) for g in (0.0, 0.0, 0.1, 0.2)]
    data = gap.collect(with_sizes(source, gap=gaps))
    assert data is not None
    assert data.finding == (
        "The generalisation gap is larger at batch 1,000 (0.2) than at 1 (0)"
    )  # fmt: skip
    alone = [Estimate(value=g, n=1) for g in (0.0, 0.0, 0.1, 0.2)]
    data = gap.collect(with_sizes(source, gap=alone))
    assert data is not None
    assert data.finding.endswith("one seed cannot tell whether that is chance")


def test_the_rules_are_carried_from_where_they_begin(source: Source) -> None:
    data = rate_rules.collect(source)
    assert data is not None
    assert data.finding == (
        "The best learning rate grows as the batch to the power 0.5 (0.4–0.6): square-root scaling"
    )
    linear, root = data.lines
    assert [rate for _, rate in linear.rates] == pytest.approx([0.05 * B for B in SIZES])
    assert [rate for _, rate in root.rates] == pytest.approx([rate_at(B) for B in SIZES])
    assert "Linear scaling holds to 1 and fails at 10." in data.note


def test_why_compares_every_size_with_the_chosen(source: Source) -> None:
    data = why.collect(source)
    assert data is not None
    assert data.unit == "seconds"
    at = {size.batch_size: size for size in data.sizes}
    assert (at[100].cost.low, at[100].cost.value, at[100].cost.high) == (1, 1, 1)
    assert at[1].cost.value == pytest.approx(steps_at(1) / steps_at(100))
    # Two intervals of a factor 1.2 each, independent.
    spread = math.exp(math.hypot(math.log(1.2), math.log(1.2)))
    assert at[1].cost.high == pytest.approx(steps_at(1) / steps_at(100) * spread)
    assert (at[1000].cost.value, at[1000].basis) == (None, "missed the target")
    assert data.finding == "Batch 100 needs the fewest seconds; no other size comes near"


def test_a_race_says_what_every_size_is_expected_to_cost(plan: Plan, plan_source: Source) -> None:
    data = why.collect(plan_source)
    assert data is not None and plan.evidence.race is not None
    assert [size.batch_size for size in data.sizes] == list(plan.evidence.race.sizes)
    chosen = next(s for s in data.sizes if s.batch_size == plan.recipe.global_batch)
    assert (chosen.cost.low, chosen.cost.value, chosen.cost.high) == (1, 1, 1)
    assert chosen.basis != "predicted"
    run = {trial.global_batch for trial in plan.evidence.race.trials}
    assert all(s.basis == "predicted" for s in data.sizes if s.batch_size not in run)
    assert f"Batch {plan.recipe.global_batch:,} needs the fewest seconds" in data.finding


def test_the_machine_is_in_a_plans_report(plan: Plan, plan_source: Source) -> None:
    times = step_time.collect(plan_source)
    assert times is not None
    law = plan.evidence.throughput.law
    assert all(seconds == law.predict(batch) for batch, seconds in times.line)
    bytes_used = memory.collect(plan_source)
    assert bytes_used is not None and plan.evidence.memory is not None
    parts = plan.evidence.memory.parts
    assert bytes_used.parts[-1].at(64) == (parts.activation_bytes_per_example or 0) * 64
    assert bytes_used.parts[1].at(64) == parts.parameters_bytes
    scale = noise.collect(plan_source)
    assert scale is not None
    assert len(scale.points) == len(plan.evidence.noise_scale.trajectory)


def planted_noise(source: Source, *values: tuple[float, float, float] | None) -> Source:
    assert source.plan is not None
    evidence = source.plan.evidence
    first = evidence.noise_scale.trajectory[0]
    points = tuple(
        replace(first, step=4**i, value=None, low=None, high=None)
        if v is None
        else replace(first, step=4**i, low=v[0], value=v[1], high=v[2])
        for i, v in enumerate(values)
    )
    record = replace(evidence.noise_scale, trajectory=points)
    return replace(
        source, plan=replace(source.plan, evidence=replace(evidence, noise_scale=record))
    )


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (((1, 2, 3), (8, 9, 10)), "The noise scale grows from 2 examples after 1 steps to 9 after"),
        (((8, 9, 10), (1, 2, 3)), "The noise scale falls from 9 examples after 1 steps to 2 after"),
        (((1, 2, 9), (8, 9, 10)), "No growth of the noise scale is resolved: 2 examples"),
        ((None, (8, 9, 10)), "The noise scale is 9 examples after 4 steps"),
        ((None,), "The noise scale is not resolved"),
    ],
)
def test_noise_titles(
    plan_source: Source, values: tuple[tuple[float, float, float] | None, ...], said: str
) -> None:
    data = noise.collect(planted_noise(plan_source, *values))
    assert data is not None
    assert data.finding.startswith(said)


def test_memory_titles(plan: Plan, plan_source: Source) -> None:
    record = plan.evidence.memory
    assert record is not None
    ceiling = replace(record.ceiling, micro_batch=64, headroom_bytes=2**20, smallest_failed=80)
    evidence = replace(plan.evidence, memory=replace(record, ceiling=ceiling))
    data = memory.collect(replace(plan_source, plan=replace(plan, evidence=evidence)))
    assert data is not None
    assert data.finding == "At most 64 examples fit at once, with 1 MiB to spare; 80 do not"
    nothing = replace(plan, evidence=replace(plan.evidence, memory=None))
    assert memory.collect(replace(plan_source, plan=nothing)) is None


def test_no_title_is_the_name_of_its_axes(source: Source, plan_source: Source) -> None:
    for given in (source, plan_source):
        for section in collect_contents(given).sections:
            assert section.data.finding != section.subject
            assert len(section.data.finding.split()) > 5
            assert any(character.isdigit() for character in section.data.finding)
            table = section.data.table()
            assert table.rows and all(len(row) == len(table.header) for row in table.rows)


def test_a_study_without_target_or_answer_still_reports(study: Study) -> None:
    design = replace(study.design, target=None)
    bare = replace(study, design=design, best=None, sizes=(), trials=())
    contents = collect_contents(Source(plan=None, study=bare))
    assert contents.sections == ()
    assert "there is no answer" in contents.answer


def test_a_plan_that_rests_on_a_study_reports_both(plan: Plan, study: Study) -> None:
    evidence = replace(plan.evidence, race=None, study=study)
    recipe = Recipe(global_batch=100, learning_rate=rate_at(100))
    given = replace(plan, evidence=evidence, recipe=recipe, effort="study")
    source = open_source(given)
    names = [section.name for section in collect_contents(source).sections]
    assert names == [
        "why", "cost-to-target", "pareto", "rate-batch-map", "rate-loss", "rate-rules", "gap",
        "noise", "step-time", "memory",
    ]  # fmt: skip
    by_steps = replace(given, goal="steps")
    data = why.collect(open_source(by_steps))
    assert data is not None
    assert data.unit == "steps"
    assert data.sizes[1].cost == data.sizes[1].steps
