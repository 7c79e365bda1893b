"""The noise scale from the gradients that ranks sum anyway.

Every micro-batch of every rank is a draw of the same gradient. Its own norm is taken before the
sum over ranks, which is in `.grad` afterwards; no pass is added, and of all ranks only three sums
travel (`laws.noise_sums.summed_moments`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from torch import Tensor, nn

from rightbatch.laws.noise_sums import summed_moments
from rightbatch.training.window_noise import squared_norm


class RankDraw:
    """Observes one update on one rank: the squared norm of each micro-batch's own gradient.

    Args:
        parameters: What is trained.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self._parameters = [p for p in parameters if p.requires_grad]
        self._before: dict[nn.Parameter, Tensor] = {}
        self._seen: list[Tensor] = []
        self._weighted = 0.0
        self._groups = 0
        self._whole: tuple[float, float, float, float] | None = None

    def __call__(self, count: float, factor: float = 1.0) -> None:
        """After a micro-batch's backward pass that is followed by another.

        Args:
            count: Examples (or tokens) of it.
            factor: What `.grad` is multiplied by; `conclude` is given sums without it.
        """
        held = {p: p.grad for p in self._parameters if p.grad is not None}
        self.look([*held], [*held.values()])
        self._end(count)
        self._before = {p: gradient.clone() for p, gradient in held.items()}

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

    def _end(self, count: float) -> None:
        if count > 0 and self._seen:
            # b|g|² of the mean gradient g, from the norm of the sum b·g.
            self._weighted += sum(square.item() for square in self._seen) / count
            self._groups += 1
        self._seen = []

    def sums(self, last_count: float) -> tuple[float, float]:
        """Ends the last micro-batch, all of which was looked at.

        Args:
            last_count: Examples (or tokens) of it; 0 where there was none.

        Returns:
            This rank's Σ b_k|g_k|², times the square of the factor, and over how many.
        """
        self._end(last_count)
        return self._weighted, float(self._groups)

    def conclude(
        self, weighted: float, groups: float, count: float, summed_norm_squared: float
    ) -> None:
        """Takes in what all ranks have together, without factors.

        Args:
            weighted: Σ b_k|g_k|² over all micro-batches of all ranks.
            groups: How many they are.
            count: Σ b_k, in examples (or tokens).
            summed_norm_squared: |Σ_k b_k g_k|².
        """
        self._whole = (weighted, groups, count, summed_norm_squared)

    def moments(self, num_examples: int) -> tuple[float, float] | None:
        """Unbiased |G|² and S, in examples also where losses count tokens.

        Args:
            num_examples: Examples of the update.

        Returns:
            Both, or None with fewer than two micro-batches or where a gradient was no number.
        """
        if self._whole is None:
            return None
        weighted, groups, count, whole = self._whole
        if groups < 2 or not math.isfinite(weighted + whole):
            return None
        weighted *= num_examples / count
        return summed_moments(weighted, round(groups), num_examples, whole / count**2)
