"""Gradients of single examples, or of micro-batches where an example has none of its own.

The form is found by trying, not by a list of known models:

1. *BatchNorm in training mode* mixes the examples of a batch: micro-batches.
2. The loss of a few examples together is compared with theirs one by one. Where they differ, the
   loss depends on the batch (contrastive losses, statistics over the batch): micro-batches.
3. Else single examples, all of a chunk at once by `torch.func.vmap(grad)`; or one backward pass
   each where an operation has no batching rule.

Only sums are kept: squared norms, the mean gradient, and up to 128 group means, which are folded
with random signs where the model is large. Inner products of folded gradients are unbiased, and
only the width of the interval rests on them.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from rightbatch.device.out_of_memory import is_out_of_memory
from rightbatch.errors import ProbeError
from rightbatch.laws.noise import GradientSample
from rightbatch.training.evaluate import to_device
from rightbatch.workload import Workload

WORKSPACE_BYTES = 256 * 2**20
"""Memory for the gradients of one chunk of examples."""
MAX_CHUNK = 128
"""Examples in a chunk, however small the model: their activations take memory too."""
FOLD = 2**16
"""Coordinates kept of a group's gradient."""
MAX_GROUPS = 128
"""Groups kept of single examples; beyond, neighbours are merged."""
GROUP = 4
"""Single examples that go into a group at first."""
CHECKED = 8
"""Examples on which the forms are compared."""
MICRO_BATCH = 16
"""Default size of a micro-batch where single examples have no gradient."""

Form = Literal["per-example", "per-example, one by one", "micro-batches"]


@dataclass(frozen=True, kw_only=True)
class GradientForm:
    """How gradients are taken of a workload.

    Attributes:
        form: Whether and how single examples have gradients.
        micro_batch: Examples behind each gradient: 1 but for micro-batches.
        stochastic: Whether the loss draws random numbers (dropout), which is noise as well.
        because: Why this form, in words.
        checked_examples: Examples that went through the model to find out.
    """

    form: Form
    micro_batch: int
    stochastic: bool
    because: str
    checked_examples: int


class _Loss(nn.Module):
    """The workload's loss as a module, so that any `compute_loss` can be called functionally."""

    def __init__(
        self, workload: Workload, model: nn.Module, autocast: torch.dtype | None, device_type: str
    ) -> None:
        super().__init__()
        self.model = model
        self._workload, self._autocast, self._device_type = workload, autocast, device_type

    def forward(self, batch: Any) -> tuple[Tensor, Tensor]:
        enabled = self._autocast is not None
        with torch.autocast(self._device_type, dtype=self._autocast, enabled=enabled):
            loss, count = self._workload.loss_sum(self.model, batch)
        return loss, torch.as_tensor(count, dtype=torch.float64, device=loss.device)


