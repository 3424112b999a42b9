"""An evaluation divided over ranks, with the results of one process.

What is evaluated stands in blocks, of samples or of texts. Rank r of W takes the blocks r, r + W, ..., and no batch
that a model sees holds parts of two blocks: whoever computes a block comes to the same numbers, to the last bit. What
the ranks have found then stands on all of them in the order of the blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from cosmos_fast.utils.collectives import Collectives
from cosmos_fast.utils.ranks import ONE, Ranks


@dataclass(frozen=True)
class Division:
    """Who takes what. Its methods but own() are collective: every rank calls them in the same order."""

    ranks: Ranks = field(default_factory=lambda: ONE)

    def own(self, blocks: int) -> range:
        """Numbers of the blocks that this rank takes."""
        return range(self.ranks.rank, blocks, self.ranks.world_size)

    def together(self) -> AbstractContextManager[None]:
        """Around a rank's own work: where one fails all do, instead of waiting for it. UserError."""
        return self.ranks.together()

    def join(self, own: Sequence[Any]) -> list[Any]:
        """own: a value of each own block, that JSON can hold -> those of all blocks."""
        found = self.ranks.gather(list(own))
        width = self.ranks.world_size
        return [found[block % width][block // width] for block in range(sum(map(len, found)))]

    def cat(self, own: Sequence[Tensor]) -> Tensor:
        """own: [rows of the block, ...] of each own block, float32 -> [rows of all blocks, ...]; at least one block.

        The blocks may differ in rows; one without any may be of shape [0]. Lies where the model's features lie.
        """
        if self.ranks.group is None:
            return torch.cat(list(own))
        shapes: list[list[int]] = self.join([list(part.shape) for part in own])
        width, device = self.ranks.world_size, self.ranks.device
        of_rank = [[shape[0] for shape in shapes[rank::width]] for rank in range(width)]
        row = max((shape[1:] for shape in shapes), key=len)
        sent = torch.zeros(max(map(sum, of_rank)), *row, device=device)  # one size for all
        if sum(of_rank[self.ranks.rank]):
            sent[: sum(of_rank[self.ranks.rank])] = torch.cat(list(own))
        gathered = Collectives(self.ranks.group).all_gather(sent).wait()
        parts = [rows[: sum(sizes)].split(sizes) for rows, sizes in zip(gathered, of_rank, strict=True)]
        return torch.cat([parts[block % width][block // width] for block in range(len(shapes))])


ALONE = Division()
"""All blocks in this process."""
