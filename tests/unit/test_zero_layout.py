"""Parameters in the flat buffers of ZeRO: whole ones become the parts of ranks and come back."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch

from cosmos_fast.engine.zero_layout import FlatLayout

SHAPES = {"a": (3, 5), "scale": (), "bias": (7,), "one": (1, 1)}
NAMED = {
    name: torch.arange(math.prod(shape)).float().view(shape) + 100 * i
    for i, (name, shape) in enumerate(SHAPES.items(), 1)
}


def split_by_hand(world: int, shares: Sequence[int] | None) -> torch.Tensor:
    """The parts of all ranks [W, S], spelt out."""
    if shares is None:
        flat = [float(x) for tensor in NAMED.values() for x in tensor.flatten()]
        count = -(-len(flat) // (2 * world)) * 2
        flat += [0.0] * (world * count - len(flat))
        return torch.tensor(flat).view(world, count)
    rows = []
    for rank in range(world):
        row: list[float] = []
        for tensor, share in zip(NAMED.values(), shares, strict=True):
            padded = [float(x) for x in tensor.flatten()] + [0.0] * (world * share - tensor.numel())
            row += padded[rank * share : (rank + 1) * share]
        rows.append([*row, 0.0, 0.0])  # the buffer is longer than what it holds
    return torch.tensor(rows)


@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("split_each", [False, True])
def test_parts_and_back(world: int, split_each: bool) -> None:
    shares = [-(-tensor.numel() // world) for tensor in NAMED.values()] if split_each else None
    layout = FlatLayout.of(list(SHAPES), list(SHAPES.values()), shares)
    expected = split_by_hand(world, shares)
    parts = [layout.part(NAMED, rank, torch.zeros(expected.shape[1])) for rank in range(world)]
    assert torch.equal(torch.stack(parts), expected)
    found = layout.assemble(expected)
    assert found.keys() == NAMED.keys()
    assert all(torch.equal(found[name], NAMED[name]) for name in NAMED)


@pytest.mark.parametrize("world", [1, 2, 3, 4, 50])
@pytest.mark.parametrize("split_each", [False, True])
def test_slices_say_what_lies_where(world: int, split_each: bool) -> None:
    """Every element once, padding never."""
    shares = [-(-tensor.numel() // world) for tensor in NAMED.values()] if split_each else None
    layout = FlatLayout.of(list(SHAPES), list(SHAPES.values()), shares)
    parts = split_by_hand(world, shares)
    found = {name: torch.full((tensor.numel(),), math.nan) for name, tensor in NAMED.items()}
    for rank, part in enumerate(parts):
        for one in layout.slices(rank, len(part)):
            target = found[one.name][one.start : one.start + one.count]
            assert one.count > 0
            assert bool(target.isnan().all()), (rank, one)
            target.copy_(part[one.place : one.place + one.count])
    assert all(torch.equal(found[name].view(NAMED[name].shape), NAMED[name]) for name in NAMED)
