"""Which sequences the attention benchmark measures, and their inputs, packed and padded.

Axes: N sequences, L tokens, T packed tokens, Q packed queries, H heads, d head width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from cosmos_fast.model.packing import pack_text
from cosmos_fast.ops.attention import Sequences

ONE_QUERY = ", one query"
CROP_TOKENS = {"global crops": 197, "local crops": 37}
NAMES = [kind + queries for queries in ("", ONE_QUERY) for kind in (*CROP_TOKENS, "captions")]
CONTEXT, CAPTION_TOKENS = 77, (12, 66)  # mean 39


class Case(NamedTuple):
    """Sequences of `lengths` keys each, of which the last query sees `seen`: fewer where a backend has lengths rounded
    up. pruned: one query a sequence, as the last block of a tower has them. padded: the length that all get in the
    baseline, which is the original's.
    """

    name: str
    sequences: Sequences
    lengths: list[int]
    seen: list[int]
    padded: int
    causal: bool
    pruned: bool

    @property
    def queries(self) -> list[int]:
        return [1] * len(self.lengths) if self.pruned else self.lengths

    def first(self, count: int) -> Case:
        """The first so many sequences."""
        lengths, seen, queries = (every[:count] for every in (self.lengths, self.seen, self.queries))
        device = self.sequences.cu_queries.device
        if lengths == seen:
            sequences = Sequences.from_lengths(queries, lengths, device=device)
        else:
            visible = [torch.tensor([keys]) for keys in seen]
            groups = [(1, length) for length in lengths]
            sequences = Sequences.from_groups([(1, 1)] * len(groups), groups, visible_keys=visible, device=device)
        return self._replace(sequences=sequences, lengths=lengths, seen=seen)


def make_case(name: str, count: int, backend: str, device: str) -> Case:
    """One of NAMES, laid out for the backend as the towers do."""
    kind, pruned = name.removesuffix(ONE_QUERY), name.endswith(ONE_QUERY)
    if kind != "captions":
        length = CROP_TOKENS[kind]
        queries = [(count, 1 if pruned else length)]
        sequences = Sequences.from_groups(queries, [(count, length)], device=device)
        return Case(name, sequences, [length] * count, [length] * count, length, False, pruned)
    ids = torch.zeros(count, CONTEXT, dtype=torch.long)
    low, high = CAPTION_TOKENS
    drawn = torch.randint(low, high + 1, (count,), generator=torch.Generator().manual_seed(0))
    ids[torch.arange(count), drawn - 1] = 1
    layout = pack_text(ids, backend=backend, device=torch.device(device)).layout
    lengths = [group.length for group in layout.groups for _ in range(group.count)]
    seen = [last + 1 for group in layout.groups for last in group.pooled] if pruned else lengths
    return Case(name, layout.kept_sequences if pruned else layout.sequences, lengths, seen, CONTEXT, True, pruned)


class Inputs(NamedTuple):
    """The same tokens twice, with gradients.

    packed: [T, 3, H, d], without queries [T, 2, H, d] where `single` holds them. padded: [N, L, 3 or 2, H, d].
    single: [Q, H, d] one query a sequence; empty where there are more.
    """

    packed: Tensor
    padded: Tensor
    single: Tensor

    def heads(self) -> tuple[Tensor, ...]:
        """Packed queries, keys, values."""
        parts = self.packed.unbind(1)
        return parts if len(parts) == 3 else (self.single, *parts)

    def padded_heads(self) -> tuple[Tensor, ...]:
        """[N, H, L, d] each, of queries [N, H, 1, d] where there is one a sequence."""
        parts = self.padded.permute(2, 0, 3, 1, 4).unbind(0)
        return parts if len(parts) == 3 else (self.single.unsqueeze(2), *parts)

    def leaves(self, *, padded: bool) -> list[Tensor]:
        """What has a gradient on this side."""
        tokens = self.padded if padded else self.packed
        return [tokens] if tokens.shape[-3] == 3 else [tokens, self.single]


def make_inputs(case: Case, heads: int, width: int, dtype: torch.dtype, seed: int) -> Inputs:
    """Drawn anew for every seed; `width` channels a head."""
    device = case.sequences.cu_queries.device
    generator = torch.Generator(device).manual_seed(seed)
    shape = (sum(case.lengths), 2 if case.pruned else 3, heads, width)
    single_shape = (len(case.lengths) if case.pruned else 0, heads, width)
    packed, single = (torch.randn(of, generator=generator, device=device).to(dtype) for of in (shape, single_shape))
    padded = packed.new_zeros(len(case.lengths), case.padded, *shape[1:])
    padded.flatten(0, 1)[rows_of(case.lengths, case.padded).to(device)] = packed
    return Inputs(packed.requires_grad_(), padded.requires_grad_(), single.requires_grad_())


def rows_of(lengths: list[int], apart: int) -> Tensor:
    """[T] rows of a matrix in which a sequence begins every `apart` rows."""
    return torch.cat([i * apart + torch.arange(length) for i, length in enumerate(lengths)])


def seen_rows(case: Case) -> Tensor:
    """[T] packed rows of keys that a query sees."""
    starts = [sum(case.lengths[:i]) for i in range(len(case.lengths))]
    return torch.cat([start + torch.arange(keys) for start, keys in zip(starts, case.seen, strict=True)])


def padded_mask(case: Case, dtype: torch.dtype) -> Tensor | None:
    """What hides keys of the padded sequences: zeros, and minus infinity above the diagonal, as the original has it;
    [N, 1, 1, L] with minus infinity behind the keys that the one query sees. None where all keys are seen."""
    if not case.causal:
        return None
    device = case.sequences.cu_queries.device
    if not case.pruned:
        return torch.full((case.padded, case.padded), -torch.inf, device=device, dtype=dtype).triu(1)
    hidden = torch.arange(case.padded) >= torch.tensor(case.seen).unsqueeze(1)
    mask = torch.zeros(hidden.shape, dtype=dtype).masked_fill(hidden, -torch.inf)
    return mask[:, None, None].to(device)
