"""One rank's part of each update, where every rank holds the whole model.

The gradient of an update is Σ over all ranks and micro-batches of ∇(loss sum) / Σ count, whatever
each of them has: shares of unequal size, padding alone, or nothing.
"""

from __future__ import annotations

import traceback
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler

from rightbatch.device.out_of_memory import is_out_of_memory
from rightbatch.recipe import Reduction
from rightbatch.training.distributed import Ranks
from rightbatch.training.gradient_sum import GradientSum
from rightbatch.training.rank_buffers import SharedBuffers
from rightbatch.training.rank_noise import RankDraw
from rightbatch.training.rank_outcome import Outcome, OwnPasses
from rightbatch.training.step import forward_loss, scaled
from rightbatch.training.window_noise import squared_norm
from rightbatch.training.windows import Window
from rightbatch.workload import Workload


class Replicated:
    """This rank's whole model, whose gradients are summed with those of the others.

    Args:
        ranks: The others.
        model: The model of this rank.

    Attributes:
        stopped: Whether some rank wanted to stop.
    """

    def __init__(self, ranks: Ranks, model: nn.Module) -> None:
        self.stopped = False
        self._ranks = ranks
        self._model = model
        self._sum = GradientSum(model.parameters(), ranks.add_up)
        self._buffers = SharedBuffers(model, ranks)
        self._stop = False

    def begin(self, window: Window, *, steps: int, stop: bool) -> None:
        """Before an update.

        Args:
            window: What it sees.
            steps: Updates done.
            stop: Whether this rank wants it to be the last.
        """
        self._ranks.step = steps
        self._stop = stop

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
                scaled(loss_sum, scaler).backward()
                own.add(loss_sum, float(count), last=last)
                if observe is not None and not last:
                    observe(float(count))
        except Exception as raised:
            error = raised
            self._give_up(raised)
        # A rank that failed takes part as well, so that the others learn of it at once.
        self._sum.finish()
        return self._conclude(own, error, reduction, observe)

    def _give_up(self, error: Exception) -> None:
        self._ranks.post(error)
        self._sum.look = None
        if is_out_of_memory(error):  # what the failed pass held is let go
            traceback.clear_frames(error.__traceback__)

    def _conclude(
        self,
        own: OwnPasses,
        error: Exception | None,
        reduction: Reduction,
        observe: RankDraw | None,
    ) -> Tensor | None:
        """What all ranks make of the update, once their gradients are summed."""
        if observe is not None:
            observe.end(own.last_count)
        weighted, groups = (0.0, 0.0) if observe is None else observe.sums
        used, changed = map(float, self._sum.used), self._buffers.changed()
        outcome = Outcome(
            self._ranks,
            own,
            error=error,
            stop=self._stop,
            extra=[weighted, groups, *used, *changed],
            meanwhile=self._sum.wait,
        )
        self.stopped = outcome.stopped
        weighted, groups, *rest = outcome.extra
        num_parameters = len(self._sum.parameters)
        self._sum.forget(rest[:num_parameters])
        self._buffers.take_over(rest[num_parameters:])
        if outcome.mean_loss is None:
            return None
        if observe is not None:
            square = self._ranks.of_first([squared_norm(self._sum.sums).item()])[0]
            observe.conclude(weighted, groups, count=outcome.count, summed_norm_squared=square)
        if reduction == "mean":
            self._sum.divide(outcome.count)
        return outcome.mean_loss

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

    def close(self) -> None:
        """Leaves the model alone from now on."""
        self._sum.close()
