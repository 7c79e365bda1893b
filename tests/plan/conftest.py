"""One real plan, made once: a race on `quadratic`, and what its making left behind."""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch

from rightbatch import catalog
from rightbatch.plan import Evidence, Plan, make_plan
from rightbatch.workload import Workload


@dataclass(frozen=True)
class Made:
    """A plan, and the state of the process before and after it was made."""

    plan: Plan
    before: dict[str, Any]
    after: dict[str, Any]
    said: list[str] = field(default_factory=list[str])


def _process_state(workload: Workload) -> dict[str, Any]:
    data = [*workload.train_data, *workload.val_data]
    return {
        "python": random.getstate(),
        "numpy": str(np.random.get_state()),
        "torch": torch.get_rng_state().tolist(),
        "threads": torch.get_num_threads(),
        "gradients": torch.is_grad_enabled(),
        "dtype": torch.get_default_dtype(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "data": [hashlib.sha256(t.numpy().tobytes()).hexdigest() for t in data],
    }


@pytest.fixture(scope="session")
def made() -> Made:
    """A race on `quadratic`."""
    workload = catalog.get("quadratic")
    said: list[str] = []
    threads = torch.get_num_threads()
    torch.manual_seed(123)
    random.seed(5)
    np.random.seed(6)
    torch.set_num_threads(1)
    try:
        before = _process_state(workload)
        plan = make_plan(workload, effort="race", progress=lambda text, *_: said.append(text))
        after = _process_state(workload)
    finally:
        torch.set_num_threads(threads)
    return Made(plan, before, after, said)


@pytest.fixture(scope="session")
def evidence(made: Made) -> Evidence:
    """What it measured."""
    return made.plan.evidence
