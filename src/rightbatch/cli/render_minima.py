"""What a study says of minima and gradients, as text."""

from __future__ import annotations

from rightbatch.cli.table import make_table
from rightbatch.laws.estimate import Estimate
from rightbatch.laws.gradient_scatter import SizeScatter
from rightbatch.report.units import show_interval, show_number
from rightbatch.study.findings import Contrast, SizeFinding
from rightbatch.study.study import Study

_SHOWN = 4
"""Batch sizes whose cosines are printed."""
_VERDICTS = {"falling": "still falling", "rising": "rising again", "unresolved": "not resolved"}


def minima_table(study: Study) -> str:
    """Gap, distance from the initial weights, roughness and noise floor of each size.

    Args:
        study: The study.

    Returns:
        Lines of at most 80 columns.
    """
    gap = any(f.gap.resolved for f in study.sizes)
    header = ["batch", "distance", "interval", "roughness", "interval", "noise floor"]
    rows = [
        [
            f"{f.batch_size:,}",
            show_number(f.distance.value),
            _interval(f.distance),
            _roughness(f),
            _interval(f.roughness),
            _floor(f),
        ]
        for f in study.sizes
    ]
    if gap:
        header.insert(1, "gap")
        for row, finding in zip(rows, study.sizes, strict=True):
            row.insert(1, show_number(finding.gap.value))
    table = make_table(tuple(header), [tuple(row) for row in rows], left=0)
    return f"What the minima are like, each at its best learning rate\n{table}"


def _interval(estimate: Estimate) -> str:
    return "-" if estimate.low is None and estimate.high is None else show_interval(estimate)


def _roughness(finding: SizeFinding) -> str:
    if finding.roughness.value is None and finding.dead:
        return "dead"
    return show_number(finding.roughness.value)


def _floor(finding: SizeFinding) -> str:
    floor = finding.noise_floor
    if floor.level.value is None:
        return _VERDICTS[floor.verdict]
    return f"{show_number(floor.level.value)} ({show_interval(floor.level)})"


def minima_sentences(study: Study) -> list[str]:
    """How paths of the smallest and the largest batch differ, and which seeds tell nothing.

    Args:
        study: The study.

    Returns:
        Paragraphs, not wrapped.
    """
    found: list[str] = []
    rough = [c for c in study.contrasts if c.quantity == "roughness"]
    if rough:
        found.append(" ".join(_how_rough(c, study.watching) for c in rough))
    far = [c for c in study.contrasts if c.quantity == "distance" and c.certain is not None]
    if far:
        found.append(" ".join(_how_far(c) for c in far))
    dead = max((finding.dead for finding in study.sizes), default=0)
    if dead:
        seeds = f"{dead} of {len(study.design.seeds)} seeds"
        found.append(
            f"The watched weight {study.watching} never moved at {seeds}: it is dead there, and "
            "says nothing of roughness. Watch another (--watch)."
        )
    return found


def _rates(contrast: Contrast) -> str:
    if contrast.at == "best":
        return "at their best learning rates"
    return f"both at {show_number(contrast.learning_rates[0])}"


def _how_rough(contrast: Contrast, weight: str) -> str:
    small, large = contrast.sizes
    ratio = contrast.difference
    text = (
        f"Over {show_number(contrast.epochs)} epochs {_rates(contrast)}, the path of {weight} is "
        f"{show_number(ratio.value)} times as rough at batch {small:,} as at {large:,}"
    )
    if contrast.certain is None:
        return f"{text}; one seed cannot tell how far chance goes."
    certainly = "for certain" if contrast.certain else "which may be chance"
    return f"{text} ({show_interval(ratio)}), {certainly}."


def _how_far(contrast: Contrast) -> str:
    small, large = contrast.sizes
    certainly = "for certain" if contrast.certain else "which may be chance"
    return (
        f"{_rates(contrast).capitalize()}, batch {small:,} ends "
        f"{show_number(contrast.difference.value)} times as far from its initial weights as "
        f"{large:,} ({show_interval(contrast.difference)}), {certainly}."
    )


def gradient_sentences(study: Study) -> list[str]:
    """How fast the gradient's error falls with the batch, and how its direction scatters.

    Args:
        study: The study.

    Returns:
        Paragraphs, not wrapped.
    """
    record = study.gradients.record
    if record is None:
        return [f"Gradients were not looked at: {study.gradients.skipped}"]
    found: list[str] = []
    for point in record.points:
        scatter = point.scatter
        when = f"After {point.step:,} updates" if point.step else "At the initial weights"
        slope = scatter.slope
        falls = (
            "how the gradient's error falls with the batch is not resolved"
            if slope.value is None
            else f"the gradient's error falls with slope {show_number(slope.value)} "
            f"({show_interval(slope)}) in logarithms of the batch; the root law is -0.5"
        )
        shown = _spread_out(scatter.sizes)
        cosines = ", ".join(
            f"{s.batch_size:,}: {s.cosine_median:.2f} ({s.cosine_low:.2f}–{s.cosine_high:.2f})"
            for s in shown
        )
        found.append(
            f"{when}, {falls}. Cosine to the full gradient, with 80 % of draws, at batch {cosines}."
        )
    return [*found, *(f"Note: {note}" for note in record.notes)]


def _spread_out(sizes: tuple[SizeScatter, ...]) -> list[SizeScatter]:
    below = [size for size in sizes if size.predicted_error > 0]
    step = max(1, -(-len(below) // _SHOWN))
    return below[::step]
