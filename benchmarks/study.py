"""Study: many small trainings at once, against one after the other.

    python benchmarks/study.py [--workloads max3,digits] [--big digits-cnn,source-lm]

The same trainings (4 batch sizes × 8 learning rates × 5 seeds, to the same number of epochs) by the
engine that a study takes, with all its evaluations and its compilation; by a hand-written PyTorch
loop, one training after the other, without any evaluation; by Optuna, which calls that loop once
per trial; and by Keras on torch. The last three are timed on a part of one training and multiplied
up. Then one online run of 100,000 updates, and larger models at batch 32 and below. Prints tables
and writes results/study.md and results/study.json.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

# Before torch and Keras are imported: one thread, as is fastest for models as small as these.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["KERAS_BACKEND"] = "torch"

RESULTS = Path(__file__).resolve().parent / "results"
RATES, SEEDS = 8, 5
PLANS = {
    "max3": (100, ("full", 100, 10, 1), [2.0**k for k in range(-6, 2)]),
    "digits": (20, ("full", 100, 10, 1), [2.0**k for k in range(-7, 1)]),
}
"""Epochs, batch sizes and learning rates."""
SAMPLE_SECONDS = 4.0
"""Of a loop that is timed in part."""
ONLINE_UPDATES = 100_000
BARS = {1: (50.0, 500.0), 10: (50.0, 500.0), 100: (10.0, 50.0)}
"""How many times faster than the loop, and than Keras on torch."""


@dataclass(frozen=True, kw_only=True)
class Line:
    """One batch size of one workload.

    Attributes:
        workload: Its name.
        batch: Examples per update.
        trainings: How many.
        updates: Of each.
        ours: Wall seconds of our engine for all of them, compilation and evaluations
            included.
        compiling: What of it was spent before the first update and in compilation, about: the
            first group's time − that of the same group again.
        loop: Seconds of the hand-written loop for all, from a part.
        optuna: Seconds of Optuna with that loop, from a part.
        keras: Seconds of Keras on torch, from a part; None where it was not run.
        difference: Largest difference of the last validation losses to the hand-written loop's,
            over the trainings that were run to the end; None where none was.
        engine: What ran ours.
    """

    workload: str
    batch: int
    trainings: int
    updates: int
    ours: float
    compiling: float
    loop: float
    optuna: float | None
    keras: float | None
    difference: float | None
    engine: str


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures, prints and writes.

    Args:
        arguments: Of the command line.

    Returns:
        0.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--workloads", default="max3,digits")
    parser.add_argument("--big", default="digits-cnn,source-lm")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    import torch

    torch.set_num_threads(1)
    lines = [line for name in _names(options.workloads) for line in _measure(name)]
    online = _measure_online()
    big = [row for name in _names(options.big) for row in _measure_big(name)]
    text = _table(lines, online, big)
    _say(text)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "study.md").write_text(text, encoding="utf-8")
    data = {
        "schema": "rightbatch.study-benchmark/1",
        "machine": _machine(),
        "lines": [asdict(line) for line in lines],
        "online": online,
        "big": big,
    }
    (options.out / "study.json").write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    return 0


def _names(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


def _measure(name: str) -> Iterator[Line]:
    import rightbatch as rb
    from rightbatch.laws.progress import steps_per_epoch
    from rightbatch.study.group import run_group
    from rightbatch.study.trials import TrialKey

    workload = rb.load_workload(name)
    epochs, sizes, rates = PLANS[name]
    for asked in sizes:
        batch = workload.num_examples if asked == "full" else int(asked)
        updates = epochs * steps_per_epoch(batch, workload.num_examples)
        keys = [
            TrialKey(batch_size=batch, learning_rate=rate, seed=seed)
            for rate in rates
            for seed in range(SEEDS)
        ]
        # Known to a study from its own timing, which decides the engine; not counted here.
        pace = _pace(workload, batch, rates[0])

        def run(keys: list[TrialKey] = keys, updates: int = updates, pace: float = pace) -> Any:
            return run_group(workload, keys, updates, step_seconds=pace)

        first, (finished, engine) = _timed(run)
        second, _ = _timed(run)
        step, difference = _time_loop(workload, batch, updates, finished)
        per_trial = _optuna_overhead()
        keras = _time_keras(workload, batch)
        yield Line(
            workload=name,
            batch=batch,
            trainings=len(keys),
            updates=updates,
            ours=first,
            compiling=max(0.0, first - second),
            loop=step * updates * len(keys),
            optuna=(step * updates + per_trial) * len(keys),
            keras=None if keras is None else keras * updates * len(keys),
            difference=difference,
            engine=engine.split(":")[0],
        )
        _say(f"{name} at {batch}: done")


def _timed(do: Callable[[], Any]) -> tuple[float, Any]:
    began = time.perf_counter()
    result = do()
    return time.perf_counter() - began, result


def _hand_written(workload: Any, batch: int, rate: float, seed: int) -> tuple[Any, Iterator[None]]:
    """What an engineer writes, on the same weights and the same order of the data."""
    from rightbatch.training import epoch_order

    model = workload.build_model(seed)
    optimizer = workload.make_optimizer(model.parameters(), rate)
    inputs, targets = workload.train_data

    def steps() -> Iterator[None]:
        epoch = 0
        while True:
            order = epoch_order(len(inputs), seed=seed, epoch=epoch)
            for indices in order.split(batch):
                optimizer.zero_grad()
                loss = workload.loss(model(inputs[indices]), targets[indices])
                loss.backward()
                optimizer.step()
                yield
            epoch += 1

    return model, steps()


def _pace(workload: Any, batch: int, rate: float) -> float:
    """Seconds of an update, from a few."""
    _, steps = _hand_written(workload, batch, rate, 0)
    for _ in range(20):
        next(steps)
    spent, _ = _timed(lambda: [next(steps) for _ in range(50)])
    return spent / 50


def _time_loop(
    workload: Any, batch: int, updates: int, finished: Sequence[Any]
) -> tuple[float, float | None]:
    """Seconds of an update; and, of a training run to its end, how far its loss is from ours."""
    import torch

    few = finished[2 * SEEDS]  # a learning rate in the lower middle
    model, steps = _hand_written(workload, batch, few.key.learning_rate, few.key.seed)
    for _ in range(min(20, updates)):
        next(steps)
    done, began = min(20, updates), time.perf_counter()
    counted = 0
    while done < updates and (time.perf_counter() - began < SAMPLE_SECONDS):
        next(steps)
        done, counted = done + 1, counted + 1
    spent = (time.perf_counter() - began) / max(1, counted)
    if done < updates:
        return spent, None
    inputs, targets = workload.val_data
    with torch.no_grad():
        loss = float(workload.loss(model.eval()(inputs), targets))
    return spent, abs(loss - few.points[-1].val_loss)


def _optuna_overhead() -> float:
    """Seconds that Optuna itself takes for a trial: in memory, on a grid."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    grid = {"lr": [2.0**k for k in range(RATES)], "seed": list(range(SEEDS))}
    study = optuna.create_study(sampler=optuna.samplers.GridSampler(grid))

    def nothing(trial: Any) -> float:
        trial.suggest_float("lr", 1, 2.0**RATES)
        trial.suggest_int("seed", 0, SEEDS)
        return 0.0

    spent, _ = _timed(lambda: study.optimize(nothing, n_trials=RATES * SEEDS))
    return spent / (RATES * SEEDS)


