"""Four workloads that are not in the catalog, to judge how far the planner carries.

Nothing in rightbatch may be tuned to these. Two on images (scikit-learn's digits, enlarged to
16×16, shifted, scaled in contrast and covered with noise) and two on text (Python's own standard
library), with SGD, SGD with momentum, Adam and AdamW, and 8,000 to 16,000 training examples. Each
has a target that batch 32 at a good learning rate reaches in three to eight epochs. The data are
made of what is installed: no download.

    python benchmarks/regret.py truth benchmarks/held_out.py:noisy_digits
"""

from __future__ import annotations

import sysconfig
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rightbatch.workload import Workload, accuracy

SIDE, MARGIN = 16, 2
CONTEXT_BYTES, WINDOW_BYTES, VOCABULARY = 12, 16, 128
FILES = ("typing.py", "inspect.py", "tarfile.py", "decimal.py", "_pydecimal.py", "zipfile.py")
FILES_BEHIND = ("turtle.py", "doctest.py", "mailbox.py", "pdb.py", "subprocess.py", "pickle.py")


# ---- images --------------------------------------------------------------------------------------


def _draw_images(num_train: int, num_val: int, noise: float, seed: int) -> Any:
    """Training and validation pairs; no digit of one is the origin of an image in the other."""
    from sklearn.datasets import load_digits

    data: Any = load_digits()
    generator = torch.Generator().manual_seed(seed)
    images = torch.from_numpy(data.images).float()[:, None] / 16.0
    large = F.interpolate(images, size=SIDE, mode="bilinear")
    labels = torch.from_numpy(data.target).long()
    order = torch.randperm(len(labels), generator=generator)
    origins_val, origins_train = order.split([360, len(order) - 360])

    def draw(origins: Tensor, count: int) -> tuple[Tensor, Tensor]:
        chosen = origins[torch.randint(len(origins), (count,), generator=generator)]
        padded = F.pad(large[chosen], (MARGIN,) * 4)
        shifts = torch.randint(2 * MARGIN + 1, (count, 2), generator=generator)
        grid = torch.arange(SIDE)
        rows = (shifts[:, 0, None] + grid)[:, None, :, None]
        columns = (shifts[:, 1, None] + grid)[:, None, None, :]
        examples = torch.arange(count)[:, None, None, None]
        shifted = padded[examples, 0, rows, columns]
        contrast = 0.6 + 0.8 * torch.rand(count, 1, 1, 1, generator=generator)
        pixels = shifted * contrast + noise * torch.randn(shifted.shape, generator=generator)
        return pixels, labels[chosen]

    return draw(origins_train, num_train), draw(origins_val, num_val)


def _make_sgd(params: Iterable[nn.Parameter], lr: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=lr)


def _make_momentum(params: Iterable[nn.Parameter], lr: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=lr, momentum=0.9)


def _make_adam(params: Iterable[nn.Parameter], lr: float) -> torch.optim.Optimizer:
    return torch.optim.Adam(params, lr=lr)


def _make_adamw(params: Iterable[nn.Parameter], lr: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=lr, weight_decay=0.01)


def _make_image_mlp() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(SIDE * SIDE, 96),
        nn.ReLU(),
        nn.Linear(96, 48),
        nn.ReLU(),
        nn.Linear(48, 10),
    )


def _make_image_cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 8, 5, stride=2, padding=2),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(256, 10),
    )


def noisy_digits() -> Workload:
    """12,000 noisy, shifted digits; a multilayer perceptron with plain SGD."""
    train, val = _draw_images(12_000, 1_500, noise=0.35, seed=11)
    return Workload(
        name="held-out-noisy-digits",
        make_model=_make_image_mlp,
        train_data=train,
        val_data=val,
        loss=F.cross_entropy,
        make_optimizer=_make_sgd,
        metric=accuracy,
        target="val_loss<=0.65",
    )


def shifted_digits() -> Workload:
    """8,000 shifted digits with less noise; a small convolutional network with Adam."""
    train, val = _draw_images(8_000, 1_000, noise=0.1, seed=12)
    return Workload(
        name="held-out-shifted-digits",
        make_model=_make_image_cnn,
        train_data=train,
        val_data=val,
        loss=F.cross_entropy,
        make_optimizer=_make_adam,
        metric=accuracy,
        target="val_loss<=0.35",
    )


