"""What the pooling's Triton kernels share on the host, without Triton: limits, and when they do not apply."""

from __future__ import annotations

import torch
from torch import Tensor

from cosmos_kernels import triton_support

LAYER_NORM_EPS = 1e-5
MAX_TOKENS = 256  # a row of scores stays in registers
MAX_ROWS = 64  # rows of a sample in one program
MAX_STRIDE = 2**22  # elements from token to token: offsets within a sample are 32-bit


def why_unsupported(tokens_BLD: Tensor, *others: Tensor) -> str | None:
    """None where the kernels take these tokens, else the reason."""
    misplaced = triton_support.why_not_on(tokens_BLD, *others)
    if misplaced is not None:
        return misplaced
    if tokens_BLD.dtype not in (torch.bfloat16, torch.float16) and not (
        triton_support.INTERPRETED and tokens_BLD.dtype == torch.float32
    ):
        # Three TF32 products in place of one fp32 product spill; the library's fp32 products do not.
        return f"tokens in {tokens_BLD.dtype}: its products take bfloat16 or float16"
    if tokens_BLD.shape[1] > MAX_TOKENS:
        return f"{tokens_BLD.shape[1]} tokens, it takes at most {MAX_TOKENS}"
    return None


def readable(tokens_BLD: Tensor) -> Tensor:
    """As it is where channels are contiguous, else a contiguous copy."""
    contiguous = tokens_BLD.stride(2) == 1 and tokens_BLD.stride(1) <= MAX_STRIDE
    return tokens_BLD if contiguous else tokens_BLD.contiguous()


def block_size(size: int, largest: int) -> int:
    """The power of two that covers `size`, between 16 (the least a product takes) and `largest`."""
    return max(16, min(largest, 1 << (size - 1).bit_length()))


def stored_dtype(x: Tensor) -> torch.dtype:
    """What a kernel stores results of x's dtype in: itself, or fp32 for torch to round, where stores truncate."""
    return torch.float32 if triton_support.upcast(x.dtype) else x.dtype
