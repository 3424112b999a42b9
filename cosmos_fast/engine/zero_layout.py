"""Where the parameters lie in the flat buffers that ZeRO divides over the ranks.

Axes: W ranks, S elements of a rank's part of one buffer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cosmos_fast.model.stored import elements


@dataclass(frozen=True)
class Slice:
    """`count` elements of a parameter from its element `start` on; in a rank's part they begin at `place`."""

    name: str
    start: int
    count: int
    place: int


@dataclass(frozen=True)
class FlatLayout:
    """Parameters of one buffer: names, shapes and, for each, the elements it takes of a rank's part or of all parts.

    split_each: every parameter is divided over the ranks by itself (stage 3), and `sizes` counts elements of one rank's
    share of it; else the parameters stand one after the other in the parts of all ranks put together (stages 1 and 2),
    and `sizes` counts their elements. What follows the last parameter is padding.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    sizes: tuple[int, ...]
    split_each: bool

    @classmethod
    def of(cls, names: Sequence[str], shapes: Sequence[Sequence[int]], shares: Sequence[int] | None) -> FlatLayout:
        """shares: elements of one rank's share of each parameter where every parameter is split, else None."""
        by_size = [math.prod(shape) for shape in shapes] if shares is None else list(shares)
        return cls(tuple(names), tuple(tuple(shape) for shape in shapes), tuple(by_size), shares is not None)

    def assemble(self, parts_WS: Tensor) -> dict[str, Tensor]:
        """Whole parameters out of the parts of all ranks; views of `parts_WS` unless every parameter is split."""
        flat = parts_WS if self.split_each else parts_WS.reshape(1, -1)
        found, start = {}, 0
        for name, shape, size in zip(self.names, self.shapes, self.sizes, strict=True):
            found[name] = flat[:, start : start + size].reshape(-1)[: math.prod(shape)].view(shape)
            start += size
        return found

    def slices(self, rank: int, count: int) -> list[Slice]:
        """What the part of `rank`, of `count` elements, holds, in its order; padding is left out."""
        found, end = [], 0
        for name, shape, size in zip(self.names, self.shapes, self.sizes, strict=True):
            begin, end = end, end + size
            if self.split_each:  # a share of every parameter, at the same place in every part
                start, place = rank * size, begin
                stop = min(start + size, math.prod(shape))
            else:
                start, place = max(0, rank * count - begin), max(0, begin - rank * count)
                stop = min(size, (rank + 1) * count - begin)
            if stop > start:
                found.append(Slice(name, start, stop - start, place))
        return found

    def part(self, named: Mapping[str, Tensor], rank: int, like_S: Tensor, prefix: str = "") -> Tensor:
        """The part of `rank`, [S] like `like_S`: the reverse of assemble(). Padding is zero.

        Of stored tensors only what the part holds is read. prefix: of the parameters' names in `named`.
        """
        part_S = torch.zeros_like(like_S)
        for one in self.slices(rank, len(like_S)):
            own = elements(named, f"{prefix}{one.name}", one.start, one.count)
            part_S[one.place : one.place + one.count] = own.to(like_S)
        return part_S
