"""The catalog as text and as data."""

from __future__ import annotations

import dataclasses
from typing import Any

from rightbatch.catalog.entries import entries
from rightbatch.cli.table import make_table, wrap


def workloads_text() -> str:
    """The catalog: one table, and a line on each workload."""
    rows = [
        (entry.name, entry.optimizer, entry.target, f"{entry.num_examples:,}")
        for entry in entries()
    ]
    table = make_table(("name", "optimizer", "target", "examples"), rows, left=3)
    about = make_table(("name", "what it is"), [(e.name, e.description) for e in entries()], left=2)
    intro = (
        f"{len(rows)} workloads are built in, on data that ship with rightbatch's dependencies. "
        "Start with: rightbatch plan digits"
    )
    return f"{wrap(intro)}\n\n{table}\n\n{about}"


def workloads_json() -> dict[str, Any]:
    """The catalog as one JSON object."""
    kept = ("name", "num_examples", "optimizer", "target", "description")
    lines = [dataclasses.asdict(entry) for entry in entries()]
    return {
        "schema": "rightbatch.workloads/1",
        "workloads": [{key: line[key] for key in kept} for line in lines],
    }
