"""The drawn figures: what must not be dropped is there, and odd records can be drawn."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from tests.report.planted import B_C, SIZES, make_points, make_study, rate_at

from rightbatch.laws.estimate import Estimate, unresolved
from rightbatch.report.contents import collect_contents
from rightbatch.report.figures.style import DARK, log_axis, size_axis, size_colours
from rightbatch.report.page import draw, make_page
from rightbatch.report.source import Source
from rightbatch.study.study import Study


def drawn(source: Source) -> dict[str, list[dict[str, Any]]]:
    return {
        section.name: [json.loads(str(f.to_json())) for _, f in draw(section.data)]
        for section in collect_contents(source).sections
    }


@pytest.fixture(scope="module")
def figures(source: Source, plan_source: Source) -> dict[str, list[dict[str, Any]]]:
    return {**drawn(plan_source), **drawn(source)}


def traces(figure: dict[str, Any], name: str) -> list[dict[str, Any]]:
    return [trace for trace in figure["data"] if trace.get("name") == name]


def test_all_figures_of_plan_and_study_are_drawn(
    figures: dict[str, list[dict[str, Any]]],
) -> None:
    assert set(figures) == {
        "why", "cost-to-target", "pareto", "curves", "rate-batch-map", "rate-loss", "rate-rules",
        "gap", "noise", "step-time", "memory",
    }  # fmt: skip
    assert len(figures["curves"]) == 4  # epochs, steps, examples, seconds


@pytest.mark.parametrize("name", ["why", "cost-to-target", "pareto", "rate-batch-map",
                                  "rate-loss", "rate-rules", "gap", "curves"])  # fmt: skip
def test_the_chosen_point_is_marked_alike(
    figures: dict[str, list[dict[str, Any]]], name: str
) -> None:
    marked = traces(figures[name][0], "chosen")
    assert marked and all(trace["marker"]["symbol"] == "star" for trace in marked)


def test_missed_diverged_and_failed_are_drawn(figures: dict[str, list[dict[str, Any]]]) -> None:
    [missed, *_] = traces(figures["cost-to-target"][0], "target missed: more than")
    assert (missed["x"], missed["y"]) == ([1000], [50])
    [wild] = traces(figures["rate-batch-map"][0], "diverged")
    assert (round(wild["x"][0]), wild["y"]) == (2, [_row(100, 1)])
    assert traces(figures["rate-batch-map"][0], "failed")
    [cross] = traces(figures["rate-loss"][0], "batch 100: diverged")
    assert cross["x"] == [pytest.approx(2 * rate_at(100))]
    assert traces(figures["why"][0], "target missed")


def _row(batch: int, above: int) -> int:
    """The row of the map on which a size's best rate × 2^above is."""
    rates = sorted({rate_at(B) * 2.0**k for B in SIZES for k in (-1, 0, 1)})
    return rates.index(rate_at(batch) * 2.0**above)


def test_the_critical_batch_is_a_band_of_its_interval(
    figures: dict[str, list[dict[str, Any]]],
) -> None:
    shapes = figures["cost-to-target"][0]["layout"]["shapes"]
    assert len(shapes) == 3
    assert all(
        (s["x0"], s["x1"]) == (pytest.approx(B_C / 1.2), pytest.approx(B_C * 1.2)) for s in shapes
    )


def test_error_bars_end_where_the_interval_does(figures: dict[str, list[dict[str, Any]]]) -> None:
    [measured, *_] = traces(figures["cost-to-target"][0], "measured")
    bars = measured["error_y"]
    assert measured["y"][0] + bars["array"][0] == pytest.approx(4200 * 1.2)
    assert measured["y"][0] - bars["arrayminus"][0] == pytest.approx(4200 / 1.2)


