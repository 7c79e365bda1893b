"""Noise probe: B_simple = tr Σ/|G|² with an interval, at the start and along a short training.

The gradient noise scale grows during training, so one number at the initial weights would mislead:
it is measured again after a few updates of a cautious warm training. At each point examples are
drawn without replacement and added until the interval is tight enough, the limit is reached, or
the whole training set was used and the answer is exact. Where the data do not tell, the answer is
"unresolved", with what is known of its lower bound.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from rightbatch.errors import ProbeError, UsageError
from rightbatch.isolate import preserved_state
from rightbatch.laws.estimate import Estimate, unresolved
from rightbatch.laws.noise import MIN_GROUPS, NoiseEstimate, estimate_noise_scale
from rightbatch.probes.example_gradients import ExampleGradients, GradientForm, GradientSums
from rightbatch.recipe import Recipe
from rightbatch.training import Training
from rightbatch.training.evaluate import to_device
from rightbatch.workload import Workload

Progress = Callable[[str, float], None]
"""Called with what is being measured now, and the share of the work that is done."""

TRAJECTORY_STEPS = (0, 4, 16, 64)
"""Updates after which the noise scale is measured: geometric, since it grows fast at first."""
FIRST_EXAMPLES = 128
MAX_EXAMPLES = 2048
RELATIVE_HALF_WIDTH = 0.25
"""An interval of ± this share of the value is tight enough."""
WARM_BATCH = 32
"""Examples per update of the warm training."""
_CAUTION = 4.0
"""The warm training takes this many times less than the best first step."""
_STREAM = 0x4015E
"""Keeps the draw of examples apart from other draws with the same seed."""
_ATTEMPTS = 4
"""Warm trainings tried, each with a learning rate that much lower, before giving up."""


@dataclass(frozen=True, kw_only=True)
class NoisePoint:
    """The noise scale at one moment of a training.

    Attributes:
        step: Updates done before.
        value: B_simple in examples; None when |G|² cannot be told from 0.
        low: Lower end of the 95 % interval; None where not even that is known.
        high: Upper end; None when unresolved.
        n: Examples whose gradients were used.
        method: How it was measured, in words.
        gradient_norm_squared: |G|² of the mean training loss.
        trace: S = tr Σ.
        cost_examples: Examples processed for this point, forward passes at a third.
    """

    step: int
    value: float | None
    low: float | None
    high: float | None
    n: int
    method: str
    gradient_norm_squared: Estimate
    trace: Estimate
    cost_examples: int

    @property
    def noise_scale(self) -> Estimate:
        """B_simple as an estimate."""
        return Estimate(
            value=self.value, low=self.low, high=self.high, n=self.n, method=self.method
        )


@dataclass(frozen=True, kw_only=True)
class NoiseRecord:
    """What the noise probe found.

    Attributes:
        workload: Name of the workload.
        device: Where.
        seed: Of weights, data order and which examples were drawn.
        noise_scale: B_simple at the initial weights.
        trajectory: B_simple along the warm training, step 0 first.
        num_examples: N.
        population: N where the gradient of the whole training set is meant, so that using all of it
            is exact; None for a stream cut short and for losses that draw random numbers.
        learning_rate: Of the warm training; None without one.
        learning_rate_source: `given`, `line search` or `none`.
        global_batch: Of the warm training.
        notes: What a reader should know, in sentences.
        cost_examples: Examples processed, the warm training included, forward passes at a third.
        seconds: Wall time.
    """

    workload: str
    device: str
    seed: int
    noise_scale: Estimate
    trajectory: tuple[NoisePoint, ...]
    num_examples: int
    population: int | None
    learning_rate: float | None
    learning_rate_source: str
    global_batch: int
    notes: tuple[str, ...]
    cost_examples: int
    seconds: float


def measure_noise_scale(
    workload: Workload,
    *,
    device: str = "cpu",
    seed: int = 0,
    learning_rate: float | None = None,
    global_batch: int | None = None,
    trajectory_steps: Sequence[int] = TRAJECTORY_STEPS,
    max_examples: int = MAX_EXAMPLES,
    micro_batch: int | None = None,
    progress: Progress | None = None,
) -> NoiseRecord:
    """Measures B_simple = tr Σ/|G|² at the initial weights and along a short warm training.

    The gradients are those of the training loss, in training mode, before any clipping. Models and
    optimizers are throw-away ones; the caller's random states, modes and threads are as before.

    Args:
        workload: What to train.
        device: Where.
        seed: Of weights, data order and which examples are drawn.
        learning_rate: Of the warm training. Default: a quarter of the best step along the
            optimizer's first direction.
        global_batch: Of the warm training. Default: 32, or N.
        trajectory_steps: Updates after which to measure; 0 is always included. `(0,)` trains
            nothing.
        max_examples: Most examples to use at each point.
        micro_batch: Size of micro-batches where single examples have no gradient (BatchNorm).
        progress: Told what is being done, and how much is done.

    Returns:
        The record.

    Raises:
        UsageError: If a number is out of range.
        ProbeError: If the gradient is not finite at the initial weights.

    Example:
        >>> import torch, rightbatch as rb
        >>> x = torch.randn(500, 3, generator=torch.Generator().manual_seed(0))
        >>> workload = rb.Workload(
        ...     name="mean", make_model=lambda: torch.nn.Linear(3, 1), train_data=(x, x[:, :1]),
        ...     loss=torch.nn.functional.mse_loss,
        ... )
        >>> record = measure_noise_scale(workload, trajectory_steps=(0,))
        >>> record.trajectory[0].step
        0
    """
    steps = sorted({0, *trajectory_steps})
    if steps[0] < 0:
        raise UsageError(f"trajectory_steps holds {steps[0]}; steps are counted from 0.")
    if max_examples < 2:
        raise UsageError(f"max_examples is {max_examples}; noise needs at least 2 examples.")
    batch = min(global_batch or WARM_BATCH, workload.num_examples)
    start = time.perf_counter()
    with preserved_state(), torch.inference_mode(False), torch.enable_grad():
        course = _Course(workload, device, seed, batch, max_examples, micro_batch, progress)
        record = course.run(steps, learning_rate)
    return replace(record, seconds=time.perf_counter() - start)


def measure_noise_at(
    training: Training,
    *,
    seed: int = 0,
    max_examples: int = MAX_EXAMPLES,
    micro_batch: int | None = None,
    form: GradientForm | None = None,
) -> NoisePoint:
    """Measures B_simple at the present weights of a running training, which does not notice.

    Args:
        training: The training; advanced no further.
        seed: Of which examples are drawn.
        max_examples: Most examples to use.
        micro_batch: Size of micro-batches where single examples have no gradient (BatchNorm).
            Default: the recipe's, up to 16.
        form: How gradients are taken, where known from an earlier call (`find_gradient_form`).

    Returns:
        The point.

    Raises:
        ProbeError: If the gradient is not finite.
    """
    size = micro_batch or min(training.recipe.micro_batch, 16)
    lower = torch.bfloat16 if training.recipe.precision == "bfloat16" else None
    with preserved_state(training.model), torch.inference_mode(False), torch.enable_grad():
        torch.manual_seed(seed)
        gradients = ExampleGradients(
            training.workload,
            training.model,
            device=training.device,
            autocast=lower,
            micro_batch=size,
            form=form,
        )
        checked = 0 if form is not None else gradients.form.checked_examples
        return _measure_point(gradients, training.steps, seed, max_examples, checked)


def find_gradient_form(training: Training, *, micro_batch: int | None = None) -> GradientForm:
    """How gradients of examples are taken for a training; the same for all with its workload.

    Args:
        training: The training; left as it is.
        micro_batch: Size of micro-batches where single examples have no gradient.

    Returns:
        The form, to be passed to `measure_noise_at`.
    """
    with preserved_state(training.model), torch.inference_mode(False), torch.enable_grad():
        return ExampleGradients(
            training.workload, training.model, device=training.device, micro_batch=micro_batch
        ).form


# --- one point ------------------------------------------------------------------------------------


def _measure_point(
    gradients: ExampleGradients, step: int, seed: int, max_examples: int, checked: int
) -> NoisePoint:
    """Adds examples, twice as many each time, until the interval is tight."""
    num_examples, form = gradients.workload.num_examples, gradients.form
    population = _population(gradients.workload, form)
    generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence((seed, step, _STREAM))))
    order = torch.from_numpy(generator.permutation(num_examples))
    limit = min(num_examples, max(max_examples, 2 * form.micro_batch))
    limit -= limit % form.micro_batch
    torch.manual_seed(int(generator.integers(2**31)))
    sums = GradientSums(gradients.num_parameters, seed=seed)
    goal = min(limit, max(FIRST_EXAMPLES, 8 * form.micro_batch))
    while True:
        for chunk in gradients.sums(order[sums.num_examples : goal]):
            sums.add(*chunk)
        if not sums.finite():
            raise ProbeError(
                f"The gradient is not finite at step {step}. Check the loss and the data for "
                "infinite values, or lower the learning rate."
            )
        estimate = _estimate(sums, population, form)
        if goal >= limit or _tight(estimate.noise_scale):
            break
        goal = min(limit, 2 * goal)
    scale = estimate.noise_scale
    return NoisePoint(
        step=step,
        value=scale.value,
        low=scale.low,
        high=scale.high,
        n=scale.n,
        method=scale.method,
        gradient_norm_squared=estimate.gradient_norm_squared,
        trace=estimate.trace,
        cost_examples=sums.num_examples + math.ceil(checked / 3),
    )


def _population(workload: Workload, form: GradientForm) -> int | None:
    """N, unless there is more noise than that of drawing from these N."""
    endless = workload.train_examples.truncated or form.stochastic
    return None if endless else workload.num_examples


def _estimate(sums: GradientSums, population: int | None, form: GradientForm) -> NoiseEstimate:
    sample, method = sums.sample(population), _method(form)
    if len(sample.sizes) < MIN_GROUPS:
        nothing = unresolved(sample.num_examples, method)
        return NoiseEstimate(noise_scale=nothing, gradient_norm_squared=nothing, trace=nothing)
    return estimate_noise_scale(sample, method=method)


def _method(form: GradientForm) -> str:
    dropout = ", random draws of the loss counted as noise" if form.stochastic else ""
    if form.form == "micro-batches":
        return f"micro-batches of {form.micro_batch}: {form.because}{dropout}"
    return f"{form.form}{dropout}"


def _tight(scale: Estimate) -> bool:
    if scale.value is None or scale.low is None or scale.high is None:
        return False
    return (scale.high - scale.low) / 2 <= RELATIVE_HALF_WIDTH * scale.value


# --- the course of the probe ----------------------------------------------------------------------


class _Course:
    """The measurement of one workload: weights, warm training, points."""

    def __init__(
        self,
        workload: Workload,
        device: str,
        seed: int,
        global_batch: int,
        max_examples: int,
        micro_batch: int | None,
        progress: Progress | None,
    ) -> None:
        self.workload, self.device, self.seed = workload, device, seed
        self.global_batch, self.max_examples = global_batch, max_examples
        self.micro_batch = micro_batch or min(global_batch, 16)
        self.tell: Progress = progress or (lambda _what, _share: None)
        self.cost = 0
        self.notes: list[str] = []

    def run(self, steps: list[int], learning_rate: float | None) -> NoiseRecord:
        rate, source = learning_rate, "none" if len(steps) == 1 else "given"
        training = self._training(1.0 if rate is None else rate)
        torch.manual_seed(self.seed)
        gradients = self._gradients(training, None)
        form = gradients.form
        self.tell("gradient noise at the initial weights", 0.0)
        first = _measure_point(gradients, 0, self.seed, self.max_examples, form.checked_examples)
        self.cost += first.cost_examples
        if len(steps) > 1 and rate is None:
            self.tell("a cautious learning rate for the warm training", 0.2)
            rate, source = self._search_learning_rate(), "line search"
        points = [first]
        if len(steps) > 1 and rate is not None:
            rate = self._follow(points, steps[1:], rate, form)
        if first.value is None:
            self.notes.append(
                f"Unresolved at the start: {first.n} examples cannot tell the mean gradient from 0."
            )
        self.tell("gradient noise", 1.0)
        return NoiseRecord(
            workload=self.workload.name,
            device=self.device,
            seed=self.seed,
            noise_scale=first.noise_scale,
            trajectory=tuple(points),
            num_examples=self.workload.num_examples,
            population=_population(self.workload, form),
            learning_rate=None if len(steps) == 1 else rate,
            learning_rate_source=source,
            global_batch=self.global_batch,
            notes=tuple(self.notes),
            cost_examples=self.cost,
            seconds=0.0,
        )

    def _training(self, learning_rate: float) -> Training:
        recipe = Recipe(global_batch=self.global_batch, learning_rate=learning_rate)
        return Training(self.workload, recipe, seed=self.seed, device=self.device)

    def _gradients(self, training: Training, form: GradientForm | None) -> ExampleGradients:
        return ExampleGradients(
            self.workload,
            training.model,
            device=self.device,
            micro_batch=self.micro_batch,
            form=form,
        )

    def _follow(
        self, points: list[NoisePoint], steps: list[int], rate: float, form: GradientForm
    ) -> float:
        """Measures along a warm training; one that diverges is begun again with a lower rate."""
        for _ in range(_ATTEMPTS):
            found = self._one_attempt(steps, rate, form)
            if found is not None:
                points.extend(found)
                return rate
            self.notes.append(f"The warm training diverged at learning rate {rate:.3g}.")
            rate /= _CAUTION
        self.notes.append("No warm training held; the noise scale is known at the start only.")
        return rate

    def _one_attempt(
        self, steps: list[int], rate: float, form: GradientForm
    ) -> list[NoisePoint] | None:
        training = self._training(rate)
        gradients = self._gradients(training, form)
        found: list[NoisePoint] = []
        for index, step in enumerate(steps):
            self.tell(f"gradient noise after {step} updates", 0.3 + 0.7 * index / len(steps))
            before = training.examples
            training.advance(step - training.steps)
            self.cost += training.examples - before
            if training.diverged:
                return None
            try:
                point = _measure_point(gradients, step, self.seed, self.max_examples, 0)
            except ProbeError:
                return None
            self.cost += point.cost_examples
            found.append(point)
        return found

    def _search_learning_rate(self) -> float:
        """A quarter of the best step along the first direction that the optimizer takes.

        The direction is (w₁ − w₀)/lr of one update, so this works for any optimizer; the loss along
        it is looked at on examples that the direction was not made from.

        Returns:
            The learning rate.
        """
        trial = 1e-3
        training = self._training(trial)
        parameters = [p for p in training.model.parameters() if p.requires_grad]
        before = [p.detach().clone() for p in parameters]
        training.advance(1)
        directions = [(p.detach() - w) / trial for p, w in zip(parameters, before, strict=True)]
        num_examples = self.workload.num_examples
        other = torch.arange(num_examples)[-min(64, num_examples) :]
        batch = to_device(self.workload.train_examples.batch(other), self.device)
        self.cost += training.examples
        best, lowest = None, math.inf
        for rate in [0.0, *(10.0 * 4.0**-k for k in range(12, -1, -1))]:
            with torch.no_grad():
                for p, w, d in zip(parameters, before, directions, strict=True):
                    p.copy_(w + rate * d)
                torch.manual_seed(self.seed)
                loss, count = self.workload.loss_sum(training.model, batch)
            self.cost += math.ceil(len(other) / 3)
            value = float(loss) / float(count)
            if value < lowest:
                best, lowest = rate, value
            elif not value <= 2 * abs(lowest) + lowest:
                break
        # Where no step helps, the smallest one does least harm.
        return (best or 10.0 * 4.0**-12) / _CAUTION
