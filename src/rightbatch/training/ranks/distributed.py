"""Several processes that train one model: who they are, what they agree on, how they part.

Under `torchrun`, every process runs the same program. `join_ranks` finds the others, checks that
all were given the same task, and ends in the same way on all of them (see `verdict`).

Numbers that decide what is done next travel between processors (gloo), small and at once, so that
all ranks decide alike in the same update; gradients travel between devices (NCCL on GPUs).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from rightbatch.device.of_rank import take_device
from rightbatch.errors import RecipeError, ReplicaError, UsageError
from rightbatch.recipe import Recipe
from rightbatch.training.data.share import Share
from rightbatch.training.ranks.verdict import (
    GRACE_SECONDS,
    ROLL_CALL_SECONDS,
    Board,
    Verdict,
    is_connection_failure,
    verdict_on,
)

TIMEOUT_SECONDS = 300.0
"""How far a rank may be behind the others. Not how long a failure goes unnoticed: a process that
ends closes its connections, which the others see at once. This is for a network that is gone, and
must leave time for what one rank alone does: writing a checkpoint, compiling."""
_PARTING_SECONDS = 5.0

_stores: dict[tuple[str, str, int], dist.Store] = {}
"""Of this process: the store outlives a training, so that the next one can meet there too."""
_joined = 0


class Ranks:
    """The processes of a data-parallel training, seen from one of them.

    Args:
        rank: Which this is.
        size: How many there are.
        device: Where this one computes.
        store: What all can read and write.
        data: The group over which gradients are summed.
        control: The group over which decisions are made, on the processor.
        own: Whether the groups were made here, and are closed at the end.

    Attributes:
        step: Updates done, for what is said of a failure.
        micro_batch: Examples of a pass, likewise.
    """

    def __init__(
        self,
        *,
        rank: int,
        size: int,
        device: str,
        store: dist.Store,
        data: dist.ProcessGroup,
        control: dist.ProcessGroup,
        own: bool,
    ) -> None:
        self.rank = rank
        self.size = size
        self.device = device
        self._groups: tuple[dist.ProcessGroup, dist.ProcessGroup] | None = (data, control)
        self.step = 0
        self.micro_batch = 0
        self._board = Board(store, rank, size)
        self._own = own
        self._shared: Exception | None = None

    @property
    def data(self) -> dist.ProcessGroup:
        """The group over which gradients are summed."""
        return self._open()[0]

    @property
    def control(self) -> dist.ProcessGroup:
        """The group over which decisions are made, on the processor."""
        return self._open()[1]

    def _open(self) -> tuple[dist.ProcessGroup, dist.ProcessGroup]:
        if self._groups is None:
            raise UsageError("The ranks have parted. Call join_ranks again.")
        return self._groups

    def share(self, recipe: Recipe, smallest: int) -> Share:
        """This rank's part of each update.

        Args:
            recipe: Says how much each rank takes.
            smallest: Examples that the model needs at least in one pass.

        Returns:
            The share.
        """
        return Share(
            micro_batch=recipe.micro_batch,
            smallest=smallest,
            rank=self.rank,
            weights=recipe.replica_batches or (1,) * self.size,
        )

    def own_seed(self, seed: int) -> int:
        """The seed of this rank's dropout; that of rank 0 is what a single process has."""
        if self.rank == 0:
            return seed
        return int(np.random.SeedSequence((seed, self.rank)).generate_state(1)[0])

    def total(self, values: Sequence[float]) -> list[float]:
        """Sums over all ranks, the same bits on each of them.

        Args:
            values: This rank's numbers, as many as the other ranks give.

        Returns:
            Their sums.
        """
        return self.begin_total(values)()

    def begin_total(self, values: Sequence[float]) -> Callable[[], list[float]]:
        """Begins to sum over all ranks.

        Args:
            values: This rank's numbers, as many as the other ranks give.

        Returns:
            What waits for the sums, and returns them.
        """
        message = torch.tensor(values, dtype=torch.float64)
        work = dist.all_reduce(message, group=self.control, async_op=True)
        assert work is not None  # this process is in the group

        def wait() -> list[float]:
            work.wait()
            return message.tolist()

        return wait

    def of_first(self, values: Sequence[float]) -> list[float]:
        """Rank 0's numbers: unequal devices round differently, and all must decide alike.

        Args:
            values: This rank's numbers, as many as the other ranks give.

        Returns:
            What rank 0 gave.
        """
        message = torch.tensor(values, dtype=torch.float64)
        dist.broadcast(message, 0, group=self.control)
        return message.tolist()

    def gather(self, value: Any) -> list[Any]:
        """Every rank's object, in their order.

        Args:
            value: This rank's; it must survive pickling.

        Returns:
            One of each rank.
        """
        gathered: list[Any] = [None] * self.size
        dist.all_gather_object(gathered, value, group=self.control)
        return gathered

    def object_of_first(self, value: Any) -> Any:
        """Rank 0's object.

        Args:
            value: On rank 0, what is sent to the others; it must survive pickling.

        Returns:
            What rank 0 gave.
        """
        sent = [value]
        dist.broadcast_object_list(sent, 0, group=self.control)
        return sent[0]

    def add_up(self, tensor: Tensor) -> dist.Work:
        """Begins to sum a tensor over all ranks, in place.

        Args:
            tensor: On this rank's device.

        Returns:
            What to wait for.
        """
        work = dist.all_reduce(tensor, group=self.data, async_op=True)
        assert work is not None  # this process is in the group
        return work

    def spread(self, tensor: Tensor) -> None:
        """Overwrites a tensor by rank 0's.

        Args:
            tensor: On this rank's device.
        """
        dist.broadcast(tensor, 0, group=self.data)

    def agree(self, facts: dict[str, Any], where: str) -> None:
        """Makes sure that all ranks were given the same; each of them raises if not.

        Args:
            facts: What must be the same, by name.
            where: What to look at if it is not.

        Raises:
            UsageError: If it is not.
        """
        gathered = self.gather({name: repr(value) for name, value in facts.items()})
        for name, mine in gathered[0].items():
            for rank, theirs in enumerate(gathered):
                if theirs[name] != mine:
                    raise self.raised_by_all(
                        UsageError(
                            f"The ranks do not train the same: {name} is {mine} on rank 0 and "
                            f"{theirs[name]} on rank {rank}. {where}"
                        )
                    )

    def raised_by_all(self, error: Exception) -> Exception:
        """Marks an error that every rank raises by itself, with the same words.

        Args:
            error: The error.

        Returns:
            The same one.
        """
        self._shared = error
        return error

    def post(self, error: BaseException) -> None:
        """Tells the others what happened here, before they see that it did."""
        self._board.post(
            verdict_on(error, rank=self.rank, step=self.step, micro_batch=self.micro_batch)
        )

    def verdict(self) -> Exception:
        """What all ranks raise after one of them said that it failed."""
        found = self._board.wait(GRACE_SECONDS)
        unread = ReplicaError("A rank failed, and its reason cannot be read: look at its output.")
        return self.raised_by_all(unread if found is None else found.as_error())

    def settle(self, error: BaseException) -> Exception | None:
        """Ends the training on this rank after an error.

        Args:
            error: What was raised here, for a reason of this rank's or of another's.

        Returns:
            What every rank raises; None where the error itself is to go on.
        """
        if error is self._shared:
            self.close()
            self._board.part(_PARTING_SECONDS)
            return None
        known = self._board.read()
        if known is None and not is_connection_failure(error):
            self.post(error)
        self.close()  # so that nobody waits for this rank
        verdict = known or self._find_verdict()
        self._board.part(_PARTING_SECONDS, verdict.ranks if verdict.kind == "vanished" else ())
        # An interrupted process stays interrupted.
        return verdict.as_error() if isinstance(error, Exception) else None

    def _find_verdict(self) -> Verdict:
        verdict = self._board.wait(GRACE_SECONDS)
        if verdict is not None:
            return verdict
        missing = self._board.find_missing(ROLL_CALL_SECONDS)
        if missing:
            return self._board.post(Verdict(kind="vanished", ranks=missing, step=self.step))
        message = "the connection between the ranks was lost, though all of them are there"
        lost = Verdict(
            kind="error", ranks=(self.rank,), type_name="a network error", message=message,
            step=self.step,
        )  # fmt: skip
        return self._board.post(lost)

    def leave(self) -> None:
        """Waits until all ranks are done, and parts.

        One that a signal has ended meanwhile is not missed: this one has nothing left to do.
        """
        with contextlib.suppress(RuntimeError):
            self.total([0.0])
            self.close()
            return
        found = self._board.wait(GRACE_SECONDS)
        self.close()
        if found is not None and found.type_name not in ("KeyboardInterrupt", "SystemExit"):
            raise self.raised_by_all(found.as_error())

    def close(self) -> None:
        """Closes this rank's connections; the others see it at once."""
        self._groups = None  # a group that is referred to stays open
        if self._own and dist.is_initialized():
            dist.destroy_process_group()


