"""A sweep as text: how the choice moves, and whether small or large batches suffer more."""

from __future__ import annotations

from rightbatch.cli.table import make_table, wrap
from rightbatch.laws.estimate import Estimate
from rightbatch.report.units import show_interval, show_number, show_seconds
from rightbatch.study.sweep import Sweep
from rightbatch.study.sweep_findings import Contrast, SweepLevel

_MOST_NOTES = 6
_BEST_IN = {
    "seconds": "fewest modelled seconds to the target",
    "examples": "fewest examples to the target",
    "loss": "least loss at the end",
}


def sweep_text(sweep: Sweep) -> str:
    """The answer in a sentence, the variants, and what each batch size loses.

    Args:
        sweep: The sweep.

    Returns:
        Lines of at most 80 columns.
    """
    parts = [wrap(sweep_answer(sweep)), _levels(sweep)]
    parts += [_table(sweep, contrast) for contrast in _shown(sweep)]
    parts += [wrap(sentence) for sentence in _verdicts(sweep)]
    parts += [wrap(f"Note: {warning}") for warning in sweep.warnings[:_MOST_NOTES]]
    if len(sweep.warnings) > _MOST_NOTES:
        parts.append(f"{len(sweep.warnings) - _MOST_NOTES} more notes are in the record (--json).")
    return "\n\n".join(parts)


def _unlike(contrast: Contrast) -> str:
    """Where the two did not come equally far, the harm of one is no measure of the other's."""
    small, large = contrast.harms[0].before, contrast.harms[-1].before
    a, b = small, large
    if a.low is None or b.low is None or a.high is None or b.high is None:
        return ""
    if contrast.measure != "loss" or (a.low <= b.high and b.low <= a.high):
        return ""
    return (
        f" They had not come equally far before, to {show_number(a.value)} and "
        f"{show_number(b.value)}: who has learnt little has little to lose."
    )


def sweep_answer(sweep: Sweep) -> str:
    """How the best batch moves from the first level to the last.

    Args:
        sweep: The sweep.

    Returns:
        One paragraph, not wrapped.
    """
    if sweep.state == "stopped":
        return (
            f"The sweep was stopped before its end, with {len(sweep.levels)} of "
            f"{len(sweep.design.levels)} levels begun. Go on with it to compare them."
        )
    first, last = sweep.levels[0], sweep.levels[-1]
    a, b = first.best_batch, last.best_batch
    ends = f"from {_name(sweep, first.level)} to {_name(sweep, last.level)}"
    if a.value is None or b.value is None:
        return f"{sweep.workload}: which batch is best is not resolved {ends}."
    best = f"the best batch, with the {_BEST_IN[sweep.goal]},"
    if a.low is None or b.low is None or a.high is None or b.high is None:
        told = "One seed cannot tell whether it moves."
    elif a.low > b.high or b.low > a.high:
        told = "It moves: the intervals do not overlap."
    else:
        told = (
            f"Whether it moves is not resolved: it lies within {show_interval(a)} and "
            f"{show_interval(b)}."
        )
        if a.value == b.value and a.low == a.high == b.low == b.high:
            told = "It does not move."
    went = f"is {_size(a)}" if a.value == b.value else f"goes from {_size(a)} to {_size(b)}"
    return f"{sweep.workload}: {best} {went} {ends}. {told}"


def _levels(sweep: Sweep) -> str:
    header = ("level", "batch", "among", "rate", "critical", "seconds", "loss", "interval")
    metric = any(level.metric.resolved for level in sweep.levels)
    if metric:
        header = (*header, _metric_name(sweep))
    rows = [_level_row(sweep, level, metric) for level in sweep.levels]
    return f"The best batch at each level, and its figures\n{make_table(header, rows, left=0)}"


