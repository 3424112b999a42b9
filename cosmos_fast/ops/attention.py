"""Self-attention of packed sequences, each within itself: the towers' rows, whatever the lengths, in one operation.

    out_i = sum_j softmax_j(q_i . k_j / sqrt(d)) v_j        over the keys j of the sequence that query i sees

A backend is a namespace with one stage function, differentiable by autograd:

    attend(q [T, H, d], k [S, H, d], v [S, H, d], sequences, causal) -> out [T, H, d]

Queries and keys may be strided views (of one [T, 3, H, d] matrix, say) with contiguous channels. All backends but
"sdpa" take sequences of any lengths in one call; "sdpa" makes one call a group of equal lengths, so that the packing
rounds lengths up to few groups (`Sequences.visible_keys`). A sequence may have fewer queries than keys: the last block
of a tower makes only the rows that are read.

Axes: N sequences, T packed queries, S packed keys, H heads, d head width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cosmos_fast.ops import attention_flash, attention_limits, attention_sdpa, attention_varlen, attention_xformers
from cosmos_fast.ops import attention_native as by_native
from cosmos_fast.ops import attention_triton as by_triton
from cosmos_fast.ops.attention_checks import OP, check_inputs
from cosmos_fast.ops.attention_sequences import Sequences
from cosmos_fast.ops.backends import Backend, choose, register, stages_for
from cosmos_fast.utils.errors import UserError
from cosmos_kernels import attention_native, attention_parts, triton_support

__all__ = ["OP", "Sequences", "choose_attention", "packed_attention", "takes_any_length"]


def packed_attention(
    q_THd: Tensor, k_SHd: Tensor, v_SHd: Tensor, sequences: Sequences, *, causal: bool, backend: str = "auto"
) -> Tensor:
    """Attention of every query to the keys of its sequence.

    Args:
        q_THd: [T, H, d] queries; fp64, fp32, bf16 or fp16, as far as the backend goes.
        k_SHd, v_SHd: [S, H, d] keys and values, of the same dtype and device.
        sequences: which rows belong together.
        causal: query i of n sees the first m - n + i + 1 of m keys only.
        backend: "auto", "flash", "varlen", "xformers", "triton", "native" or "sdpa".

    Returns:
        [T, H, d] in the dtype of the queries.

    Raises:
        ValueError: shapes that do not fit the sequences, several dtypes or devices, a causal mask over more queries
            than keys, or a backend that cannot run.
    """
    check_inputs(q_THd, k_SHd, v_SHd, sequences, causal)
    if sequences.rounded:
        if backend not in ("auto", "sdpa"):
            raise ValueError(f"{OP}: backend {backend!r} takes no rounded sequences: pack them exactly")
        backend = "sdpa"
    # A single query is the last one: it sees all keys, and no backend needs a mask for it.
    causal = causal and sequences.max_queries > 1
    longest = _longest(max(sequences.max_queries, sequences.max_keys))
    return stages_for(OP, backend, q_THd, k_SHd, v_SHd, longest).attend(q_THd, k_SHd, v_SHd, sequences, causal)


def choose_attention(
    request: str, *, tokens: int, longest: int, heads: int, width: int, dtype: torch.dtype, device: torch.device
) -> str:
    """The name of the backend for self-attention of about so many tokens; logs each new choice once.

    Args:
        request: "auto" or a backend's name.
        tokens: rows of queries, as far as known: the measured order of backends depends on it.
        longest: tokens of the longest sequence.
        heads, width: H and d.
        dtype, device: of the queries.

    Raises:
        UserError: an explicit request that is unknown or cannot be met.
    """
    probe_THd = torch.empty((), dtype=dtype, device=device).expand(tokens, heads, width)
    try:
        return choose(OP, request, probe_THd, probe_THd, probe_THd, _longest(longest)).name
    except ValueError as error:
        raise UserError(f"{error}; auto takes what runs here") from None


def _longest(tokens: int) -> Tensor:
    """A length in the form in which backends are asked about tensors: one without storage, of so many elements."""
    return torch.empty(tokens, device="meta")


def _why_not_triton(q_THd: Tensor, k_SHd: Tensor, v_SHd: Tensor, longest: Tensor | None = None) -> str | None:
    objection = attention_parts.why_unsupported(q_THd, k_SHd, v_SHd)
    if objection is None and longest is not None:
        objection = attention_parts.why_too_long(len(longest), len(longest), q_THd)
    return objection


def takes_any_length(backend: str) -> bool:
    """Whether sequences need not be rounded up to the length of a group."""
    return backend != "sdpa"


register(
    Backend(
        OP,
        "flash",
        attention_flash,
        "the flash-attn package, version 3 on Hopper where installed; fp16 and bf16",
        why_unavailable=attention_flash.why_unavailable,
        why_unsupported=attention_limits.why_not_half,
    ),
    Backend(
        OP,
        "varlen",
        attention_varlen,
        "FlashAttention-2 as PyTorch 2.10 and later bring it; fp16 and bf16",
        why_unavailable=attention_varlen.why_unavailable,
        why_unsupported=attention_limits.why_not_half,
    ),
    Backend(
        OP,
        "xformers",
        attention_xformers,
        "xformers' block-diagonal masks; fp16, bf16 and fp32",
        why_unavailable=attention_xformers.why_unavailable,
        why_unsupported=attention_xformers.why_unsupported,
    ),
    Backend(
        OP,
        "triton",
        by_triton,
        "for sequences of at most 256 tokens; fp16 and bf16, several short sequences a tile",
        why_unavailable=triton_support.why_missing,
        why_unsupported=_why_not_triton,
        automatic=False,  # until it has been measured against the others
    ),
    Backend(
        OP,
        "native",
        by_native,
        "C++ on the CPU, heads whole and fused; fp32, sequences of at most 512 tokens",
        why_unavailable=attention_native.why_missing,
        why_unsupported=attention_native.why_unsupported,
    ),
    Backend(OP, "sdpa", attention_sdpa, "PyTorch, one call a group of equal lengths; runs everywhere"),
)