@contextmanager
def join_ranks(
    recipe: Recipe,
    device: str = "cpu",
    *,
    timeout_seconds: float = TIMEOUT_SECONDS,
    backend: str | None = None,
) -> Iterator[Ranks | None]:
    """Meets the other processes that `torchrun` started, and parts from them at the end.

    Whatever is raised inside the block on one rank, all of them raise the same error. A process
    group that the program has made itself is used and left as it is.

    Args:
        recipe: How is trained; its replicas are the processes.
        device: Where; `cuda` is one GPU for each process.
        timeout_seconds: How far a rank may be behind the others.
        backend: Of torch.distributed, for gradients. Default: nccl on CUDA, else gloo.

    Yields:
        The ranks, or None in a program that was started by itself.

    Raises:
        Exception: What was raised on this or another rank.
    """
    environment = _environment()
    if environment is None:
        yield None
        return
    ranks = _meet(*environment, device, timeout_seconds, backend)
    try:
        _agree_on_recipe(ranks, recipe)
        yield ranks
        ranks.leave()
    except BaseException as error:
        shared = ranks.settle(error)
        if shared is None:
            raise
        raise shared from error


def count_processes() -> int:
    """How many processes `torchrun` started; 1 in a program that was started by itself."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first_process() -> bool:
    """Whether this process is rank 0, which writes and prints; true of one that is alone."""
    return count_processes() == 1 or os.environ.get("RANK", "0") == "0"


def _environment() -> tuple[int, int] | None:
    """Rank and number of ranks as torchrun gives them, or as the program's group has them."""
    if dist.is_available() and dist.is_initialized():
        size = dist.get_world_size()
        return (dist.get_rank(), size) if size > 1 else None
    size = count_processes()
    if size == 1:
        return None
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise UsageError(
            f"WORLD_SIZE is {size}, so this is one of {size} processes, but {', '.join(missing)} "
            "is not set. Start the program with torchrun, which sets them, or unset WORLD_SIZE."
        )
    return int(os.environ["RANK"]), size


