"""`rightbatch probe sharpness`: of one training, or of several batch sizes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rightbatch.cli.opening import open_workload
from rightbatch.cli.output import Output
from rightbatch.errors import UsageError
from rightbatch.recipe import Recipe
from rightbatch.store import dump_record, read_record

SCHEMA = "rightbatch.sharpness/1"
COMPARISON_SCHEMA = "rightbatch.sharpness-comparison/1"


def run(
    output: Output,
    reference: str,
    *,
    device: str,
    threads: int | None,
    seed: int,
    examples: int | None,
    learning_rate: float | None,
    steps: str | None,
    batch_size: int | None,
    compare: str | None,
    epochs: int | None,
    seeds: int | None,
    study: Path | None,
) -> int:
    """Measures the sharpness of one training, or compares those of several batch sizes.

    Args:
        output: Where to print.
        reference: The workload.
        device: Where to measure.
        threads: CPU threads, or None for torch's default.
        seed: Of weights, data order and draws; the first of several seeds.
        examples: Most training examples to use.
        learning_rate: Of the training; in a comparison, the fixed one.
        steps: Updates after which to measure, with commas.
        batch_size: Of the training.
        compare: Batch sizes to compare, with commas.
        epochs: Passes of a comparison's trainings.
        seeds: Of a comparison.
        study: Folder of a study with the tuned learning rates.

    Returns:
        0.
    """
    shared = {"device": device, "max_examples": examples}
    if compare is None:
        _refuse({"--epochs": epochs, "--seeds": seeds, "--study": study}, "without --compare")
        recipe, moments = _training(steps, batch_size, learning_rate)
        own = {"recipe": recipe, "trajectory_steps": moments, "seed": seed}
        return _probe(output, reference, device, threads, {**shared, **own})
    _refuse({"--steps": steps, "--batch-size": batch_size}, "with --compare")
    options: dict[str, Any] = {**shared, "batch_sizes": compare, "learning_rate": learning_rate}
    if epochs is not None:
        options["epochs"] = epochs
    if seed or seeds is not None:
        options["seeds"] = tuple(range(seed, seed + (5 if seeds is None else seeds)))
    return _compare(output, reference, threads, study, options)


def _refuse(options: dict[str, Any], where: str) -> None:
    given = [name for name, value in options.items() if value is not None]
    if given:
        raise UsageError(f"{' and '.join(given)} means nothing {where}. Leave it out.")


def _training(
    steps: str | None, batch_size: int | None, learning_rate: float | None
) -> tuple[Recipe | None, tuple[int, ...]]:
    """How to train, and after which updates to measure."""
    if steps is None:
        _refuse({"--batch-size": batch_size, "--learning-rate": learning_rate}, "without --steps")
        return None, (0,)
    words = [word.strip() for word in steps.split(",")]
    if not all(word.isascii() and word.isdigit() for word in words):
        raise UsageError(f"--steps is {steps!r}; give numbers of updates, such as 0,64,256.")
    if learning_rate is None:
        raise UsageError("--steps needs a --learning-rate to train with.")
    recipe = Recipe(global_batch=batch_size or 32, learning_rate=learning_rate)
    return recipe, tuple(int(word) for word in words)


def _probe(
    output: Output, reference: str, device: str, threads: int | None, options: dict[str, Any]
) -> int:
    from rightbatch.cli.render_sharpness import as_text
    from rightbatch.probes.sharpness import measure_sharpness

    with output.progress("Probing sharpness") as report:
        report(f"Checking {reference}")
        workload = open_workload(reference, device, threads)
        record = measure_sharpness(workload, progress=report, **options)
    output.result(lambda: as_text(record), lambda: dump_record(record, schema=SCHEMA))
    return 0


def _compare(
    output: Output,
    reference: str,
    threads: int | None,
    study: Path | None,
    options: dict[str, Any],
) -> int:
    from rightbatch.cli.render_sharpness_comparison import as_text
    from rightbatch.study.sharpness import compare_sharpness
    from rightbatch.study.study import SCHEMA as STUDY_SCHEMA
    from rightbatch.study.study import Study

    with output.progress("Comparing sharpness") as report:
        report(f"Checking {reference}")
        workload = open_workload(reference, options["device"], threads)
        if study is not None:
            path = study / "study.json"
            if not path.exists():
                raise UsageError(f"There is no study in {str(study)!r}: it has no study.json.")
            options = {**options, "tuned_rates": read_record(path, Study, schema=STUDY_SCHEMA)}
        found = compare_sharpness(workload, progress=report, **options)
    output.result(lambda: as_text(found), lambda: dump_record(found, schema=COMPARISON_SCHEMA))
    return 0
