"""What a machine has, as one line of JSON: GPU and versions, or an error.

`gpu_check.py` asks this in a process of its own, because a driver that hangs would hang whoever asks.
"""

from __future__ import annotations

import importlib.util
import json
import platform
import re
import subprocess
from importlib import metadata
from typing import Any

PACKAGES = ("torch", "triton", "numpy", "pytest", "matplotlib", "inf-cl", "liger-kernel", "flash-attn", "apex")


def facts() -> dict[str, Any]:
    """device, capability, and the versions that figures depend on; {"error": ...} where there is no usable GPU."""
    if importlib.util.find_spec("torch") is None:
        return {"error": "torch is not installed"}
    import torch

    if not torch.cuda.is_available():
        return {"error": "no usable CUDA device: gpu-check needs an NVIDIA GPU and a CUDA build of torch"}
    return {
        "device": torch.cuda.get_device_name(),
        "capability": torch.cuda.get_device_capability(),
        **versions(),
        "cuda": torch.version.cuda,
    }


def versions() -> dict[str, str]:
    """Of Python, nvcc and packages, as far as they are there."""
    found = {"python": platform.python_version(), "nvcc": _nvcc()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _nvcc() -> str:
    try:
        told = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, timeout=20).stdout
    except (OSError, subprocess.TimeoutExpired):
        return "none"
    release = re.search(r"release ([\d.]+)", told)
    return release[1] if release else "unknown"


if __name__ == "__main__":
    print(json.dumps(facts()))
