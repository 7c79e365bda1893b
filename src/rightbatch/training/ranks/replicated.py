"""One rank's part of each update, where every rank holds the whole model.

The gradient of an update is Σ over all ranks and micro-batches of ∇(loss sum) / Σ count, whatever
each of them has: shares of unequal size, padding alone, or nothing.
"""

from __future__ import annotations

import math
import traceback
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler

from rightbatch.device.out_of_memory import is_out_of_memory
from rightbatch.recipe import Reduction
from rightbatch.training.data.windows import Window
from rightbatch.training.ranks.buffers import SharedBuffers
from rightbatch.training.ranks.distributed import Ranks
from rightbatch.training.ranks.gradient_sum import GradientSum
from rightbatch.training.ranks.noise import RankDraw
from rightbatch.training.ranks.outcome import Outcome, OwnPasses
from rightbatch.training.step import forward_loss, scaled
from rightbatch.training.window_noise import squared_norm
from rightbatch.workload import Workload


class Replicated:
    """This rank's whole model, whose gradients are summed with those of the others.

    Args:
        ranks: The others.
        model: The model of this rank.

    Attributes:
        stopped: Whether some rank wanted to stop.
        paused: Whether some rank wanted to do something between updates.
    """

    def __init__(self, ranks: Ranks, model: nn.Module) -> None:
        self.stopped = self.paused = False
        self._ranks = ranks
        self._model = model
        self._sum = GradientSum(model.parameters(), ranks.add_up)
        self._buffers = SharedBuffers(model, ranks)
        self._stop = self._pause = False
        self._unit = 1.0

    def begin(self, window: Window, *, steps: int, stop: bool, pause: bool) -> None:
        """Before an update.

        Args:
            window: What it sees.
            steps: Updates done.
            stop: Whether this rank wants it to be the last.
            pause: Whether this rank wants to do something after it.
        """
        self._ranks.step = steps
        # In half precision a sum leaves the numbers where a mean does not. All ranks must divide
        # by the same, which they know before they count; a power of two does not round.
        self._unit = 2.0 ** round(math.log2(window.size))
        self._stop, self._pause = stop, pause

    def gradients(
        self,
        workload: Workload,
        model: nn.Module,
        batches: Sequence[Any],
        *,
        autocast: torch.dtype | None,
        scaler: GradScaler | None,
        reduction: Reduction,
        observe: RankDraw | None,
    ) -> Tensor | None:
        """Leaves the gradient of all ranks in `.grad`.

        Args:
            workload: Says how the loss is computed.
            model: What is called for it.
            batches: This rank's micro-batches; may be none.
            autocast: Lower precision of the forward pass, or None.
            scaler: Multiplies the loss.
            reduction: Mean over all ranks' examples, or their sum.
            observe: Measures the noise of this update.

        Returns:
            The mean loss over all ranks; None where none had anything to count.
        """
        self._sum.clear()
        self._sum.look = None if observe is None else observe.look
        unit = 1.0 if scaler is None else self._unit
        factor = (1.0 if scaler is None else scaler.get_scale()) / unit
        own = OwnPasses()
        error: Exception | None = None
        try:
            for number, batch in enumerate(batches, start=1):
                last = number == len(batches)
                loss_sum, count = forward_loss(workload.loss_sum, model, batch, autocast)
                # A micro-batch of padding alone has no mean: NaN times no count.
                if not count > 0:
                    continue
                if last:
                    self._sum.arm()
                scaled(loss_sum if unit == 1 else loss_sum / unit, scaler).backward()
                own.add(loss_sum, float(count), last=last)
                if observe is not None and not last:
                    observe(float(count), factor)
        except Exception as raised:
            error = raised
            self._give_up(raised)
        # A rank that failed takes part as well, so that the others learn of it at once.
        self._sum.finish()
        outcome = self._exchange(own, error, observe)
        if outcome.mean_loss is None:
            return None
        if observe is not None:
            square = self._ranks.of_first([squared_norm(self._sum.sums).item()])[0]
            weighted, groups = outcome.extra[:2]
            observe.conclude(weighted / factor**2, groups, outcome.count, square / factor**2)
        divisor = (outcome.count if reduction == "mean" else 1.0) / unit
        if divisor != 1:
            self._sum.divide(divisor)
        return outcome.mean_loss

    def _give_up(self, error: Exception) -> None:
        self._ranks.post(error)
        self._sum.look = None
        if is_out_of_memory(error):  # what the failed pass held is let go
            traceback.clear_frames(error.__traceback__)

    def _exchange(
        self, own: OwnPasses, error: Exception | None, observe: RankDraw | None
    ) -> Outcome:
        """What all ranks make of the update, while their gradients are being summed."""
        weighted, groups = (0.0, 0.0) if observe is None else observe.sums(own.last_count)
        used, changed = map(float, self._sum.used), self._buffers.changed()
        outcome = Outcome(
            self._ranks,
            own,
            error=error,
            stop=self._stop,
            pause=self._pause,
            extra=[weighted, groups, *used, *changed],
            meanwhile=self._sum.wait,
        )
        self.stopped, self.paused = outcome.stopped, outcome.paused
        rest, num_parameters = outcome.extra[2:], len(self._sum.parameters)
        self._sum.forget(rest[:num_parameters])
        self._buffers.take_over(rest[num_parameters:])
        return outcome

    def local(self, gradients: list[Tensor]) -> list[Tensor]:
        """The gradients, all of which this rank holds.

        Args:
            gradients: Of the parameters.

        Returns:
            The same.
        """
        return gradients

    def norms(self, gradients: list[Tensor]) -> list[Tensor]:
        """The norm of each gradient.

        Args:
            gradients: Of the parameters.

        Returns:
            Their norms.
        """
        return list(torch._foreach_norm(gradients))

    def whole_model(self) -> nn.Module:
        """The model.

        Returns:
            The same one.
        """
        return self._model

    def whole_state(self, optimizer: torch.optim.Optimizer, random: list[Tensor]) -> dict[str, Any]:
        """What a checkpoint holds of model, optimizer and random numbers.

        Args:
            optimizer: Of the model.
            random: This rank's states.

        Returns:
            The state; of the random numbers that of all ranks.
        """
        return {
            "model": self._model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "random": self._ranks.gather(random),
        }

    def load_whole_state(
        self, state: dict[str, Any], optimizer: torch.optim.Optimizer
    ) -> list[Tensor]:
        """Goes on from a `whole_state`.

        Args:
            state: What it returned on rank 0.
            optimizer: Of the model.

        Returns:
            This rank's random states.
        """
        self._model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        return state["random"][self._ranks.rank]

    def close(self) -> None:
        """Leaves the model alone from now on."""
        self._sum.close()
