"""What the residual LayerNorm's Triton kernels take, without Triton."""

from __future__ import annotations

import torch
from torch import Tensor

from cosmos_kernels import triton_support

MAX_DIM = 8192  # a row stays in registers
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def why_unsupported(x_TD: Tensor, *others: Tensor) -> str | None:
    """None where the kernels take these tensors, else the reason."""
    misplaced = triton_support.why_not_on(x_TD, *others)
    if misplaced is not None:
        return misplaced
    wrong = next((tensor.dtype for tensor in (x_TD, *others) if tensor.dtype not in DTYPES), None)
    if wrong is not None:
        return f"a tensor in {wrong}: it takes float32, bfloat16 and float16"
    if x_TD.shape[-1] > MAX_DIM:
        return f"rows of {x_TD.shape[-1]} channels, it takes at most {MAX_DIM}"
    return None
