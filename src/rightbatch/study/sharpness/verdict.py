"""Is the place where the smallest batch ends flatter? A verdict and one sentence per setting."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rightbatch.laws.estimate import Estimate
from rightbatch.laws.sharpness import order_of_pairs
from rightbatch.study.sharpness.records import (
    MEASURES,
    Matched,
    Measure,
    Rate,
    SharpnessOfRun,
    SharpnessRatio,
    Verdict,
)


def judge_setting(
    by_size: Mapping[int, Sequence[SharpnessOfRun]], matched: Matched, amount: int, rate: Rate
) -> tuple[tuple[SharpnessRatio, ...], Verdict, str]:
    """Compares the smallest batch size with the largest, paired over seeds.

    Flatter (sharper) needs one measure that is told apart at 95 % and says so, and none that says
    the opposite. Where training losses differ as well, the sentence says that: the curvature of
    most losses falls as they do, so that it is not of two minima.

    Args:
        by_size: Trainings of each batch size, in the same order of seeds.
        matched: What is the same for all sizes.
        amount: How many of it.
        rate: Whether the learning rate is.

    Returns:
        The ratios, the verdict, and the sentence.
    """
    small, large = min(by_size), max(by_size)
    first, second = by_size[small], by_size[large]
    ratios = tuple(_ratio(measure, first, second) for measure in MEASURES)
    verdict = _verdict(ratios)
    unit = matched if amount != 1 else matched[:-1]
    rates = "at one learning rate" if rate == "fixed" else "each at its tuned learning rate"
    where = f"After {amount:,} {unit}, {rates}, "
    pairs = sum(not (a.diverged or b.diverged) for a, b in zip(first, second, strict=True))
    if pairs < 2:
        count = f"only {pairs} seed{'s' * (pairs != 1)}" if pairs else "no seed"
        return ratios, verdict, f"{where}nothing can be told: {count} has both batch sizes."
    finding = _finding(small, large, ratios, verdict)
    return ratios, verdict, f"{where}{finding}{_loss(small, first, second)}"


def _ratio(
    measure: Measure, first: Sequence[SharpnessOfRun], second: Sequence[SharpnessOfRun]
) -> SharpnessRatio:
    values = [[run.value(measure) for run in runs] for runs in (first, second)]
    order, ratio = order_of_pairs(*values)
    return SharpnessRatio(measure=measure, order=order, ratio=ratio)


def _verdict(ratios: Sequence[SharpnessRatio]) -> Verdict:
    orders = {ratio.order for ratio in ratios}
    if {"lower", "higher"} <= orders:
        return "measures disagree"
    if "lower" in orders:
        return "flatter"
    return "sharper" if "higher" in orders else "not told apart"


def _finding(small: int, large: int, ratios: Sequence[SharpnessRatio], verdict: Verdict) -> str:
    names = f"batch {small:,}", f"batch {large:,}"
    lower = [_times(r) for r in ratios if r.order == "lower"]
    higher = [_times(r) for r in ratios if r.order == "higher"]
    untold = [r.measure for r in ratios if r.order == "not told apart"]
    if verdict == "not told apart":
        top = ratios[0]
        return f"{names[0]} and {names[1]} are not told apart in sharpness ({_times(top)})."
    if verdict == "measures disagree":
        return (
            f"the measures disagree: {names[0]} is flatter than {names[1]} by {_listed(lower)}, "
            f"and sharper by {_listed(higher)}."
        )
    rest = f"; {_listed(untold)} {'does' if len(untold) == 1 else 'do'} not tell" if untold else ""
    return f"{names[0]} ends {verdict} than {names[1]}: {_listed(lower or higher)}{rest}."


def _times(own: SharpnessRatio) -> str:
    """Such as `λ_max 0.31 (0.2–0.48) times`."""
    ratio = own.ratio
    if ratio.value is None:
        return own.measure
    if ratio.low is None or ratio.high is None:
        return f"{own.measure} {ratio.value:.2g} times"
    return f"{own.measure} {ratio.value:.2g} ({ratio.low:.2g}–{ratio.high:.2g}) times"


def _loss(small: int, first: Sequence[SharpnessOfRun], second: Sequence[SharpnessOfRun]) -> str:
    """Whether it is also at another training loss."""
    order, ratio = order_of_pairs([r.train_loss for r in first], [r.train_loss for r in second])
    if order == "not told apart":
        return ""
    return (
        f" But the training loss of batch {small:,} is {order}{_by(ratio)}: these are not two "
        "minima of one depth."
    )


def _by(ratio: Estimate) -> str:
    return "" if ratio.value is None else f", {ratio.value:.2g} times the other's"


def _listed(words: Sequence[str]) -> str:
    return " and ".join(words) if len(words) < 3 else f"{', '.join(words[:-1])} and {words[-1]}"
