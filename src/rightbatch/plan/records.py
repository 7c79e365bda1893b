"""What a plan consists of. All of it is plain data: written to JSON, read back, replayed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from rightbatch.laws.estimate import Estimate
from rightbatch.probes.learning_rate import LearningRateRecord
from rightbatch.probes.memory import MemoryRecord
from rightbatch.probes.noise import NoiseRecord
from rightbatch.probes.throughput import ThroughputRecord
from rightbatch.recipe import Recipe
from rightbatch.study.records import RaceRecord
from rightbatch.study.study import Study

Goal = Literal["time", "examples", "steps", "quality"]
Effort = Literal["auto", "probe", "race", "study"]
UsedEffort = Literal["probe", "race", "study"]


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What was asked, and what was known before measuring.

    Attributes:
        goal: What should be least: modelled seconds, examples or steps to the target; `quality`
            asks for the best loss within a fixed number of epochs' cost; the target is left out.
        effort: What was asked for.
        budget_seconds: Wall time that was allowed, or None.
        target: The target in words, or None.
        num_examples: N.
        num_examples_is_cut: Whether the source is a stream of which only a part was read.
        replicas: Data-parallel workers.
        optimizer: Class name of the optimizer.
        normalised: Whether it divides by the gradient's size (all but SGD do).
        averaging: Whether it averages gradients over steps (momentum, Adam).
        device: Where everything was measured.
        seed: Of everything random.
    """

    goal: Goal
    effort: Effort
    budget_seconds: float | None
    target: str | None
    num_examples: int
    num_examples_is_cut: bool
    replicas: int
    optimizer: str
    normalised: bool
    averaging: bool
    device: str
    seed: int


@dataclass(frozen=True, kw_only=True)
class Environment:
    """Where it was measured: another machine may need another plan.

    `clock` is `processor` where the machine was too busy for wall times to mean anything.
    """

    rightbatch: str
    python: str
    torch: str
    numpy: str
    platform: str
    processor: str
    num_cpus: int
    num_threads: int
    clock: Literal["wall", "processor"]
    started: str


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """Everything that was measured; a plan can be recomputed from it without running a model."""

    setting: Setting
    environment: Environment
    memory: MemoryRecord | None
    throughput: ThroughputRecord
    noise_scale: NoiseRecord
    learning_rate: LearningRateRecord
    race: RaceRecord | None
    study: Study | None = None


@dataclass(frozen=True, kw_only=True)
class Reason:
    """Why one field of the recipe is what it is.

    Attributes:
        field: The field.
        because: A sentence with the numbers behind it.
        source: The probe or rule it rests on.
    """

    field: str
    because: str
    source: str


@dataclass(frozen=True, kw_only=True)
class NearBest:
    """The sizes among which one within 5 % of the best probably is, at most 8 × apart."""

    low: int
    high: int


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What training with the recipe should take, to the target.

    Attributes:
        steps: Updates.
        seconds: Modelled seconds: steps × measured step time.
        examples: Training examples.
        speedup: Modelled seconds of batch 32 at its best learning rate ÷ those of the recipe; None
            where nothing was trained, where 32 is not open, or where it is the recipe's batch.
    """

    steps: Estimate
    seconds: Estimate
    examples: Estimate
    speedup: Estimate | None


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What finding the plan cost.

    Attributes:
        examples: Training examples processed, by probes, race and study together.
        seconds: Wall time.
        full_trainings: Examples ÷ those that batch 32 is predicted to take to the target; None
            where that is not known.
    """

    examples: int
    seconds: float
    full_trainings: float | None


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The answer.

    Attributes:
        workload: Name of the workload.
        goal: What should be least.
        effort: What was done in the end.
        recipe: How to train.
        near_best: Batch sizes that are probably as good.
        prediction: What it should take; None when only probes were made.
        reasons: One for each field of the recipe.
        evidence: What it rests on.
        cost: What finding it cost.
        warnings: What the user should know before relying on it.
    """

    workload: str
    goal: Goal
    effort: UsedEffort
    recipe: Recipe
    near_best: NearBest
    prediction: Prediction | None
    reasons: tuple[Reason, ...]
    evidence: Evidence
    cost: Cost
    warnings: tuple[str, ...]
