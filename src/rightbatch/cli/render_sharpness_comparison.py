"""A comparison of sharpness over batch sizes as text."""

from __future__ import annotations

from collections.abc import Callable

from rightbatch.cli.render_sharpness import CAVEAT
from rightbatch.cli.table import make_table, wrap
from rightbatch.laws.estimate import Estimate
from rightbatch.report.units import show_interval, show_number, show_seconds
from rightbatch.study.sharpness.records import SharpnessComparison, SharpnessSetting, SizeSharpness

_ROWS: tuple[tuple[str, Callable[[SizeSharpness], Estimate]], ...] = (
    ("λ_max", lambda size: size.largest_eigenvalue),
    ("trace", lambda size: size.trace),
    ("φ %", lambda size: size.phi),
    ("φ %, random 100", lambda size: size.phi_random),
    ("SAM rise", lambda size: size.sam_rise),
    ("training loss", lambda size: size.train_loss),
    ("validation − training", lambda size: size.gap),
    ("distance from start", lambda size: size.distance),
    ("norm of gradient", lambda size: size.gradient_norm),
)


def as_text(found: SharpnessComparison) -> str:
    """Four answers, the numbers behind each, and the caveats.

    Args:
        found: The comparison.

    Returns:
        Lines of at most 80 columns.
    """
    parts = [wrap(_in_a_sentence(found))]
    parts.extend(f"{wrap(own.finding)}\n{_table(own)}" for own in found.settings)
    rates = ", ".join(f"{size:,}: {show_number(rate)}" for size, rate in found.tuned_rates)
    others = len(found.batch_sizes) - 2
    shown = f" {others} sizes between them are in the record (--json)." if others else ""
    notes = [
        f"Means over {len(found.seeds)} seeds (geometric where all values are positive) with 95 % "
        f"intervals; verdicts within seeds.{shown}",
        f"Fixed learning rate {show_number(found.learning_rate)}; tuned {rates} ("
        f"{found.rates_from}).",
        "φ at ε = 0.001, a lower bound.",
        CAVEAT,
        *found.notes,
        f"Cost: {found.trainings} trainings and {len(found.runs)} measurements, "
        f"{found.cost_examples:,} examples, {show_seconds(found.seconds)}.",
    ]
    parts.append("\n".join(wrap(note) for note in notes))
    return "\n\n".join(parts)


def _in_a_sentence(found: SharpnessComparison) -> str:
    small, large = min(found.batch_sizes), max(found.batch_sizes)
    verdicts = [setting.verdict for setting in found.settings]
    count = {word: verdicts.count(word) for word in verdicts}
    flatter, sharper = count.get("flatter", 0), count.get("sharper", 0)
    start = f"{found.workload}: batch {small:,} ends"
    if 4 in (flatter, sharper):
        word = "flatter" if flatter else "sharper"
        return f"{start} {word} than batch {large:,}, whatever is held the same."
    if flatter == sharper == 0:
        return f"{start} neither flatter nor sharper than batch {large:,}, as far as can be told."
    return (
        f"{start} flatter than batch {large:,} in {flatter} of 4 settings and sharper in {sharper}"
        f"{_rest(4 - flatter - sharper)}: it depends on what is held the same."
    )


def _rest(number: int) -> str:
    return f"; in {number} it is not told apart" if number else ""


def _table(setting: SharpnessSetting) -> str:
    ends = (setting.sizes[0], setting.sizes[-1])  # all are in the record
    header = ["", *(text for size in ends for text in (f"batch {size.batch_size:,}", "interval"))]
    rows = [
        (
            name,
            *(
                text
                for size in ends
                for text in (show_number(value(size).value), show_interval(value(size)))
            ),
        )
        for name, value in _ROWS
        if any(value(size).resolved for size in ends)
    ]
    how = [
        ("learning rate", *(t for s in ends for t in (show_number(s.learning_rate), ""))),
        ("steps", *(t for s in ends for t in (f"{s.steps:,}", ""))),
    ]
    return make_table(header, [*how, *rows])
