"""Steps, examples and seconds to the target against the batch size, with the fitted law."""

from __future__ import annotations

from dataclasses import dataclass

from rightbatch.laws.estimate import Estimate
from rightbatch.report.data.table import Table, sizes_in_words, with_interval
from rightbatch.report.source import Source
from rightbatch.report.units import show_interval, show_number, show_seconds
from rightbatch.study.findings import Fits, SizeFinding

_SAVED = 0.1
"""Beyond c·B_c a doubling saves less than this share of the steps; of S_min(1 + B_c/B):
1 − (1 + x/2)/(1 + x) < 0.1 for x = B_c/B < 1/4."""
_FACTOR = (1 - 2 * _SAVED) / (2 * _SAVED)
_CURVE_POINTS = 60


@dataclass(frozen=True, kw_only=True)
class SizeCost:
    """What one size took.

    Attributes:
        batch_size: Examples per update.
        steps: To the target; without a value where a training missed it.
        examples: Likewise.
        seconds: Likewise, by the measured step time.
        reached: Trainings that met the target.
        trials: Trainings.
        given_up_steps: Updates after which those that missed it ended.
    """

    batch_size: int
    steps: Estimate
    examples: Estimate
    seconds: Estimate
    reached: int
    trials: int
    given_up_steps: int


@dataclass(frozen=True, kw_only=True)
class CostToTarget:
    """The figure.

    Attributes:
        finding: What it shows here.
        note: How to read it.
        target: What counts as trained.
        sizes: Each batch size at its best learning rate.
        critical_batch: Where steps are twice the fewest.
        law: Batch size, steps and examples by S_min(1 + B_c/B); empty where it is not resolved.
        chosen: Batch size of the answer, or None.
    """

    finding: str
    note: str
    target: str
    sizes: tuple[SizeCost, ...]
    critical_batch: Estimate
    law: tuple[tuple[float, float, float], ...]
    chosen: int | None

    def table(self) -> Table:
        """The exact numbers."""
        header = ("batch", "steps", "examples", "seconds", "met the target")
        rows = tuple(
            (
                f"{size.batch_size:,}",
                with_interval(size.steps),
                with_interval(size.examples),
                _seconds(size.seconds),
                f"{size.reached} of {size.trials}",
            )
            for size in self.sizes
        )
        return Table(header=header, rows=rows)


def collect(source: Source) -> CostToTarget | None:
    """The figure of a study with a target.

    Args:
        source: What the report is made of.

    Returns:
        The figure, or None without a study or a target.
    """
    study = source.study
    if study is None or study.design.target is None or not study.sizes:
        return None
    sizes = tuple(_cost(finding) for finding in study.sizes)
    return CostToTarget(
        finding=_finding(sizes, study.fits),
        note=_note(sizes, study.fits),
        target=study.design.target,
        sizes=sizes,
        critical_batch=study.fits.critical_batch,
        law=_law(sizes, study.fits),
        chosen=None if source.chosen is None else source.chosen[0],
    )


def _cost(finding: SizeFinding) -> SizeCost:
    return SizeCost(
        batch_size=finding.batch_size,
        steps=finding.steps_to_target,
        examples=finding.examples_to_target,
        seconds=finding.seconds_to_target,
        reached=finding.reached,
        trials=finding.trials,
        given_up_steps=finding.steps,
    )


def _law(sizes: tuple[SizeCost, ...], fits: Fits) -> tuple[tuple[float, float, float], ...]:
    critical, least = fits.critical_batch.value, fits.min_steps.value
    if critical is None or least is None:
        return ()
    low, high = sizes[0].batch_size, sizes[-1].batch_size
    batches = [low * (high / low) ** (i / _CURVE_POINTS) for i in range(_CURVE_POINTS + 1)]
    steps = [least * (1 + critical / batch) for batch in batches]
    return tuple((B, S, B * S) for B, S in zip(batches, steps, strict=True))


def _finding(sizes: tuple[SizeCost, ...], fits: Fits) -> str:
    critical = fits.critical_batch.value
    if critical is not None:
        beyond = show_number(round(_FACTOR * critical))
        return (
            f"Beyond batch {beyond}, doubling the batch saves under {_SAVED * 100:.0f} % of the "
            f"steps; at {show_number(round(critical))} they are twice the fewest"
        )
    met = [(s.batch_size, s.steps.value) for s in sizes if s.steps.value is not None]
    if not met:
        return "At no batch size did every training meet the target"
    (first, most), (last, least) = met[0], met[-1]
    if len(met) == 1:
        return f"Only at batch {first:,} did every training meet the target"
    return (
        f"From batch {first:,} to {last:,} the steps to the target go from "
        f"{show_number(round(most))} to {show_number(round(least))}"
    )


def _note(sizes: tuple[SizeCost, ...], fits: Fits) -> str:
    parts = ["Each size at its best learning rate, with 95 % intervals over seeds."]
    if fits.critical_batch.value is not None:
        parts.append(
            f"The line is S_min (1 + B_c/B); the band is the interval of the critical batch B_c, "
            f"{show_interval(fits.critical_batch)}."
        )
    censored = [size.batch_size for size in sizes if size.reached < size.trials]
    if censored:
        parts.append(
            f"At batch {sizes_in_words(censored)} trainings missed the target: a triangle stands "
            "where they were given up; it takes more than that."
        )
    return " ".join(parts)


def _seconds(estimate: Estimate) -> str:
    if estimate.value is None:
        return "at least " + show_seconds(estimate.low) if estimate.low else "unresolved"
    if estimate.low is None or estimate.high is None:
        return show_seconds(estimate.value)
    ends = f"{show_seconds(estimate.low)}–{show_seconds(estimate.high)}"
    return f"{show_seconds(estimate.value)} ({ends})"
