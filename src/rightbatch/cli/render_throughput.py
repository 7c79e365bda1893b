"""The throughput probe as text."""

from __future__ import annotations

from rightbatch.cli.table import make_table, wrap
from rightbatch.laws.timing import SizeTime
from rightbatch.probes.throughput import ThroughputRecord
from rightbatch.report.units import show_interval, show_number, show_seconds


def as_text(record: ThroughputRecord) -> str:
    """The answer in a sentence, the sizes, the law, and the notes.

    Args:
        record: What the probe found.

    Returns:
        Lines of at most 80 columns.
    """
    parts = [wrap(_in_a_sentence(record)), _sizes(record), _law(record)]
    remarks = [*(power.sentence for power in record.powers_of_two), *record.notes]
    cost = f"Cost: {record.cost_examples:,} examples, {show_seconds(record.cost_seconds)}."
    # The law's own note may be among the record's notes already.
    lines = dict.fromkeys([*remarks, record.law.note, cost])
    return "\n\n".join([*parts, "\n".join(wrap(line) for line in lines if line)])


def _in_a_sentence(record: ThroughputRecord) -> str:
    knee, best = record.law.knee, max(record.sizes, key=_throughput)
    where = f"{record.workload} on {record.device}"
    fastest = (
        f"the most measured is {show_number(_throughput(best))} examples a second, at micro-batch "
        f"{best.micro_batch:,}"
    )
    if knee.value is None:
        return f"{where}: no size was found beyond which throughput stops growing; {fastest}."
    if knee.value < 1:
        return f"{where}: throughput does not grow with the micro-batch; {fastest}."
    return (
        f"{where}: at micro-batch {show_number(knee.value)} ({show_interval(knee)}) half of the "
        f"greatest throughput is reached, beyond it little is gained; {fastest}."
    )


def _throughput(size: SizeTime) -> float:
    return size.micro_batch / size.seconds


def _sizes(record: ThroughputRecord) -> str:
    rows = [
        (
            f"{size.micro_batch:,}",
            show_seconds(size.seconds),
            f"{show_seconds(size.low)} – {show_seconds(size.high)}",
            show_number(_throughput(size)),
            str(size.n),
        )
        for size in record.sizes
    ]
    return make_table(
        ("micro-batch", "step", "95 % interval", "examples/s", "rounds"), rows, left=0
    )


def _law(record: ThroughputRecord) -> str:
    law = record.law
    named = (
        ("per step, α", law.alpha_seconds),
        ("per example, β", law.beta_seconds),
        ("floor", law.floor_seconds),
        ("loading, per example", record.loader_seconds_per_example),
        ("update", record.update_seconds),
        ("evaluation, per example", record.evaluation_seconds_per_example),
    )
    rows = [
        (name, show_seconds(value.value), f"{show_seconds(value.low)} – {show_seconds(value.high)}")
        for name, value in named
        if value.value is not None
    ]
    return make_table(("seconds", "value", "95 % interval"), rows)
