"""Memory probe: the largest micro-batch that trains within a limit, and where the bytes go.

Every size really trains, in a fenced child process: model, optimizer state, accumulation,
evaluation and the heaviest examples included. A law fitted to the first sizes says where to look
next, and its prediction is compared with what the answer then took (`laws/search.py`).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import torch

from rightbatch import errors
from rightbatch.device.memory import format_bytes, parse_bytes
from rightbatch.errors import NoBatchFitsError, ProbeError, UsageError, WorkloadError
from rightbatch.isolate import Child, ChildResult
from rightbatch.laws.memory import MemoryLaw, fit_memory_law
from rightbatch.laws.search import CeilingSearch, Trial, bracket
from rightbatch.probes.memory_record import (
    Ceiling,
    MemoryLawRecord,
    MemoryParts,
    MemoryRecord,
    MemoryTrial,
)
from rightbatch.probes.memory_trial import SentWorkload, Survey, Usage, survey, train_at
from rightbatch.recipe import Precision
from rightbatch.workload import Workload
from rightbatch.workload.crossing import check_crossing

Progress = Callable[[str], None]

_PATIENCE_SECONDS = 3.0
_SOAK_SECONDS = 20.0
_STALL_SECONDS = 6.0
_CLOSE = 0.05
_AMPLE = 0.5
"""A peak below this share of the limit need not be known closely."""


def measure_memory(
    workload: Workload,
    *,
    device: str = "cpu",
    memory_limit: str | int | None = None,
    max_micro_batch: int | None = None,
    precision: Precision = "float32",
    exact: bool = False,
    timeout_seconds: float = 120.0,
    progress: Progress | None = None,
) -> MemoryRecord:
    """Finds the largest micro-batch that trains within a memory limit.

    Args:
        workload: What to train.
        device: Where.
        memory_limit: Such as `"8GiB"`: the most that the training process may have, libraries and
            data included. Default: what is available now, less 5 %.
        max_micro_batch: Look no further than this. Default: the training set.
        precision: Arithmetic of the forward pass.
        exact: Search until one example more has failed, instead of within 90 % of the truth.
        timeout_seconds: A size that takes longer ends the search upwards.
        progress: Called with what is being run.

    Returns:
        Ceiling, parts, law and trials. The ceiling is one of the trials.

    Raises:
        UsageError: If a size or the limit is out of range.
        WorkloadError: If the workload cannot be trained, or not be sent to a child process.
        ProbeError: If the smallest size dies or hangs.
        NoBatchFitsError: If not even one example fits.

    Example:
        >>> import rightbatch as rb
        >>> record = rb.measure_memory(rb.load_workload("max3"), memory_limit="1GiB")
        >>> record.ceiling.micro_batch  # all of its training set
        1000
    """
    if max_micro_batch is not None and max_micro_batch < 1:
        raise UsageError(f"max_micro_batch is {max_micro_batch}; it must be at least 1.")
    limit = None if memory_limit is None else parse_bytes(memory_limit)
    start = time.monotonic()
    with _send(workload, device) as child:
        probe = _MemoryProbe(
            workload.name, child, limit, max_micro_batch, precision, timeout_seconds, progress
        )
        probe.search(exact=exact)
        return probe.record(time.monotonic() - start)


def _send(workload: Workload, device: str) -> Child:
    try:
        return Child(SentWorkload(workload), device=device, preload=["torch._dynamo"])
    except WorkloadError:
        check_crossing(workload)  # names the part that cannot cross
        raise


class _MemoryProbe:
    """One run of the probe: what is known so far."""

    def __init__(
        self,
        name: str,
        child: Child,
        limit_bytes: int | None,
        max_micro_batch: int | None,
        precision: Precision,
        timeout_seconds: float,
        progress: Progress | None,
    ) -> None:
        self.name = name
        self.child = child
        self.precision: Precision = precision
        self.timeout_seconds = timeout_seconds
        self.progress = progress or (lambda _text: None)
        self.trials: list[MemoryTrial] = []
        self.usages: dict[int, Usage] = {}
        self.notes: list[str] = []
        self._set_limit(limit_bytes)
        self.found = self._survey()
        self.max_size = min(max_micro_batch or self.found.num_examples, self.found.num_examples)

    def _set_limit(self, given: int | None) -> None:
        available = self.child.available_bytes()
        self.limit_bytes = available if given is None else min(given, available)
        self.limit_source: Literal["given", "available"] = "given"
        if given is None or given > available:
            self.limit_source = "available"
        if given is not None and given > available:
            self.notes.append(
                f"The limit of {format_bytes(given)} is more than the {format_bytes(available)} "
                "that are available here; sizes were measured up to the latter."
            )

    def _survey(self) -> Survey:
        self.progress("memory: starting a child process and looking at the data")
        result = self._run(survey, limit_bytes=self.available_bytes())
        if result.verdict == "oom":
            raise NoBatchFitsError(
                f"No micro-batch fits: the data of workload {self.name!r} alone do not fit into "
                f"the {format_bytes(result.limit_bytes)} that are available. Use a dataset that "
                "reads its examples when they are asked for."
            )
        self._refuse_failure(result, "reading the data")
        found: Survey = result.value
        if found.heaviest is not None and found.num_weighed < found.num_examples:
            self.notes.append(
                f"Examples differ in size, and {found.num_weighed} of {found.num_examples} were "
                "weighed: a heavier one may be among the rest."
            )
        return found

    def available_bytes(self) -> int:
        """At least the limit; more where the machine has more than was given."""
        return max(self.limit_bytes, self.child.available_bytes())

    def search(self, *, exact: bool) -> None:
        """Runs sizes until the answer is found, and the answer again where it is not certain.

        A heap fragments differently in every process, so an answer close to the limit must fit in
        a second process too; and its peak must have settled.
        """
        search = CeilingSearch(
            max_size=self.max_size,
            limit_bytes=self.limit_bytes,
            base_bytes=self.found.data_bytes if self.child.device == "cpu" else 0,
            exact=exact,
        )
        while True:
            while (size := search.next_size(self.law_trials())) is not None:
                self.try_size(size, _PATIENCE_SECONDS)
            answer, _ = self.bracket()
            if answer == 0:
                self._nothing_fits()
            if self._certain(answer):
                break
            self.child.close()  # the next request starts another process
            self.try_size(answer, _SOAK_SECONDS)
            if self.trials[-1].verdict == "fits":
                break
            # What had seemed to fit does not: one more size may be looked at.
            search = replace(search, max_trials=max(6, len(self.trials) + 1))
        headroom = self.limit_bytes - self.usages[answer].peak_bytes
        if headroom < _CLOSE * self.limit_bytes and self.child.device == "cpu":
            self.notes.append(
                f"{answer} examples leave {format_bytes(headroom)} of the limit. The heap of the C "
                "library fragments differently in every process, by some per cent of what is "
                "trained with: for a long run choose a little less."
            )
        self.proven = search.proven(self.law_trials())
        if not self.proven:
            self.notes.append(
                f"{answer} examples fit, and after {len(self.trials)} sizes it is open whether "
                "clearly more would. Use exact=True to know."
            )

    def _certain(self, answer: int) -> bool:
        usage = self.usages[answer]
        return usage.settled and usage.peak_bytes < (1 - _CLOSE) * self.limit_bytes

    def try_size(self, size: int, patience_seconds: float) -> None:
        """Trains at one size in the child and notes how it went."""
        self.progress(f"memory: training on {size} examples at once, to see their peak")
        result = self._train(size, patience_seconds)
        if result.verdict in {"error", "killed"} and result.perhaps_memory:
            result = self._ask_again_with_more(result, size)
        fits_before = any(t.verdict == "fits" for t in self.trials)
        if result.verdict == "error":
            self._raise_error(result, size)
        if result.verdict in {"timeout", "killed"}:
            if not fits_before and not self.trials:
                self._refuse_failure(result, f"training on {size} examples")
            self.notes.append(
                f"Training on {size} examples ended otherwise than by memory: {result.message} "
                "Larger sizes were not tried."
            )
        usage: Usage | None = None
        if result.verdict == "fits" and result.peak_bytes is not None:
            usage = replace(result.value, peak_bytes=result.peak_bytes)
        if usage is None:
            self.usages.pop(size, None)
        else:
            self.usages[size] = usage
        # More steps at the same size are the same trial, better known.
        shorter = [t for t in self.trials if t.micro_batch == size]
        trial = MemoryTrial(
            micro_batch=size,
            verdict=result.verdict,
            peak_bytes=None if usage is None else usage.peak_bytes,
            num_steps=0 if usage is None else usage.num_steps,
            num_examples=(0 if usage is None else usage.num_examples)
            + sum(t.num_examples for t in shorter),
            seconds=result.seconds + sum(t.seconds for t in shorter),
        )
        self.trials = [*(t for t in self.trials if t.micro_batch != size), trial]

    def _train(
        self, size: int, patience_seconds: float, limit_bytes: int | None = None
    ) -> ChildResult:
        return self._run(
            train_at,
            size,
            self.found,
            self.child.device,
            self.precision,
            patience_seconds,
            _AMPLE * (limit_bytes or self.limit_bytes),
            limit_bytes=limit_bytes,
        )

    def _ask_again_with_more(self, result: ChildResult, size: int) -> ChildResult:
        """A failure that may be memory's fault is, if it does not happen with more memory."""
        available = self.available_bytes()
        if available > self.limit_bytes:
            again = self._train(size, 0.0, limit_bytes=available)
            if again.verdict in {"fits", "oom"}:
                return replace(result, verdict="oom")
        return result

    def _run(
        self, fn: Callable[..., object], *args: object, limit_bytes: int | None = None
    ) -> ChildResult:
        return self.child.run(
            fn,
            *args,
            memory_limit_bytes=limit_bytes or self.limit_bytes,
            timeout_seconds=self.timeout_seconds,
            stall_seconds=_STALL_SECONDS,
        )

    def law_trials(self) -> list[Trial]:
        """The trials as the search wants them."""
        base = self.found.data_bytes if self.child.device == "cpu" else 0
        law_trials: list[Trial] = []
        for trial in self.trials:
            usage = self.usages.get(trial.micro_batch) if trial.verdict == "fits" else None
            fixed = saved = None
            if usage is not None:
                saved = usage.saved_bytes
                fixed = base + usage.parameters_bytes + usage.optimizer_bytes
            law_trials.append(
                Trial(
                    size=trial.micro_batch,
                    fits=trial.verdict == "fits",
                    peak_bytes=trial.peak_bytes,
                    fixed_bytes=fixed,
                    growth_bytes=saved / trial.micro_batch if saved else None,
                )
            )
        return law_trials

    def bracket(self) -> tuple[int, int]:
        """The largest size that fitted, and the smallest that did not."""
        return bracket(self.law_trials(), self.max_size)

    def _refuse_failure(self, result: ChildResult, doing: str) -> None:
        if result.verdict == "error":
            raise _workload_error(result, f"Workload {self.name!r} failed while {doing}")
        if result.verdict != "fits":
            error = ProbeError(
                f"The memory of workload {self.name!r} could not be measured: while {doing}, "
                f"{result.message[:1].lower()}{result.message[1:]}"
            )
            error.add_note(result.traceback)
            raise error

    def _raise_error(self, result: ChildResult, size: int) -> None:
        # After exhaustion at larger sizes, an error at one example (BatchNorm's, say) means that
        # no size is left.
        if size == 1 and self.trials and all(t.verdict == "oom" for t in self.trials):
            smallest = min(t.micro_batch for t in self.trials)
            error = NoBatchFitsError(
                f"No micro-batch fits: {smallest} examples need more than the "
                f"{format_bytes(self.limit_bytes)} that are free, and one example alone cannot be "
                f"trained on ({result.error_type}: {result.message}). {_REMEDY}"
            )
            error.add_note(result.traceback)
            raise error
        raise _workload_error(
            result, f"Workload {self.name!r} failed while training on {size} examples"
        )

    def _nothing_fits(self) -> None:
        failed = self.trials[-1]
        if failed.verdict != "oom":
            raise ProbeError(
                f"The memory of workload {self.name!r} could not be measured: one example ended "
                f"with {failed.verdict!r}. {' '.join(self.notes)}"
            )
        self.progress("memory: nothing fits; measuring what one example needs")
        available = self.available_bytes()
        need = f"more than {format_bytes(available)}"
        if available > self.limit_bytes:
            result = self._train(1, _PATIENCE_SECONDS, limit_bytes=available)
            if result.verdict == "fits":
                need = format_bytes(result.peak_bytes or 0)
        base = format_bytes(self.found.data_bytes)
        raise NoBatchFitsError(
            f"No micro-batch fits: one example needs {need} and {format_bytes(self.limit_bytes)} "
            f"are free ({base} of it go to the libraries and the data). {_REMEDY}"
        )

    def record(self, seconds: float) -> MemoryRecord:
        """Everything that was found."""
        answer, failed = self.bracket()
        usage = self.usages[answer]
        law, law_record = self._law(answer)
        return MemoryRecord(
            workload=self.name,
            device=self.child.device,
            precision=self.precision,
            num_threads=torch.get_num_threads(),
            limit_bytes=self.limit_bytes,
            limit_source=self.limit_source,
            ceiling=Ceiling(
                micro_batch=answer,
                headroom_bytes=self.limit_bytes - usage.peak_bytes,
                smallest_failed=failed if failed <= self.max_size else None,
                proven=self.proven,
            ),
            parts=MemoryParts(
                baseline_bytes=self.found.data_bytes,
                parameters_bytes=usage.parameters_bytes,
                gradients_bytes=usage.gradients_bytes,
                optimizer_bytes=usage.optimizer_bytes,
                activation_bytes_per_example=self._activation_bytes(answer, law),
            ),
            law=law_record,
            trials=tuple(self.trials),
            notes=tuple(self.notes),
            seconds=seconds,
        )

    def _law(self, answer: int) -> tuple[MemoryLaw | None, MemoryLawRecord | None]:
        peaks = {size: usage.peak_bytes for size, usage in sorted(self.usages.items())}
        if len(peaks) < 2:
            return None, None
        law = fit_memory_law(list(peaks), list(peaks.values()))
        smaller = {size: peak for size, peak in peaks.items() if size < answer}
        fixed = [t.fixed_bytes for t in self.law_trials() if t.fixed_bytes is not None]
        if len(smaller) == 1:
            smaller[0] = max(fixed)
        predicted = error = None
        if smaller:
            predicted = fit_memory_law(list(smaller), list(smaller.values())).peak_bytes(answer)
            error = predicted / peaks[answer] - 1
        return law, MemoryLawRecord(
            fixed_bytes=law.fixed_bytes,
            bytes_per_example=law.bytes_per_example,
            predicted_bytes=predicted,
            prediction_error=error,
        )

    def _activation_bytes(self, answer: int, law: MemoryLaw | None) -> float | None:
        slope = None if law is None else law.bytes_per_example
        if slope is not None and slope.value and (slope.low is None or slope.low > 0):
            return slope.value
        saved = self.usages[answer].saved_bytes
        if saved is None:
            return None
        self.notes.append(
            "The peaks are too close together to tell what an example adds; "
            "activation_bytes_per_example counts what the forward pass keeps."
        )
        return saved / answer


_REMEDY = (
    "Lower the precision, turn on activation checkpointing, shorten the longest examples, or use "
    "a smaller model."
)


def _workload_error(result: ChildResult, what: str) -> Exception:
    """The child's exception as one of ours: our own kind stays what it was."""
    kind = getattr(errors, result.error_type, None)
    if isinstance(kind, type) and issubclass(kind, errors.RightbatchError):
        error: Exception = kind(result.message)
    else:
        error = WorkloadError(f"{what}: {result.error_type}: {result.message}")
    error.add_note(f"In the child process:\n{result.traceback}")
    return error
