"""Loss while training, one curve per batch size, against epochs, steps, examples and seconds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rightbatch.laws.estimate import Estimate
from rightbatch.laws.seeds import geometric_mean_over_seeds, mean_over_seeds
from rightbatch.plan.price import max_micro_batch, step_seconds
from rightbatch.plan.records import Plan
from rightbatch.report.data.table import Table, overlap, sizes_in_words, with_interval
from rightbatch.report.source import CurvePoint, Source
from rightbatch.report.units import show_number
from rightbatch.study.records import TrialRecord
from rightbatch.study.study import Study


@dataclass(frozen=True, kw_only=True)
class CurveStep:
    """The loss of a batch size at one moment.

    Attributes:
        step: Updates done.
        epochs: Passes over the training set.
        examples: Training examples processed.
        seconds: What that takes by the measured step time, or None.
        train_loss: Over the seeds that had one.
        val_loss: Likewise.
    """

    step: int
    epochs: float
    examples: int
    seconds: float | None
    train_loss: Estimate
    val_loss: Estimate


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One batch size at one learning rate.

    Attributes:
        batch_size: Examples per update.
        learning_rate: Learning rate.
        seeds: Trainings.
        ended: How they ended, in words; empty where nothing is to be said.
        steps: The curve.
    """

    batch_size: int
    learning_rate: float
    seeds: int
    ended: str
    steps: tuple[CurveStep, ...]


@dataclass(frozen=True, kw_only=True)
class Curves:
    """All curves.

    Attributes:
        finding: What they show here.
        note: How to read them.
        curves: By batch size.
        chosen: The pair of the answer, or None.
    """

    finding: str
    note: str
    curves: tuple[Curve, ...]
    chosen: tuple[int, float] | None

    @property
    def has_seconds(self) -> bool:
        """Whether every curve can be drawn against seconds."""
        return all(step.seconds is not None for curve in self.curves for step in curve.steps)

    @property
    def has_train_loss(self) -> bool:
        """Whether there is a training loss to draw."""
        return any(step.train_loss.resolved for curve in self.curves for step in curve.steps)

    def table(self) -> Table:
        """Where every curve ends."""
        header = ("batch", "learning rate", "epochs", "steps", "training loss", "validation loss")
        rows = tuple(
            (
                f"{curve.batch_size:,}",
                show_number(curve.learning_rate),
                show_number(round(curve.steps[-1].epochs, 3)),
                f"{curve.steps[-1].step:,}",
                with_interval(curve.steps[-1].train_loss),
                with_interval(curve.steps[-1].val_loss) + (f", {curve.ended}" * bool(curve.ended)),
            )
            for curve in self.curves
        )
        return Table(header=header, rows=rows)


def collect(source: Source) -> Curves | None:
    """The curves of a study's best rates, or of the runs of a plan's race.

    Args:
        source: What the report is made of.

    Returns:
        The curves, or None where no evaluations were kept.
    """
    if source.study is not None:
        curves = _of_study(source.study, source.points)
    elif source.plan is not None and source.plan.evidence.race is not None:
        curves = _of_race(source.plan, source.plan.evidence.race.trials)
    else:
        curves = ()
    if not curves:
        return None
    return Curves(
        finding=_finding(curves),
        note=_note(curves, raced=source.study is None),
        curves=curves,
        chosen=source.chosen,
    )


def _of_study(study: Study, points: Sequence[CurvePoint]) -> tuple[Curve, ...]:
    """Each size at its best learning rate, seeds together."""
    found: list[Curve] = []
    for finding in study.sizes:
        rate = finding.learning_rate.value
        at: dict[int, list[CurvePoint]] = {}
        for point in points:
            if (point.batch_size, point.learning_rate) == (finding.batch_size, rate):
                at.setdefault(point.step, []).append(point)
        if not at or rate is None:
            continue
        trials = study.trials_at(finding.batch_size, rate)
        per_step = [t.seconds / t.steps for t in trials if t.seconds is not None and t.steps]
        steps = [_step(at[step], study.num_examples, per_step[:1]) for step in sorted(at)]
        wild = sum(trial.state == "diverged" for trial in trials)
        found.append(
            Curve(
                batch_size=finding.batch_size,
                learning_rate=rate,
                seeds=len(trials),
                ended=f"{wild} of {len(trials)} diverged" if wild else "",
                # Before the first update the training has no loss to draw on a logarithmic axis.
                steps=tuple(step for step in steps if step.step > 0),
            )
        )
    return tuple(curve for curve in found if curve.steps)


