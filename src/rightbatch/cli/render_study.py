"""A study as text: the answer, each batch size, all at equal costs, and what holds over them."""

from __future__ import annotations

from collections.abc import Callable

from rightbatch.cli.render_minima import gradient_sentences, minima_sentences, minima_table
from rightbatch.cli.table import make_table, wrap
from rightbatch.cli.units import show_interval, show_number, show_seconds
from rightbatch.laws.estimate import Estimate
from rightbatch.study.findings import Comparison, RaceFinding, SizeFinding
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
    parts += [wrap(sentence) for sentence in (*minima_sentences(study), *_over_sizes(study))]
    if study.sizes:
        parts += [wrap(sentence) for sentence in gradient_sentences(study)]
    if study.race is not None:
        parts.append(wrap(_race(study, study.race)))
    notes = (*study.warnings, *study.fits.notes)
    parts += [wrap(f"Note: {note}") for note in notes[:_MOST_NOTES]]
    if len(notes) > _MOST_NOTES:
        parts.append(f"{len(notes) - _MOST_NOTES} more notes are in the record (--json).")
    parts.append(wrap(_cost(study)))
    return "\n\n".join(parts)


def answer(study: Study) -> str:
    """The pair to train with, what it is best in, and what cannot be told from it.

    Args:
        study: The study.

    Returns:
        One paragraph, not wrapped.
    """
    stopped = "The study was stopped before its end. " if study.state == "stopped" else ""
    if study.best is None:
        return f"{stopped}No training of {study.workload} ended with a loss: there is no answer."
    best = study.best
    rate = show_number(best.learning_rate)
    text = (
        f"{stopped}Best for {study.workload}: batch {best.batch_size:,} at learning rate {rate}, "
        f"with the {best.because}."
    )
    if len(study.design.seeds) == 1:
        return f"{text} One seed cannot tell how far chance goes: take this as a hint."
    alike = [f"{size:,}" for size in _alike(study)]
    if alike:
        text += f" Batch {_listed(alike)} cannot be told from it: the intervals overlap."
    return text


def _alike(study: Study) -> list[int]:
    """Other sizes whose cost (or loss) has an interval that overlaps the best one's."""
    assert study.best is not None
    by_size = {finding.batch_size: finding for finding in study.sizes}
    judged = _judged_by(study)
    best = judged(by_size[study.best.batch_size])
    return [
        size
        for size, finding in by_size.items()
        if size != study.best.batch_size and _overlap(best, judged(finding))
    ]


def _judged_by(study: Study) -> Callable[[SizeFinding], Estimate]:
    because = "" if study.best is None else study.best.because
    if "seconds" in because:
        return lambda finding: finding.seconds_to_target
    if "examples" in because:
        return lambda finding: finding.examples_to_target
    if "validation" in because:
        return lambda finding: finding.val_loss
    return lambda finding: finding.train_loss


def _overlap(first: Estimate, second: Estimate) -> bool:
    if first.low is None or first.high is None or second.low is None or second.high is None:
        return False
    return first.low <= second.high and second.low <= first.high


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


def _over_sizes(study: Study) -> list[str]:
    fits, found = study.fits, list[str]()
    critical = fits.critical_batch
    if critical.value is not None:
        found.append(
            f"Critical batch {show_number(_rounded(critical.value))} "
            f"({show_interval(critical)}): there, steps to the target are twice the fewest, "
            f"{show_number(_rounded(fits.min_steps.value))} ({show_interval(fits.min_steps)}), and "
            "examples twice the fewest, "
            f"{show_number(_rounded(fits.min_examples.value))} "
            f"({show_interval(fits.min_examples)})."
        )
    exponent = fits.rate_exponent
    if exponent.value is not None:
        found.append(
            f"The best learning rate grows as the batch to the power "
            f"{show_number(exponent.value)} ({show_interval(exponent)}): "
            f"{_which_rule(exponent)}.{_rules(study)}"
        )
    if len(fits.pareto) > 1:
        listed = _listed([f"{size:,}" for size in fits.pareto])
        found.append(f"Fewer steps cost more examples: batch {listed}; none beats another in both.")
    return found


def _which_rule(exponent: Estimate) -> str:
    low = 0.0 if exponent.low is None else exponent.low
    high = 9.0 if exponent.high is None else exponent.high
    held = [name for name, p in (("linear", 1.0), ("square-root", 0.5)) if low <= p <= high]
    if len(held) == 2:
        return "linear and square-root scaling cannot be told apart"
    return f"{held[0]} scaling" if held else "neither linear (1) nor square-root scaling (0.5)"


def _rules(study: Study) -> str:
    names = {"linear": "linear", "sqrt": "square-root"}
    parts = [
        f"{names[rule.rule]} scaling holds to {rule.holds_to:,}"
        + ("" if rule.breaks_at is None else f" and fails at {rule.breaks_at:,}")
        for rule in study.fits.rate_rules
    ]
    if not parts:
        return ""
    return f" From batch {study.fits.rate_rules[0].begins_at:,}, {_listed(parts)}."


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
    kept = f"of {pairs} pairs it dropped {_listed(dropped)}" if dropped else "it dropped nothing"
    return (
        f"The race: {kept}. With what was run again it took {cost} that all pairs take to "
        "their end."
    )


def _cost_of(amount: float, unit: str) -> str:
    return show_seconds(amount) if unit == "seconds" else f"{show_number(amount)} {unit}"


def _cost(study: Study) -> str:
    count = sum(trial.state in ("complete", "diverged") for trial in study.trials)
    wild = sum(trial.state == "diverged" for trial in study.trials)
    ran = f"{count:,} trainings{f', {wild:,} of which diverged' if wild else ''}"
    if count < len(study.trials):
        ran = (
            f"{count:,} of {len(study.trials):,} trainings{f', {wild:,} diverged' if wild else ''}"
        )
    engines = sorted({text.split(":")[0] for text in study.engines})
    by = f", by the {_listed(engines)} engine{'s' * (len(engines) > 1)}" if engines else ""
    return (
        f"Cost: {ran}, {study.cost.examples:,} examples{by}; "
        f"this call took {show_seconds(study.cost.seconds)}."
    )


def _listed(words: list[str]) -> str:
    return " and ".join(words) if len(words) < 3 else f"{', '.join(words[:-1])} and {words[-1]}"
