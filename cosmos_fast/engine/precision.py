"""Device and arithmetic of a run."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

from cosmos_fast.utils.bf16 import bf16_if_fast
from cosmos_fast.utils.errors import UserError


def resolve_device(request: str) -> torch.device:
    """ "auto" is the GPU where there is one, else the CPU."""
    if request == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(request)
    except RuntimeError:
        raise UserError(f"run.device is {request!r}: use auto, cpu, cuda or cuda:<number>") from None
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"run.device is {request!r}: only cpu and cuda are supported")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"run.device is {request!r}, but torch sees {torch.cuda.device_count()} CUDA devices: use cpu")
    return device


_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Precision:
    """Type of the matrix products. Weights, optimizer state and teacher are fp32 in every case.

    name: "fp32", "bf16" or "fp16"; the last one needs engine.loss_scale.
    """

    name: str
    device_type: str

    def autocast(self) -> AbstractContextManager[object]:
        """Context of a model's forward pass."""
        if self.name == "fp32":
            return nullcontext()
        return torch.autocast(self.device_type, dtype=_AUTOCAST[self.name])

    @property
    def image_dtype(self) -> torch.dtype:
        """Of the loader's images: autocast rounds them to it before anything else, so half the bytes lose nothing."""
        return torch.bfloat16 if self.name == "bf16" else torch.float32


def resolve_precision(request: str, device: torch.device) -> Precision:
    """ "auto" is bf16 on GPUs that have it (compute capability 8 and up), fp32 elsewhere."""
    return Precision(bf16_if_fast(request, device), device.type)
