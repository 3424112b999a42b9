"""What keeps a backend of packed attention from a machine or from tensors, in words."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

HALF_DTYPES = (torch.bfloat16, torch.float16)
MAX_FLASH_WIDTH = 256
FLASH_WIDTH_STEP = 8


@functools.cache
def why_no_gpu(min_capability: tuple[int, int]) -> str | None:
    """None where there is a GPU of this compute capability or newer."""
    if not torch.cuda.is_available():
        return "no CUDA device"
    capability = torch.cuda.get_device_capability()
    if capability < min_capability:
        wanted, found = ("{}.{}".format(*numbers) for numbers in (min_capability, capability))
        return f"compute capability {found}, it needs {wanted} or newer"
    return None


def why_not_half(q_THd: Tensor, *_: Tensor) -> str | None:
    """None where a FlashAttention kernel takes these tensors."""
    return why_not_fused(q_THd, HALF_DTYPES)


def why_not_fused(q_THd: Tensor, dtypes: tuple[torch.dtype, ...]) -> str | None:
    """None for CUDA tensors of one of these types whose head width fits vectors of 16 bytes."""
    if q_THd.device.type != "cuda":
        return f"it takes CUDA tensors only, these are on {q_THd.device.type}"
    if q_THd.dtype not in dtypes:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        return f"queries in {str(q_THd.dtype).removeprefix('torch.')}, it takes {names}: set run.precision=bf16"
    width = q_THd.shape[-1]
    if width > MAX_FLASH_WIDTH or width % FLASH_WIDTH_STEP:
        return f"heads of {width} channels, it takes multiples of {FLASH_WIDTH_STEP} up to {MAX_FLASH_WIDTH}"
    return None