def _level_row(sweep: Sweep, level: SweepLevel, metric: bool) -> tuple[str, ...]:
    critical = level.critical_batch.value
    row = (
        _name(sweep, level.level).removesuffix(" label noise").removesuffix(" examples"),
        _size(level.best_batch),
        show_interval(level.best_batch) if level.best_batch.resolved else "-",
        show_number(level.learning_rate.value),
        show_number(None if critical is None else round(critical)),
        show_seconds(level.seconds_to_target.value),
        show_number(level.loss.value),
        show_interval(level.loss),
    )
    return (*row, show_number(level.metric.value)) if metric else row


def _metric_name(sweep: Sweep) -> str:
    return (sweep.levels[0].study.metric or "metric").removeprefix("val_")


def _shown(sweep: Sweep) -> list[Contrast]:
    """The hardest level in losses, at each cost; the others are in the record."""
    if not sweep.contrasts:
        return []
    hardest = _hardest(sweep)
    return [c for c in sweep.contrasts if c.level == hardest and c.measure == "loss"]


def _hardest(sweep: Sweep) -> float:
    return sweep.design.levels[-1 if sweep.design.easiest == 0 else 0]


def _table(sweep: Sweep, contrast: Contrast) -> str:
    header = ("batch", "loss before", "loss after", "rise", "interval")
    rows = [
        (
            f"{harm.batch_size:,}",
            show_number(harm.before.value),
            show_number(harm.after.value),
            show_number(harm.harm.value),
            _signed_interval(harm.harm),
        )
        for harm in contrast.harms
    ]
    title = (
        f"From {_name(sweep, contrast.against)} to {_name(sweep, contrast.level)}, after "
        f"{_cost(contrast)} each"
    )
    return f"{wrap(title)}\n{make_table(header, rows, left=0)}"


def _verdicts(sweep: Sweep) -> list[str]:
    return [_verdict(sweep, contrast) + _unlike(contrast) for contrast in sweep.contrasts]


def _verdict(sweep: Sweep, contrast: Contrast) -> str:
    small, large = (contrast.harms[i].batch_size for i in (0, -1))
    first = (
        f"At equal {contrast.unit} ({_cost(contrast)}), {_name(sweep, contrast.level)} against "
        f"{_name(sweep, contrast.against)}:"
    )
    did = "the loss of" if contrast.measure == "loss" else "the accuracy of"
    moves = "rises" if contrast.measure == "loss" else "falls"
    by = (
        f"by {show_number(contrast.difference.value)} more "
        f"({_signed_interval(contrast.difference)})"
    )
    if contrast.verdict == "not told apart":
        return (
            f"{first} whether {did} batch {small:,} or that of {large:,} {moves} more is not told "
            f"apart; the difference is {show_number(contrast.difference.value)} "
            f"({_signed_interval(contrast.difference)})."
        )
    if contrast.verdict == "small":
        return f"{first} {did} batch {small:,} {moves} {by} than that of {large:,}."
    less = Estimate(
        value=None if contrast.difference.value is None else -contrast.difference.value,
        low=None if contrast.difference.high is None else -contrast.difference.high,
        high=None if contrast.difference.low is None else -contrast.difference.low,
        n=contrast.difference.n,
    )
    return (
        f"{first} {did} batch {large:,} {moves} by {show_number(less.value)} more "
        f"({_signed_interval(less)}) than that of {small:,}."
    )


def _signed_interval(estimate: Estimate) -> str:
    if estimate.low is None or estimate.high is None:
        return "no interval"
    return f"{show_number(estimate.low)} to {show_number(estimate.high)}"


def _cost(contrast: Contrast) -> str:
    number = show_number(contrast.amount)
    return f"{number} {contrast.unit[:-1] if contrast.amount == 1 else contrast.unit}"


def _name(sweep: Sweep, level: float) -> str:
    if sweep.design.kind == "dataset_size":
        return f"{int(level):,} examples"
    return f"{100 * level:.4g} % label noise"


def _size(batch: Estimate) -> str:
    return "?" if batch.value is None else f"{int(batch.value):,}"
