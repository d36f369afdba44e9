"""What this process may use of the machine: cores and memory, limits of containers included."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup")  # of version 2; in a container its own


def usable_cores() -> int:
    """Cores this process may use: affinity mask and container quota included."""
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:  # macOS, Windows
        cores = os.cpu_count() or 1
    with suppress(OSError, ValueError):  # no cgroup, or the quota is "max"
        quota, period = (_CGROUP / "cpu.max").read_text().split()
        cores = min(cores, max(1, round(int(quota) / int(period))))
    return cores


def total_ram() -> int:
    """Bytes of RAM of the machine or of the container."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 8 << 30
    with suppress(OSError, ValueError):  # no cgroup, or no limit ("max")
        total = min(total, int((_CGROUP / "memory.max").read_text()))
    return total


def free_ram() -> int:
    """Bytes of RAM that could still be used, of the machine or of the container."""
    free = total_ram() // 2  # where nobody says, half of all
    with suppress(OSError, StopIteration):
        free = _number_after("MemAvailable:", Path("/proc/meminfo")) * 1024
    with suppress(OSError, ValueError):
        limit = int((_CGROUP / "memory.max").read_text())
        used = int((_CGROUP / "memory.current").read_text())
        with suppress(OSError, StopIteration):  # files that were read count as used, and give way
            used -= _number_after("inactive_file", _CGROUP / "memory.stat")
        free = min(free, limit - used)
    return max(free, 0)


def _number_after(name: str, path: Path) -> int:
    lines = (line.split() for line in path.read_text().splitlines())
    return next(int(words[1]) for words in lines if words[0] == name)
