"""The noise probe as text."""

from __future__ import annotations

from rightbatch.cli.table import make_table, wrap
from rightbatch.probes.noise import NoiseRecord
from rightbatch.report.units import show_interval, show_number, show_seconds


def as_text(record: NoiseRecord) -> str:
    """The answer in a sentence, the scale along the training, and the notes.

    Args:
        record: What the probe found.

    Returns:
        Lines of at most 80 columns.
    """
    rows = [
        (
            f"{point.step:,}",
            show_number(point.value),
            show_interval(point.noise_scale),
            f"{point.n:,}",
            point.method,
        )
        for point in record.trajectory
    ]
    table = make_table(("step", "B_simple", "95 % interval", "examples", "method"), rows, left=0)
    meaning = (
        "B_simple = tr(Σ)/|G|²: the batch at which noise and gradient are equally strong. It is a "
        "guide of the right order, not the critical batch."
    )
    cost = f"Cost: {record.cost_examples:,} examples, {show_seconds(record.seconds)}."
    notes = "\n".join(wrap(line) for line in [meaning, *record.notes, cost])
    return f"{wrap(_in_a_sentence(record))}\n\n{table}\n\n{notes}"


def _in_a_sentence(record: NoiseRecord) -> str:
    scale = record.noise_scale
    start = (
        f"{record.workload}: the noise scale at the start is unresolved ({show_interval(scale)})"
        if scale.value is None
        else f"{record.workload}: the noise scale at the start is {show_number(scale.value)} "
        f"examples ({show_interval(scale)})"
    )
    later = [point for point in record.trajectory if point.step > 0]
    if not later:
        return f"{start}."
    last = later[-1]
    if last.value is None:
        known = show_interval(last.noise_scale)
        return f"{start}; after {last.step} steps it is unresolved ({known})."
    return (
        f"{start}; after {last.step} steps it is {show_number(last.value)} "
        f"({show_interval(last.noise_scale)})."
    )
