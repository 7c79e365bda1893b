"""Before a training: are accumulated micro-batches the same as the whole batch? By measurement.

Where the loss is a mean over examples and the model treats every example by itself, the gradients
of micro-batches, summed and divided by the true count, are the gradient of all examples at once.
BatchNorm, contrastive losses, class weights inside a mean and some mistakes break this silently.
So both gradients are taken of the same examples at the same weights, and compared:

    difference = ‖g_split − g_whole‖ / ‖g_whole‖.

Two micro-batches are compared with the same examples at once, not all of the global batch with all
of its micro-batches: what mixes examples shows at the first cut, and a whole global batch is just
what need not fit in memory. Where two do not fit together, one is compared with its halves.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from rightbatch.device.out_of_memory import is_out_of_memory
from rightbatch.errors import ProbeError
from rightbatch.isolate import preserved_state
from rightbatch.recipe import Recipe
from rightbatch.training.data.order import epoch_order
from rightbatch.training.ghost_norm import GHOST_KINDS, use_ghost_norm
from rightbatch.training.preflight.causes import Cause, find_causes
from rightbatch.training.preflight.split_gradients import Comparison, Cut, norm_of
from rightbatch.workload import Workload

Draws = Literal["none", "dropout off", "evaluation mode", "left on"]

_TOLERANCE = {
    torch.float64: 1e-12,
    torch.float32: 1e-5,
    torch.float16: 3e-3,
    torch.bfloat16: 2e-2,
}
_MAX_ROUNDING = 1e-3
"""However strongly gradients cancel, more than this is not taken for rounding."""
_TRIED_PAIRS = 4
"""Pairs of micro-batches looked at for one that has a gradient (where few tokens count)."""
_REDRAWS = 3


@dataclass(frozen=True, kw_only=True)
class Preflight:
    """Whether accumulating micro-batches is the same as the whole batch.

    Attributes:
        compared: Examples in each of the micro-batches that were compared with all of these
            examples at once; empty where an update has only one micro-batch.
        difference: ‖g_split − g_whole‖ / ‖g_whole‖; infinite where the micro-batches fail or give
            no finite gradient.
        tolerance: The difference that counts as none: 1e-12 in float64, 1e-5 in float32, 2e-2 in
            bfloat16; more where the whole batch's gradient itself changes more when its examples
            change places (rounding, where gradients cancel) or with other random draws.
        agrees: Whether the difference is within the tolerance.
        causes: What mixes the examples: layers by name, `the model`, `the loss`, ….
        draws: How random numbers of the forward pass were kept out of the comparison, since no two
            cuts of a batch draw the same dropout masks: none are drawn; dropout layers were
            switched off; all but BatchNorm was in evaluation mode; or they could not be switched
            off, and the tolerance is widened to what other draws change.
        warning: What is wrong, how much, why and what to do; None where the gradients agree, but
            where random draws may hide a difference.
    """

    compared: tuple[int, ...]
    difference: float
    tolerance: float
    agrees: bool
    causes: tuple[str, ...] = ()
    draws: Draws = "none"
    warning: str | None = None


def check_accumulation(
    workload: Workload, recipe: Recipe, *, seed: int = 0, device: str = "cpu"
) -> Preflight:
    """Measures whether a recipe's micro-batches give the gradient of the whole batch.

    Takes the first examples that training would take, at the weights it would start from. Costs
    two forward and backward passes over two micro-batches, and a few more where they disagree, to
    find out why; nothing where an update has one micro-batch. Leaves no trace.

    Args:
        workload: What is to be trained.
        recipe: How. Replicas count as micro-batches.
        seed: The run's, for weights and data order.
        device: Where.

    Returns:
        What was found.

    Raises:
        ProbeError: If no gradient can be taken to compare with.

    Example:
        >>> from rightbatch import catalog
        >>> recipe = Recipe(global_batch=64, micro_batch=16, learning_rate=0.1)
        >>> check_accumulation(catalog.get("max3"), recipe).agrees
        True
    """
    base = _TOLERANCE[torch.bfloat16 if recipe.precision == "bfloat16" else torch.float32]
    nothing_to_compare = Preflight(compared=(), difference=0.0, tolerance=base, agrees=True)
    if recipe.global_batch == recipe.micro_batch:
        return nothing_to_compare
    order = epoch_order(workload.num_examples, seed=seed, epoch=0)
    window = order[: recipe.global_batch].split(recipe.micro_batch)
    if len(window) == 1:
        return nothing_to_compare
    if torch.device(device).type == "cuda":
        torch.cuda.init()  # so that its random state is there to be put back
    with preserved_state(), torch.inference_mode(False), torch.enable_grad():
        _seed(seed, device)
        model = workload.build_model(seed, device)
        if recipe.ghost_batch is not None:
            use_ghost_norm(model, recipe.ghost_batch)
        check = _Check(workload, recipe, model, seed=seed, device=device)
        return check.run(window)


class _Check:
    """One comparison, from the choice of examples to the sentence."""

    def __init__(
        self, workload: Workload, recipe: Recipe, model: nn.Module, *, seed: int, device: str
    ) -> None:
        self.workload, self.recipe, self.model = workload, recipe, model
        self.seed, self.device = seed, device
        self.autocast = torch.bfloat16 if recipe.precision == "bfloat16" else None
        self.draws: Draws | None = None

    def run(self, window: Sequence[Tensor]) -> Preflight:
        comparison, difference = self._compare(window)
        tolerance = self._tolerance(comparison, difference)
        drawn = self._drawn_tolerance(comparison) if difference > tolerance else 0.0
        agrees = difference <= max(tolerance, drawn)
        causes: list[Cause] = []
        warning = _unresolved(self.recipe, drawn) if agrees and drawn else None
        if not agrees:
            # In words before the causes are looked for, which changes the model.
            finding = _finding(comparison, difference, left_on=bool(drawn))
            causes = find_causes(
                comparison,
                self.recipe,
                tolerance=max(tolerance, drawn),
                draws=self.draws == "left on",
            )
            warning = _warning(self.recipe, finding, causes)
        return Preflight(
            compared=comparison.cut.sizes,
            difference=difference,
            tolerance=max(tolerance, drawn),
            agrees=agrees,
            causes=tuple(name for cause in causes for name in cause.names),
            draws=self.draws or "none",
            warning=warning,
        )

    def _compare(self, window: Sequence[Tensor]) -> tuple[Comparison, float]:
        """Of the first two micro-batches, or the halves of one where two do not fit."""
        pairs = [window[i : i + 2] for i in range(0, len(window) - 1, 2)]
        try:
            return self._compare_first(pairs[:_TRIED_PAIRS])
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        half = math.ceil(len(window[0]) / 2)
        if half == len(window[0]):
            raise ProbeError(
                "Two examples do not fit in memory together, so micro-batches of one cannot be "
                "compared with a larger batch. Run this check where there is more memory."
            )
        for norm in self.model.modules():
            # What is the same for whole micro-batches has to be the same for their halves.
            if isinstance(norm, GHOST_KINDS) and len(window[0]) % norm.ghost_batch == 0:
                norm.ghost_batch = half
        return self._compare_first([window[0].split(half)])

    def _compare_first(self, pairs: Sequence[Sequence[Tensor]]) -> tuple[Comparison, float]:
        """Of the first pair that has a gradient."""
        for pair in pairs:
            cut = Cut(self.workload, pair, self.device)
            comparison = Comparison(self.workload, self.model, cut, self.autocast)
            if self.draws is None:
                self.draws = _switch_draws_off(comparison)
            whole = comparison.gradient([cut.whole])
            if 0 < norm_of(whole) < math.inf:
                return comparison, comparison.difference(whole)
        raise ProbeError(
            f"The gradient of the first examples of workload {self.workload.name!r} is zero or not "
            "finite, so there is nothing to compare. rightbatch.check_workload says why."
        )

    def _tolerance(self, comparison: Comparison, difference: float) -> float:
        """By dtype; wider where rounding changes the whole batch's own gradient by more."""
        dtypes = {p.dtype for p in self.model.parameters() if p.requires_grad}
        if self.autocast is not None:
            dtypes.add(self.autocast)
        tolerance = max(_TOLERANCE.get(dtype, 1e-5) for dtype in dtypes)
        if difference <= tolerance or math.isinf(difference):
            return tolerance
        return max(tolerance, min(4 * comparison.rounding(), _MAX_ROUNDING))

    def _drawn_tolerance(self, comparison: Comparison) -> float:
        """Three times what other random draws change; 0 where none are left."""
        if self.draws != "left on":
            return 0.0
        seeds = range(self.seed + 1, self.seed + 1 + _REDRAWS)
        return 3 * comparison.redraw_spread([lambda s=s: _seed(s, self.device) for s in seeds])


