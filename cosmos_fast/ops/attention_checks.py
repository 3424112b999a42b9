"""What packed attention is given, checked in words before a backend sees it.

Axes: T packed queries, S packed keys, H heads, d head width.
"""

from __future__ import annotations

from torch import Tensor

from cosmos_fast.ops.attention_sequences import Sequences

OP = "attention"


def check_inputs(q_THd: Tensor, k_SHd: Tensor, v_SHd: Tensor, sequences: Sequences, causal: bool) -> None:
    """Nothing where these fit together; which dtypes, devices, widths and lengths it takes is for a backend to say.

    Raises:
        ValueError: names the argument, what it is and what was expected.
    """
    if sequences.queries == 0:
        raise ValueError(f"{OP}: sequences are {sequences.query_groups}, expected at least one")
    if not q_THd.is_floating_point():
        raise ValueError(f"{OP}: q_THd is {q_THd.dtype}, expected a floating-point type")
    heads_and_width = tuple(q_THd.shape[1:]) if q_THd.dim() == 3 else ("H", "d")
    sides = ("q_THd", q_THd, sequences.queries), ("k_SHd", k_SHd, sequences.keys), ("v_SHd", v_SHd, sequences.keys)
    for label, tensor, rows in sides:
        if tensor.dim() != 3 or tensor.shape[0] != rows or tensor.shape[1:] != heads_and_width:
            expected = ", ".join(map(str, (rows, *heads_and_width)))
            raise ValueError(f"{OP}: {label} has shape {tuple(tensor.shape)}, expected ({expected}) for the sequences")
        if (tensor.dtype, tensor.device) != (q_THd.dtype, q_THd.device):
            kinds = f"{tensor.dtype} on {tensor.device}, expected {q_THd.dtype} on {q_THd.device}"
            raise ValueError(f"{OP}: {label} is {kinds} like q_THd")
    if sequences.cu_queries.device != q_THd.device:
        kinds = f"{sequences.cu_queries.device}, expected {q_THd.device}"
        raise ValueError(f"{OP}: sequences are on {kinds} like q_THd: make them with device=...")
    if causal:
        _check_causal(sequences)


def _check_causal(sequences: Sequences) -> None:
    """A query that sees no key has no attention; backends would disagree on what to make of it."""
    for (_, queries), (_, keys) in zip(sequences.query_groups, sequences.key_groups, strict=True):
        if queries > keys:
            raise ValueError(
                f"{OP}: sequences have {queries} queries for {keys} keys, a causal mask needs at least as many keys"
            )
