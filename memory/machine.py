"""Memory that there is, and that is held."""

from __future__ import annotations

import os
import resource
import sys
from pathlib import Path

import torch

STATUS, GROUPS, LIMITS = Path("/proc/self/status"), Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")


def peak_mib(device: torch.device) -> float:
    """Most memory held so far, MiB: what PyTorch allocated on a GPU; on a CPU, all that this process had resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    if STATUS.exists():  # the kernel's own count; getrusage counts in what the parent process held at the start
        return _status("VmHWM") / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def reset_peak(device: torch.device) -> None:
    """`peak_mib` counts from here on. Raises OSError on a CPU where the system is not Linux."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        Path("/proc/self/clear_refs").write_text("5")


def there(device: torch.device) -> float:
    """Bytes that this process may hold, with what it holds already: the GPU's, or on a CPU what is free and within the
    limits of its control groups. Infinite where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    if not STATUS.exists():
        return float("inf")
    free = int(Path("/proc/meminfo").read_text().split("MemAvailable:")[1].split()[0]) * 1024
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # of this run, on this machine
    return min([free / processes + resident(), *(limit / processes for limit in group_limits())])


def resident() -> float:
    """Bytes that this process holds now; 0 where the system does not say."""
    return _status("VmRSS") if STATUS.exists() else 0


def _status(name: str) -> int:
    """A line of /proc/self/status, in bytes."""
    return int(STATUS.read_text().split(f"{name}:")[1].split()[0]) * 1024


def group_limits() -> list[int]:
    """Of the control groups that this process is in, versions 1 and 2."""
    limits = []
    for line in GROUPS.read_text().splitlines():
        _, kinds, group = line.split(":", 2)
        if kinds and "memory" not in kinds.split(","):
            continue
        folder = LIMITS / "memory" / group.strip("/") if kinds else LIMITS / group.strip("/")
        for path in (folder, *folder.parents):  # a group's limit holds for those inside; a container hides some
            file = path / ("memory.limit_in_bytes" if kinds else "memory.max")
            if path.is_relative_to(LIMITS) and file.is_file() and (text := file.read_text().strip()).isdigit():
                limits.append(int(text))
    return limits
