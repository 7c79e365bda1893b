"""The batch sizes of a comparison in one setting, over the seeds."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rightbatch.laws.estimate import Estimate
from rightbatch.laws.seeds import geometric_mean_over_seeds, mean_over_seeds
from rightbatch.study.sharpness.course import Course
from rightbatch.study.sharpness.records import (
    Matched,
    Rate,
    SharpnessOfRun,
    SharpnessSetting,
    SizeSharpness,
)
from rightbatch.study.sharpness.verdict import judge_setting
from rightbatch.workload import Workload


def summarise_setting(
    course: Course,
    runs: Sequence[SharpnessOfRun],
    matched: Matched,
    rate: Rate,
    workload: Workload,
) -> SharpnessSetting:
    """What the sizes are like in one of the four settings, and what that says.

    Args:
        course: What was run.
        runs: What was measured.
        matched: What is held the same.
        rate: At which learning rates.
        workload: What was trained.

    Returns:
        The setting.
    """
    by_size: dict[int, list[SharpnessOfRun]] = {}
    for size in course.tuned:
        wanted = (size, course.rate(rate, size), course.stop(matched, size))
        own = [run for run in runs if (run.batch_size, run.learning_rate, run.steps) == wanted]
        by_size[size] = sorted(own, key=lambda run: run.seed)
    sizes = tuple(_size(own, workload.num_examples) for own in by_size.values())
    amount = course.epochs if matched == "epochs" else course.steps
    ratios, verdict, finding = judge_setting(by_size, matched, amount, rate)
    return SharpnessSetting(
        matched=matched,
        amount=amount,
        rate=rate,
        sizes=sizes,
        ratios=ratios,
        verdict=verdict,
        finding=finding,
    )


def _size(runs: Sequence[SharpnessOfRun], num_examples: int) -> SizeSharpness:
    first = runs[0]

    def mean(value: Callable[[SharpnessOfRun], float | None]) -> Estimate:
        there = [found for run in runs if (found := value(run)) is not None]
        if there and min(there) > 0:  # curvatures and losses of seeds differ by factors
            return geometric_mean_over_seeds(there)
        return mean_over_seeds(there)

    return SizeSharpness(
        batch_size=first.batch_size,
        learning_rate=first.learning_rate,
        steps=first.steps,
        epochs=first.steps * first.batch_size / num_examples,
        diverged=sum(run.diverged for run in runs),
        largest_eigenvalue=mean(lambda run: run.largest_eigenvalue),
        trace=mean(lambda run: run.trace),
        phi=mean(lambda run: run.phi),
        phi_random=mean(lambda run: run.phi_random),
        sam_rise=mean(lambda run: run.sam_rise),
        gradient_norm=mean(lambda run: run.gradient_norm),
        train_loss=mean(lambda run: run.train_loss),
        val_loss=mean(lambda run: run.val_loss),
        gap=mean(lambda run: run.gap),
        distance=mean(lambda run: run.distance),
    )
