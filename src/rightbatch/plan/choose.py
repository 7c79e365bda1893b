"""From evidence to a plan: pure, so that a plan can be replayed from its file, bit for bit."""

from __future__ import annotations

from rightbatch.laws.split import Split, split_batch
from rightbatch.plan.by_probes import choose_by_probes
from rightbatch.plan.by_race import choose_by_race
from rightbatch.plan.by_study import choose_by_study
from rightbatch.plan.choice import Choice
from rightbatch.plan.price import max_micro_batch
from rightbatch.plan.reasons import general_warnings, other_reasons
from rightbatch.plan.records import Cost, Evidence, NearBest, Plan, UsedEffort
from rightbatch.recipe import Recipe


def choose(workload: str, evidence: Evidence, *, seconds: float) -> Plan:
    """Makes the plan that follows from the evidence.

    Args:
        workload: Name of the workload.
        evidence: What was measured.
        seconds: Wall time that measuring took.

    Returns:
        The plan. The same evidence gives the same plan.
    """
    choice, effort = _choose(evidence)
    setting = evidence.setting
    split = split_for(evidence, choice.cell.global_batch)
    recipe = Recipe(
        global_batch=split.global_batch,
        micro_batch=split.micro_batch,
        accumulation=split.accumulation,
        replicas=split.replicas,
        learning_rate=choice.cell.learning_rate,
    )
    examples = count_examples(evidence)
    return Plan(
        workload=workload,
        goal=setting.goal,
        effort=effort,
        recipe=recipe,
        near_best=NearBest(
            # Replicas that do not divide the size move the batch; it is as good still.
            low=min(choice.near_best.low, split.global_batch),
            high=max(choice.near_best.high, split.global_batch),
        ),
        prediction=choice.prediction,
        reasons=(choice.batch_reason, choice.rate_reason, *other_reasons(evidence, recipe, split)),
        evidence=evidence,
        cost=Cost(
            examples=examples,
            seconds=seconds,
            full_trainings=examples / choice.one_training if choice.one_training else None,
        ),
        warnings=(*choice.warnings, *general_warnings(evidence)),
    )


def _choose(evidence: Evidence) -> tuple[Choice, UsedEffort]:
    """By the most that was done."""
    if evidence.study is not None:
        return choose_by_study(evidence, evidence.study), "study"
    if evidence.race is not None:
        return choose_by_race(evidence, evidence.race), "race"
    return choose_by_probes(evidence), "probe"


def split_for(evidence: Evidence, size: int) -> Split:
    """How a size that was found is trained with the memory and the replicas there are."""
    return split_batch(size, min(max_micro_batch(evidence), size), evidence.setting.replicas)


def count_examples(evidence: Evidence) -> int:
    """Training examples that probes, race and study processed."""
    memory = evidence.memory
    in_memory = sum(t.num_examples for t in memory.trials) if memory else 0
    return (
        in_memory
        + evidence.throughput.cost_examples
        + evidence.noise_scale.cost_examples
        + evidence.learning_rate.cost_examples
        + (evidence.race.examples if evidence.race else 0)
        + (evidence.study.cost.examples if evidence.study else 0)
    )
