"""What the memory probe found, as plain data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from rightbatch.isolate.child import Verdict
from rightbatch.laws.estimate import Estimate
from rightbatch.recipe import Precision


@dataclass(frozen=True, kw_only=True)
class Ceiling:
    """The largest micro-batch that was run within the limit.

    Attributes:
        micro_batch: Examples.
        headroom_bytes: What was left below the limit at its peak.
        smallest_failed: The smallest size that did not fit, or None: none was met.
        proven: Whether the trials show that nothing above 1/0.9 of it fits (or was asked for).
    """

    micro_batch: int
    headroom_bytes: int
    smallest_failed: int | None
    proven: bool


@dataclass(frozen=True, kw_only=True)
class MemoryParts:
    """Where the bytes go.

    Attributes:
        baseline_bytes: Interpreter, libraries and data, before anything is built.
        parameters_bytes: Parameters.
        gradients_bytes: Their gradients.
        optimizer_bytes: The optimizer's state.
        activation_bytes_per_example: What one more example adds to the peak; where the peaks are
            too close to tell, what its forward pass keeps for the backward pass.
    """

    baseline_bytes: int
    parameters_bytes: int
    gradients_bytes: int
    optimizer_bytes: int
    activation_bytes_per_example: float | None


@dataclass(frozen=True, kw_only=True)
class MemoryTrial:
    """One size that was run.

    Attributes:
        micro_batch: Examples.
        verdict: `fits`, `oom`, `timeout` or `killed`.
        peak_bytes: Its peak, libraries and data included; None unless it fitted.
        num_steps: Updates done; 0 unless it fitted.
        num_examples: Examples trained on; some steps accumulate two micro-batches.
        seconds: How long it took.
    """

    micro_batch: int
    verdict: Verdict
    peak_bytes: int | None
    num_steps: int
    num_examples: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class MemoryLawRecord:
    """The memory law peak(B) = fixed + per example × B, and how well it foresaw the answer.

    Attributes:
        fixed_bytes: Memory that does not depend on the size.
        bytes_per_example: Memory of one more example.
        predicted_bytes: The answer's peak as predicted from the smaller sizes (from a single one
            and what is fixed), or None without any.
        prediction_error: (predicted − measured) / measured at the answer, or None.
    """

    fixed_bytes: float
    bytes_per_example: Estimate
    predicted_bytes: float | None
    prediction_error: float | None


@dataclass(frozen=True, kw_only=True)
class MemoryRecord:
    """What the memory probe found.

    Attributes:
        workload: Name of the workload.
        device: Where it was measured.
        precision: Arithmetic of the forward pass.
        num_threads: Threads torch used; each has memory of its own.
        limit_bytes: The most that a process may have, libraries and data included (on CUDA: the
            tensors alone).
        limit_source: `given`, or `available` when it is what the machine had free.
        ceiling: The answer.
        parts: Where the bytes go.
        law: The fitted law; None with a single size.
        trials: Every size that was run, in the order of their last step.
        notes: What a reader should know.
        seconds: What the probe cost.
    """

    workload: str
    device: str
    precision: Precision
    num_threads: int
    limit_bytes: int
    limit_source: Literal["given", "available"]
    ceiling: Ceiling
    parts: MemoryParts
    law: MemoryLawRecord | None
    trials: tuple[MemoryTrial, ...]
    notes: tuple[str, ...]
    seconds: float
