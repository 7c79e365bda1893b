"""Peers' failure 5: Lightning's lr_find halves the first loss and differentiates by linear lr."""

import logging
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from rightbatch.laws.range_test import analyse_range_test
from rightbatch.probes.learning_rate import find_learning_rate
from rightbatch.workload import Workload

pytest.importorskip("lightning")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import lightning.pytorch as pl
    from lightning.pytorch.tuner.tuning import Tuner

pytestmark = pytest.mark.filterwarnings("ignore")

NUM_EXAMPLES, GLOBAL_BATCH = 2048, 16


def make_data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(NUM_EXAMPLES, 8, generator=generator)
    y = X.sum(dim=1, keepdim=True) + 0.5 * torch.randn(NUM_EXAMPLES, 1, generator=generator)
    return X, y


def make_model() -> nn.Module:
    model = nn.Linear(8, 1)
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    return model


class Peer(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model, self.lr = make_model(), 1e-3
        self.seen: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        inputs, targets = batch
        loss = nn.functional.mse_loss(self.model(inputs), targets)
        self.seen.append(float(loss))
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr)


def make_trainer(folder: Path, max_steps: int) -> pl.Trainer:
    return pl.Trainer(
        max_steps=max_steps,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )


def make_loader() -> torch.utils.data.DataLoader[Any]:
    dataset = torch.utils.data.TensorDataset(*make_data())
    return torch.utils.data.DataLoader(dataset, batch_size=GLOBAL_BATCH)


@pytest.fixture(autouse=True)
def quiet() -> None:
    logging.getLogger("lightning.pytorch").setLevel(logging.CRITICAL)


def test_peer_failure_5_first_loss_and_suggestion(tmp_path: Path) -> None:
    peer = Peer()
    finder = Tuner(make_trainer(tmp_path, 100)).lr_find(
        peer, train_dataloaders=make_loader(), num_training=100, min_lr=1e-8, max_lr=1.0
    )
    assert finder is not None
    # The peer: the debias index is off by one, so the first average is 1/1.98 of the first loss.
    assert finder.results["loss"][0] == pytest.approx(peer.seen[0] / 1.98, rel=1e-3)
    theirs = finder.suggestion()

    workload = Workload(
        name="peer",
        make_model=make_model,
        train_data=make_data(),
        loss=nn.functional.mse_loss,
    )
    record = find_learning_rate(workload, global_batch=GLOBAL_BATCH, lr_min=1e-8, lr_max=1.0)
    ours = record.steepest.value
    assert ours is not None
    # λ of this loss is 2: training is stable up to lr ≈ 2/λ, less at a small batch.
    assert 1e-3 < ours < 0.5
    # The peer differentiates by linear lr: on the curve it saw itself, orders of magnitude below.
    on_its_curve = analyse_range_test(
        np.asarray(finder.results["lr"][: len(peer.seen)]), np.asarray(peer.seen)
    ).steepest
    assert on_its_curve is not None and 1e-3 < on_its_curve < 0.5
    assert theirs is not None and theirs < ours / 100


def test_peer_failure_5_after_100_training_steps(tmp_path: Path) -> None:
    peer = Peer()
    trainer = make_trainer(tmp_path, 100)
    trainer.fit(peer, make_loader())
    assert trainer.global_step == 100
    finder = Tuner(trainer).lr_find(
        peer, train_dataloaders=make_loader(), num_training=100, min_lr=1e-8, max_lr=1.0
    )
    # The best loss is still 0 when the first one comes, so the peer stops at once.
    assert finder is not None
    assert len(finder.results["loss"]) == 1
    assert finder.suggestion() is None
