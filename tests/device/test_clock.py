import time

import pytest
import torch

from rightbatch.device.clock import Clock, DeviceClock, synchronise


def test_the_clock_measures_what_passed() -> None:
    clock: Clock = DeviceClock()
    start = clock.now()
    time.sleep(0.02)
    assert 0.02 <= clock.now() - start < 1


def test_the_clock_waits_for_an_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[torch.device] = []
    monkeypatch.setattr(torch.accelerator, "synchronize", waited.append)
    DeviceClock("cuda:0").now()
    assert waited == [torch.device("cuda:0")]
    DeviceClock("cpu").now()
    synchronise("cpu")
    assert len(waited) == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_cuda_queued_work_is_included() -> None:
    clock = DeviceClock("cuda")
    a = torch.randn(4096, 4096, device="cuda")
    start = clock.now()
    for _ in range(20):
        a = a @ a / 64
    queued = time.perf_counter() - start
    assert clock.now() - start > queued
