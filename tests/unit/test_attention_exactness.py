"""Packed attention by every backend against fp64, sequence by sequence: no worse than plain PyTorch in the same dtype.

Packages that are missing run as stand-ins, Triton's kernels in its interpreter where there is no GPU.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from cosmos_fast.ops import backends
from cosmos_fast.ops.attention import OP, Sequences, packed_attention
from cosmos_kernels import reference, triton_support
from tests import attention_fakes
from tests.kernels.truth import GRADIENT_FACTOR, OUTPUT_FACTOR, Outcome, assert_tensors_no_worse, outcome

LENGTHS = [1, 2, 16, 17, 77, 196, 197]  # around tiles and the plain products of a CPU; crops and captions
WIDTH = 16
HALF = (torch.bfloat16, torch.float16)
PACKAGES = {fake.split("-")[0] for fake in attention_fakes.FAKES}
OURS = [backend for backend in backends._BACKENDS[OP] if backend.name not in PACKAGES]
DTYPES = {
    "sdpa": (torch.float32, *HALF),
    "native": (torch.float32,),
    "xformers": (torch.float32, *HALF),
    # fp32 is interpreted only, to check the formulas.
    "triton": (torch.float32, torch.bfloat16) if triton_support.INTERPRETED else HALF,
}
KINDS = [
    (name, dtype)
    for name in (*(backend.name for backend in OURS), *attention_fakes.FAKES)
    for dtype in DTYPES.get(name, HALF)
]


@pytest.mark.parametrize("pruned", [False, True], ids=["every query", "one query"])
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize(("backend", "dtype"), KINDS, ids=str)
def test_outputs_and_gradients(backend, dtype, causal, pruned, monkeypatch):
    if reason := next((known.why_unavailable() for known in OURS if known.name == backend), None):
        pytest.skip(reason)
    on_gpu = backend == "triton" and not triton_support.INTERPRETED
    name = attention_fakes.use(backend, monkeypatch) if backend in attention_fakes.FAKES else backend
    queries = [1] * len(LENGTHS) if pruned else LENGTHS
    heads = 1 if backend == "triton" and triton_support.INTERPRETED else 2  # a program a head, and it is slow
    inputs = heads_of_projections(queries, heads, dtype, "cuda" if on_gpu else "cpu")
    sequences = Sequences.from_lengths(queries, LENGTHS, device=inputs["q_THd"].device)
    ours = partial(packed_attention, sequences=sequences, causal=causal, backend=name)

    def oracle(q_THd: Tensor, k_SHd: Tensor, v_SHd: Tensor) -> Tensor:
        return reference.packed_attention(q_THd, k_SHd, v_SHd, queries, LENGTHS, causal)[0]

    found, eager, truth = outcome(ours, inputs), outcome(oracle, inputs), outcome(oracle, inputs, torch.float64)
    assert found.outputs["output 0"].dtype == dtype
    assert {gradient.dtype for gradient in found.gradients.values()} == {dtype}
    # In fp32 Triton's kernels show that they take exponentials to base 2 and rowsum(dO out) for rowsum(P dP): of two
    # tokens whose weights are all but 0 and 1, little is left of the gradient, and their roundings are of what cancels.
    extra = 32 * torch.finfo(dtype).eps if (backend, dtype) == ("triton", torch.float32) else 0.0
    sides = [by_sequence(side, queries) for side in (found, eager, truth)]
    lucky = sides[0][1] if extra else ()
    assert_tensors_no_worse(*(side[0] for side in sides), factor=OUTPUT_FACTOR, extra_floor=extra)
    assert_tensors_no_worse(*(side[1] for side in sides), factor=GRADIENT_FACTOR, extra_floor=extra, lucky=lucky)


def heads_of_projections(queries: list[int], heads: int, dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    """Queries, keys and values as a tower has them: views of one matrix, or of two where some queries are not read."""
    generator = torch.Generator().manual_seed(0)
    qkv_S3Hd = torch.randn(sum(LENGTHS), 3, heads, WIDTH, generator=generator).to(device, dtype)
    q_THd, k_SHd, v_SHd = qkv_S3Hd.unbind(1)
    return {"q_THd": q_THd[: sum(queries)], "k_SHd": k_SHd, "v_SHd": v_SHd}


def by_sequence(found: Outcome, queries: list[int]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Outputs, and gradients, each cut into sequences: the small entries of a long one are held to their own size."""

    def cut(name: str, tensor: Tensor) -> dict[str, Tensor]:
        lengths = LENGTHS if name in ("k_SHd", "v_SHd") else queries
        parts = zip(LENGTHS, tensor.split(lengths), strict=True)
        return {f"{name} of {tokens} tokens": part for tokens, part in parts}

    outputs, gradients = (
        {key: part for name, tensor in tensors.items() for key, part in cut(name, tensor).items()} for tensors in found
    )
    return outputs, gradients
