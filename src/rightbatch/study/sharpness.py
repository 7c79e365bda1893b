"""`compare_sharpness`: do small batches end in flatter places than large ones, on this workload?

Keskar et al. (2017) found that they do, and that flat places generalise better. Hoffer et al.
(2017) and Shallue et al. (2018) found that much of the difference goes where large batches get as
many updates, or learning rates of their own. So there are four answers, and none of them is
promised: after as many epochs and after as many updates, each at one learning rate for all and at
each size's own.

Trainings of one seed begin with the same weights and see the same order of the data at every batch
size, so that differences are taken within seeds.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rightbatch.errors import ProbeError, UsageError
from rightbatch.isolate import preserved_state
from rightbatch.laws.estimate import Estimate
from rightbatch.laws.seeds import geometric_mean_over_seeds, mean_over_seeds
from rightbatch.probes.sharpness import measure_sharpness_at
from rightbatch.recipe import Recipe
from rightbatch.study.design import BatchSizes, Budget, make_design
from rightbatch.study.sharpness_records import (
    Matched,
    Rate,
    SharpnessComparison,
    SharpnessOfRun,
    SharpnessSetting,
    SizeSharpness,
)
from rightbatch.study.sharpness_verdict import judge_setting
from rightbatch.study.study import Study, run_study
from rightbatch.training import Training
from rightbatch.training.evaluate import evaluate
from rightbatch.training.model import smallest_pass
from rightbatch.workload import Workload

Progress = Callable[..., None]
EPOCHS, MAX_STEPS, SEEDS = 20, 2000, 5
MAX_COST_EXAMPLES = 100_000_000
"""Training examples: a comparison that would take more is refused before it begins."""
_EPSILON = 1e-3


@dataclass(frozen=True, kw_only=True)
class _Arm:
    """One batch size at one learning rate, and after which updates it is measured."""

    batch_size: int
    learning_rate: float
    stops: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class _Course:
    """What all trainings share, and how long each setting is."""

    fixed: float
    tuned: dict[int, float]
    epochs: int
    steps: int
    steps_of_epochs: dict[int, int]

    def rate(self, rate: Rate, size: int) -> float:
        return self.fixed if rate == "fixed" else self.tuned[size]

    def stop(self, matched: Matched, size: int) -> int:
        return self.steps if matched == "steps" else self.steps_of_epochs[size]

    def settings(self) -> Iterator[tuple[Matched, Rate]]:
        kinds: tuple[tuple[Matched, Rate], ...] = (
            ("epochs", "fixed"),
            ("epochs", "tuned"),
            ("steps", "fixed"),
            ("steps", "tuned"),
        )
        yield from kinds

    def arms(self) -> list[_Arm]:
        """Every training that is needed, once, whatever number of settings it serves."""
        stops: dict[tuple[int, float], set[int]] = {}
        for matched, rate in self.settings():
            for size in self.tuned:
                stops.setdefault((size, self.rate(rate, size)), set()).add(self.stop(matched, size))
        return [
            _Arm(batch_size=size, learning_rate=rate, stops=tuple(sorted(own)))
            for (size, rate), own in sorted(stops.items())
        ]


def compare_sharpness(
    workload: Workload,
    *,
    batch_sizes: BatchSizes,
    learning_rate: float | None = None,
    tuned_rates: Mapping[int, float] | Study | None = None,
    epochs: int = EPOCHS,
    steps: int | None = None,
    seeds: int | Sequence[int] = SEEDS,
    device: str = "cpu",
    max_examples: int | None = None,
    max_cost_examples: int = MAX_COST_EXAMPLES,
    progress: Progress | None = None,
) -> SharpnessComparison:
    """Trains at several batch sizes and compares the sharpness of where they end.

    Args:
        workload: What to train.
        batch_sizes: At least two: numbers and `full`, a list or a text with commas.
        learning_rate: The one for all in the settings at a fixed rate. Default: the tuned rate of
            the smallest batch size.
        tuned_rates: The own rate of each batch size, or a finished study that found them. Default:
            a study over these sizes with learning rates `auto` and 3 seeds is made first.
        epochs: Passes of the settings at matched epochs.
        steps: Updates of the settings at matched steps. Default: those of the smallest batch size
            in that many epochs, at most 2,000.
        seeds: How many, or which.
        device: Where.
        max_examples: Most training examples of each measurement; see `measure_sharpness`.
        max_cost_examples: A comparison whose trainings would take more examples is refused.
        progress: Told the cost first, then what is being done and which share is done.

    Returns:
        The comparison: four settings, each with a sentence.

    Raises:
        UsageError: If sizes, rates or lengths are missing or out of range, or it would cost more.

    Example:
        >>> from rightbatch import compare_sharpness, load_workload
        >>> found = compare_sharpness(
        ...     load_workload("max3"), batch_sizes=[50, "full"], epochs=2, seeds=1,
        ...     learning_rate=0.1, tuned_rates={50: 0.2, 1000: 0.5}, max_examples=100,
        ... )
        >>> [(s.matched, s.rate) for s in found.settings][:2], found.steps
        ([('epochs', 'fixed'), ('epochs', 'tuned')], 40)

    References:
        Keskar et al. 2017; Hoffer, Hubara, Soudry 2017, "Train longer, generalize better"; Shallue
        et al. 2018, "Measuring the Effects of Data Parallelism on Neural Network Training".
    """
    begun, tell = time.perf_counter(), progress or (lambda *_: None)
    design = make_design(
        workload.num_examples,
        batch_sizes=batch_sizes,
        learning_rates="auto",
        seeds=seeds,
        target=workload.target,
        epochs=epochs,
    )
    sizes = design.batch_sizes
    if len(sizes) < 2:
        raise UsageError(f"batch_sizes is {list(sizes)}; a comparison needs at least two.")
    if steps is not None and steps < 1:
        raise UsageError(f"steps is {steps}; it must be at least 1.")
    _check_study(tuned_rates, workload)
    lengths = _steps_of_epochs(workload, sizes, epochs, device)
    if steps is None:
        steps = min(lengths[sizes[0]], MAX_STEPS)
    # Refused before a study is made: what trainings cost does not depend on their rates.
    _refuse_dear(sizes, lengths, steps, len(design.seeds), max_cost_examples)
    tuned, rates_from = _tuned_rates(workload, sizes, tuned_rates, epochs, tell)
    course = _Course(
        fixed=learning_rate if learning_rate is not None else tuned[sizes[0]],
        tuned=tuned,
        epochs=epochs,
        steps=steps,
        steps_of_epochs=lengths,
    )
    runs, cost, trainings = _run(workload, course, design.seeds, device, max_examples, tell)
    return SharpnessComparison(
        workload=workload.name,
        device=device,
        num_examples=workload.num_examples,
        batch_sizes=sizes,
        seeds=design.seeds,
        epochs=epochs,
        steps=steps,
        learning_rate=course.fixed,
        tuned_rates=tuple(tuned.items()),
        rates_from=rates_from,
        settings=tuple(_setting(course, runs, *kind, workload) for kind in course.settings()),
        runs=tuple(runs),
        notes=tuple(_notes(course, runs, len(design.seeds), capped=steps < lengths[sizes[0]])),
        trainings=trainings,
        cost_examples=cost,
        seconds=time.perf_counter() - begun,
    )


# --- what is run ----------------------------------------------------------------------------------


def _check_study(tuned_rates: Mapping[int, float] | Study | None, workload: Workload) -> None:
    if isinstance(tuned_rates, Study) and tuned_rates.workload != workload.name:
        raise UsageError(
            f"The study is of workload {tuned_rates.workload!r}, and not of {workload.name!r}. "
            "Give one of this workload."
        )


def _tuned_rates(
    workload: Workload,
    sizes: Sequence[int],
    given: Mapping[int, float] | Study | None,
    epochs: int,
    tell: Progress,
) -> tuple[dict[int, float], str]:
    """The own rate of each size, and where it comes from."""
    source = "given"
    if given is None:
        tell("tuned learning rates: a study with 3 seeds at each batch size")
        given = run_study(
            workload,
            batch_sizes=list(sizes),
            seeds=3,
            epochs=epochs,
            progress=lambda what, *_: tell(f"tuned learning rates: {what}"),
        )
        source = f"a study of {len(given.trials)} trainings, made for this"
    elif isinstance(given, Study):
        source = f"a study of {len(given.trials)} trainings"
    rates: Mapping[int, float | None]
    if isinstance(given, Study):
        rates = {finding.batch_size: finding.learning_rate.value for finding in given.sizes}
    else:
        rates = given
    found: dict[int, float] = {}
    for size in sizes:
        rate = rates.get(size)
        if rate is None:
            known = ", ".join(f"{own:,}" for own in rates) or "none"
            raise UsageError(
                f"There is no tuned learning rate for batch {size:,} (only for: {known}). Give "
                "tuned_rates for every batch size, or a study that holds them all."
            )
        found[size] = rate
    return found, source


def _steps_of_epochs(
    workload: Workload, sizes: Sequence[int], epochs: int, device: str
) -> dict[int, int]:
    """Updates of each size in so many epochs."""
    budget, model = Budget(unit="epochs", amount=epochs), workload.build_model(0, device)
    found: dict[int, int] = {}
    for size in sizes:
        recipe = Recipe(global_batch=size, learning_rate=1.0)
        smallest = smallest_pass(workload, model, recipe, device)
        found[size] = budget.steps(size, workload.num_examples, None, smallest)
    return found


def _refuse_dear(
    sizes: Sequence[int], lengths: Mapping[int, int], steps: int, num_seeds: int, most: int
) -> None:
    """Every size at two learning rates at most, to the later of its two ends."""
    dear = sum(2 * num_seeds * size * max(lengths[size], steps) for size in sizes)
    if dear > most:
        raise UsageError(
            f"The trainings would take up to {dear:,} examples, more than {most:,}. Lower epochs, "
            "seeds or steps, or raise max_cost_examples."
        )


def _run(
    workload: Workload,
    course: _Course,
    seeds: Sequence[int],
    device: str,
    max_examples: int | None,
    tell: Progress,
) -> tuple[list[SharpnessOfRun], int, int]:
    """Every training, measured on its way; with the examples that it all took."""
    arms = course.arms()
    stops = sum(len(arm.stops) for arm in arms) * len(seeds)
    examples = sum(arm.stops[-1] * arm.batch_size for arm in arms) * len(seeds)
    tell(
        f"cost: {len(arms) * len(seeds)} trainings, {examples:,} examples; {stops} measurements",
        0.0,
    )
    runs, cost = list[SharpnessOfRun](), 0
    for arm in arms:
        for seed in seeds:

            def report(step: int, batch: int = arm.batch_size, seed: int = seed) -> None:
                share = len(runs) / stops
                tell(f"batch {batch:,}, seed {seed}: sharpness after {step:,} updates", share)

            own, taken = _run_one(workload, arm, seed, device, max_examples, report)
            runs.extend(own)
            cost += taken
    tell("sharpness", 1.0)
    return runs, cost, len(arms) * len(seeds)


def _run_one(
    workload: Workload,
    arm: _Arm,
    seed: int,
    device: str,
    max_examples: int | None,
    report: Callable[[int], None],
) -> tuple[list[SharpnessOfRun], int]:
    recipe = Recipe(global_batch=arm.batch_size, learning_rate=arm.learning_rate)
    training = Training(workload, recipe, seed=seed, device=device)
    start = _weights(training)
    found, cost = list[SharpnessOfRun](), 0
    try:
        for stop in arm.stops:
            training.advance(stop - training.steps)
            report(stop)
            run, taken = _measure(training, start, stop, max_examples)
            found.append(run)
            cost += taken
    finally:
        training.close()
    return found, cost + training.examples


def _weights(training: Training) -> Tensor:
    parts = [p.detach().reshape(-1).double() for p in training.model.parameters()]
    return torch.cat(parts)


def _measure(
    training: Training, start: Tensor, stop: int, max_examples: int | None
) -> tuple[SharpnessOfRun, int]:
    workload, recipe = training.workload, training.recipe
    nothing = SharpnessOfRun(
        batch_size=recipe.global_batch,
        learning_rate=recipe.learning_rate,
        seed=training.seed,
        steps=stop,
        diverged=True,
    )
    if not training.is_sound():
        return nothing, 0
    try:
        point = measure_sharpness_at(
            training, max_examples=max_examples, epsilons=(_EPSILON,), seed=0
        )
    except ProbeError:  # finite weights whose loss is none
        return nothing, 0
    with preserved_state(training.model):
        device, model = training.device, training.model
        train = evaluate(workload, model, workload.train_examples, device=device)
        val = workload.val_examples
        val_loss = None if val is None else evaluate(workload, model, val, device=device).loss
    run = SharpnessOfRun(
        batch_size=recipe.global_batch,
        learning_rate=recipe.learning_rate,
        seed=training.seed,
        steps=stop,
        diverged=False,
        largest_eigenvalue=point.largest_eigenvalue.value,
        trace=point.trace.value,
        phi=point.phi("all").value,
        phi_random=point.phi("random").value,
        sam_rise=point.sam_rise.value,
        gradient_norm=point.gradient_norm,
        train_loss=train.loss,
        val_loss=val_loss,
        distance=float((_weights(training) - start).norm()),
    )
    return run, point.cost_examples


# --- what it says ---------------------------------------------------------------------------------


def _setting(
    course: _Course,
    runs: Sequence[SharpnessOfRun],
    matched: Matched,
    rate: Rate,
    workload: Workload,
) -> SharpnessSetting:
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


def _notes(
    course: _Course, runs: Sequence[SharpnessOfRun], num_seeds: int, *, capped: bool
) -> list[str]:
    found = list[str]()
    if num_seeds < 3:
        few = f"{num_seeds} seed{'s' * (num_seeds > 1)}"
        found.append(f"{few}: too few to tell chance from a difference. Use 5.")
    found.append(
        "Four measures in four settings are 16 comparisons at 95 %: about one of them is told "
        "apart by chance where there is no difference."
    )
    if capped:
        smallest = min(course.tuned)
        found.append(
            f"Matched steps are {course.steps:,}, fewer than batch {smallest:,} does in "
            f"{course.epochs} epochs: more would cost too much at the largest batch."
        )
    wild = sum(run.diverged for run in runs)
    if wild:
        found.append(f"{wild} of {len(runs)} measurements found a training that had diverged.")
    return found
