"""What a study answers, in a sentence or two: the same in the terminal and in the report."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rightbatch.laws.estimate import Estimate
from rightbatch.report.units import show_interval, show_number, show_seconds
from rightbatch.study.findings import SizeFinding
from rightbatch.study.study import Study


def answer(study: Study) -> str:
    """The pair to train with, what it is best in, and what cannot be told from it.

    Args:
        study: The study.

    Returns:
        One paragraph, not wrapped.
    """
    return f"{headline(study)} {doubts(study)}".rstrip()


def headline(study: Study) -> str:
    """The pair to train with and what it is best in, in a sentence."""
    stopped = "The study was stopped before its end. " if study.state == "stopped" else ""
    if study.best is None:
        return f"{stopped}No training of {study.workload} ended with a loss: there is no answer."
    best = study.best
    return (
        f"{stopped}Best for {study.workload}: batch {best.batch_size:,} at learning rate "
        f"{show_number(best.learning_rate)}, with the {best.because}."
    )


def doubts(study: Study) -> str:
    """What cannot be told from the answer, in a sentence; empty where nothing is near."""
    if study.best is None:
        return ""
    if len(study.design.seeds) == 1:
        return "One seed cannot tell how far chance goes: take this as a hint."
    alike = [f"{size:,}" for size in _alike(study)]
    if not alike:
        return ""
    return f"Batch {listed(alike)} cannot be told from it: the intervals overlap."


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


def which_rule(exponent: Estimate) -> str:
    """Which of the two scaling rules an exponent agrees with.

    Args:
        exponent: p of best learning rate ∝ Bᵖ.

    Returns:
        In words.
    """
    low = 0.0 if exponent.low is None else exponent.low
    high = 9.0 if exponent.high is None else exponent.high
    held = [name for name, p in (("linear", 1.0), ("square-root", 0.5)) if low <= p <= high]
    if len(held) == 2:
        return "linear and square-root scaling cannot be told apart"
    return f"{held[0]} scaling" if held else "neither linear (1) nor square-root scaling (0.5)"


def listed(words: Sequence[str]) -> str:
    """Words with commas and an `and`.

    Args:
        words: The words.

    Returns:
        Such as `a, b and c`.

    Example:
        >>> listed(["1", "10", "full"])
        '1, 10 and full'
    """
    return " and ".join(words) if len(words) < 3 else f"{', '.join(words[:-1])} and {words[-1]}"


def over_sizes(study: Study) -> list[str]:
    """What holds over the batch sizes.

    Args:
        study: The study.

    Returns:
        Sentences.
    """
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
            f"{which_rule(exponent)}.{_rules(study)}"
        )
    if len(fits.pareto) > 1:
        sizes = listed([f"{size:,}" for size in fits.pareto])
        found.append(f"Fewer steps cost more examples: batch {sizes}; none beats another in both.")
    return found


def _rules(study: Study) -> str:
    names = {"linear": "linear", "sqrt": "square-root"}
    parts = [
        f"{names[rule.rule]} scaling holds to {rule.holds_to:,}"
        + ("" if rule.breaks_at is None else f" and fails at {rule.breaks_at:,}")
        for rule in study.fits.rate_rules
    ]
    if not parts:
        return ""
    return f" From batch {study.fits.rate_rules[0].begins_at:,}, {listed(parts)}."


def cost_text(study: Study) -> str:
    """What the study cost.

    Args:
        study: The study.

    Returns:
        A sentence.
    """
    count = sum(trial.state in ("complete", "diverged") for trial in study.trials)
    wild = sum(trial.state == "diverged" for trial in study.trials)
    ran = f"{count:,} trainings{f', {wild:,} of which diverged' if wild else ''}"
    if count < len(study.trials):
        ran = (
            f"{count:,} of {len(study.trials):,} trainings{f', {wild:,} diverged' if wild else ''}"
        )
    engines = sorted({text.split(":")[0] for text in study.engines})
    by = f", by the {listed(engines)} engine{'s' * (len(engines) > 1)}" if engines else ""
    return (
        f"Cost: {ran}, {study.cost.examples:,} examples{by}; "
        f"this call took {show_seconds(study.cost.seconds)}."
    )


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value)
