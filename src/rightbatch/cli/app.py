"""The commands and their options."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from rightbatch.cli.output import Output

app = typer.Typer(
    name="rightbatch",
    help=(
        "Finds the batch size and learning rate a neural network should be trained with, shows "
        "why, and trains with it.\n\n"
        "WORKLOAD is a built-in name (see `rightbatch workloads`), path/to/file.py:name or "
        "package.module:name."
    ),
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 80},
)
probe_app = typer.Typer(
    help="Measures one thing about a workload and leaves no trace.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
app.add_typer(probe_app, name="probe")

Goal = Literal["time", "examples", "steps", "quality"]
Effort = Literal["auto", "probe", "race", "study"]
WorkloadArgument = Annotated[
    str, typer.Argument(metavar="WORKLOAD", help="Catalog name, file.py:name or module:name.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")]
DeviceOption = Annotated[str, typer.Option(help="Where to run: cpu, cuda, cuda:1, …")]
ThreadsOption = Annotated[
    int | None, typer.Option(min=1, help="CPU threads. Small models are fastest with 1.")
]
SeedOption = Annotated[int, typer.Option(help="Decides weights, data order and draws.")]
MemoryOption = Annotated[
    str | None, typer.Option("--memory", help="Memory limit, such as 8GiB. Default: what is free.")
]
BudgetOption = Annotated[
    str | None, typer.Option(help="About how long it may take, such as 30s or 2min.")
]
BatchOption = Annotated[int, typer.Option("--batch-size", min=1, help="The global batch.")]


@app.command()
def workloads(as_json: JsonOption = False, quiet: QuietOption = False) -> None:
    """Lists the built-in workloads."""
    from rightbatch.cli.render_workloads import workloads_json, workloads_text

    output = Output(as_json=as_json, quiet=quiet)
    output.result(workloads_text, workloads_json)


@app.command()
def train(
    workload: WorkloadArgument,
    plan: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="Train with the recipe of this plan."),
    ] = None,
    batch_size: Annotated[
        str | None, typer.Option(help="Examples per update: a number, or full.")
    ] = None,
    learning_rate: Annotated[float | None, typer.Option(help="With --batch-size.")] = None,
    fields: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="FIELD=VALUE",
            help="Another field of the recipe, such as last_batch=drop or micro_batch=16.",
        ),
    ] = None,
    epochs: Annotated[
        float | None, typer.Option(min=0, help="Passes over the training set. Default: 10.")
    ] = None,
    steps: Annotated[int | None, typer.Option(min=0, help="Updates, instead of --epochs.")] = None,
    until_target: Annotated[
        bool, typer.Option("--until-target", help="Stop where the target is met.")
    ] = False,
    evaluate_every: Annotated[
        int | None, typer.Option(min=1, help="Updates between evaluations. Default: an epoch.")
    ] = None,
    run: Annotated[
        Path | None,
        typer.Option(help="Where the run is kept. Default: a new folder in runs/."),
    ] = None,
    no_run: Annotated[bool, typer.Option("--no-run", help="Keep nothing.")] = False,
    resume: Annotated[
        Path | None,
        typer.Option(exists=True, file_okay=False, help="Go on with the run in this folder."),
    ] = None,
    checkpoint_every: Annotated[
        int | None, typer.Option(min=1, help="Updates between checkpoints, beside one a minute.")
    ] = None,
    workers: Annotated[int, typer.Option(min=0, help="Processes that fetch examples.")] = 0,
    seed: SeedOption = 0,
    device: DeviceOption = "cpu",
    threads: ThreadsOption = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> int:
    """Trains a workload with a plan's recipe, or with a batch size and learning rate."""
    from rightbatch.cli import run_train

    return run_train.run(
        Output(as_json=as_json, quiet=quiet),
        workload,
        recipe=run_train.RecipeChoice(plan, batch_size, learning_rate, tuple(fields or ())),
        place=run_train.RunChoice(run, resume, not no_run),
        threads=threads,
        epochs=epochs,
        steps=steps,
        until_target=until_target,
        evaluate_every=evaluate_every,
        checkpoint_every=checkpoint_every,
        workers=workers,
        seed=seed,
        device=device,
    )