def _step(points: Sequence[CurvePoint], num_examples: int, per_step: Sequence[float]) -> CurveStep:
    first = points[0]
    return CurveStep(
        step=first.step,
        epochs=first.examples / num_examples,
        examples=first.examples,
        seconds=first.step * per_step[0] if per_step else None,
        train_loss=_over_seeds([point.train_loss for point in points]),
        val_loss=_over_seeds([point.val_loss for point in points]),
    )


def _over_seeds(losses: Sequence[float | None]) -> Estimate:
    """Geometric, as the axis is logarithmic; arithmetic where a loss is not positive."""
    known = [loss for loss in losses if loss is not None]
    if known and min(known) > 0:
        return geometric_mean_over_seeds(known)
    return mean_over_seeds(known)


_FEWEST_POINTS = 3
"""Runs of a race that were given up before are not curves yet."""


def _of_race(plan: Plan, trials: Sequence[TrialRecord]) -> tuple[Curve, ...]:
    evidence, setting = plan.evidence, plan.evidence.setting
    largest = max_micro_batch(evidence)

    def curve(trial: TrialRecord) -> Curve:
        batch = trial.global_batch
        seconds = step_seconds(evidence.throughput, batch, largest, setting.replicas)
        return Curve(
            batch_size=batch,
            learning_rate=trial.learning_rate,
            seeds=1,
            ended="" if trial.state == "reached" else trial.state,
            steps=tuple(
                CurveStep(
                    step=point.steps,
                    epochs=point.steps * batch / setting.num_examples,
                    examples=point.steps * batch,
                    seconds=point.steps * seconds,
                    train_loss=mean_over_seeds([]),
                    val_loss=mean_over_seeds([point.loss]),
                )
                for point in trial.points
                if point.steps > 0 and point.loss is not None
            ),
        )

    curves = [curve(trial) for trial in trials]
    order = sorted(curves, key=lambda c: (c.batch_size, c.learning_rate))
    return tuple(c for c in order if len(c.steps) >= _FEWEST_POINTS)


def _finding(curves: Sequence[Curve]) -> str:
    known = [(loss.value, c) for c in curves if (loss := _end(c)).value is not None]
    if not known:
        return "No curve ends with a loss"
    loss, best = min(known, key=lambda pair: pair[0])
    epochs = show_number(round(best.steps[-1].epochs, 2))
    end = f"a loss of {show_number(loss)} after {epochs} epochs, {best.steps[-1].step:,} steps"
    if len({curve.batch_size for curve in curves}) == 1:
        return f"Learning rate {show_number(best.learning_rate)} ends lowest: {end}"
    alike = [
        curve.batch_size
        for curve in curves
        if curve is not best and _end(curve).low is not None and overlap(_end(curve), _end(best))
    ]
    tail = f"; batch {sizes_in_words(alike)} cannot be told from it" if alike else ""
    return f"Batch {best.batch_size:,} ends lowest: {end}{tail}"


def _end(curve: Curve) -> Estimate:
    """Its last loss, of validation where there is one."""
    last = curve.steps[-1]
    return last.val_loss if last.val_loss.resolved else last.train_loss


def _note(curves: Sequence[Curve], *, raced: bool) -> str:
    if raced:
        return (
            "Each line is one run of the race; most were stopped early, when others were ahead. "
            "Which batch looks best depends on what is held equal: switch the axis."
        )
    seeds = max(curve.seeds for curve in curves)
    wild = [curve for curve in curves if curve.ended]
    ended = f" Diverged trainings end early: {wild[0].ended}." if wild else ""
    return (
        f"Each size at its best learning rate; bands are 95 % intervals over {seeds} seeds, "
        "dotted lines the training loss. Which batch looks best depends on what is held equal: "
        f"switch the axis.{ended}"
    )
