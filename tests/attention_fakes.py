"""Stand-ins for the packages behind packed attention: each checks what it is given and computes the plain result.

`use(name, monkeypatch)` puts one in the place of its package and lets its backend run on a CPU.
Axes: T packed queries, S packed keys, n queries and m keys of a sequence, H heads, d head width.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable
from dataclasses import dataclass, replace
from types import ModuleType

import pytest
import torch
from torch import Tensor

from cosmos_fast.ops import attention_flash, attention_varlen, backends
from cosmos_fast.ops.attention import OP

# "varlen-2.10" and "flash-3" are other versions of a package.
FAKES = ("varlen", "varlen-2.10", "flash", "flash-3", "xformers")


def use(fake: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """Make a backend run on its stand-in, on any tensors; returns the backend's name."""
    name = fake.split("-")[0]
    _INSTALLERS[name](fake, monkeypatch)
    known = [
        replace(backend, why_unavailable=lambda: None, why_unsupported=lambda *_: None)
        if backend.name == name
        else backend
        for backend in backends._BACKENDS[OP]
    ]
    monkeypatch.setitem(backends._BACKENDS, OP, known)
    return name


def attention(
    q_THd: Tensor, k_SHd: Tensor, v_SHd: Tensor, cu_q: Iterable[int], cu_k: Iterable[int], causal: bool
) -> Tensor:
    """The definition, sequence by sequence; a causal mask is aligned to the end."""
    q_bounds, k_bounds = list(map(int, cu_q)), list(map(int, cu_k))
    outputs = []
    for i in range(len(q_bounds) - 1):
        q_nHd, (k_mHd, v_mHd) = (
            q_THd[q_bounds[i] : q_bounds[i + 1]],
            (x_SHd[k_bounds[i] : k_bounds[i + 1]] for x_SHd in (k_SHd, v_SHd)),
        )
        n, m = len(q_nHd), len(k_mHd)
        scores_Hnm = torch.einsum("nhd,mhd->hnm", q_nHd, k_mHd) / math.sqrt(q_nHd.shape[-1])
        if causal:
            seen_nm = torch.ones(n, m, dtype=torch.bool).tril(m - n)
            scores_Hnm = scores_Hnm.masked_fill(~seen_nm, -torch.inf)
        outputs.append(torch.einsum("hnm,mhd->nhd", scores_Hnm.softmax(-1), v_mHd))
    return torch.cat(outputs)


def checked(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, causal: bool
) -> Tensor:
    """`attention`, on arguments that a FlashAttention kernel takes."""
    assert q.dim() == k.dim() == 3
    assert k.shape == v.shape
    assert k.shape[1:] == q.shape[1:]
    assert q.dtype == k.dtype == v.dtype
    assert q.stride(-1) == k.stride(-1) == v.stride(-1) == 1
    for cu, rows, longest in ((cu_q, q, max_q), (cu_k, k, max_k)):
        assert cu.dtype == torch.int32
        assert cu.dim() == 1
        assert cu.is_contiguous()
        assert int(cu[0]) == 0
        assert int(cu[-1]) == len(rows)
        assert type(longest) is int
        assert int(cu.diff().max()) == longest
        assert int(cu.diff().min()) > 0
    assert len(cu_q) == len(cu_k)
    assert type(causal) is bool
    return attention(q, k, v, cu_q, cu_k, causal)


def _varlen(fake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def since_2_10(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, *, return_aux=None):
        assert return_aux is None
        return checked(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal)

    def windowed(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1)):
        assert scale is None
        assert window_size in ((-1, -1), (-1, 0))
        return checked(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, window_size == (-1, 0))

    module = ModuleType(attention_varlen.MODULE)
    module.varlen_attn = since_2_10 if fake == "varlen-2.10" else windowed
    monkeypatch.setitem(sys.modules, attention_varlen.MODULE, module)
    _forget(attention_varlen, "varlen_function", monkeypatch)


def _flash(fake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale=None, causal=False
    ):
        assert softmax_scale is None
        out = checked(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal)
        return (out, torch.zeros(q.shape[1], q.shape[0])) if fake == "flash-3" else out

    module = ModuleType("flash_attn_interface" if fake == "flash-3" else "flash_attn")
    module.flash_attn_varlen_func = flash_attn_varlen_func
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(attention_flash, "has_version_3", lambda: fake == "flash-3")
    _forget(attention_flash, "flash_function", monkeypatch)


def _forget(module: ModuleType, cached: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The function without its memory, for as long as the test runs."""
    monkeypatch.setattr(module, cached, getattr(module, cached).__wrapped__)


@dataclass
class SeqLenInfo:
    """The fields that xformers' `_SeqLenInfo` has."""

    seqstart: Tensor
    max_seqlen: int
    min_seqlen: int
    seqstart_py: list[int]

    @classmethod
    def from_seqlens(cls, seqlens, device):
        starts = [0]
        for length in seqlens:
            starts.append(starts[-1] + length)
        # Wrong on purpose: what was made on the host must not be what the kernel reads.
        return cls(torch.zeros(len(starts), dtype=torch.int32, device=device), max(seqlens), min(seqlens), starts)


@dataclass
class BlockDiagonalMask:
    q_seqinfo: SeqLenInfo
    k_seqinfo: SeqLenInfo
    _batch_sizes: list[int] | None = None

    @classmethod
    def from_seqlens(cls, q_seqlen, kv_seqlen=None, *, device=None):
        assert device == torch.device("cpu")
        assert isinstance(device, torch.device)  # a name would do for torch, not for xformers
        q = SeqLenInfo.from_seqlens(q_seqlen, device)
        return cls(q, q if kv_seqlen in (None, q_seqlen) else SeqLenInfo.from_seqlens(kv_seqlen, device))


@dataclass
class BlockDiagonalCausalMask(BlockDiagonalMask):
    pass


@dataclass
class BlockDiagonalCausalFromBottomRightMask(BlockDiagonalMask):
    pass


def memory_efficient_attention(query, key, value, attn_bias=None, p=0.0, scale=None):
    assert (p, scale) == (0.0, None)
    q_info, k_info = attn_bias.q_seqinfo, attn_bias.k_seqinfo
    for info in (q_info, k_info):
        assert info.seqstart.tolist() == info.seqstart_py
    causal = type(attn_bias) is not BlockDiagonalMask
    if type(attn_bias) is BlockDiagonalCausalMask:  # aligned to the start: good for equal lengths only
        assert q_info is k_info
    (q, k, v) = (packed.squeeze(0) for packed in (query, key, value))
    longest = q_info.max_seqlen, k_info.max_seqlen
    return checked(q, k, v, q_info.seqstart, k_info.seqstart, *longest, causal).unsqueeze(0)


def _xformers(_: str, monkeypatch: pytest.MonkeyPatch) -> None:
    modules = {name: ModuleType(name) for name in ("xformers", "xformers.ops", "xformers.ops.fmha")}
    bias = modules["xformers.ops.fmha"].attn_bias = ModuleType("xformers.ops.fmha.attn_bias")
    for kind in (BlockDiagonalMask, BlockDiagonalCausalMask, BlockDiagonalCausalFromBottomRightMask):
        setattr(bias, kind.__name__, kind)
    modules["xformers.ops"].memory_efficient_attention = memory_efficient_attention
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)


_INSTALLERS = {"varlen": _varlen, "flash": _flash, "xformers": _xformers}