@app.command()
def plan(
    workload: Annotated[
        str | None, typer.Argument(metavar="WORKLOAD", help="Not needed with --replay.")
    ] = None,
    goal: Annotated[Goal, typer.Option(help="What should be least; quality: best.")] = "time",
    effort: Annotated[Effort, typer.Option(help="How much to try out.")] = "auto",
    budget: Annotated[
        str | None,
        typer.Option(help="Time to spend, such as 30s or 2min. Default with --effort auto: 2min."),
    ] = None,
    target: Annotated[
        str | None, typer.Option(help="Such as 'val_loss<=0.15'. Default: the workload's.")
    ] = None,
    memory: MemoryOption = None,
    replicas: Annotated[int, typer.Option(min=1, help="Data-parallel workers.")] = 1,
    device: DeviceOption = "cpu",
    threads: ThreadsOption = None,
    seed: SeedOption = 0,
    out: Annotated[Path | None, typer.Option(help="Write the plan and its evidence.")] = None,
    replay: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="Recompute a plan from its evidence."),
    ] = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> int:
    """Finds the batch size and learning rate, and shows why."""
    from rightbatch.cli import run_plan

    output = Output(as_json=as_json, quiet=quiet)
    if replay is not None:
        return run_plan.replay(output, replay)
    if workload is None:
        raise typer.BadParameter("Name a WORKLOAD, or pass --replay plan.json.")
    return run_plan.run(
        output,
        workload,
        out=out,
        memory_limit=memory,
        goal=goal,
        effort=effort,
        budget=budget,
        target=target,
        replicas=replicas,
        device=device,
        threads=threads,
        seed=seed,
    )


@app.command()
def study(
    workload: WorkloadArgument,
    batch_sizes: Annotated[
        str, typer.Option(help="Such as 1,10,full; powers; auto; or plan.json: around its answer.")
    ] = "auto",
    learning_rates: Annotated[
        str, typer.Option(help="Such as 0.1,0.5; a grid 1e-3:1:7; or auto.")
    ] = "auto",
    seeds: Annotated[int, typer.Option(min=1, help="Trainings of each pair.")] = 3,
    epochs: Annotated[
        float | None, typer.Option(help="Passes of each training. Default: 20.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Or updates.")] = None,
    examples: Annotated[int | None, typer.Option(help="Or training examples.")] = None,
    seconds: Annotated[
        float | None, typer.Option(help="Or seconds, by the measured step time.")
    ] = None,
    target: Annotated[
        str | None, typer.Option(help="Such as 'val_loss<=0.15'. Default: the workload's.")
    ] = None,
    search: Annotated[
        Literal["grid", "race", "tpe", "gp", "random"],
        typer.Option(help="All pairs; the better ones farther; or those a sampler asks for."),
    ] = "grid",
    trials: Annotated[
        int | None, typer.Option(min=1, help="Pairs that a sampler asks for. Default: 20.")
    ] = None,
    watch: Annotated[
        str, typer.Option(help="The weight whose path is followed, such as '0.weight[3,1]'.")
    ] = "first",
    label_noise: Annotated[
        str | None, typer.Option(help="A study for each share of wrong labels, such as 0,0.2,0.4.")
    ] = None,
    dataset_sizes: Annotated[
        str | None, typer.Option(help="A study for each part of the data, such as 250,500,full.")
    ] = None,
    carries_over_to: Annotated[
        str | None, typer.Option(metavar="WORKLOAD", help="Is the best size best there, too?")
    ] = None,
    engine: Annotated[
        Literal["auto", "compiled", "vmapped", "loop"],
        typer.Option(help="What runs the trainings."),
    ] = "auto",
    run: Annotated[
        Path | None, typer.Option(help="Where it is kept. Default: a new folder in runs/.")
    ] = None,
    resume: Annotated[
        Path | None,
        typer.Option(exists=True, file_okay=False, help="Go on with the study here, as begun."),
    ] = None,
    no_run: Annotated[bool, typer.Option("--no-run", help="Keep nothing.")] = False,
    storage: Annotated[
        str | None,
        typer.Option(help="URL of another database, such as postgresql+psycopg://user@host/name."),
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="Of the study in --storage. Default: the workload's.")
    ] = None,
    workers: Annotated[
        int, typer.Option(min=1, help="Processes that run trainings side by side.")
    ] = 1,
    executor: Annotated[
        Literal["local", "ray"], typer.Option(help="Or run them on a Ray cluster.")
    ] = "local",
    export_optuna: Annotated[
        str | None,
        typer.Option(help="URL, such as sqlite:///optuna.db, for optuna-dashboard to open."),
    ] = None,
    threads: ThreadsOption = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> int:
    """Batch sizes × learning rates × seeds, and what they show."""
    from rightbatch.cli import run_study

    return run_study.run(
        Output(as_json=as_json, quiet=quiet),
        workload,
        run=run,
        resume=resume,
        keep=not no_run,
        export_optuna=export_optuna,
        threads=threads,
        batch_sizes=batch_sizes,
        learning_rates=learning_rates,
        seeds=seeds,
        epochs=epochs,
        steps=steps,
        examples=examples,
        seconds=seconds,
        target=target,
        search=search,
        trials=trials,
        watch=watch,
        label_noise=label_noise,
        dataset_sizes=dataset_sizes,
        carries_over_to=carries_over_to,
        engine=engine,
        storage=storage,
        name=name,
        workers=workers,
        executor=executor,
    )


