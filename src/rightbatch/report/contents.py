"""What stands in a report, before it has a form: the answer, why, the findings, the evidence."""

from __future__ import annotations

import platform
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version

from rightbatch.plan.records import Environment, Setting
from rightbatch.report import answer_plan, answer_study
from rightbatch.report.data import (
    cost_to_target,
    curves,
    gap,
    memory,
    noise,
    pareto,
    rate_batch_map,
    rate_loss,
    rate_rules,
    step_time,
    why,
)
from rightbatch.report.data.table import FigureData
from rightbatch.report.source import Source
from rightbatch.report.units import show_number

SCHEMA = "rightbatch.report/1"
_FIGURES: tuple[tuple[str, str, Callable[[Source], FigureData | None]], ...] = (
    ("why", "Why this batch", why.collect),
    ("cost-to-target", "What the target takes", cost_to_target.collect),
    ("pareto", "Steps against examples", pareto.collect),
    ("curves", "While training", curves.collect),
    ("rate-batch-map", "Learning rate × batch size", rate_batch_map.collect),
    ("rate-loss", "Loss against learning rate", rate_loss.collect),
    ("rate-rules", "Learning-rate rules", rate_rules.collect),
    ("gap", "Generalisation gap", gap.collect),
    ("noise", "Gradient noise scale", noise.collect),
    ("step-time", "Step time and throughput", step_time.collect),
    ("memory", "Memory", memory.collect),
)
"""In the order of the page: name, subject, and what collects it."""


@dataclass(frozen=True, kw_only=True)
class Section:
    """One figure of a report.

    Attributes:
        name: Its anchor.
        subject: What it is about, in a few words; the finding is its title.
        data: What it shows.
    """

    name: str
    subject: str
    data: FigureData


@dataclass(frozen=True, kw_only=True)
class WhyRow:
    """One field of the recipe.

    Attributes:
        field: Its name.
        value: Its value.
        because: Why, with the numbers.
        source: What that rests on.
    """

    field: str
    value: str
    because: str
    source: str


@dataclass(frozen=True, kw_only=True)
class Contents:
    """A report.

    Attributes:
        workload: What was trained.
        answer: What to do, in a sentence.
        doubts: What that rests on, and what cannot be told from it; may be empty.
        sentences: Why, in sentences.
        reasons: Why, field by field; a study has none.
        warnings: What to know before relying on it.
        sections: The figures.
        evidence: What it rests on: names and values.
    """

    workload: str
    answer: str
    doubts: str
    sentences: tuple[str, ...]
    reasons: tuple[WhyRow, ...]
    warnings: tuple[str, ...]
    sections: tuple[Section, ...]
    evidence: tuple[tuple[str, str], ...]


def collect_contents(source: Source) -> Contents:
    """Everything that a report says.

    Args:
        source: The plan or study.

    Returns:
        Its contents.
    """
    found = ((name, subject, collect(source)) for name, subject, collect in _FIGURES)
    sections = tuple(Section(name=n, subject=s, data=d) for n, s, d in found if d is not None)
    plan, study = source.plan, source.study
    sentences: list[str] = [] if study is None else answer_study.over_sizes(study)
    warnings: list[str] = [] if study is None else [*study.warnings, *study.fits.notes]
    reasons: list[tuple[str, str, str, str]] = []
    if plan is not None:
        answer, doubts = answer_plan.headline(plan), answer_plan.rests_on(plan)
        reasons = answer_plan.reason_rows(plan)
        sentences.append(answer_plan.cost_text(plan))
        warnings = [*plan.warnings, *warnings]
    else:
        assert study is not None  # a source has one of them
        answer, doubts = answer_study.headline(study), answer_study.doubts(study)
        sentences.append(answer_study.cost_text(study))
    return Contents(
        workload=source.workload,
        answer=answer,
        doubts=doubts,
        sentences=tuple(sentences),
        reasons=tuple(
            WhyRow(field=field, value=value, because=because, source=basis)
            for field, value, because, basis in reasons
        ),
        warnings=tuple(dict.fromkeys(warnings)),
        sections=sections,
        evidence=tuple(_evidence(source)),
    )


def _evidence(source: Source) -> list[tuple[str, str]]:
    rows = [
        ("workload", source.workload),
        ("training examples", f"{source.num_examples:,}"),
        ("target", source.target or "none"),
    ]
    if source.plan is not None:
        rows += _of_plan(source.plan.evidence.setting, source.plan.evidence.environment)
    if source.study is not None:
        study = source.study
        budget = study.design.budget
        rows += [
            ("batch sizes", ", ".join(f"{size:,}" for size in study.design.batch_sizes)),
            ("seeds", ", ".join(str(seed) for seed in study.design.seeds)),
            ("each training", f"{show_number(budget.amount)} {budget.unit}"),
            ("trainings", f"{len(study.trials):,}"),
            *(("engine", engine) for engine in study.engines),
        ]
    report = f"rightbatch {version('rightbatch')}, Python {platform.python_version()}"
    return [*rows, ("this report", report)]


def _of_plan(setting: Setting, environment: Environment) -> list[tuple[str, str]]:
    return [
        ("optimizer", setting.optimizer),
        ("goal and effort", f"{setting.goal}, {setting.effort}"),
        ("seed", str(setting.seed)),
        ("device", f"{setting.device}, {_threads(environment.num_threads)}"),
        ("measured with", f"rightbatch {environment.rightbatch}, torch {environment.torch}, "
                          f"NumPy {environment.numpy}, Python {environment.python}"),
        ("machine", f"{environment.platform}; {environment.processor}; "
                    f"{environment.num_cpus} CPUs; {environment.clock} clock"),
        ("begun", environment.started),
    ]  # fmt: skip


def _threads(count: int) -> str:
    return "1 thread" if count == 1 else f"{count} threads"
