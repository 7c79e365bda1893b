"""The training loop, as an object that can be advanced step by step.

A `Training` is a run that can be continued: probes advance it a little, a race advances the arms
that are still in, `train` advances it to the end. What it does depends only on the workload, the
recipe, the seed and the horizon, not on how it was cut into pieces.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Generator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rightbatch.errors import RecipeError
from rightbatch.laws.efficiency import adascale_gain
from rightbatch.laws.schedule import batch_at
from rightbatch.recipe import Recipe
from rightbatch.training.arithmetic import (
    autocast_dtype,
    gradients_on,
    make_scaler,
    tensor_float_32,
)
from rightbatch.training.data.loader import Share, load_windows
from rightbatch.training.data.windows import Place, Window, plan_windows
from rightbatch.training.evaluate import Evaluation, evaluate
from rightbatch.training.model import make_model, smallest_pass
from rightbatch.training.random_state import OwnRandomState
from rightbatch.training.ranks.distributed import Ranks
from rightbatch.training.ranks.noise import RankDraw
from rightbatch.training.ranks.replica import Replica, first_evaluation, make_replica
from rightbatch.training.rates import Horizon, Rates, group_settings
from rightbatch.training.step import optimizer_step
from rightbatch.training.streams.arrivals import Feed
from rightbatch.training.watching.callbacks import Callback, Point, reads_norms
from rightbatch.training.watching.norms import parameters_to_keep
from rightbatch.training.watching.telling import Telling
from rightbatch.training.window_noise import WindowNoise
from rightbatch.workload import Workload

EXPLOSION = 1e4
"""A loss this many times the first one counts as diverged, though still finite."""
SETTLING = 100
"""Updates of a stream whose largest loss stands for the first: one example's may be nearly 0."""


