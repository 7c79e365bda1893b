"""`rightbatch probe …`."""

from __future__ import annotations

import importlib
from typing import Any, NamedTuple

import rightbatch
from rightbatch.cli.opening import open_workload
from rightbatch.cli.output import Output
from rightbatch.store import dump_record


class _Probe(NamedTuple):
    """Which library function makes the measurement, and what shows it."""

    function: str
    schema: str
    renderer: str


_PROBES = {
    "memory": _Probe("measure_memory", "rightbatch.probe-memory/1", "render_memory"),
    "throughput": _Probe(
        "measure_throughput", "rightbatch.probe-throughput/1", "render_throughput"
    ),
    "noise": _Probe("measure_noise_scale", "rightbatch.probe-noise/1", "render_noise"),
    "learning-rate": _Probe(
        "find_learning_rate", "rightbatch.probe-learning-rate/1", "render_learning_rate"
    ),
}


def run(
    output: Output,
    kind: str,
    reference: str,
    *,
    device: str,
    threads: int | None = None,
    **options: Any,
) -> int:
    """Makes one measurement and prints it.

    Args:
        output: Where to print.
        kind: Which, as on the command line.
        reference: The workload.
        device: Where to measure.
        threads: CPU threads, or None for torch's default.
        **options: Passed on to the probe.

    Returns:
        0.
    """
    probe = _PROBES[kind]
    measure = getattr(rightbatch, probe.function)
    with output.progress(f"Probing {kind}") as report:
        report(f"Checking {reference}")
        workload = open_workload(reference, device, threads)
        record = measure(workload, device=device, progress=report, **options)
    render = importlib.import_module(f"rightbatch.cli.{probe.renderer}").as_text
    output.result(lambda: render(record), lambda: dump_record(record, schema=probe.schema))
    return 0
