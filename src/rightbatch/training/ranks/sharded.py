"""One rank's part of each update, where every rank holds a shard of the model (FSDP2).

Each forward pass gathers the parameters from all ranks, block by block, so all ranks must do the
same number of passes. A rank whose share needs fewer makes up for it with passes over the update's
first example, whose gradient is a zero that is put in at the model's outputs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves

from rightbatch.device.random_state import get_random_states, set_random_states
from rightbatch.errors import RecipeError
from rightbatch.recipe import Recipe, Reduction
from rightbatch.training.data.windows import Window, micro_batch_sizes, share_of_rank
from rightbatch.training.evaluate import to_device
from rightbatch.training.random_state import drawing_from
from rightbatch.training.ranks.buffers import SharedBuffers
from rightbatch.training.ranks.distributed import Ranks
from rightbatch.training.ranks.noise import RankDraw
from rightbatch.training.ranks.outcome import Outcome, OwnPasses
from rightbatch.training.step import forward_loss, scaled
from rightbatch.workload import Workload


class Sharded:
    """This rank's shard of the model; gradients are summed shard by shard.

    Args:
        ranks: The others.
        workload: Where examples are.
        recipe: How is trained.
        model: The whole model; changed in place.
        seed: Of the run.
        smallest: Examples that the model needs at least in one pass.

    Attributes:
        stopped: Whether some rank wanted to stop.
        paused: Whether some rank wanted to do something between updates.

    Raises:
        RecipeError: If the recipe asks for what shards cannot do.
    """

    def __init__(
        self,
        ranks: Ranks,
        workload: Workload,
        recipe: Recipe,
        model: nn.Module,
        *,
        seed: int,
        smallest: int,
    ) -> None:
        _check(recipe)
        self.stopped = self.paused = False
        self._ranks = ranks
        self._workload = workload
        self._share = ranks.share(recipe, smallest)
        self._seed = seed
        self._model = model
        self._buffers = SharedBuffers(model, ranks)
        self._fsdp = _shard(model, ranks)
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._outputs: list[Tensor] = []
        self._hook = model.register_forward_hook(self._keep_outputs)
        self._window: Window | None = None
        self._stop = self._pause = False

    def begin(self, window: Window, *, steps: int, stop: bool, pause: bool) -> None:
        """Before an update.

        Args:
            window: What it sees.
            steps: Updates done.
            stop: Whether this rank wants it to be the last.
            pause: Whether this rank wants to do something after it.
        """
        self._window = window
        self._ranks.step = steps
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
        """Leaves this rank's shards of the gradient of all ranks in `.grad`.

        Args:
            workload: Says how the loss is computed.
            model: What is called for it.
            batches: This rank's micro-batches; may be none.
            autocast: Lower precision of the forward pass, or None.
            scaler: Not used with shards.
            reduction: Mean over all ranks' examples, or their sum.
            observe: Not used with shards.

        Returns:
            The mean loss over all ranks; None where none had anything to count.
        """
        own = OwnPasses()
        passes = self._num_passes()
        for number in range(1, passes + 1):
            last = number == passes
            self._fsdp.set_requires_gradient_sync(last)
            self._fsdp.set_is_last_backward(last)
            if number > len(batches):
                with self._without_a_trace():
                    self._forward(workload, model, self._stand_in(), autocast)
                    self._backward_of_nothing()
                continue
            loss_sum, count = self._forward(workload, model, batches[number - 1], autocast)
            if count > 0:
                scaled(loss_sum, scaler).backward()
                own.add(loss_sum, float(count), last=last)
            else:
                self._backward_of_nothing()
        outcome = Outcome(
            self._ranks,
            own,
            error=None,
            stop=self._stop,
            pause=self._pause,
            extra=self._buffers.changed(),
        )
        self.stopped, self.paused = outcome.stopped, outcome.paused
        self._buffers.take_over(outcome.extra)
        if outcome.mean_loss is not None and reduction == "mean":
            gradients = [p.grad for p in self._parameters if p.grad is not None]
            torch._foreach_div_(self.local(gradients), outcome.count)
        return outcome.mean_loss

    def _num_passes(self) -> int:
        """Of the rank that needs the most."""
        share, window = self._share, self._window
        assert window is not None  # by begin
        most = 1
        for rank in range(self._ranks.size):
            first, end = share_of_rank(window.size, rank, share.weights, share.smallest)
            sizes = micro_batch_sizes(end - first, share.micro_batch, share.smallest)
            most = max(most, len(sizes))
        return most

    def _forward(
        self, workload: Workload, model: nn.Module, batch: Any, autocast: torch.dtype | None
    ) -> tuple[Tensor, Any]:
        self._outputs.clear()
        return forward_loss(workload.loss_sum, model, batch, autocast)

    def _keep_outputs(self, module: nn.Module, args: Any, outputs: Any) -> None:
        if torch.is_grad_enabled():
            leaves = [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor)]
            self._outputs += [leaf for leaf in leaves if leaf.requires_grad]

    def _backward_of_nothing(self) -> None:
        """A backward pass with a gradient of zero.

        It begins at the model's outputs and not at the loss, whose derivative may be no number
        where there is nothing to count, and times zero would still be none.
        """
        torch.autograd.backward(self._outputs, [torch.zeros_like(o) for o in self._outputs])
        self._outputs.clear()

    def _stand_in(self) -> Any:
        """The first examples of the update, fetched without drawing from the run's numbers."""
        window = self._window
        assert window is not None  # by begin
        with drawing_from(self._seed, window.epoch, window.start):
            batch = self._workload.train_examples.batch(window.indices[: self._share.smallest])
        return to_device(batch, self._ranks.device)

    @contextmanager
    def _without_a_trace(self) -> Iterator[None]:
        """Buffers and random numbers are afterwards what they were before."""
        kept = [(buffer, buffer.clone()) for buffer in self._model.buffers()]
        states = get_random_states(self._ranks.device)
        try:
            yield
        finally:
            set_random_states(states, self._ranks.device)
            with torch.no_grad():
                for buffer, value in kept:
                    buffer.copy_(value)

    def local(self, gradients: list[Tensor]) -> list[Tensor]:
        """This rank's shards of some gradients.

        Args:
            gradients: Of the parameters.

        Returns:
            Their parts here, not copied.
        """
        return [g.to_local() if isinstance(g, DTensor) else g for g in gradients]

    def norms(self, gradients: list[Tensor]) -> list[Tensor]:
        """The norm of each whole gradient.

        Args:
            gradients: This rank's shards.

        Returns:
            The norms, the same on all ranks.
        """
        kind = torch.promote_types(gradients[0].dtype, torch.float32)
        squares = torch.stack([g.to(kind).square().sum() for g in gradients])
        self._ranks.add_up(squares).wait()
        return list(squares.sqrt().unbind())

    def whole_model(self) -> nn.Module:
        """A model on the processor with all weights, as a single process would hold it.

        Returns:
            A new one, on every rank.
        """
        state = get_model_state_dict(self._model, options=_whole())
        model = self._workload.build_model(self._seed)
        model.load_state_dict(cast(dict[str, Any], state))
        return model

    def whole_state(self, optimizer: torch.optim.Optimizer, random: list[Tensor]) -> dict[str, Any]:
        """What a checkpoint holds of model, optimizer and random numbers.

        Args:
            optimizer: Of the model.
            random: This rank's states.

        Returns:
            On rank 0 the whole state, in the processor's memory; on the others not all of it.
        """
        model, moments = get_state_dict(self._model, optimizer, options=_whole(offload=True))
        return {"model": model, "optimizer": moments, "random": self._ranks.gather(random)}

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
        set_state_dict(
            self._model,
            optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
            options=_whole(),
        )
        return state["random"][self._ranks.rank]

    def close(self) -> None:
        """Leaves the model alone from now on."""
        self._hook.remove()


