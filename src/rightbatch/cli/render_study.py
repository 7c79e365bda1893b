"""A study as text: the answer, each batch size, all at equal costs, and what holds over them."""

from __future__ import annotations

from rightbatch.cli.render_minima import gradient_sentences, minima_sentences, minima_table
from rightbatch.cli.table import make_table, wrap
from rightbatch.report.answer_study import answer, cost_text, listed, over_sizes
from rightbatch.report.units import show_interval, show_number, show_seconds
from rightbatch.study.findings import Comparison, RaceFinding
from rightbatch.study.study import Study

_MOST_NOTES = 6


def study_text(study: Study) -> str:
    """The answer in a sentence, then the tables, then what holds over the sizes.

    Args:
        study: The study.

    Returns:
        Lines of at most 80 columns.
    """
    parts = [wrap(answer(study))]
    if study.sizes:
        parts.append(_sizes(study))
    if study.comparisons:
        parts.append(_equal_costs(study))
    if study.sizes:
        parts.append(minima_table(study))
    parts += [wrap(sentence) for sentence in (*minima_sentences(study), *over_sizes(study))]
    if study.sizes:
        parts += [wrap(sentence) for sentence in gradient_sentences(study)]
    if study.race is not None:
        parts.append(wrap(_race(study, study.race)))
    notes = (*study.warnings, *study.fits.notes)
    parts += [wrap(f"Note: {note}") for note in notes[:_MOST_NOTES]]
    if len(notes) > _MOST_NOTES:
        parts.append(f"{len(notes) - _MOST_NOTES} more notes are in the record (--json).")
    parts.append(wrap(cost_text(study)))
    return "\n\n".join(parts)


def _sizes(study: Study) -> str:
    target = study.design.target
    if target is None:
        header = ("batch", "learning rate", "interval", "stable to", "rates tried")
        rows = [
            (
                f"{f.batch_size:,}",
                show_number(f.learning_rate.value),
                show_interval(f.learning_rate),
                "?" if f.stable_edge is None else show_number(f.stable_edge),
                str(len(f.rates)),
            )
            for f in study.sizes
        ]
        return f"The best learning rate of each batch size\n{make_table(header, rows, left=0)}"
    header = ("batch", "learning rate", "interval", "steps", "interval", "seconds", "reached")
    rows = [
        (
            f"{f.batch_size:,}",
            show_number(f.learning_rate.value),
            show_interval(f.learning_rate),
            show_number(_rounded(f.steps_to_target.value)),
            show_interval(f.steps_to_target) if f.steps_to_target.resolved else "not all",
            show_seconds(f.seconds_to_target.value),
            f"{f.reached} of {f.trials}",
        )
        for f in study.sizes
    ]
    return f"To {target}, each at its best learning rate\n{make_table(header, rows, left=0)}"


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value)


def _equal_costs(study: Study) -> str:
    """The main comparison with its intervals, and the others as one column each."""
    unit = study.design.budget.unit
    main = next((c for c in study.comparisons if c.unit == unit), study.comparisons[0])
    parts = [_main_comparison(study, main)]
    others = [c for c in study.comparisons if c.unit not in {main.unit, *_same_as(main.unit)}]
    if others:
        header = ("batch", *(_amount(c) for c in others))
        sizes = sorted({size.batch_size for c in others for size in c.sizes})
        rows = [(f"{size:,}", *(_loss_in(c, size) for c in others)) for size in sizes]
        loss = "validation" if any(f.val_loss.resolved for f in study.sizes) else "training"
        parts.append(
            f"The {loss} loss at equal costs, at the rate that is best there\n"
            f"{make_table(header, rows, left=0)}"
        )
    return "\n\n".join(parts)


def _same_as(unit: str) -> tuple[str, ...]:
    """Epochs and examples are one cost in two units."""
    return {"epochs": ("examples",), "examples": ("epochs",)}.get(unit, ())


def _main_comparison(study: Study, comparison: Comparison) -> str:
    header: tuple[str, ...] = ("batch", "learning rate", "loss", "interval")
    metric = study.metric if any(s.metric.resolved for s in comparison.sizes) else None
    if metric is not None:
        header = (*header, metric, "interval")
    rows: list[tuple[str, ...]] = []
    for size in comparison.sizes:
        row = (
            f"{size.batch_size:,}",
            show_number(size.learning_rate),
            show_number(size.loss.value),
            show_interval(size.loss),
        )
        if metric is not None:
            row = (*row, show_number(size.metric.value), show_interval(size.metric))
        rows.append(row)
    return (
        f"After {_amount(comparison)}, each at the rate that is best there\n"
        f"{make_table(header, rows, left=0)}"
    )


def _amount(comparison: Comparison) -> str:
    if comparison.unit == "seconds":
        return show_seconds(comparison.amount)
    number = show_number(comparison.amount)
    return f"{number} {comparison.unit[:-1] if comparison.amount == 1 else comparison.unit}"


def _loss_in(comparison: Comparison, batch_size: int) -> str:
    found = [s.loss.value for s in comparison.sizes if s.batch_size == batch_size]
    return show_number(found[0]) if found else "-"


def _race(study: Study, race: RaceFinding) -> str:
    dropped = [
        f"{rung.dropped} after {_cost_of(rung.amount, rung.unit)}"
        for rung in race.rungs
        if rung.dropped
    ]
    pairs = len({(trial.batch_size, trial.learning_rate) for trial in study.trials})
    cost = f"{100 * race.examples_of_grid:.0f} % of the examples"
    if race.seconds_of_grid is not None:
        cost = f"{100 * race.seconds_of_grid:.0f} % of the modelled seconds and {cost}"
    kept = f"of {pairs} pairs it dropped {listed(dropped)}" if dropped else "it dropped nothing"
    return (
        f"The race: {kept}. With what was run again it took {cost} that all pairs take to "
        "their end."
    )


def _cost_of(amount: float, unit: str) -> str:
    return show_seconds(amount) if unit == "seconds" else f"{show_number(amount)} {unit}"
