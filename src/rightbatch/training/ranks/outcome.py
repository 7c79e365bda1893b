"""What ranks tell each other in every update, besides gradients: one small message.

    failed · wants to stop · wants to pause · count · loss sum · whatever else is to be summed

All ranks read the same sums, so that they decide alike in the same update.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from rightbatch.training.ranks.distributed import Ranks


class OwnPasses:
    """Losses and counts of one rank's micro-batches in an update.

    Attributes:
        count: Examples (or tokens) of all of them.
        last_count: Those of the last one; 0 where it held nothing to count.
    """

    def __init__(self) -> None:
        self.count = 0.0
        self.last_count = 0.0
        self._losses: list[Tensor] = []

    def add(self, loss_sum: Tensor, count: float, *, last: bool) -> None:
        """Takes a micro-batch in that held something to count."""
        self.count += count
        self.last_count = count if last else 0.0
        self._losses.append(loss_sum.detach())

    def loss_sum(self, device: str | torch.device) -> Tensor:
        """The losses' sum in double precision, shape (1,)."""
        losses = [loss.double().reshape(1) for loss in self._losses]
        return torch.cat([torch.zeros(1, dtype=torch.float64, device=device), *losses]).sum(
            0, keepdim=True
        )


class Outcome:
    """What an update came to, over all ranks.

    Args:
        ranks: Who exchanges it.
        own: This rank's passes.
        error: Why this rank has failed, as it has posted already; or None.
        stop: Whether this rank wants to stop.
        pause: Whether it wants to do something between updates.
        extra: Further numbers to be summed.
        meanwhile: Done while the message is on its way.

    Attributes:
        count: Examples (or tokens) of all ranks.
        mean_loss: Over them; None where none had anything to count.
        stopped: Whether some rank wants to stop.
        paused: Whether some rank wants to pause.
        extra: The sums of the further numbers.

    Raises:
        Exception: The same on all ranks, if one has failed.
    """

    def __init__(
        self,
        ranks: Ranks,
        own: OwnPasses,
        *,
        error: Exception | None,
        stop: bool,
        pause: bool,
        extra: Sequence[float] = (),
        meanwhile: Callable[[], None] = lambda: None,
    ) -> None:
        # Losses on a GPU stay there until several are read together.
        here = ranks.data is ranks.control
        loss_sum = own.loss_sum("cpu" if here else ranks.device)
        told = loss_sum.item() if here and error is None else 0.0
        flags = [float(error is not None), float(stop), float(pause)]
        totals = ranks.begin_total([*flags, own.count, told, *extra])
        meanwhile()
        failed, stopped, paused, self.count, summed, *self.extra = totals()
        if failed:
            raise ranks.verdict() from error
        self.stopped, self.paused = stopped > 0, paused > 0
        self.mean_loss: Tensor | None = None
        if self.count:
            if here:
                loss_sum = torch.tensor(summed, dtype=torch.float64)
            else:
                ranks.add_up(loss_sum).wait()
            self.mean_loss = (loss_sum / self.count).reshape(())
