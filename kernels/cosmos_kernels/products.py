"""Matrix products of 16-bit operands by the library, summed and stored in fp32."""

from __future__ import annotations

import functools

import torch
from torch import Tensor


def add_product(out: Tensor, a: Tensor, b: Tensor, *, alpha: float, overwrite: bool) -> None:
    """out += alpha a @ b, or out = alpha a @ b where `overwrite`.

    Args:
        out: fp32 [M, N], contiguous. a, b: [M, K] and [K, N] of one dtype: fp32, bf16 or fp16; sums are fp32.
    """
    beta = 0.0 if overwrite else 1.0
    if a.dtype == torch.float32:
        out.addmm_(a, b, beta=beta, alpha=alpha)
    elif not a.is_cuda:
        out.addmm_(a.float(), b.float(), beta=beta, alpha=alpha)
    elif _adds_in_place(a.device, a.dtype):
        torch.addmm(out, a, b, out_dtype=torch.float32, beta=beta, alpha=alpha, out=out)
    else:
        product = torch.mm(a, b, out_dtype=torch.float32)
        _ = torch.mul(product, alpha, out=out) if overwrite else out.add_(product, alpha=alpha)


@functools.cache
def _adds_in_place(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this torch adds a 16-bit product to an fp32 matrix without a copy: some want all of one dtype."""
    ones = torch.ones(16, 16, device=device, dtype=dtype)
    out = torch.ones(16, 16, device=device)
    try:
        torch.addmm(out, ones, ones, out_dtype=torch.float32, beta=1.0, alpha=0.5, out=out)
    except RuntimeError:
        return False
    return bool((out == 9.0).all())
