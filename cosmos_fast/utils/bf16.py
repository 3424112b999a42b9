"""Which devices compute in bf16."""

from __future__ import annotations

import torch


def bf16_if_fast(request: str, device: torch.device) -> str:
    """A precision by its name: "auto" is bf16 on GPUs that have it (compute capability 8 and up), fp32 elsewhere."""
    if request != "auto":
        return request
    has_bf16 = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 8
    return "bf16" if has_bf16 else "fp32"
