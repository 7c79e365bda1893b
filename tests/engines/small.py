"""Small workloads with every kind of layer, and how engines are compared on them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rightbatch import Workload, accuracy
from rightbatch.engines import Copies

Params = Iterable[nn.Parameter]
Make = Callable[..., torch.optim.Optimizer]

OPTIMIZERS: dict[str, Make] = {
    "sgd": lambda params, lr: torch.optim.SGD(params, lr=lr),
    "momentum": lambda params, lr: torch.optim.SGD(params, lr=lr, momentum=0.9),
    "adam": lambda params, lr: torch.optim.Adam(params, lr=lr / 10),
    "adamw": lambda params, lr: torch.optim.AdamW(params, lr=lr / 10, weight_decay=0.1),
}
OPTIONS: dict[str, Make] = {
    "nesterov": lambda p, lr: torch.optim.SGD(
        p, lr=lr, momentum=0.9, nesterov=True, weight_decay=0.01
    ),
    "dampening": lambda p, lr: torch.optim.SGD(p, lr=lr, momentum=0.8, dampening=0.3),
    "maximize": lambda p, lr: torch.optim.SGD(p, lr=lr / 10, maximize=True),
    "amsgrad": lambda p, lr: torch.optim.Adam(
        p, lr=lr / 10, betas=(0.8, 0.9), eps=1e-3, weight_decay=0.01, amsgrad=True
    ),
    "beta zero": lambda p, lr: torch.optim.Adam(p, lr=lr / 10, betas=(0.0, 0.9), eps=1e-3),
    "decay of lr": lambda p, lr: torch.optim.AdamW(p, lr=lr / 10, weight_decay=10 * lr),
    "tensor lr": lambda p, lr: torch.optim.Adam(p, lr=torch.tensor(lr / 10)),
}


def blobs(num_examples: int, seed: int, *shape: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(0, 3, (num_examples,), generator=generator)
    inputs = torch.randn(num_examples, *shape, generator=generator)
    return inputs + targets.reshape(-1, *[1] * len(shape)) - 1, targets


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))


def _cnn() -> nn.Module:
    # No bias before BatchNorm: its gradient is rounding noise, which Adam turns into full steps.
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(4, 6, 3, stride=2, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 3),
    )


class _Gpt(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(9, 8), nn.Embedding(5, 8)
        self.norms = nn.ModuleList([nn.LayerNorm(8), nn.LayerNorm(8)])
        # Without a bias: attention does not see the keys', so its gradient is rounding noise.
        self.qkv = nn.Linear(8, 24, bias=False)
        self.mlp = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8), nn.Dropout(0.0))
        self.head = nn.Linear(8, 9, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, tokens: Tensor) -> Tensor:
        batch, length = tokens.shape
        x = self.tokens(tokens) + self.places(torch.arange(length))
        q, k, v = (
            part.view(batch, length, 2, 4).transpose(1, 2)
            for part in self.qkv(self.norms[0](x)).chunk(3, dim=-1)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + mixed.transpose(1, 2).reshape(batch, length, 8)
        return self.head(x + self.mlp(self.norms[1](x)))


def _next_token(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
    """Loss summed over the tokens that are not padding, and their number: a tensor."""
    tokens = batch["tokens"]
    scores, following = model(tokens[:, :-1]), tokens[:, 1:]
    loss = F.cross_entropy(
        scores.flatten(0, 1), following.flatten(), ignore_index=0, reduction="sum"
    )
    return loss, (following != 0).sum()


def _sequences(num_examples: int, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    start = torch.randint(0, 9, (num_examples, 1), generator=generator)
    return {"tokens": (start + torch.arange(6)) % 9}


def make_workload(model: str, make_optimizer: Make = OPTIMIZERS["sgd"], **changes: Any) -> Workload:
    fields: dict[str, Any] = {"name": model, "make_optimizer": make_optimizer}
    if model == "gpt":
        fields |= {"make_model": _Gpt, "compute_loss": _next_token}
        fields |= {"train_data": _sequences(21, 1), "val_data": _sequences(7, 2)}
    else:
        shape = (4,) if model == "mlp" else (1, 6, 6)
        fields |= {
            "make_model": _mlp if model == "mlp" else _cnn,
            "train_data": blobs(21, 1, *shape),
            "val_data": blobs(7, 2, *shape),
            "loss": F.cross_entropy,
            "metric": accuracy,
        }
    return Workload(**{**fields, **changes})


TRAIN_ONLY: dict[str, Any] = {"val_data": None, "metric": None}
RATES, SEEDS = [0.05, 0.1, 0.05], [0, 0, 1]


def assert_same_weights(engine: Copies, loop: Copies, tolerance: float = 1e-5) -> None:
    for copy in range(len(loop.seeds)):
        ours, theirs = engine.state_dict(copy), loop.state_dict(copy)
        assert ours.keys() == theirs.keys()
        for name, their in theirs.items():
            assert ours[name].dtype == their.dtype
            torch.testing.assert_close(
                ours[name], their, rtol=tolerance, atol=tolerance, msg=f"{name} of copy {copy}"
            )


def assert_same_evaluation(engine: Copies, loop: Copies) -> None:
    ours, theirs = engine.evaluate(), loop.evaluate()
    for field in ("train_loss", "val_loss", "val_metric", "diverged"):
        our, their = getattr(ours, field), getattr(theirs, field)
        assert (our is None) == (their is None)
        if their is not None:
            assert our.shape == (len(loop.seeds),)
            np.testing.assert_allclose(our, their, rtol=2e-5, err_msg=field)
