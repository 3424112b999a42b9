"""Peak memory of this process: what torch's allocator gave out on CUDA, resident memory on a CPU."""

from __future__ import annotations

import re
import resource
import sys
from pathlib import Path

import torch

MIB = 2**20
PROC = Path("/proc/self")  # resolved in whichever process reads it


def peak_bytes(device: torch.device) -> int:
    """Most that was held at once since reset_peak(), or since the process began."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # ru_maxrss is the last resort: on Linux it survives exec, and a child starts with its parent's peak.
    if (PROC / "status").exists():
        return _status_bytes("VmHWM")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def reset_peak(device: torch.device) -> int:
    """Make what is held now the peak, where the system allows it; returns the peak then, in bytes."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.max_memory_allocated(device)
    try:
        (PROC / "clear_refs").write_text("5")
    except OSError:
        return peak_bytes(device)
    return _status_bytes("VmRSS")


def _status_bytes(field: str) -> int:
    found = re.search(rf"^{field}:\s+(\d+) kB", (PROC / "status").read_text(), re.MULTILINE)
    assert found, f"/proc/self/status has no {field}"
    return int(found[1]) * 1024