def _time_keras(workload: Any, batch: int) -> float | None:
    """Seconds of an update by `fit`, from two lengths whose difference is what is counted."""
    try:
        keras: Any = importlib.import_module("keras")
    except ImportError:
        return None
    layers = {"max3": (3, [9, 9], 3), "digits": (64, [64], 10)}.get(workload.name)
    if layers is None:
        return None
    inputs, targets = workload.train_data
    width, hidden, classes = layers
    dense = keras.layers.Dense
    stack = [keras.Input((width,)), *(dense(n, activation="relu") for n in hidden), dense(classes)]
    model = keras.Sequential(stack)
    model.compile(
        optimizer=keras.optimizers.SGD(0.01),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    per_epoch = math.ceil(len(inputs) / batch)

    def fit(count: int, epochs: int) -> float:
        some = inputs[:count], targets[:count]
        return _timed(
            lambda: model.fit(*some, batch_size=batch, epochs=epochs, shuffle=True, verbose=0)
        )[0]

    if per_epoch >= 1000:  # part of an epoch tells enough
        short, long = 100 * batch, 900 * batch
        fit(short, 1)
        return (fit(long, 1) - fit(short, 1)) / 800
    epochs = max(2, 400 // per_epoch)
    fit(len(inputs), 1)
    return (fit(len(inputs), 1 + epochs) - fit(len(inputs), 1)) / (epochs * per_epoch)


def _measure_online() -> dict[str, float]:
    """100,000 updates of one example, of one training: compiling, then running."""
    import rightbatch as rb
    from rightbatch.engines import make_copies

    workload = rb.load_workload("max3")
    began = time.perf_counter()
    copies = make_copies(
        workload, global_batch=1, learning_rates=[0.05], seeds=[0], engine="compiled"
    )
    copies.advance(ONLINE_UPDATES)
    copies.evaluate()
    first = time.perf_counter() - began
    runs: list[float] = []
    for _ in range(5):
        spent, _ = _timed(lambda: (copies.advance(ONLINE_UPDATES), copies.evaluate()))
        runs.append(spent)
    run = sorted(runs)[2]
    return {"updates": ONLINE_UPDATES, "compiling": first - run, "running": run}


def _measure_big(name: str) -> Iterator[dict[str, Any]]:
    """Larger models at small batches: eight trainings in one thread, without the compiling."""
    import rightbatch as rb
    from rightbatch.engines import make_copies

    workload = rb.load_workload(name)
    for batch in (1, 8, 32):
        updates = {"digits-cnn": 60, "source-lm": 16}.get(name, 20)
        seconds: dict[str, float] = {}
        compiling = 0.0
        for engine in ("compiled", "loop"):
            made, copies = _timed(
                lambda e=engine, b=batch: make_copies(
                    workload, global_batch=b, learning_rates=[0.01] * 8, seeds=range(8), engine=e
                )
            )
            first, _ = _timed(lambda c=copies, u=updates: (c.advance(u), c.wait()))
            again, _ = _timed(lambda c=copies, u=updates: (c.advance(u), c.wait()))
            seconds[engine] = again / (8 * updates)
            if engine == "compiled":
                compiling = made + first - again
        yield {"workload": name, "batch": batch, "compiling": compiling, **seconds}
        _say(f"{name} at {batch}: done")


def _table(lines: Sequence[Line], online: dict[str, float], big: Sequence[dict[str, Any]]) -> str:
    head = [
        "# Many small trainings at once",
        "",
        "Written by `python benchmarks/study.py`; its head says what is compared. Each line is",
        f"{RATES} learning rates × {SEEDS} seeds. Ours counts compilation and evaluations; the",
        "others evaluate nothing and are multiplied up from a part of one training.",
        "",
        "| workload | batch | updates | engine | ours | of it beginning | loop ÷ ours "
        "| Optuna ÷ ours "
        "| Keras ÷ ours | bar | verdict | largest difference |",
        "| --- | ---: | ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: | --- | ---: |",
    ]
    rows = [_row(line) for line in lines]
    total = [
        f"All of `{name}`: ours {sum(x.ours for x in own):.1f} s, the loop "
        f"{_duration(sum(x.loop for x in own))}"
        + (
            ""
            if any(x.keras is None for x in own)
            else f", Keras {_duration(sum(x.keras or 0 for x in own))}"
        )
        + "."
        for name in dict.fromkeys(line.workload for line in lines)
        for own in [[line for line in lines if line.workload == name]]
    ]
    verdict = "met" if online["running"] <= 0.3 and online["compiling"] <= 1.5 else "missed"
    tail = [
        "",
        *total,
        "",
        f"One online run of {online['updates']:,} updates on max3: {online['running']:.3f} s after "
        f"{online['compiling']:.2f} s of compiling (bars 0.3 s and 1.5 s): {verdict}.",
        "",
        "| workload | batch | compiled, ms per update | loop, ms per update | loop ÷ compiled "
        "| compiling, s |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
        *(
            f"| {row['workload']} | {row['batch']} | {row['compiled'] * 1e3:.3g} | "
            f"{row['loop'] * 1e3:.3g} | {row['loop'] / row['compiled']:.2f} | "
            f"{row['compiling']:.1f} |"
            for row in big
        ),
        "",
        f"Measured on {_machine()}.",
        "",
    ]
    return "\n".join([*head, *rows, *tail])


def _row(line: Line) -> str:
    over_loop = line.loop / line.ours
    over_keras = None if line.keras is None else line.keras / line.ours
    bar = BARS.get(line.batch)
    verdict, shown = "", ""
    if bar is not None:
        shown = f"≥ {bar[0]:g}, ≥ {bar[1]:g}"
        met = over_loop >= bar[0] and (over_keras is None or over_keras >= bar[1])
        verdict = "met" if met else "missed"
    cells = (
        line.workload,
        f"{line.batch:,}",
        f"{line.updates:,}",
        line.engine,
        f"{line.ours:.2f} s",
        f"{line.compiling:.2f} s",
        f"{over_loop:.0f}",
        "" if line.optuna is None else f"{line.optuna / line.ours:.0f}",
        "" if over_keras is None else f"{over_keras:.0f}",
        shown,
        verdict,
        "" if line.difference is None else f"{line.difference:.1g}",
    )
    return f"| {' | '.join(cells)} |"


def _duration(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _machine() -> str:
    from importlib.metadata import version

    from regret.truth import describe_machine

    machine = describe_machine()
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "jax", "optuna"))
    return (
        f"{machine.processor}, {machine.cores} cores; {machine.system}; Python {machine.python}, "
        f"{packages}; {machine.date}"
    )


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
