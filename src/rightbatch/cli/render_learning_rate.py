"""The learning-rate probe as text."""

from __future__ import annotations

from rightbatch.cli.table import make_table, wrap
from rightbatch.laws.estimate import Estimate
from rightbatch.probes.learning_rate import LearningRateRecord
from rightbatch.report.units import show_interval, show_number, show_seconds


def as_text(record: LearningRateRecord) -> str:
    """The answer in a sentence, the suggestions with their spread, and the notes.

    Args:
        record: What the probe found.

    Returns:
        Lines of at most 80 columns.
    """
    suggestions = (
        ("steepest fall", record.steepest, lambda c: c.result.steepest),
        ("minimum ÷ 10", record.minimum_div_10, lambda c: c.result.minimum_div_10),
        ("valley", record.valley, lambda c: c.result.valley),
        ("explodes from", record.edge, lambda c: c.result.edge),
    )
    rows = [
        (
            name,
            _value(estimate),
            show_interval(estimate),
            *(show_number(of_ramp(curve)) for curve in record.curves),
        )
        for name, estimate, of_ramp in suggestions
    ]
    header = ("learning rate", "median", "interval", *(f"seed {c.seed}" for c in record.curves))
    cost = f"Cost: {record.cost_examples:,} examples, {show_seconds(record.cost_seconds)}."
    remarks = "\n".join(wrap(line) for line in [*record.notes, cost])
    return f"{wrap(_in_a_sentence(record))}\n\n{make_table(header, rows)}\n\n{remarks}"


def _value(estimate: Estimate) -> str:
    return "unresolved" if estimate.value is None else show_number(estimate.value)


def _in_a_sentence(record: LearningRateRecord) -> str:
    where = f"{record.workload} at batch {record.global_batch:,}"
    edge = (
        f"it explodes from {show_number(record.edge.value)} on"
        if record.edge.value is not None
        else f"it did not explode up to {show_number(record.lr_max)}"
    )
    if record.steepest.value is None:
        return f"{where}: the loss shows no clear fall from which to suggest a rate; {edge}."
    return (
        f"{where}: the loss falls most steeply at learning rate "
        f"{show_number(record.steepest.value)}; {edge}."
    )
