"""Where the parameters lie in the flat buffers that ZeRO divides over the ranks.

Axes: W ranks, S elements of a rank's part of one buffer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


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

    def part(self, named: Mapping[str, Tensor], rank: int, like_S: Tensor, world_size: int) -> Tensor:
        """The part of `rank`, [S] like `like_S`: the reverse of assemble(). Padding is zero."""
        count = len(like_S)
        if not self.split_each:
            flat = torch.cat([named[name].detach().reshape(-1) for name in self.names])
            flat = torch.nn.functional.pad(flat, (0, world_size * count - len(flat)))
            return flat[rank * count : (rank + 1) * count].to(like_S).clone()
        result, start = torch.zeros_like(like_S), 0
        for name, size in zip(self.names, self.sizes, strict=True):
            own = named[name].detach().reshape(-1)[rank * size : (rank + 1) * size]
            result[start : start + len(own)] = own.to(like_S)
            start += size
        return result
