"""The noise scale from the gradients that ranks sum anyway.

Every micro-batch of every rank is a draw of the same gradient. Its own norm is taken before the
sum over ranks, which is in `.grad` afterwards; no pass is added, and of all ranks only three sums
travel (`laws.noise.summed_moments`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor, nn

from rightbatch.laws.noise import summed_moments
from rightbatch.training.window_noise import squared_norm


class RankDraw:
    """Observes one update on one rank: the squared norm of each micro-batch's own gradient.

    Args:
        parameters: Of the model.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self._parameters = [p for p in parameters if p.requires_grad]
        self._before: dict[nn.Parameter, Tensor] = {}
        self._seen: list[Tensor] = []
        self._weighted = 0.0
        self._groups = 0
        self._moments: tuple[float, float] | None = None

    def __call__(self, count: float) -> None:
        """After a micro-batch's backward pass that is followed by another.

        Args:
            count: Examples (or tokens) of it.
        """
        held = [p for p in self._parameters if p.grad is not None]
        gradients = [p.grad for p in held if p.grad is not None]
        self.look(held, gradients)
        self.end(count)
        self._before = {p: gradient.clone() for p, gradient in zip(held, gradients, strict=True)}

    def look(self, parameters: Sequence[nn.Parameter], gradients: Sequence[Tensor]) -> None:
        """Takes a part of the last micro-batch's gradient in, on top of those before it.

        Args:
            parameters: Whose gradients.
            gradients: The sums of this rank so far.
        """
        own = [
            gradient if (before := self._before.get(p)) is None else gradient - before
            for p, gradient in zip(parameters, gradients, strict=True)
        ]
        if own:
            self._seen.append(squared_norm(own))

    def end(self, count: float) -> None:
        """Ends a micro-batch, all of which was looked at.

        Args:
            count: Examples (or tokens) of it; 0 where there was none.
        """
        if count > 0 and self._seen:
            # b|g|² of the mean gradient g, from the norm of the sum b·g.
            self._weighted += sum(square.item() for square in self._seen) / count
            self._groups += 1
        self._seen = []

    @property
    def sums(self) -> tuple[float, float]:
        """This rank's Σ b_k|g_k|², and over how many micro-batches."""
        return self._weighted, float(self._groups)

    def conclude(
        self, weighted: float, groups: float, *, count: float, summed_norm_squared: float
    ) -> None:
        """Takes in what all ranks have together.

        Args:
            weighted: Σ b_k|g_k|² over all micro-batches of all ranks.
            groups: How many they are.
            count: Examples (or tokens) of the update.
            summed_norm_squared: |Σ_k b_k g_k|².
        """
        if groups >= 2:
            self._moments = summed_moments(
                weighted,
                num_draws=round(groups),
                num_examples=count,
                mean_norm_squared=summed_norm_squared / count**2,
            )

    def moments(self) -> tuple[float, float] | None:
        """Unbiased |G|² and S, or None with fewer than two micro-batches."""
        return self._moments
