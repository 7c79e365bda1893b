"""The sharpness probe as text."""

from __future__ import annotations

from rightbatch.cli.table import make_table, wrap
from rightbatch.probes.sharpness import KeskarSharpness, SharpnessPoint, SharpnessRecord
from rightbatch.report.units import show_interval, show_number, show_seconds

CAVEAT = (
    "None of these is invariant: weights of a ReLU network can be rescaled so that all of them "
    "change and the function does not. They compare trainings of one model, at like training "
    "losses, and say nothing about another model."
)


def as_text(record: SharpnessRecord) -> str:
    """The answer in a sentence, all measures of the last point, and the caveats.

    Args:
        record: What the probe found.

    Returns:
        Lines of at most 80 columns.
    """
    last = record.points[-1]
    parts = [wrap(_in_a_sentence(record)), _measures(last)]
    if len(record.points) > 1:
        parts.append(_along(record.points))
    top = last.largest_eigenvalue.value
    limit = (
        f" Plain gradient descent at a learning rate above 2/λ_max = {show_number(2 / top)} leaves "
        "such a place."
        if top is not None and top > 0
        else ""
    )
    meaning = [
        f"λ_max and trace are curvature.{limit}",
        "φ is the rise in percent of 1 + loss, to the highest loss that was found in a box around "
        "the weights: a lower bound.",
        CAVEAT,
    ]
    cost = f"Cost: {record.cost_examples:,} examples, {show_seconds(record.seconds)}."
    parts.append("\n".join(wrap(line) for line in [*meaning, *record.notes, cost]))
    return "\n\n".join(parts)


def _in_a_sentence(record: SharpnessRecord) -> str:
    last = record.points[-1]
    top, trace = last.largest_eigenvalue, last.trace
    return (
        f"{record.workload}: {_where(last)} the training loss has a curvature of at most "
        f"{show_number(top.value)} in any direction (λ_max, {show_interval(top)}) and of "
        f"{show_number(trace.value)} in all together (trace, {show_interval(trace)})."
    )


def _where(point: SharpnessPoint) -> str:
    if point.step is None:
        return "at the given weights"
    return "at the initial weights" if point.step == 0 else f"after {point.step:,} steps"


def _measures(point: SharpnessPoint) -> str:
    top, trace, rise = point.largest_eigenvalue, point.trace, point.sam_rise
    rows = [
        ("λ_max", show_number(top.value), show_interval(top), _count(top.n, "iteration")),
        ("trace", show_number(trace.value), show_interval(trace), _count(trace.n, "probe")),
        *(_phi(own) for own in point.keskar),
        (
            f"SAM rise, ρ = {point.sam_radius:g}",
            show_number(rise.value),
            show_interval(rise),
            _count(rise.n, "example"),
        ),
        ("loss", show_number(point.loss), "", _count(point.num_examples, "example")),
        ("norm of the gradient", show_number(point.gradient_norm), "", ""),
    ]
    return make_table(("measure", "value", "95 % interval", "from"), rows)


def _phi(own: KeskarSharpness) -> tuple[str, str, str, str]:
    name = "all directions" if own.directions == "all" else f"random {own.dimension}"
    starts = _count(own.phi.n, "start" if own.directions == "all" else "subspace")
    return (
        f"φ %, {name}, ε = {own.epsilon:g}",
        show_number(own.phi.value),
        show_interval(own.phi),
        starts,
    )


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'s' * (number != 1)}"


def _along(points: tuple[SharpnessPoint, ...]) -> str:
    rows = [
        (
            "?" if point.step is None else f"{point.step:,}",
            show_number(point.loss),
            show_number(point.gradient_norm),
            show_number(point.largest_eigenvalue.value),
            show_number(point.trace.value),
            show_number(point.keskar[0].phi.value),
            show_number(point.sam_rise.value),
        )
        for point in points
    ]
    header = ("step", "loss", "gradient", "λ_max", "trace", "φ %", "SAM rise")
    return f"Along the training\n{make_table(header, rows, left=0)}"