def _meet(rank: int, size: int, device: str, timeout_seconds: float, backend: str | None) -> Ranks:
    global _joined
    _joined += 1
    device = take_device(device, int(os.environ.get("LOCAL_RANK", rank)))
    timeout = timedelta(seconds=timeout_seconds)
    own = not dist.is_initialized()
    if own:
        base = _meeting_point(rank, size, timeout)
        name = backend or ("nccl" if torch.device(device).type == "cuda" else "gloo")
        dist.init_process_group(
            name,
            store=dist.PrefixStore(f"torch/{_joined}", base),
            rank=rank,
            world_size=size,
            timeout=timeout,
        )
    else:
        base = dist.distributed_c10d._get_default_store()
    data = dist.distributed_c10d._get_default_group()
    control = data
    if dist.get_backend() != "gloo":
        group = dist.new_group(backend="gloo", timeout=timeout)
        assert isinstance(group, dist.ProcessGroup)  # every rank is in it
        control = group
    # A restarted run must not read what the one before it left.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = dist.PrefixStore(f"rightbatch/{attempt}/{_joined}", base)
    return Ranks(
        rank=rank, size=size, device=device, store=store, data=data, control=control, own=own
    )


def _meeting_point(rank: int, size: int, timeout: timedelta) -> dist.Store:
    """The store at the address that torchrun gives; its agent holds it, or else rank 0 does."""
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    key = (host, attempt, port)
    if key not in _stores:
        held_by_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        store = dist.TCPStore(
            host,
            port,
            size,
            is_master=rank == 0 and not held_by_agent,
            timeout=timeout,
            wait_for_workers=False,
        )
        _stores[key] = dist.PrefixStore(f"attempt/{attempt}", store)
    return _stores[key]


def _agree_on_recipe(ranks: Ranks, recipe: Recipe) -> None:
    facts = {f"recipe.{name}": value for name, value in asdict(recipe).items()}
    ranks.agree(facts, "Give all processes the same recipe.")
    if recipe.replicas != ranks.size:
        error = RecipeError(
            f"recipe.replicas is {recipe.replicas}, but {ranks.size} processes train. Use "
            f"recipe.replace(replicas={ranks.size}) (--set replicas={ranks.size}), or start "
            f"{recipe.replicas} (torchrun --nproc-per-node {recipe.replicas})."
        )
        raise ranks.raised_by_all(error)
