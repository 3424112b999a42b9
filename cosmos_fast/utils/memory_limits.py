"""How much memory this process may use: of the machine, of its control group, of a GPU."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

ROOT = Path("/")  # of the files of the kernel; tests put a folder of their own here


class MemoryLimits(NamedTuple):
    """total: what there is. free: what may be taken now without pushing anything out. Bytes."""

    total: int
    free: int


def memory_limits(device: torch.device) -> MemoryLimits:
    """Of a GPU, or of this machine and every control group around this process, whichever leaves least.

    Raises:
        OSError: the system tells nothing of its memory.
    """
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return MemoryLimits(total, free + torch.cuda.memory_reserved(device))
    limits = [_machine(), *_control_groups()]
    return MemoryLimits(min(limit.total for limit in limits), min(limit.free for limit in limits))


def _machine() -> MemoryLimits:
    try:
        kib = {name: int(number) for name, number in re.findall(r"^(\w+):\s+(\d+) kB", _read("proc/meminfo"), re.M)}
        return MemoryLimits(1024 * kib["MemTotal"], 1024 * kib["MemAvailable"])
    except FileNotFoundError:
        import os

        page = os.sysconf("SC_PAGE_SIZE")  # macOS: says nothing of what is free
        return MemoryLimits(page * os.sysconf("SC_PHYS_PAGES"), page * os.sysconf("SC_PHYS_PAGES"))


def _control_groups() -> Iterator[MemoryLimits]:
    """Limits of the group of this process and of those around it; version 2, and version 1 where it still serves."""
    try:
        lines = _read("proc/self/cgroup").splitlines()
    except OSError:
        return
    for _, controllers, path in (line.split(":", 2) for line in lines if line.count(":") >= 2):
        if not controllers:
            mount, names = "sys/fs/cgroup", ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            mount = "sys/fs/cgroup/memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        parts = [part for part in path.split("/") if part]
        # In a container the path may be that of the host, of which the container sees the last part only, at the root.
        for depth in range(len(parts), -1, -1):
            found = _group("/".join([mount, *parts[:depth]]), *names)
            if found is not None:
                yield found


def _group(folder: str, limit_file: str, usage_file: str, cache_name: str) -> MemoryLimits | None:
    """None without a limit. The page cache that was not used lately gives way, so it counts as free."""
    try:
        limit = int(_read(f"{folder}/{limit_file}"))  # "max" is no number
        used = int(_read(f"{folder}/{usage_file}"))
        cache = re.search(rf"^{cache_name} (\d+)", _read(f"{folder}/memory.stat"), re.M)
    except (OSError, ValueError):
        return None
    return MemoryLimits(limit, max(0, limit - used + (int(cache[1]) if cache else 0)))


def _read(path: str) -> str:
    return (ROOT / path).read_text()