class Training:
    """A run that can be advanced in pieces.

    The caller's random state is not touched: dropout and the like draw from a generator state that
    belongs to this training and is swapped in while it runs.

    Args:
        workload: What to train.
        recipe: How.
        seed: Decides initial weights, data order and dropout.
        device: Where.
        horizon: The length of the whole run, for schedules that need it.
        callbacks: What watches it.
        workers: Processes that fetch examples ahead.
        feed: Gives the windows of a stream, in place of the workload's training set, which is
            then not read.
        ranks: The processes that train together, each with a `Training` of its own.

    Attributes:
        steps: Updates done.
        examples: Examples processed.
        consumed: Examples of the training set gone through, over all epochs: the place in the data.
            Those that padding repeats are not counted, those that `drop` leaves out are.
        seconds: Wall time of the updates.
        diverged: Whether the loss left the numbers.
        stop_requested: Set by a callback or a signal: no further update is begun. Of several ranks
            one is enough; they do one more update, in which all of them learn of it.
    """

    def __init__(
        self,
        workload: Workload,
        recipe: Recipe,
        *,
        seed: int = 0,
        device: str = "cpu",
        horizon: Horizon | None = None,
        callbacks: Sequence[Callback] = (),
        workers: int = 0,
        feed: Feed | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        self.workload = workload
        self.recipe = recipe
        self.seed = seed
        self.device = device
        self.horizon = horizon
        self.callbacks = tuple(callbacks) if ranks is None or ranks.rank == 0 else ()
        self.workers = workers
        self.feed = feed
        self.ranks = ranks
        self.replica: Replica | None = None
        self._watched = any(reads_norms(callback) for callback in callbacks)
        if ranks is not None:
            # Shards know the norm of a gradient only together, so that all ranks measure it, also
            # those that were given no callback.
            self._watched = ranks.total([float(self._watched)])[0] > 0
        with torch.inference_mode(False):
            self.model, self._forward_model = make_model(workload, recipe, seed, device)
            # A feed finds it out from its first example.
            self._smallest = 1 if feed else smallest_pass(workload, self.model, recipe, device)
            if ranks is not None:
                self.replica = make_replica(
                    ranks, workload, recipe, self.model, seed, self._smallest
                )
            self.optimizer = workload.make_optimizer(self.model.parameters(), recipe.learning_rate)
        self.scaler = make_scaler(recipe.precision, device)
        self.steps = 0
        self.examples = 0
        self.seconds = 0.0
        self.consumed = 0
        self.diverged = False
        self.stop_requested = False
        self.first_loss: float | None = None
        self.gained = 0.0
        self._loss_sum, self._loss_count = 0.0, 0
        self._random = OwnRandomState(seed if ranks is None else ranks.own_seed(seed), device)
        self._begin()

    def _begin(self) -> None:
        """What follows from the recipe and the place, and is made anew when either is changed."""
        self._autocast = autocast_dtype(self.recipe.precision)
        largest = self.workload.num_examples if self.feed is None else None
        self._rates = Rates(self.optimizer, self.recipe, self.horizon, largest=largest)
        self._scaled = self.recipe.rate_rule == "adascale"
        self.noise = self._make_noise()
        self._patience = losses_read_together(self.device)
        self._unread: list[Tensor | None] = []
        alone = self.replica is None and self.recipe.clip_norm is None and self.scaler is None
        keep = self._watched and alone
        self._measured_later = parameters_to_keep(self.optimizer, self.device) if keep else []
        self._telling = Telling(
            self.callbacks, kept=self._measured_later, read_at_once=self._patience == 1
        )
        self._reload()

    def _make_noise(self) -> WindowNoise | None:
        """Where the recipe needs the noise scale on the way, what measures it."""
        recipe = self.recipe
        if recipe.batch_policy == "follow-noise":
            largest = recipe.largest_batch or self.workload.num_examples
            return WindowNoise(recipe.global_batch, largest)
        return WindowNoise(recipe.global_batch, None) if self._scaled else None

    def _reload(self) -> None:
        """Windows from the present place on."""
        if self.feed is not None:
            self._windows = self.feed.windows_for(self)
            return
        recipe, N = self.recipe, self.workload.num_examples
        windows = plan_windows(
            N,
            seed=self.seed,
            start=Place(*divmod(self.consumed, N)),
            batch_at=self.batch_at if recipe.changes_batch else lambda _: recipe.global_batch,
            last_batch=recipe.last_batch,
            smallest=self._smallest,
        )
        self._windows = load_windows(
            self.workload.train_examples,
            windows,
            share=Share(micro_batch=recipe.micro_batch, smallest=self._smallest)
            if self.ranks is None
            else self.ranks.share(recipe, self._smallest),
            seed=self.seed,
            device=self.device,
            workers=self.workers,
        )

    def batch_at(self, consumed: int) -> int:
        """The global batch of the update that begins after so many examples.

        Args:
            consumed: Examples gone through before it.

        Returns:
            The batch.
        """
        if self.noise is not None and self.noise.batch is not None:
            return self.noise.batch
        recipe = self.recipe
        batch = batch_at(consumed, recipe.global_batch, recipe.batch_ramp)
        if self.feed is not None:
            return batch
        # Beyond the training set no batch grows, so the learning rate must not go on either.
        return min(batch, max(self.workload.num_examples, recipe.global_batch))

    @property
    def _num_examples(self) -> float:
        """Examples of a pass; infinite in the first pass of a stream."""
        return self.workload.num_examples if self.feed is None else self.feed.num_examples

    @property
    def epochs(self) -> float:
        """Passes over the training set so far; 0 in the first pass of a stream."""
        return self.consumed / self._num_examples

    def fork(self, recipe: Recipe) -> Training:
        """A copy that goes on from here under another recipe; this one is not touched.

        Weights, buffers, optimizer state, place in the data and random state are copied; batch and
        learning rate are the recipe's.

        Args:
            recipe: How the copy trains.

        Returns:
            The copy.

        Raises:
            RecipeError: If BatchNorm in groups would have to become BatchNorm over whole batches.
        """
        if self.recipe.ghost_batch is not None and recipe.ghost_batch is None:
            raise RecipeError(
                f"The run has ghost_batch {self.recipe.ghost_batch}, and a fork's recipe None. "
                "Give it one: the largest batch normalises whole batches."
            )
        copied = copy.copy(self)
        copied.recipe = recipe
        copied.callbacks, copied._watched = (), False
        with torch.inference_mode(False):
            copied.model, copied._forward_model = make_model(
                self.workload, recipe, self.seed, self.device, like=self.model
            )
            if self.ranks is not None:
                copied.replica = make_replica(
                    self.ranks, self.workload, recipe, copied.model, self.seed, self._smallest
                )
            copied.optimizer = self.workload.make_optimizer(
                copied.model.parameters(), recipe.learning_rate
            )
            fresh = [group_settings(group) for group in copied.optimizer.param_groups]
            copied.optimizer.load_state_dict(copy.deepcopy(self.optimizer.state_dict()))
        for group, settings in zip(copied.optimizer.param_groups, fresh, strict=True):
            group.update(settings)
        copied.scaler = make_scaler(recipe.precision, self.device)
        copied._random = self._random.copy()
        copied._loss_sum, copied._loss_count = 0.0, 0
        copied._begin()
        return copied

    @property
    def over(self) -> bool:
        """Whether no further update will be done."""
        return self.diverged or self._stopped or self.finished

    @property
    def _stopped(self) -> bool:
        """Whether to stop; of several ranks, all know it in the same update."""
        return self.stop_requested if self.replica is None else self.replica.stopped

    @property
    def finished(self) -> bool:
        """Whether the horizon is reached, or a stream has ended; never without either."""
        if self.feed is not None and self.feed.ended:
            return True
        if self.horizon is None:
            return False
        return self.horizon.progress(self.steps, self._covered) >= 1

    @property
    def _covered(self) -> float:
        """How far the run is, in examples of the horizon."""
        # A step of AdaScale counts as many steps at the first batch as it is worth.
        return self.gained if self._scaled else self.consumed

    def go_on_from_here(self) -> None:
        """The place in the data and the optimizer were set from outside (`restore_training`)."""
        self._rates.unsettle()
        self.close()
        self._reload()

    def close(self) -> None:
        """Ends the workers that fetch ahead; the training can still be looked at."""
        # Left to the garbage collector, each of them is waited for in vain for five seconds.
        if isinstance(self._windows, Generator):
            self._windows.close()

    def is_sound(self) -> bool:
        """Whether every weight is a finite number; a run that is not cannot be gone on with."""
        weights = [p.detach() for p in self.model.parameters()]
        if self.replica is not None:
            weights = self.replica.local(weights)
        finite = bool(torch.stack([torch.isfinite(w).all() for w in weights]).all())
        if self.ranks is not None:
            finite = not self.ranks.total([float(not finite)])[0]
        return finite and not self.diverged

    def advance(
        self,
        num_steps: int | None = None,
        *,
        to_epoch: int | None = None,
        deadline: float = math.inf,
    ) -> None:
        """Does some updates; stops early at the horizon, or when the loss leaves the numbers.

        Args:
            num_steps: Updates to do; None: no limit but the others.
            to_epoch: Stop when so many epochs are done.
            deadline: Stop after the update in which `time.perf_counter` passes this.
        """
        last_step, last_consumed = self._limits(num_steps, to_epoch)
        # The caller may have switched gradients off, as a callback of an evaluation has.
        with (
            self._random.swapped_in(),
            gradients_on(),
            tensor_float_32(self.recipe.tf32, self.device),
        ):
            start = time.perf_counter()
            alone, self._deadline = self.replica is None, deadline
            while self.steps < last_step and self.consumed < last_consumed:
                if start >= deadline and alone:
                    break
                if self.diverged or self._stopped or (self._scaled and self.finished):
                    break
                found = next(self._windows, None)
                if found is None:  # of a stream: its pass is over, or the next example is not here
                    self.consumed = self.feed.taken if self.feed else self.consumed
                    break
                start = self._update(*found, start)
                if self.replica is not None and self.replica.paused:
                    break
        self._read_losses()
        self._tell_records()

    def _limits(self, num_steps: int | None, to_epoch: int | None) -> tuple[float, float]:
        """Steps and consumed examples at which an advance ends."""
        last_step = math.inf if num_steps is None else self.steps + num_steps
        last_consumed = math.inf if to_epoch is None else to_epoch * self._num_examples
        horizon = self.horizon
        if horizon is not None and horizon.steps is not None:
            last_step = min(last_step, horizon.steps)
        if horizon is not None and horizon.examples is not None and not self._scaled:
            last_consumed = min(last_consumed, horizon.examples)
        return last_step, last_consumed

    def _update(self, window: Window, batches: list[Any], start: float) -> float:
        """One update; returns when it ended."""
        gain = 1.0
        if not self._rates.settled:
            gain = self._gain(window)
            self._rates.set(
                steps=self.steps,
                examples=self._covered,
                global_batch=window.global_batch,
                factor=window.rate_factor,
                gain=gain,
            )
        draw = None
        if self.replica is not None:
            pause = start >= self._deadline
            self.replica.begin(window, steps=self.steps, stop=self.stop_requested, pause=pause)
            if self.noise is not None:
                draw = self.noise.observer(self.steps, self.optimizer, RankDraw)
        elif self.noise is not None and len(batches) > 1:
            draw = self.noise.observer(self.steps, self.optimizer)
        result = optimizer_step(
            self.workload,
            self._forward_model,
            self.optimizer,
            batches,
            autocast=self._autocast,
            scaler=self.scaler,
            reduction=self.recipe.reduction,
            clip_norm=self.recipe.clip_norm,
            want_norms=self._watched and not self._measured_later,
            want_gradients_of=self._measured_later,
            observe=draw,
            replica=self.replica,
        )
        if self.replica is not None and self.replica.stopped:
            self.stop_requested = True
        self.steps += 1
        self.examples += window.size
        reached = window.end
        if window.epoch:  # 0 in a stream, whose length is infinite
            reached += window.epoch * self.workload.num_examples
        share = (reached - self.consumed) / window.global_batch  # of a whole update
        self.gained += gain * share * self.recipe.global_batch
        self.consumed = reached
        self._unread.append(result.loss)
        if len(self._unread) >= self._patience or self.first_loss is None:
            self._read_losses()
        if draw is not None and self.noise is not None:
            changed = self.noise.add(draw, window.size)
            if changed and self.workers:  # what they fetched ahead was for the old batch
                self.close()
                self._reload()
        now = time.perf_counter()
        self.seconds += now - start
        if self.callbacks and self._telling.note(self, window.size, result, now - start):
            self._tell_records()
        return now

    def _gain(self, window: Window) -> float:
        """How many steps at the recipe's batch this update is worth, by AdaScale."""
        scale = window.global_batch / self.recipe.global_batch
        if not self._scaled or self.noise is None or scale <= 1:
            return 1.0
        moments = self.noise.running_moments
        if moments is None:
            return 1.0
        norm_squared, trace = max(moments[0], 0.0), max(moments[1], 0.0)
        trace /= self.recipe.global_batch
        if trace + norm_squared == 0:
            return 1.0
        return adascale_gain(scale, trace=trace, gradient_norm_squared=norm_squared)

    def _read_losses(self) -> None:
        """Looks at the losses of the last updates, and sees a divergence among them."""
        unread, self._unread = self._unread, []
        for loss in _values(unread):
            if self.callbacks:
                self._telling.losses.append(loss)
            if loss is None:
                continue
            if self.first_loss is None:
                self.first_loss = loss
            elif self.feed is not None and self.steps <= SETTLING and math.isfinite(loss):
                self.first_loss = max(abs(self.first_loss), abs(loss))
            self._loss_sum += loss
            self._loss_count += 1
            # Not `abs(loss) > limit`, which is false of NaN.
            if not abs(loss) <= EXPLOSION * max(abs(self.first_loss), 1e-8):
                self.diverged = True

    def _tell_records(self) -> None:
        """Gives the callbacks what the last updates were."""
        if self._telling.waiting:
            self._read_losses()
            self._telling.tell(self, self._num_examples)

    def whole_model(self) -> nn.Module:
        """The model with all its weights; of several ranks, to be called on all."""
        return self.model if self.replica is None else self.replica.whole_model()

    def recent_train_loss(self) -> float:
        """Mean loss of the updates since the last call (NaN if there were none)."""
        mean = self._loss_sum / self._loss_count if self._loss_count else math.nan
        self._loss_sum, self._loss_count = 0.0, 0
        return mean

    @property
    def interval(self) -> tuple[float, int]:
        """Sum and count of the losses since the last call of `recent_train_loss`."""
        return self._loss_sum, self._loss_count

    @interval.setter
    def interval(self, value: tuple[float, int]) -> None:
        self._loss_sum, self._loss_count = value

    @property
    def random_states(self) -> list[Tensor]:
        """What dropout and the like draw from next."""
        return self._random.states

    @random_states.setter
    def random_states(self, states: list[Tensor]) -> None:
        self._random.states = states

    def evaluate(self) -> Point:
        """Evaluates on the validation set and closes the interval of the training loss.

        Returns:
            The losses at this step.
        """
        val = Evaluation(loss=math.nan)
        examples = self.workload.val_examples
        if examples is not None:
            with self._random.swapped_in():
                val = evaluate(self.workload, self.model, examples, device=self.device)
            if self.ranks is not None:
                val = first_evaluation(val, self.ranks)
        return Point(
            step=self.steps,
            examples=self.examples,
            train_loss=self.recent_train_loss(),
            val_loss=None if examples is None else val.loss,
            val_metric=val.metric,
            epochs=self.epochs,
            seconds=self.seconds,
        )


def losses_read_together(device: str | torch.device) -> int:
    """Updates after which losses are read: reading one waits for a GPU, but not for the CPU."""
    return 1 if torch.device(device).type == "cpu" else 16


def _values(losses: list[Tensor | None]) -> list[float | None]:
    """The losses as numbers; all are fetched from the device at once."""
    held = [loss for loss in losses if loss is not None]
    if len(held) == 1 == len(losses):
        return [held[0].item()]
    values = iter(torch.stack(held).tolist() if held else [])
    return [None if loss is None else next(values) for loss in losses]
