"""Peers' failures in finding the largest batch, by number (1-4, 8, 14): theirs shown, ours right.

Lightning's tuner runs here as it is, with an exhausted memory injected at a known size.
"""

import warnings

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import rightbatch as rb
from rightbatch.device.out_of_memory import is_out_of_memory
from rightbatch.errors import NoBatchFitsError

OOM = "CUDA out of memory. Tried to allocate 20.00 MiB"


class Ours:
    """A step that runs out of memory above a limit."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.ran: list[int] = []

    def __call__(self, n: int) -> None:
        self.ran.append(n)
        if n > self.limit:
            raise RuntimeError(OOM)


@pytest.fixture
def lightning():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the peer's own
        return pytest.importorskip("lightning.pytorch")


def run_lightning(lightning, tmp_path, *, limit: int, num_examples: int = 4096, **options):
    """Lightning's answer, and the sizes of the batches that its model really saw."""
    ran: list[int] = []

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.batch_size = 2
            self.layer = nn.Linear(2, 1)

        def training_step(self, batch, batch_idx):
            (x,) = batch
            ran.append(len(x))
            if len(x) > limit:
                raise RuntimeError(OOM)
            return self.layer(x).sum()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=1e-3)

        def train_dataloader(self):
            return DataLoader(TensorDataset(torch.zeros(num_examples, 2)), self.batch_size)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = lightning.Trainer(
            max_epochs=1,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path,
        )
        tuner = lightning.tuner.Tuner(trainer)
        answer = tuner.scale_batch_size(Module(), steps_per_trial=1, **options)
    return answer, ran


@pytest.mark.parametrize(("max_val", "their_answer"), [(64, 64), (48, 64)])
def test_failure_1_returns_a_size_that_never_ran(lightning, tmp_path, max_val, their_answer):
    answer, ran = run_lightning(lightning, tmp_path, limit=10_000, max_val=max_val)
    assert answer == their_answer
    assert answer not in ran  # the failure

    step = Ours(limit=10_000)
    found = rb.find_max_micro_batch(step, max_size=max_val, start=2)
    assert found.micro_batch == max_val
    assert found.micro_batch in step.ran


def test_failure_2_the_first_probe_ignores_the_initial_value(lightning, tmp_path):
    answer, ran = run_lightning(lightning, tmp_path, limit=5, init_val=64, max_trials=1)
    assert answer >= 64  # the failure: five fit
    assert 64 not in ran

    step = Ours(limit=5)
    found = rb.find_max_micro_batch(step, max_size=4096, start=64, exact=True)
    assert step.ran[0] == 64
    assert found.micro_batch == 5


def test_failure_3_a_dataset_of_100_of_which_90_fit(lightning, tmp_path):
    answer, ran = run_lightning(lightning, tmp_path, limit=90, num_examples=100, max_trials=10)
    assert answer > 90  # the failure
    assert answer not in ran

    step = Ours(limit=90)
    found = rb.find_max_micro_batch(step, max_size=100, exact=True)
    assert found.micro_batch == 90
    assert max(step.ran) <= 100
    assert len(step.ran) <= 15
    assert 81 <= rb.find_max_micro_batch(Ours(limit=90), max_size=100).micro_batch <= 90


def test_failure_4_one_example_does_not_fit(lightning, tmp_path):
    with pytest.raises(ValueError, match="batch_size should be a positive integer"):
        run_lightning(lightning, tmp_path, limit=0)  # the failure: a batch of 0 is tried

    with pytest.raises(NoBatchFitsError, match="one example runs out of memory"):
        rb.find_max_micro_batch(Ours(limit=0), max_size=4096)


MISSED = [
    RuntimeError("HIP out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("XPU out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("MPS backend out of memory (MPS allocated: 5.51 GB)"),
    RuntimeError("[enforce fail at alloc_cpu.cpp] data. DefaultCPUAllocator: not enough memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    MemoryError("Unable to allocate 8.00 GiB for an array"),
    RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 8589934592 bytes."),
]


@pytest.mark.parametrize("error", MISSED, ids=str)
def test_failure_8_exhausted_memory_is_not_recognised(lightning, error):
    from lightning.pytorch.utilities.memory import is_oom_error

    assert not is_oom_error(error)  # the failure
    assert is_out_of_memory(error)


def test_failure_14_batch_norm_at_one_example_is_taken_for_exhausted_memory():
    norm = nn.BatchNorm1d(3)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        rb.find_max_micro_batch(lambda n: norm(torch.zeros(n, 3)), max_size=16)


def test_failure_14_a_size_is_returned_when_nothing_fits():
    with pytest.raises(NoBatchFitsError):
        rb.find_max_micro_batch(Ours(limit=0), max_size=16, start=16)


def test_failure_14_extrapolation_is_never_the_answer():
    step = Ours(limit=700)
    found = rb.find_max_micro_batch(step, max_size=253_731)
    assert found.micro_batch in step.ran
    assert 630 <= found.micro_batch <= 700