def _whole(*, offload: bool = False) -> StateDictOptions:
    return StateDictOptions(full_state_dict=True, cpu_offload=offload)


def _check(recipe: Recipe) -> None:
    """Refuses what would go wrong in silence, or only on several ranks."""
    because = {
        "float16": recipe.precision == "float16",
        "compile": recipe.compile is not None,
        "batch_policy 'follow-noise'": recipe.batch_policy == "follow-noise",
        "rate_rule 'adascale'": recipe.rate_rule == "adascale",
    }
    asked = [name for name, holds in because.items() if holds]
    if asked:
        raise RecipeError(
            f"sharding is 'fsdp', which does not go with {' and '.join(asked)}. Use bfloat16, "
            "leave compile out and keep the batch to a ramp; or use sharding='replicated', if the "
            "model fits."
        )


def _shard(model: nn.Module, ranks: Ranks) -> FSDPModule:
    """Shards a model block by block, with gradients that are sums over ranks."""
    mesh = DeviceMesh.from_group(ranks.data, torch.device(ranks.device).type)
    for block in _separate_blocks(model):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    root = cast(FSDPModule, model)
    if hasattr(root, "set_reduce_scatter_unused_params"):  # from torch 2.13 on
        # Ranks may use different parameters, as a mixture of experts does.
        root.set_reduce_scatter_unused_params(True)
    return root


def _separate_blocks(model: nn.Module) -> list[nn.Module]:
    """Blocks of several layers that share no parameter: shared ones must stay in one group."""
    blocks = [block for block in _nested_blocks(model) if [*block.children()]]
    owners = Counter(id(p) for module in model.modules() for p in module._parameters.values())
    return [
        block
        for block in dict.fromkeys(blocks)
        if [*block.parameters()] and all(owners[id(p)] == 1 for p in block.parameters())
    ]


def _nested_blocks(model: nn.Module) -> list[nn.Module]:
    """The children of a model's outermost `Sequential`s and `ModuleList`s."""
    if isinstance(model, nn.Sequential | nn.ModuleList):
        return list(model)
    return [block for child in model.children() for block in _nested_blocks(child)]
