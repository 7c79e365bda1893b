"""`train_stream`: a run over an iterable of unknown length, which is never held.

The loop is the one of `train`; what differs is where its windows come from. The iterable is gone
through in its own order, or through a buffer that shuffles as far as it reaches.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rightbatch.errors import UsageError
from rightbatch.recipe import Recipe
from rightbatch.training.checkpoints.saving import RunSettings, make_saver
from rightbatch.training.loop import Training
from rightbatch.training.random_state import drawing_from
from rightbatch.training.run import Run, run_to_end
from rightbatch.training.streams.feed import DRAWS, StreamFeed
from rightbatch.training.watching.callbacks import Callback
from rightbatch.workload import Workload


def train_stream(
    workload: Workload,
    recipe: Recipe,
    *,
    steps: int | None = None,
    examples: int | None = None,
    passes: int | None = 1,
    shuffle_buffer: int = 0,
    seed: int = 0,
    device: str = "cpu",
    until_target: bool = False,
    evaluate_every: int | None = None,
    callbacks: Sequence[Callback] = (),
    run_directory: str | Path | None = None,
    checkpoint_every: int | None = None,
    resume: bool = False,
) -> Run:
    """Trains on an iterable as it comes, in memory for one update.

    Without `steps` and `examples` the run ends where the passes do. A schedule over the whole run,
    such as `cosine`, needs one of the two.

    With a `run_directory` the run is saved as one of `train` is, and one that is resumed gives the
    same bits as one that was never stopped. A stream with `state_dict` and `load_state_dict` is
    asked for its place and sent there. Any other is read again from the start of the pass it was
    in, with the random states from then; so it must give the same examples in each process. A run
    whose stream does not give as many is refused, and one whose stream gives others is warned of.

    Args:
        workload: Its `train_data` are an iterable of examples (a generator, an IterableDataset or
            its DataLoader, of which the dataset and the collate function are used), or anything
            else, taken in order.
        recipe: How. `batch_ramp` counts the stream's examples.
        steps: Updates.
        examples: Training examples; the last update may be smaller.
        passes: How often the iterable is gone through; None: as often as needed.
        shuffle_buffer: Examples among which the next one is drawn; 0: the stream's own order.
        seed: Decides initial weights, dropout and the buffer's draws. What the iterable draws from
            Python's, NumPy's and torch's generators is decided by it too, at every batch size
            alike.
        device: Where.
        until_target: Stop at the first evaluation that meets the workload's target.
        evaluate_every: Updates between evaluations; there is one at the end of each pass too.
        callbacks: What watches the run.
        run_directory: Where checkpoints are kept; None: nowhere.
        checkpoint_every: Updates between checkpoints, beside one a minute.
        resume: Go on from the newest checkpoint in `run_directory`, or begin where there is none.

    Returns:
        The finished run. Its `epochs` are 0 when it ended inside the first pass, whose length is
        not known; after that they are counted in the first pass's examples.

    Raises:
        UsageError: If an argument is out of range, two lengths are given, or `run_directory` holds
            another run.
        WorkloadError: If the stream cannot be read again to where the run was.
        CorruptStateError: If no checkpoint of the run to resume can be used.
    """
    _check_lengths(steps, examples, passes, shuffle_buffer)
    settings = RunSettings(
        workload=workload.name,
        num_examples=None,
        recipe=recipe,
        seed=seed,
        epochs=passes,
        steps=steps,
        examples=examples,
        until_target=until_target,
        evaluate_every=evaluate_every,
        shuffle_buffer=shuffle_buffer,
    )
    saver = make_saver(run_directory, settings, steps_between=checkpoint_every, resume=resume)
    if saver is not None and not resume:
        saver.refuse_another_run()
    horizon = settings.horizon
    feed = StreamFeed(
        workload, recipe, passes=passes, horizon=horizon, shuffle_buffer=shuffle_buffer, seed=seed
    )
    with drawing_from(seed, DRAWS):
        training = Training(
            workload,
            recipe,
            seed=seed,
            device=device,
            horizon=horizon,
            callbacks=callbacks,
            feed=feed,
        )
        return run_to_end(
            training,
            until_target=until_target,
            evaluate_every=evaluate_every,
            saver=saver,
            resume=resume,
        )


def train_epochs(
    workload: Workload,
    recipe: Recipe,
    *,
    epochs: float | None,
    steps: int | None,
    workers: int,
    **options: Any,
) -> Run:
    """`train_stream` with the arguments of `train`.

    Args:
        workload: Its training data are a stream.
        recipe: How.
        epochs: Whole passes, or None.
        steps: Updates, in as many passes as they need, or None.
        workers: Must be 0.
        **options: As for `train_stream`.

    Returns:
        The finished run.

    Raises:
        UsageError: If part of a pass, or workers, are asked for.
    """
    if workers:
        raise UsageError(
            f"workers is {workers}, but the data are a stream, which is read in order by one "
            "process. Use workers=0."
        )
    if epochs is None:
        return train_stream(workload, recipe, steps=steps, passes=None, **options)
    if epochs != int(epochs) or epochs < 1:
        raise UsageError(
            f"epochs is {epochs:g}, but the data are a stream whose length is not known. Give "
            "steps, or whole epochs."
        )
    return train_stream(workload, recipe, passes=int(epochs), **options)


def _check_lengths(
    steps: int | None, examples: int | None, passes: int | None, shuffle_buffer: int
) -> None:
    if steps is not None and examples is not None:
        raise UsageError("Give steps or examples, and not both.")
    if passes is None and steps is None and examples is None:
        raise UsageError("passes is None, which has no end. Give steps or examples with it.")
    for name, value in (("steps", steps), ("examples", examples), ("passes", passes)):
        if value is not None and value < 1:
            raise UsageError(f"{name} is {value}; it must be at least 1.")
    if shuffle_buffer < 0:
        raise UsageError(f"shuffle_buffer is {shuffle_buffer}; it cannot be negative.")
