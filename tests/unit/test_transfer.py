"""Tensors of a structure move together, in one copy."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cosmos_fast.utils.transfer import copy_together, move


@dataclass(frozen=True)
class Inner:
    rows: Tensor
    count: int


@dataclass(frozen=True)
class Outer:
    inner: Inner
    parts: tuple[Tensor | None, ...]
    named: dict[str, list[Tensor]]


def test_copies_keep_values_types_and_shapes_and_share_a_buffer():
    tensors = [
        torch.arange(7, dtype=torch.int32),
        torch.randn(3, 5)[:, ::2],
        torch.tensor(True),
        torch.empty(0, 4),
        torch.arange(3),
    ]
    copies = copy_together(tensors, torch.device("cpu"))
    for tensor, copy in zip(tensors, copies, strict=True):
        assert torch.equal(tensor, copy)
        assert (tensor.dtype, tensor.shape) == (copy.dtype, copy.shape)
        assert copy.data_ptr() % 16 == 0 or copy.numel() == 0
    assert len({copy.untyped_storage().data_ptr() for copy in copies}) == 1


def test_structures_move_and_what_was_one_stays_one():
    shared = torch.arange(4)
    structure = Outer(Inner(shared, 3), (None, torch.ones(2)), {"a": [shared]})
    assert move(structure, torch.device("cpu")) is structure
    moved = move(structure, torch.device("meta"))
    assert moved.inner.rows.is_meta
    assert moved.inner.rows is moved.named["a"][0]
    assert moved.inner.count == 3
    assert moved.parts[0] is None
    assert moved.parts[1].shape == (2,)
    assert moved.parts[1].is_meta
    assert move(moved, torch.device("meta")).inner.rows is moved.inner.rows
