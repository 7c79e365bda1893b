"""Sizes, headrooms in made-up control groups, and the honesty of the peak."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rightbatch.device import memory
from rightbatch.errors import UsageError

MIB = 1 << 20


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("8GiB", 8 << 30),
        ("8G", 8 << 30),
        ("8gb", 8_000_000_000),
        ("1.5 MiB", 3 << 19),
        ("512 k", 512 << 10),
        ("4096", 4096),
        ("4096b", 4096),
        ("2TiB", 2 << 40),
        (123, 123),
    ],
)
def test_parse_bytes(text, expected):
    assert memory.parse_bytes(text) == expected


@pytest.mark.parametrize("text", ["", "lots", "8 elephants", "-8GiB", "GiB", "1e3MiB", "nan"])
def test_parse_bytes_refuses_other_forms(text):
    with pytest.raises(UsageError, match=r"cannot be read.*Write it like '8GiB'"):
        memory.parse_bytes(text)


@pytest.mark.parametrize("size", [0, "0GiB", -5])
def test_parse_bytes_refuses_no_memory(size):
    with pytest.raises(UsageError, match="must be positive"):
        memory.parse_bytes(size)


@given(st.integers(min_value=1, max_value=1 << 55))
def test_formatting_keeps_three_digits(size):
    number, unit = memory.format_bytes(size).split()
    exponent = ("B", "KiB", "MiB", "GiB", "TiB").index(unit)
    assert float(number) * 1024**exponent == pytest.approx(size, rel=6e-3)
    assert float(number) < 1000 or unit == "TiB"


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def fake_system(tmp_path: Path, membership: str, mount: str) -> Path:
    write(tmp_path / "proc/self/cgroup", membership)
    write(tmp_path / "proc/self/mountinfo", mount)
    return tmp_path / "proc"


def test_cgroup_v2_counts_every_ancestor(tmp_path):
    proc = fake_system(
        tmp_path,
        "0::/pod/app\n",
        "30 23 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw\n",
    )
    base = tmp_path / "sys/fs/cgroup"
    write(base / "pod/memory.max", f"{600 * MIB}\n")
    write(base / "pod/memory.current", f"{100 * MIB}\n")
    write(base / "pod/memory.stat", f"anon 1\ninactive_file {20 * MIB}\n")
    write(base / "pod/app/memory.max", "max\n")
    write(base / "pod/app/memory.current", f"{90 * MIB}\n")
    assert memory.cgroup_headroom_bytes(proc, tmp_path) == [520 * MIB]


def test_cgroup_v2_inside_a_container_namespace(tmp_path):
    proc = fake_system(
        tmp_path, "0::/\n", "30 23 0:26 / /sys/fs/cgroup ro - cgroup2 cgroup rw,nsdelegate\n"
    )
    base = tmp_path / "sys/fs/cgroup"
    write(base / "memory.max", f"{64 * MIB}\n")
    write(base / "memory.current", f"{100 * MIB}\n")
    assert memory.cgroup_headroom_bytes(proc, tmp_path) == [0]


def test_cgroup_v1_in_a_container_whose_mount_shows_only_its_group(tmp_path):
    proc = fake_system(
        tmp_path,
        "9:cpu,cpuacct:/docker/abc\n4:memory:/docker/abc\n0::/\n",
        "31 23 0:27 /docker/abc /sys/fs/cgroup/memory ro - cgroup cgroup rw,memory\n"
        "32 23 0:28 /docker/abc /sys/fs/cgroup/cpu ro - cgroup cgroup rw,cpu\n",
    )
    base = tmp_path / "sys/fs/cgroup/memory"
    write(base / "memory.limit_in_bytes", f"{512 * MIB}")
    write(base / "memory.usage_in_bytes", f"{200 * MIB}")
    write(base / "memory.stat", f"inactive_file 5\ntotal_inactive_file {8 * MIB}\n")
    assert memory.cgroup_headroom_bytes(proc, tmp_path) == [320 * MIB]


def test_cgroup_v1_without_limit(tmp_path):
    proc = fake_system(
        tmp_path,
        "4:memory:/job\n",
        "31 23 0:27 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n",
    )
    base = tmp_path / "sys/fs/cgroup/memory/job"
    write(base / "memory.limit_in_bytes", "9223372036854771712")
    write(base / "memory.usage_in_bytes", "1")
    assert memory.cgroup_headroom_bytes(proc, tmp_path) == []


def test_no_control_groups_at_all(tmp_path):
    assert memory.cgroup_headroom_bytes(tmp_path / "nothing") == []


def test_available_is_no_more_than_the_machine_has():
    assert 0 < memory.available_bytes() <= memory.psutil.virtual_memory().total


def test_a_tighter_group_wins_over_the_machine(monkeypatch):
    monkeypatch.setattr(memory, "cgroup_headroom_bytes", lambda: [3 * MIB, 5 * MIB])
    assert memory.available_bytes() == 3 * MIB


@pytest.mark.skipif(sys.platform != "linux", reason="high-water marks can be reset on Linux only")
def test_the_peak_sees_what_came_and_went_and_forgets_it_after_a_reset():
    torch.ones(60 * MIB // 4)  # starts the thread pool, whose stacks are data too
    memory.reset_peak()
    before = memory.peak_bytes()
    block = torch.ones(60 * MIB // 4)
    del block
    grown = memory.peak_bytes() - before
    assert 59 * MIB < grown < 62 * MIB
    assert memory.reset_peak()
    assert memory.peak_bytes() < before + 2 * MIB


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA fences on Linux")
def test_the_fence_makes_allocation_fail_and_is_lifted_afterwards():
    # Far beyond the limit: what earlier tests left may be freed meanwhile and leave room.
    limit = memory.read_host_memory().data_bytes + 40 * MIB
    with memory.memory_fence(limit), pytest.raises(RuntimeError, match="can't allocate memory"):
        torch.empty(1024 * MIB // 4)
    torch.empty(1024 * MIB // 4)


def test_no_limit_is_no_fence():
    with memory.memory_fence(None):
        torch.ones(4)


def test_asking_about_memory_does_not_import_torch():
    code = "import sys, rightbatch.device.memory as m; m.available_bytes(); m.peak_bytes(); "
    code += "m.release_cached_memory(); sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_is_fenced_by_its_allocator():
    torch.cuda.init()
    with (
        memory.memory_fence(64 * MIB, "cuda"),
        pytest.raises(torch.OutOfMemoryError),
    ):
        torch.empty(128 * MIB, dtype=torch.uint8, device="cuda")
    memory.reset_peak("cuda")
    block = torch.empty(128 * MIB, dtype=torch.uint8, device="cuda")
    assert memory.peak_bytes("cuda") >= 128 * MIB
    del block
    memory.release_cached_memory()
    assert memory.available_bytes("cuda") > 0