class ExampleGradients:
    """Takes gradients of a model at its present weights, without touching its `.grad` or buffers.

    Args:
        workload: Says how the loss is computed.
        model: The model, in the mode it trains in. It may change between calls.
        device: Where batches are put.
        autocast: Lower precision of the forward pass, or None.
        micro_batch: Size of micro-batches where they are needed.
        form: Known already; else found by trying, at the first call.
    """

    def __init__(
        self,
        workload: Workload,
        model: nn.Module,
        *,
        device: str = "cpu",
        autocast: torch.dtype | None = None,
        micro_batch: int | None = None,
        form: GradientForm | None = None,
    ) -> None:
        self.workload = workload
        self.model = model
        self.device = device
        self._loss = _Loss(workload, model, autocast, torch.device(device).type)
        self._names = [n for n, p in self._loss.named_parameters() if p.requires_grad]
        self.num_parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
        self._wanted_micro_batch = micro_batch
        self.form = form if form is not None else self._find_form()

    def sums(self, indices: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor | None, float]]:
        """Gradients summed over groups of the examples at `indices`, chunk by chunk.

        Args:
            indices: Examples, int64, shape (n,).

        Yields:
            Sums of gradients of the examples' summed losses, shape (k, D); examples in each,
            shape (k,); Σ of their squared norms, shape (k,), or None for micro-batches; and the
            count (examples or tokens) in the chunk.
        """
        if self.form.form == "micro-batches":
            for part in indices.split(self.form.micro_batch):
                if len(part) == self.form.micro_batch:
                    gradient, count = self._backward(part)
                    yield gradient[None], torch.tensor([len(part)]), None, count
            return
        chunk = max(1, min(MAX_CHUNK, WORKSPACE_BYTES // (12 * self.num_parameters)))
        group = max(1, min(GROUP, self.workload.num_examples // 16))
        take = self._vmapped if self.form.form == "per-example" else self._one_by_one
        for part in indices.split(chunk):
            rows, count = take(part)
            squares = torch.einsum("bd,bd->b", rows, rows).double()
            groups = [slice(i, i + group) for i in range(0, len(part), group)]
            yield (
                torch.stack([rows[g].sum(dim=0) for g in groups]),
                torch.tensor([len(rows[g]) for g in groups]),
                torch.stack([squares[g].sum() for g in groups]),
                count,
            )

    def of_batch(self, indices: Tensor) -> Tensor:
        """The mean gradient of one batch; at once where its examples mix, else in pieces.

        Args:
            indices: Examples, int64, shape (m,).

        Returns:
            The gradient, float64, shape (D,), on the CPU.
        """
        whole = self.form.form == "micro-batches"
        total, counted = torch.zeros(self.num_parameters, dtype=torch.float64), 0.0
        for piece in indices.split(len(indices) if whole else MAX_CHUNK):
            gradient, count = self._backward(piece)
            total += gradient.cpu()
            counted += count
        return total / counted

    # --- taking gradients -------------------------------------------------------------------------

    def _batch(self, indices: Tensor) -> Any:
        return to_device(self.workload.train_examples.batch(indices), self.device)

    def _buffers(self) -> dict[str, Tensor]:
        # Copies: a forward pass in training mode may update running statistics.
        return {name: buffer.clone() for name, buffer in self._loss.named_buffers()}

    def _call(self, parameters: dict[str, Tensor], batch: Any) -> tuple[Tensor, Tensor]:
        return functional_call(self._loss, parameters | self._buffers(), (batch,))

    def _forward(self, indices: Tensor) -> tuple[float, float]:
        with torch.no_grad():
            loss, count = self._call({}, self._batch(indices))
        return float(loss), float(count)

    def _backward(self, indices: Tensor) -> tuple[Tensor, float]:
        named = dict(self._loss.named_parameters())
        parameters = [named[name] for name in self._names]
        loss, count = self._call({}, self._batch(indices))
        gradients = torch.autograd.grad(loss, parameters, materialize_grads=True)
        return torch.cat([g.reshape(-1) for g in gradients]).float(), float(count)

    def _one_by_one(self, indices: Tensor) -> tuple[Tensor, float]:
        pairs = [self._backward(index) for index in indices.split(1)]
        return torch.stack([row for row, _ in pairs]), sum(count for _, count in pairs)

    def _vmapped(self, indices: Tensor) -> tuple[Tensor, float]:
        rows, _, count = self._vmapped_with_losses(indices)
        return rows, count

    def _vmapped_with_losses(self, indices: Tensor) -> tuple[Tensor, Tensor, float]:
        batch = self._batch(indices)
        lengths = set(_leading_lengths(batch))
        if lengths != {len(indices)}:
            raise ProbeError(f"a batch of {len(indices)} examples has first dimensions {lengths}")
        named = dict(self._loss.named_parameters())
        trained = {name: named[name].detach() for name in self._names}

        def loss_of_one(parameters: dict[str, Tensor], row: Any) -> tuple[Tensor, Any]:
            loss, count = self._call(parameters, _map_tensors(row, lambda t: t.unsqueeze(0)))
            return loss, (loss.detach(), count)

        take = vmap(grad(loss_of_one, has_aux=True), in_dims=(None, 0), randomness="different")
        with _batched_attention():
            gradients, (losses, counts) = take(trained, batch)
        rows = torch.cat([gradients[name].flatten(1) for name in self._names], dim=1).float()
        return rows, losses, float(counts.sum())

    # --- finding the form -------------------------------------------------------------------------

    def _find_form(self) -> GradientForm:
        num_examples = self.workload.num_examples
        some = torch.arange(min(CHECKED, num_examples))
        state = _random_state(self.device)
        self._forward(some)
        stochastic = not torch.equal(state, _random_state(self.device))
        norms = [m for m in self.model.modules() if _mixes_examples(m)]
        if norms:
            because = f"{type(norms[0]).__name__} in training mode mixes the examples of a batch"
            return self._micro_batches(stochastic, because, len(some))
        with self._quiet(stochastic):
            singles = self._single_losses(some)
            together = self._forward(some)[0]
        if singles is None:
            because = "the loss of a single example cannot be computed"
            return self._micro_batches(stochastic, because, 3 * len(some))
        if not _close(sum(singles), together):
            because = "the loss of an example depends on the others in its batch"
            return self._micro_batches(stochastic, because, 3 * len(some))
        problem = self._problem_with_vmap(some, None if stochastic else singles)
        return GradientForm(
            form="per-example" if problem is None else "per-example, one by one",
            micro_batch=1,
            stochastic=stochastic,
            because=problem or "every example has a loss of its own",
            checked_examples=4 * len(some),
        )

    def _micro_batches(self, stochastic: bool, because: str, checked: int) -> GradientForm:
        wanted = self._wanted_micro_batch or MICRO_BATCH
        # At least eight micro-batches, so that their spread means something; two examples each,
        # since BatchNorm needs them.
        size = max(2, min(wanted, self.workload.num_examples // 8))
        return GradientForm(
            form="micro-batches",
            micro_batch=size,
            stochastic=stochastic,
            because=because,
            checked_examples=checked,
        )

    @contextmanager
    def _quiet(self, stochastic: bool) -> Iterator[None]:
        """Without dropout, whose random numbers would differ between the losses compared."""
        modes = [(module, module.training) for module in self.model.modules()]
        try:
            if stochastic:
                self.model.eval()
            yield
        finally:
            for module, training in modes:
                module.training = training

    def _single_losses(self, indices: Tensor) -> list[float] | None:
        try:
            return [self._forward(index)[0] for index in indices.split(1)]
        except Exception as error:
            if is_out_of_memory(error):
                raise
            return None

    def _problem_with_vmap(self, indices: Tensor, singles: list[float] | None) -> str | None:
        try:
            _, losses, _ = self._vmapped_with_losses(indices)
        except Exception as error:
            if is_out_of_memory(error):
                raise
            first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
            return f"not all at once: {first_line}"
        if singles is not None and not all(
            _close(a, b) for a, b in zip(losses.tolist(), singles, strict=True)
        ):
            return "not all at once: the losses came out different"
        return None


class GradientSums:
    """Adds gradients up to what the law of noise needs of them.

    Args:
        num_parameters: D.
        seed: Of the random signs with which large gradients are folded.
    """

    def __init__(self, num_parameters: int, *, seed: int) -> None:
        self._total = torch.zeros(num_parameters, dtype=torch.float64)
        self._signs = _signs(num_parameters, seed) if num_parameters > FOLD else None
        self._folded: list[Tensor] = []
        self._sizes: list[int] = []
        self._squares: list[float] = []
        self._own: list[float] = []
        self._count = 0.0
        self._single = True

    @property
    def num_examples(self) -> int:
        """Examples added so far."""
        return sum(self._sizes)

    def add(self, rows: Tensor, sizes: Tensor, squares: Tensor | None, count: float) -> None:
        """Adds the sums of a chunk, as `ExampleGradients.sums` gives them.

        Args:
            rows: Sums of gradients, shape (k, D).
            sizes: Examples in each, shape (k,).
            squares: Σ |g_i|² in each, shape (k,); None for micro-batches.
            count: Examples or tokens in the chunk.
        """
        self._total += rows.sum(dim=0, dtype=torch.float64).cpu()
        self._folded.extend(self._fold(rows.cpu()).unbind())
        self._sizes.extend(int(s) for s in sizes)
        self._own.extend(torch.einsum("kd,kd->k", rows, rows).double().tolist())
        self._count += count
        if squares is None:
            self._single = False
        else:
            self._squares.extend(squares.tolist())
            while len(self._folded) > MAX_GROUPS:
                self._merge()

    def finite(self) -> bool:
        """Whether all gradients so far are numbers."""
        return bool(self._total.isfinite().all()) and bool(np.isfinite(self._own).all())

    def sample(self, population: int | None) -> GradientSample:
        """The sample so far, of gradients of the mean loss.

        Args:
            population: N when drawn without replacement from N that are meant, else None.

        Returns:
            The sample.
        """
        sizes = np.array(self._sizes, dtype=float)
        # The training loss is Σ loss / Σ count: an example's share of it is its loss over the mean
        # count (1, or tokens per example).
        unit = (self._count / self.num_examples) ** 2
        folded = torch.stack(self._folded).double()
        gram = (folded @ folded.T).numpy() / np.outer(sizes, sizes) / unit
        if not self._single:
            np.fill_diagonal(gram, np.array(self._own) / sizes**2 / unit)
        mean = float(self._total @ self._total) / self.num_examples**2 / unit
        return GradientSample(
            sizes=sizes,
            gram=gram,
            squared_sums=np.array(self._squares) / unit if self._single else None,
            population=population,
            mean_norm_squared=mean,
        )

    def _fold(self, rows: Tensor) -> Tensor:
        if self._signs is None:
            return rows
        signed = rows * self._signs
        padded = nn.functional.pad(signed, (0, -signed.shape[1] % FOLD))
        return padded.view(len(rows), -1, FOLD).sum(dim=1)

    def _merge(self) -> None:
        """Neighbouring groups become one."""
        for name in ("_folded", "_sizes", "_squares", "_own"):
            values = getattr(self, name)
            merged = [sum(values[i + 1 : i + 2], start=values[i]) for i in range(0, len(values), 2)]
            setattr(self, name, merged)


@contextmanager
def _batched_attention() -> Iterator[None]:
    """Attention by its plain formula, which vmap can batch; torch's fused kernels it cannot."""
    with warnings.catch_warnings(), sdpa_kernel(SDPBackend.MATH):
        # Operations without a batching rule run in a loop inside torch: slower and still right.
        warnings.filterwarnings("ignore", message="There is a performance drop")
        yield


def _signs(num_parameters: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2, (num_parameters,), generator=generator, dtype=torch.int8) * 2 - 1


def _mixes_examples(module: nn.Module) -> bool:
    batch_norm = isinstance(module, nn.modules.batchnorm._BatchNorm)
    return batch_norm and (module.training or module.running_mean is None)


def _random_state(device: str) -> Tensor:
    if torch.device(device).type == "cuda":
        return torch.cuda.get_rng_state(torch.device(device))
    return torch.random.get_rng_state()


def _close(a: float, b: float) -> bool:
    return abs(a - b) <= 1e-3 * max(abs(a), abs(b)) + 1e-6


def _leading_lengths(batch: Any) -> Iterator[int]:
    """First dimension of every tensor; −1 for anything that is not a tensor with one."""
    if isinstance(batch, Tensor):
        yield batch.shape[0] if batch.ndim else -1
    elif isinstance(batch, dict | tuple | list):
        for value in batch.values() if isinstance(batch, dict) else batch:
            yield from _leading_lengths(value)
    else:
        yield -1


def _map_tensors(batch: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(batch, Tensor):
        return change(batch)
    if isinstance(batch, dict):
        return {key: _map_tensors(value, change) for key, value in batch.items()}
    changed = [_map_tensors(value, change) for value in batch]
    if hasattr(batch, "_fields"):
        return type(batch)(*changed)
    return type(batch)(changed)