def _switch_draws_off(comparison: Comparison) -> Draws:
    """Takes dropout and the like out of a model, as little else as possible."""
    draws = _still_the_model(comparison)
    return "left on" if comparison.fetching_draws() else draws


def _still_the_model(comparison: Comparison) -> Draws:
    if not comparison.forward_draws():
        return "none"
    modules = [*comparison.model.modules()]
    for module in modules:
        if isinstance(module, _DropoutNd):
            module.eval()
        elif isinstance(module, nn.RNNBase | nn.MultiheadAttention):
            module.dropout = 0.0
    if not comparison.forward_draws():
        return "dropout off"
    modes = [(module, module.training) for module in modules]
    for module, _ in modes:
        # cuDNN takes gradients of recurrent layers only in training mode.
        if not isinstance(module, _BatchNorm | nn.RNNBase):
            module.training = False
    if not comparison.forward_draws():
        return "evaluation mode"
    for module, training in modes:
        module.training = training
    return "left on"


def _finding(comparison: Comparison, difference: float, *, left_on: bool) -> str:
    """What was seen, in words."""
    sizes = comparison.cut.sizes
    equal = len({*sizes}) == 1
    parts = f"{len(sizes)} × {sizes[0]}" if equal else " + ".join(str(size) for size in sizes)
    error = comparison.split_error
    if error is not None:
        reason = " ".join(str(error).split()) or type(error).__name__
        return f"{parts} examples fail where {sum(sizes)} at once do not ({reason})"
    if math.isinf(difference):
        return (
            f"loss or gradient of {parts} examples is not finite, and of {sum(sizes)} at once it is"
        )
    finding = (
        f"the gradients of {parts} examples and of {sum(sizes)} at once differ by "
        f"{100 * difference:.3g} %"
    )
    return f"{finding}, more than random draws explain" if left_on else finding


def _unresolved(recipe: Recipe, drawn: float) -> str:
    return (
        f"Whether accumulating {_in_words(recipe)} is the same as {recipe.global_batch} could be "
        f"told only to {100 * drawn:.3g} %, because random numbers are drawn, in the forward pass "
        "or in collate, that cannot be switched off. Draw them only in training mode, or for each "
        "example by itself, to have it told exactly."
    )


def _warning(recipe: Recipe, finding: str, causes: Sequence[Cause]) -> str:
    because = ", and ".join(cause.because for cause in causes)
    remedies = " ".join(cause.remedy for cause in causes)
    return (
        f"Accumulating {_in_words(recipe)} is not the same as {recipe.global_batch} here: "
        f"{finding}, because {because}. {remedies}"
    )


def _in_words(recipe: Recipe) -> str:
    replicas = f" on {recipe.replicas} replicas" if recipe.replicas > 1 else ""
    return f"{recipe.accumulation} × {recipe.micro_batch}{replicas}"


def _seed(seed: int, device: str) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    # torch.manual_seed would also leave a seed behind for a CUDA that nobody has started yet.
    torch.default_generator.manual_seed(seed)
    if torch.device(device).type == "cuda":
        torch.cuda.manual_seed_all(seed)
