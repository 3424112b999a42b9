"""Heads of a packed projection as views, whose gradients become the projection's without a copy where they can.

`unbind` gives the same views, but its backward pass stacks the gradients of queries, keys and values into a new matrix.
An attention backend that writes them into one [T, parts, H, d] matrix spares that pass over three tensors.

Axes: T packed tokens, H heads, d head width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def head_views(packed_TD: Tensor, parts: int, heads: int) -> tuple[Tensor, ...]:
    """[T, parts * H * d] -> `parts` views [T, H, d]."""
    views: tuple[Tensor, ...] = _HeadViews.apply(packed_TD, parts, heads)
    return views


class _HeadViews(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, packed: Tensor, parts: int, heads: int) -> tuple[Tensor, ...]:
        return packed.unflatten(1, (parts, heads, -1)).unbind(1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return joined(grads), None, None


def joined(grads: tuple[Tensor, ...]) -> Tensor:
    """`torch.stack(grads, 1).flatten(1)` of tensors [T, H, d]; the matrix itself where they are all its views."""
    first, parts = grads[0], len(grads)
    rows, heads, width = first.shape
    row = parts * heads * width
    storage, begin = first.untyped_storage().data_ptr(), first.storage_offset()
    if all(
        grad.dtype == first.dtype
        and grad.stride() == (row, width, 1)
        and grad.untyped_storage().data_ptr() == storage
        and grad.storage_offset() == begin + i * heads * width
        for i, grad in enumerate(grads)
    ):
        return first.as_strided((rows, row), (row, 1))
    return torch.stack(grads, 1).flatten(1)