@app.command()
def report(
    source: Annotated[
        Path, typer.Argument(metavar="RUN|PLAN", help="Folder of a study, or a plan.json.")
    ],
    out: Annotated[
        Path | None, typer.Option(help="Where to write. Default: report.html, .md or .json.")
    ] = None,
    format: Annotated[
        Literal["html", "md", "json"] | None,
        typer.Option(help="Default: by the ending of --out, else html."),
    ] = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> int:
    """One page of a plan or study: the answer, why, figures and evidence."""
    from rightbatch.cli import run_report

    return run_report.run(Output(as_json=as_json, quiet=quiet), source, out=out, format=format)


@probe_app.command("memory")
def probe_memory(
    workload: WorkloadArgument,
    memory: MemoryOption = None,
    device: DeviceOption = "cpu",
    threads: ThreadsOption = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> int:
    """The largest micro-batch that fits, and what the memory is used for."""
    options = {"device": device, "threads": threads, "memory_limit": memory}
    return _probe("memory", workload, as_json, quiet, **options)


@probe_app.command("throughput")
def probe_throughput(
    workload: WorkloadArgument,
    budget: BudgetOption = None,
    device: DeviceOption = "cpu",
    threads: ThreadsOption = None,
    seed: SeedOption = 0,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> int:
    """Seconds per step against micro-batch, and where throughput stops growing."""
    options = {"device": device, "threads": threads, "seed": seed}
    options |= _seconds("budget_seconds", budget)
    return _probe("throughput", workload, as_json, quiet, **options)


@probe_app.command("noise")
def probe_noise(
    workload: WorkloadArgument,
    device: DeviceOption = "cpu",
    threads: ThreadsOption = None,
    seed: SeedOption = 0,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> int:
    """The gradient noise scale B_simple, at the start and along a short training."""
    options = {"device": device, "threads": threads, "seed": seed}
    return _probe("noise", workload, as_json, quiet, **options)


@probe_app.command("learning-rate")
def probe_learning_rate(
    workload: WorkloadArgument,
    batch_size: BatchOption = 32,
    device: DeviceOption = "cpu",
    threads: ThreadsOption = None,
    seed: SeedOption = 0,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> int:
    """A learning-rate range test at one batch size."""
    options = {"device": device, "threads": threads, "seed": seed, "global_batch": batch_size}
    return _probe("learning-rate", workload, as_json, quiet, **options)


@probe_app.command("sharpness")
def probe_sharpness(
    workload: WorkloadArgument,
    steps: Annotated[
        str | None,
        typer.Option(help="Updates after which to measure, such as 0,64,256. Default: none."),
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="With --steps. Default: 32.")
    ] = None,
    learning_rate: Annotated[
        float | None, typer.Option(help="With --steps; with --compare: the same for all.")
    ] = None,
    compare: Annotated[
        str | None, typer.Option(help="Train at these batch sizes and compare, such as 10,full.")
    ] = None,
    epochs: Annotated[
        int | None, typer.Option(min=1, help="With --compare: passes. Default: 20.")
    ] = None,
    seeds: Annotated[
        int | None, typer.Option(min=1, help="With --compare: trainings of each. Default: 5.")
    ] = None,
    study: Annotated[
        Path | None,
        typer.Option(help="With --compare: folder of the study that tuned the rates."),
    ] = None,
    examples: Annotated[
        int | None, typer.Option(min=1, help="Most training examples to measure with.")
    ] = None,
    device: DeviceOption = "cpu",
    threads: ThreadsOption = None,
    seed: SeedOption = 0,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> int:
    """How sharp the loss is around the weights, and whether small batches find flatter places."""
    from rightbatch.cli import run_sharpness

    return run_sharpness.run(
        Output(as_json=as_json, quiet=quiet),
        workload,
        device=device,
        threads=threads,
        seed=seed,
        examples=examples,
        learning_rate=learning_rate,
        steps=steps,
        batch_size=batch_size,
        compare=compare,
        epochs=epochs,
        seeds=seeds,
        study=study,
    )


def _probe(kind: str, workload: str, as_json: bool, quiet: bool, **options: Any) -> int:
    from rightbatch.cli import run_probe

    output = Output(as_json=as_json, quiet=quiet)
    return run_probe.run(output, kind, workload, **options)


def _seconds(name: str, text: str | None) -> dict[str, float]:
    from rightbatch.plan.make import parse_seconds

    return {} if text is None else {name: parse_seconds(text)}
