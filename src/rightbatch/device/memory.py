"""How much memory there is, how much of it a process may take, and how much it took.

On the host, "memory" is the *data size* of a process: private writable pages (Linux: `VmData`).
That is what `RLIMIT_DATA` fences, so the number that is measured and the number that is enforced
are the same. Resident memory would also count the libraries' code, which the kernel can drop, and
would not count pages that are promised but not touched yet.

The kernel keeps no high-water mark of the data size, only one of the resident size (`VmHWM`). Data
are mostly touched when they are used, so both rise together, and

    peak data ≥ data now + (resident peak − resident now),

with equality where everything is touched. Whoever can look from outside (`data_bytes_of`) also sees
workspaces that are reserved and never touched.

On CUDA it is what PyTorch's caching allocator hands out, fenced by the allocator itself.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import psutil

from rightbatch.errors import UsageError

_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 4096
_UNITS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}
_SIZE = re.compile(r"\s*(?P<number>\d+(\.\d+)?)\s*(?P<unit>[kmgt]?)(?P<kind>i?b|)\s*", re.I)
_STATUS = re.compile(r"^(Vm\w+|Rss\w+):\s+(\d+) kB", re.MULTILINE)


def parse_bytes(size: str | int) -> int:
    """Reads a size in bytes: `8GiB` and `8G` count in 1024s, `8GB` in 1000s.

    Args:
        size: Text such as `"512MiB"`, or a number of bytes.

    Returns:
        The number of bytes.

    Raises:
        UsageError: If the text has another form, or the size is not positive.

    Example:
        >>> parse_bytes("8GiB"), parse_bytes("1.5 GB"), parse_bytes(4096)
        (8589934592, 1500000000, 4096)
    """
    if isinstance(size, str):
        match = _SIZE.fullmatch(size)
        if match is None:
            raise UsageError(
                f"The memory size {size!r} cannot be read. Write it like '8GiB', '512MiB' or '8GB'."
            )
        base = 1000 if match["kind"].lower() == "b" and match["unit"] else 1024
        size = round(float(match["number"]) * base ** _UNITS[match["unit"].lower()])
    if size <= 0:
        raise UsageError(f"The memory size is {size} bytes. It must be positive, such as '8GiB'.")
    return size


def format_bytes(size: float) -> str:
    """A size for people, in binary units.

    Args:
        size: Bytes.

    Returns:
        Three significant digits and a unit.

    Example:
        >>> format_bytes(9_771_050_598), format_bytes(512), format_bytes(-2048)
        ('9.1 GiB', '512 B', '-2 KiB')
    """
    magnitude = abs(size)
    exponent = min(int(math.log(magnitude, 1024)), 4) if magnitude >= 1 else 0
    if magnitude / 1024**exponent >= 999.5 and exponent < 4:
        exponent += 1
    unit = ("B", "KiB", "MiB", "GiB", "TiB")[exponent]
    return f"{size / 1024**exponent:.3g} {unit}"


def available_bytes(device: str = "cpu") -> int:
    """Memory that a new process could take now without pushing anybody out.

    On the host: the least of what the machine has available and what is left in every control
    group (v1 and v2) that this process is in; psutil alone would tell a container about the whole
    machine. On CUDA: what the driver says is free, plus what this process has cached.

    Args:
        device: `cpu`, `cuda` or `cuda:1`.

    Returns:
        Bytes.
    """
    if device.startswith("cuda"):
        import torch

        free, _total = torch.cuda.mem_get_info(device)
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return free + cached
    candidates = [psutil.virtual_memory().available, *cgroup_headroom_bytes()]
    return max(0, min(candidates))


def cgroup_headroom_bytes(proc: Path = Path("/proc"), root: Path | None = None) -> list[int]:
    """What is left in each control group with a memory limit that this process is in.

    Page cache that the kernel would drop first (`inactive_file`) counts as free.

    Args:
        proc: Where the proc file system is mounted.
        root: Prepended to every mount point (for tests); default: none.

    Returns:
        Bytes, one entry for each group with a limit; empty without limits or outside Linux.
    """
    headrooms: list[int] = []
    for group, names in _memory_groups(proc, root):
        limit, usage = (_read_number(group / names[i]) for i in (0, 1))
        # Version 1 writes "no limit" as the largest multiple of the page size.
        if limit is None or usage is None or limit >= 1 << 60:
            continue
        cache = _read_stat(group / "memory.stat", names[2])
        headrooms.append(max(0, limit - usage + cache))
    return headrooms


_V2 = ("memory.max", "memory.current", "inactive_file")
_V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def _memory_groups(proc: Path, root: Path | None) -> Iterator[tuple[Path, tuple[str, str, str]]]:
    """This process's memory groups and their ancestors, each with the names of its files."""
    try:
        memberships = (proc / "self" / "cgroup").read_text().splitlines()
        mounts = (proc / "self" / "mountinfo").read_text().splitlines()
    except OSError:
        return
    paths: dict[str, str] = {}
    for line in memberships:
        _id, controllers, path = line.split(":", 2)
        if not controllers:
            paths["cgroup2"] = path
        elif "memory" in controllers.split(","):
            paths["cgroup"] = path
    for line in mounts:
        before, _, after = line.partition(" - ")
        kind, _source, options = after.split(" ")[:3]
        if kind not in paths or (kind == "cgroup" and "memory" not in options.split(",")):
            continue
        mounted_root, mount_point = before.split(" ")[3:5]
        mount = Path(mount_point) if root is None else root / mount_point.lstrip("/")
        names = _V2 if kind == "cgroup2" else _V1
        # Inside a container the mount may show only the group itself: its root is then our path.
        inside = PurePosixPath(paths[kind])
        with contextlib.suppress(ValueError):
            inside = PurePosixPath("/") / inside.relative_to(mounted_root)
        for level in (inside, *inside.parents):
            group = mount / str(level).lstrip("/")
            if group.is_dir():
                yield group, names


