"""What the Triton kernels of packed attention share on the host, without Triton: limits, tiles, runs of sequences."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cosmos_kernels import triton_support
from cosmos_kernels.pool_parts import block_size, stored_dtype

MAX_TOKENS = 256  # keys, and queries, of a sequence: a row of scores stays in registers
MAX_HEAD_DIM = 128
WIDE_HEAD = 64  # heads with more channels leave registers for fewer queries
WIDE_SHARED_BYTES = 147_456  # that keys and values of more than MAX_TILE tokens take with wide heads
MAX_TILE = 128  # rows or columns of a tile that several sequences share
MAX_SHARING = 8  # sequences of one tile
MAX_STRIDE = 2**22  # elements from token to token: offsets within a tile are 32-bit
MAX_OFFSET = 2**31 - 1  # and so are those of heads
# What a program costs beside its products (start, latency of its loads), in scores of a tile. An estimate, not
# measured: it is what makes three sequences of 37 tokens share a tile of 128.
PROGRAM_COST = 4096


@dataclass(frozen=True)
class Run:
    """Consecutive sequences that one launch handles: `count` from `first` on, none longer than these lengths."""

    first: int
    count: int
    max_queries: int
    max_keys: int


@functools.cache
def architecture(device: torch.device) -> int:
    """80, 90 or 100: whose tiles suit this GPU; Hopper's in the interpreter.

    Those of A100 are for every GPU whose products take their operands from registers: Ada, the Blackwell of
    workstations, and what is not known yet. They spill on none and need the least shared memory.
    """
    if device.type != "cuda":
        return 90
    return {9: 90, 10: 100, 11: 100}.get(torch.cuda.get_device_capability(device)[0], 80)


def why_unsupported(q_THd: Tensor, k_SHd: Tensor, v_SHd: Tensor, *others: Tensor) -> str | None:
    """None where the kernels take these tensors, else the reason. Lengths: see `why_too_long`."""
    misplaced = triton_support.why_not_on(q_THd, k_SHd, v_SHd, *others)
    if misplaced is not None:
        return misplaced
    if q_THd.dtype not in (torch.bfloat16, torch.float16) and not (
        triton_support.INTERPRETED and q_THd.dtype == torch.float32
    ):
        return f"queries in {q_THd.dtype}: its products take bfloat16 or float16"
    if q_THd.shape[-1] > MAX_HEAD_DIM:
        return f"heads of {q_THd.shape[-1]} channels, it takes at most {MAX_HEAD_DIM}"
    return None


def why_too_long(max_queries: int, max_keys: int, q_THd: Tensor | None = None) -> str | None:
    """None where sequences of these lengths (with these heads, on their device) fit a program, else the reason."""
    longest = max(max_queries, max_keys)
    if longest > MAX_TOKENS:
        return f"sequences of {longest} tokens, it takes at most {MAX_TOKENS}"
    if q_THd is None or max_keys <= MAX_TILE or q_THd.shape[-1] <= WIDE_HEAD:
        return None
    if triton_support.shared_bytes(q_THd.device) >= WIDE_SHARED_BYTES:
        return None
    return (
        f"sequences of {max_keys} tokens with heads of {q_THd.shape[-1]} channels: on this GPU it takes {MAX_TILE} "
        f"tokens, or {WIDE_HEAD} channels"
    )


@functools.cache
def sharing(max_queries: int, max_keys: int) -> int:
    """How many sequences of these lengths one program takes: the number that costs least a sequence."""

    def cost(count: int) -> float:
        scores = block_size(count * max_queries, MAX_TOKENS) * block_size(count * max_keys, MAX_TOKENS)
        return (scores + PROGRAM_COST) / count

    fitting = [count for count in range(1, MAX_SHARING + 1) if count * max(max_queries, max_keys) <= MAX_TILE]
    return min(fitting, key=cost, default=1)


def runs(query_groups: Sequence[tuple[int, int]], key_groups: Sequence[tuple[int, int]]) -> list[Run]:
    """The launches for sequences in groups of one length, [(count, length), ...] of queries and of keys.

    Neighbouring groups whose lengths need the same tile share a launch, so that short sequences do not pay for long
    ones. Both lists describe the same sequences; their groups need not begin together.
    """
    found: list[Run] = []
    for count, queries, keys in _in_step(query_groups, key_groups):
        last = found[-1] if found else None
        if last is not None and _tile(last.max_queries, last.max_keys) == _tile(queries, keys):
            longest = max(last.max_queries, queries), max(last.max_keys, keys)
            found[-1] = Run(last.first, last.count + count, *longest)
        else:
            found.append(Run(last.first + last.count if last else 0, count, queries, keys))
    return found


def _tile(queries: int, keys: int) -> tuple[int, int]:
    return block_size(queries, MAX_TOKENS), block_size(keys, MAX_TOKENS)


def _in_step(
    query_groups: Sequence[tuple[int, int]], key_groups: Sequence[tuple[int, int]]
) -> list[tuple[int, int, int]]:
    """(count, queries, keys) of the pieces in which both lists have one length."""
    pieces: list[tuple[int, int, int]] = []
    queries, keys = list(query_groups), list(key_groups)
    assert sum(count for count, _ in queries) == sum(count for count, _ in keys), "groups of other sequences"
    while queries and keys:
        (query_count, query_length), (key_count, key_length) = queries.pop(), keys.pop()
        count = min(query_count, key_count)
        if count:
            pieces.append((count, query_length, key_length))
        if query_count > count:
            queries.append((query_count - count, query_length))
        if key_count > count:
            keys.append((key_count - count, key_length))
    return pieces[::-1]


def readable(x_THd: Tensor) -> Tensor:
    """As it is where channels are contiguous and offsets of tokens and heads fit 32 bits, else a contiguous copy."""
    token, head, channel = x_THd.stride()
    strided = channel == 1 and 0 < token <= MAX_STRIDE and head * x_THd.shape[1] <= MAX_OFFSET
    return x_THd if strided else x_THd.contiguous()


def empty_like_views(inputs: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Tensors for the gradients of q, k and v; views of one [T, 3, H, d], or of one [S, 2, H, d] for k and v, where
    they are such views themselves."""
    q, k, v = inputs

    def made(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=stored_dtype(q), device=q.device)

    if not _neighbours(k, v):
        return made(*q.shape), made(*k.shape), made(*v.shape)
    parts = 3 if _neighbours(q, k) else 2
    together = made(k.shape[0], parts, *k.shape[1:]).unbind(1)
    return together[0] if parts == 3 else made(*q.shape), together[-2], together[-1]


def _neighbours(a: Tensor, b: Tensor) -> bool:
    """Whether b's rows lie right behind a's, in rows of one matrix."""
    width = a.shape[1] * a.shape[2]
    rows = a.shape == b.shape and a.stride() == b.stride() and a.stride()[1:] == (a.shape[2], 1)
    return rows and a.stride(0) >= 2 * width and b.data_ptr() - a.data_ptr() == width * a.element_size()
