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
from collections.abc import Callable, Mapping, Sequence

from rightbatch.errors import UsageError
from rightbatch.recipe import Recipe
from rightbatch.study.design import BatchSizes, Budget, make_design
from rightbatch.study.sharpness.course import Course
from rightbatch.study.sharpness.records import SharpnessComparison, SharpnessOfRun
from rightbatch.study.sharpness.runs import run_course
from rightbatch.study.sharpness.summary import summarise_setting
from rightbatch.study.study import Study, run_study
from rightbatch.training.model import smallest_pass
from rightbatch.workload import Workload

Progress = Callable[..., None]
EPOCHS, MAX_STEPS, SEEDS = 20, 2000, 5
MAX_COST_EXAMPLES = 100_000_000
"""Training examples: a comparison that would take more is refused before it begins."""


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
    course = Course(
        fixed=learning_rate if learning_rate is not None else tuned[sizes[0]],
        tuned=tuned,
        epochs=epochs,
        steps=steps,
        steps_of_epochs=lengths,
    )
    runs, cost, trainings = run_course(workload, course, design.seeds, device, max_examples, tell)
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
        settings=tuple(
            summarise_setting(course, runs, *kind, workload) for kind in course.settings()
        ),
        runs=tuple(runs),
        notes=tuple(_notes(course, runs, len(design.seeds), capped=steps < lengths[sizes[0]])),
        trainings=trainings,
        cost_examples=cost,
        seconds=time.perf_counter() - begun,
    )


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


def _notes(
    course: Course, runs: Sequence[SharpnessOfRun], num_seeds: int, *, capped: bool
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