def test_every_colour_of_a_figure_that_needs_it_has_a_dark_one(
    figures: dict[str, list[dict[str, Any]]],
) -> None:
    """Text and lines; the fills of the map and of bars are light enough on either page."""

    def colours(value: Any, key: str = "") -> set[str]:
        if isinstance(value, dict):
            return {c for k, item in value.items() if k != "colorscale" for c in colours(item, k)}
        if isinstance(value, list):
            return {c for item in value for c in colours(item, key)}
        return {value} if "color" in key and isinstance(value, str) else set()

    used = {c for views in figures.values() for figure in views for c in colours(figure)}
    either = {"#3a3f47", "rgba(0,0,0,0)", "#ffffff", "#e69f00", "#009e73", "#cc79a7", "#56b4e9"}
    assert used - set(DARK) <= either


def test_sizes_have_viridis_by_logarithm_small_dark() -> None:
    colours = size_colours([1, 10, 100])
    light = [sum(map(int, c[4:-1].split(","))) for c in colours.values()]
    assert light == sorted(light)
    assert size_colours([1, 100])[1] == colours[1]


def test_size_labels_do_not_collide() -> None:
    axis = size_axis([2**k for k in range(11)] + [1438])
    assert axis["ticktext"][-1] == "1,438" and "1,024" not in axis["ticktext"]
    gaps = [math.log(b / a) for a, b in zip(axis["tickvals"], axis["tickvals"][1:], strict=False)]
    assert min(gaps) >= math.log(1438) / 6.5
    assert size_axis([32])["ticktext"] == ["32"]


@pytest.mark.parametrize("values", [[0.05, 20.0], [1e-9, 1e9], [3.0], [2.0, 2.1], []])
def test_logarithmic_axes_always_have_labels(values: list[float]) -> None:
    axis = log_axis("x", values)
    assert 2 <= len(axis["tickvals"]) <= 12
    low, high = axis["range"]
    assert all(low <= math.log10(tick) <= high for tick in axis["tickvals"])


def one_size(study: Study) -> Study:
    trials = tuple(study.trials_at(10))
    return replace(study, trials=trials, sizes=study.sizes[1:2], best=None)


def all_diverged(study: Study) -> Study:
    trials = tuple(
        replace(t, state="diverged", train_loss=None, val_loss=None, steps_to_target=None)
        for t in study.trials
    )
    return replace(study, trials=trials, sizes=(), best=None)


def negative_losses(study: Study) -> Study:
    def below(loss: float | None) -> float | None:
        return None if loss is None else loss - 1

    trials = tuple(
        replace(t, train_loss=below(t.train_loss), val_loss=below(t.val_loss)) for t in study.trials
    )
    return replace(study, trials=trials)


def one_seed(study: Study) -> Study:
    alone = Estimate(value=0.5, n=1)
    sizes = tuple(
        replace(size, learning_rate=Estimate(value=size.learning_rate.value, n=1), gap=alone,
                steps_to_target=alone, examples_to_target=alone, seconds_to_target=alone)
        for size in study.sizes
    )  # fmt: skip
    trials = tuple(trial for trial in study.trials if trial.seed == 0)
    design = replace(study.design, seeds=(0,))
    return replace(study, trials=trials, sizes=sizes, design=design)


def nothing_resolved(study: Study) -> Study:
    none = unresolved(3)
    fits = replace(study.fits, critical_batch=none, min_steps=none, min_examples=none,
                   rate_exponent=none, rate_rules=(), pareto=())  # fmt: skip
    sizes = tuple(
        replace(size, steps_to_target=none, examples_to_target=none, seconds_to_target=none,
                gap=none)
        for size in study.sizes
    )  # fmt: skip
    return replace(study, fits=fits, sizes=sizes)


@pytest.mark.parametrize(
    "change", [one_size, all_diverged, negative_losses, one_seed, nothing_resolved]
)
def test_odd_studies_have_a_report(change: Callable[[Study], Study]) -> None:
    source = Source(plan=None, study=change(make_study()), points=make_points())
    contents = collect_contents(source)
    assert contents.sections
    assert "figures" in make_page(contents)


def test_losses_below_zero_are_drawn_on_a_linear_axis() -> None:
    figures = drawn(Source(plan=None, study=negative_losses(make_study())))
    figure = figures["rate-loss"][0]
    assert "type" not in figure["layout"]["yaxis"]
    assert sum(len(t["x"]) for t in figure["data"] if t.get("mode") == "lines+markers") == 12