# ---- text ----------------------------------------------------------------------------------------


def _read_windows(
    names: tuple[str, ...], length: int, num_train: int, num_val: int
) -> tuple[Tensor, Tensor]:
    """Windows of bytes spread evenly over files, every ninth or so for validation."""
    library = Path(sysconfig.get_paths()["stdlib"])
    found = [library / name for name in names if (library / name).is_file()]
    text = b"".join(path.read_bytes() for path in found)
    windows = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    wanted, available = num_train + num_val, len(windows) // length
    if available < wanted:
        raise RuntimeError(
            f"{library} gives {available} of the {wanted} windows of {length} bytes."
        )
    rows = windows[: available * length].view(available, length)
    chosen = rows[torch.arange(wanted) * available // wanted].long().clamp(max=VOCABULARY - 1)
    held = torch.zeros(wanted, dtype=torch.bool)
    held[torch.arange(num_val) * wanted // num_val] = True
    return chosen[~held].contiguous(), chosen[held].contiguous()


class _ByteMlp(nn.Module):
    """The byte after twelve others, from their embeddings side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = nn.Embedding(VOCABULARY, 12)
        self.hidden = nn.Linear(12 * CONTEXT_BYTES, 96)
        self.scores = nn.Linear(96, VOCABULARY)

    def forward(self, read_BL: Tensor) -> Tensor:
        return self.scores(F.relu(self.hidden(self.bytes(read_BL).flatten(1))))


class _ByteTransformer(nn.Module):
    """One causal attention block over 16 bytes."""

    def __init__(self, width: int = 24, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.bytes = nn.Embedding(VOCABULARY, width)
        self.places = nn.Embedding(WINDOW_BYTES, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))
        self.mix_in, self.mix_out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.feed = nn.Sequential(
            nn.Linear(width, 3 * width), nn.ReLU(), nn.Linear(3 * width, width)
        )
        self.scores = nn.Linear(width, VOCABULARY)

    def forward(self, read_BL: Tensor) -> Tensor:
        batch, length = read_BL.shape
        x_BLD = self.bytes(read_BL) + self.places(torch.arange(length, device=read_BL.device))
        parts = self.mix_in(self.norms[0](x_BLD)).view(batch, length, 3, self.heads, -1)
        q, k, v = parts.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x_BLD = x_BLD + self.mix_out(mixed.transpose(1, 2).reshape(batch, length, -1))
        x_BLD = x_BLD + self.feed(self.norms[1](x_BLD))
        return self.scores(self.norms[2](x_BLD))


def _sequence_loss(model: nn.Module, windows_BL: Tensor) -> tuple[Tensor, int]:
    scores, following = model(windows_BL[:, :-1]), windows_BL[:, 1:]
    summed = F.cross_entropy(scores.flatten(0, 1), following.flatten(), reduction="sum")
    return summed, following.numel()


def next_byte() -> Workload:
    """16,000 contexts of twelve bytes; a multilayer perceptron with SGD and momentum."""
    train, val = _read_windows(FILES, CONTEXT_BYTES + 1, 16_000, 1_500)
    return Workload(
        name="held-out-next-byte",
        make_model=_ByteMlp,
        train_data=(train[:, :-1], train[:, -1]),
        val_data=(val[:, :-1], val[:, -1]),
        loss=F.cross_entropy,
        make_optimizer=_make_momentum,
        metric=accuracy,
        target="val_loss<=2.3",
    )


def byte_windows() -> Workload:
    """8,000 windows of 16 bytes; a one-block transformer with AdamW."""
    train, val = _read_windows(FILES_BEHIND, WINDOW_BYTES + 1, 8_000, 800)
    return Workload(
        name="held-out-byte-windows",
        make_model=_ByteTransformer,
        train_data=train,
        val_data=val,
        compute_loss=_sequence_loss,
        make_optimizer=_make_adamw,
        target="val_loss<=2.0",
    )
