"""Rows of fp32 in three quarters of their bytes: whole multiples of the row's largest entry / (2^23 - 1).

An entry is off by less than 2^-23 of the largest of its row. For features, whose entries are all of about one size, it
is little more than the rounding of fp32, and less than what a product of two of them is off by.

Axes: D entries of a row.
"""

from __future__ import annotations

import torch
from torch import Tensor

_STEPS = 2**23 - 1


def pack_rows(rows: Tensor) -> Tensor:
    """fp32 [..., D] -> uint8 [..., 3 D + 4]: the low bytes of the multiples, then the largest entry."""
    largest = rows.abs().amax(dim=-1, keepdim=True)
    multiples = (rows / largest * _STEPS).round().to(torch.int32)
    low = multiples.view(torch.uint8).unflatten(-1, (-1, 4))[..., :3].flatten(-2)
    return torch.cat([low, largest.view(torch.uint8)], dim=-1)


def unpack_rows(packed: Tensor) -> Tensor:
    """What pack_rows took, up to its rounding; rows with NaN or Inf come back as NaN."""
    low = packed[..., :-4].unflatten(-1, (-1, 3))
    largest = packed[..., -4:].clone(memory_format=torch.contiguous_format).view(torch.float32)
    # As the high bytes, so that the sign is in its place: 256 times the multiple, which fp32 holds exactly.
    multiples = torch.cat([torch.zeros_like(low[..., :1]), low], dim=-1).view(torch.int32).squeeze(-1)
    return multiples.float() / (256.0 * _STEPS) * largest
