"""`source-lm`: the next byte of Python's own standard library, by a small causal transformer.

The text comes with the interpreter, so nothing is downloaded. The files are a fixed list, read in
a fixed order; their text differs a little between Python versions, and the loss with it.
"""

from __future__ import annotations

import sysconfig
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rightbatch.catalog.entries import target_of
from rightbatch.errors import WorkloadError
from rightbatch.workload import Workload

WINDOW_BYTES = 32
"""Bytes predicted per example; a window holds one more, the first, which is only read."""
TRAIN_WINDOWS, VAL_WINDOWS = 4096, 512
WIDTH, LAYERS, HEADS, VOCABULARY = 32, 2, 4, 128

FILES = (
    "argparse.py",
    "ast.py",
    "calendar.py",
    "configparser.py",
    "copy.py",
    "csv.py",
    "dataclasses.py",
    "difflib.py",
    "functools.py",
    "shutil.py",
    "textwrap.py",
)


class _Block(nn.Module):
    """Causal attention and a feed-forward layer, each on a normalised residual stream."""

    def __init__(self) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(WIDTH)
        self.queries_keys_values = nn.Linear(WIDTH, 3 * WIDTH)
        self.attention_out = nn.Linear(WIDTH, WIDTH)
        self.feed_norm = nn.LayerNorm(WIDTH)
        self.feed = nn.Sequential(
            nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH)
        )

    def forward(self, x_BLD: Tensor) -> Tensor:
        batch, length, _ = x_BLD.shape
        heads = self.queries_keys_values(self.attention_norm(x_BLD))
        heads = heads.view(batch, length, 3, HEADS, WIDTH // HEADS).permute(2, 0, 3, 1, 4)
        mixed_BHLK = F.scaled_dot_product_attention(heads[0], heads[1], heads[2], is_causal=True)
        mixed_BLD = mixed_BHLK.transpose(1, 2).reshape(batch, length, WIDTH)
        x_BLD = x_BLD + self.attention_out(mixed_BLD)
        return x_BLD + self.feed(self.feed_norm(x_BLD))


class SourceModel(nn.Module):
    """A causal transformer over bytes: (batch, length) int64 to (batch, length, 128) scores."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = nn.Embedding(VOCABULARY, WIDTH)
        self.positions = nn.Embedding(WINDOW_BYTES, WIDTH)
        self.blocks = nn.Sequential(*(_Block() for _ in range(LAYERS)))
        self.norm = nn.LayerNorm(WIDTH)
        self.scores = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, read_BL: Tensor) -> Tensor:
        """Scores of the byte that follows each position."""
        positions_L = torch.arange(read_BL.shape[1], device=read_BL.device)
        x_BLD = self.bytes(read_BL) + self.positions(positions_L)
        return self.scores(self.norm(self.blocks(x_BLD)))


def _compute_loss(model: nn.Module, windows_BL: Tensor) -> tuple[Tensor, int]:
    """Cross-entropy summed over the predicted bytes, and how many there are."""
    windows_BL = windows_BL.long()
    scores_BLV, following_BL = model(windows_BL[:, :-1]), windows_BL[:, 1:]
    loss_sum = F.cross_entropy(scores_BLV.flatten(0, 1), following_BL.flatten(), reduction="sum")
    return loss_sum, following_BL.numel()


def _make_optimizer(params: Iterable[nn.Parameter], lr: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=lr, betas=(0.9, 0.98), weight_decay=0.01)


def _read_windows() -> tuple[Tensor, Tensor]:
    """Training and validation windows, uint8, each of shape (windows, WINDOW_BYTES + 1).

    The windows do not overlap, lie evenly over all the files, and every ninth is for validation.

    Returns:
        `(training windows, validation windows)`.

    Raises:
        WorkloadError: If the library's source files are not there.
    """
    library = Path(sysconfig.get_paths()["stdlib"])
    text = b"".join((library / name).read_bytes() for name in FILES if (library / name).is_file())
    length, wanted = WINDOW_BYTES + 1, TRAIN_WINDOWS + VAL_WINDOWS
    if len(text) < wanted * length:
        raise WorkloadError(
            f"The standard library in {library} gives {len(text)} of the {wanted * length} bytes "
            "that source-lm needs. Use a Python that ships its library as source files."
        )
    available = len(text) // length
    windows = torch.frombuffer(bytearray(text[: available * length]), dtype=torch.uint8)
    chosen = torch.arange(wanted) * available // wanted
    # Bytes beyond ASCII are rare in source code; they share one value.
    kept = windows.view(available, length)[chosen].clamp(max=VOCABULARY - 1)
    for_validation = torch.arange(wanted) % (wanted // VAL_WINDOWS) == 0
    return kept[~for_validation].contiguous(), kept[for_validation].contiguous()


def build(name: str) -> Workload:
    """Builds `source-lm`: windows of 32 + 1 bytes, 4096 to train on and 512 others to validate."""
    train, val = _read_windows()
    return Workload(
        name=name,
        make_model=SourceModel,
        train_data=train,
        val_data=val,
        compute_loss=_compute_loss,
        make_optimizer=_make_optimizer,
        target=target_of(name),
    )
