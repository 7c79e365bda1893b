"""The memory probe as text."""

from __future__ import annotations

from rightbatch.cli.table import make_table, wrap
from rightbatch.probes.memory import MemoryRecord
from rightbatch.report.units import show_bytes, show_seconds


def as_text(record: MemoryRecord) -> str:
    """The answer in a sentence, where the bytes go, what was run, and the notes.

    Args:
        record: What the probe found.

    Returns:
        Lines of at most 80 columns.
    """
    cost = f"Cost: {len(record.trials)} sizes run, {show_seconds(record.seconds)}."
    remarks = "\n".join(wrap(line) for line in [*_prediction(record), *record.notes, cost])
    return "\n\n".join([wrap(_in_a_sentence(record)), _trials(record), _parts(record), remarks])


def _in_a_sentence(record: MemoryRecord) -> str:
    ceiling = record.ceiling
    limit = f"{show_bytes(record.limit_bytes)} ({record.limit_source})"
    failed = (
        "" if ceiling.smallest_failed is None else f", and {ceiling.smallest_failed:,} does not fit"
    )
    larger = "" if ceiling.proven else "; larger ones were not ruled out"
    return (
        f"{record.workload} on {record.device}: micro-batch {ceiling.micro_batch:,} was run within "
        f"{limit} with {show_bytes(ceiling.headroom_bytes)} to spare{failed}{larger}."
    )


def _trials(record: MemoryRecord) -> str:
    rows = [
        (
            f"{trial.micro_batch:,}",
            "–" if trial.peak_bytes is None else show_bytes(trial.peak_bytes),
            show_seconds(trial.seconds),
            trial.verdict,
        )
        for trial in record.trials
    ]
    return make_table(("micro-batch", "peak", "time", "verdict"), rows, left=0)


def _parts(record: MemoryRecord) -> str:
    parts = record.parts
    rows = [
        ("libraries and data", show_bytes(parts.baseline_bytes)),
        ("parameters", show_bytes(parts.parameters_bytes)),
        ("gradients", show_bytes(parts.gradients_bytes)),
        ("optimizer state", show_bytes(parts.optimizer_bytes)),
        ("activations, per example", show_bytes(parts.activation_bytes_per_example)),
    ]
    return make_table(("where the bytes go", "bytes"), rows)


def _prediction(record: MemoryRecord) -> list[str]:
    """How well the law foresaw the answer: the trust that its extrapolation deserves."""
    if record.law is None or record.law.prediction_error is None:
        return []
    return [
        f"From the smaller sizes the law predicted {show_bytes(record.law.predicted_bytes)} at "
        f"micro-batch {record.ceiling.micro_batch:,}, {abs(record.law.prediction_error):.1%} "
        f"{'above' if record.law.prediction_error > 0 else 'below'} what was measured."
    ]