def _read_number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # "max" is no number: no limit
        return None


def _read_stat(path: Path, key: str) -> int:
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith(f"{key} ")), 0)


@dataclass(frozen=True, kw_only=True)
class HostMemory:
    """What a process has taken of the host's memory, in bytes.

    Attributes:
        data_bytes: Data size now.
        resident_bytes: Resident size now.
        peak_resident_bytes: The largest resident size since the process began, or since
            `reset_peak`.
    """

    data_bytes: int
    resident_bytes: int
    peak_resident_bytes: int

    @property
    def peak_data_bytes(self) -> int:
        """The largest data size, rather too low (see the head of this module)."""
        return self.data_bytes + max(0, self.peak_resident_bytes - self.resident_bytes)


def read_host_memory() -> HostMemory:
    """What this process has taken of the host's memory.

    Returns:
        Sizes from `/proc/self/status`; elsewhere the resident size stands for the data size.
    """
    if sys.platform == "linux":
        status = dict(_STATUS.findall(Path("/proc/self/status").read_text()))
        kib = {name: int(value) * 1024 for name, value in status.items()}
        return HostMemory(
            data_bytes=kib["VmData"],
            resident_bytes=kib["VmRSS"],
            peak_resident_bytes=kib["VmHWM"],
        )
    info = psutil.Process().memory_info()
    peak = getattr(info, "peak_wset", info.rss)
    return HostMemory(data_bytes=info.rss, resident_bytes=info.rss, peak_resident_bytes=peak)


def data_bytes_of(pid: int) -> int:
    """The data size of another process now; cheap enough to be asked every few milliseconds.

    Args:
        pid: The process.

    Returns:
        Bytes, or 0 when the process has gone or the platform does not tell.
    """
    try:
        fields = Path(f"/proc/{pid}/statm").read_bytes().split()
    except OSError:
        return 0
    # The field counts the main stack too, which RLIMIT_DATA does not: a few hundred KiB.
    return int(fields[5]) * _PAGE_BYTES


def reset_peak(device: str = "cpu") -> bool:
    """Starts a new high-water mark of this process's memory.

    Args:
        device: `cpu` or a CUDA device.

    Returns:
        Whether the platform can do it; if not, the mark is that of the whole life of the process.
    """
    if device.startswith("cuda"):
        import torch

        torch.cuda.reset_peak_memory_stats(device)
        return True
    try:
        # 5 resets the peak resident size (proc(5)).
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def peak_bytes(device: str = "cpu") -> int:
    """The most memory this process has had on a device since it began, or since `reset_peak`.

    Args:
        device: `cpu` or a CUDA device.

    Returns:
        Bytes: data size on the host, allocated by PyTorch on CUDA.
    """
    if device.startswith("cuda"):
        import torch

        return torch.cuda.max_memory_allocated(device)
    return read_host_memory().peak_data_bytes


@contextmanager
def memory_fence(limit_bytes: int | None, device: str = "cpu") -> Iterator[None]:
    """Makes allocations of this process beyond a limit fail with an error that can be caught.

    On Linux hosts by `RLIMIT_DATA`, on CUDA by the allocator. Elsewhere it does nothing: there
    the parent watches the child from outside.

    Args:
        limit_bytes: The most this process may have, or None for no fence.
        device: `cpu` or a CUDA device.

    Yields:
        Nothing.
    """
    if limit_bytes is None:
        yield
    elif device.startswith("cuda"):
        with _cuda_fence(limit_bytes, device):
            yield
    elif sys.platform == "linux":
        import resource

        # Only the soft limit, so that it can be lifted again to report what happened.
        soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
        fenced = limit_bytes if hard == resource.RLIM_INFINITY else min(limit_bytes, hard)
        resource.setrlimit(resource.RLIMIT_DATA, (fenced, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))
    else:
        yield


@contextmanager
def _cuda_fence(limit_bytes: int, device: str) -> Iterator[None]:
    import torch

    _free, total = torch.cuda.mem_get_info(device)
    torch.cuda.set_per_process_memory_fraction(min(1.0, limit_bytes / total), device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)


def can_fence(device: str = "cpu") -> bool:
    """Whether `memory_fence` makes allocations fail on this platform and device.

    Args:
        device: `cpu` or a CUDA device.

    Returns:
        True on Linux hosts and on CUDA.
    """
    return device.startswith("cuda") or sys.platform == "linux"


def release_cached_memory() -> None:
    """Returns what the garbage collector and the devices' caching allocators still hold."""
    import gc

    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    if sys.platform == "linux":
        _trim_heap()


def _trim_heap() -> None:
    """Gives the free pages inside glibc's heap back, which `free` alone keeps."""
    import ctypes

    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def num_kernel_kills() -> int | None:
    """How many processes the kernel has killed for lack of memory since it started.

    Returns:
        The count of `/proc/vmstat`, or None where there is none.
    """
    try:
        lines = Path("/proc/vmstat").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), None)


def volunteer_for_the_kernel() -> None:
    """Makes this process the first one the kernel kills when the machine runs out of memory."""
    if os.name == "posix":
        with contextlib.suppress(OSError):
            Path("/proc/self/oom_score_adj").write_text("1000")
