"""The towers' operations over their sizes, forward and backward: attention of packed crops, and residual LayerNorm.

Axes: T packed tokens, H heads, d head width, W width of the tower.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from benchmarks.sweep import ORACLE, Point, Sweep, draw, with_gradients
from cosmos_fast.ops.attention import OP as ATTENTION
from cosmos_fast.ops.attention import Sequences, packed_attention
from cosmos_fast.ops.layer_norm import OP as LAYER_NORM
from cosmos_fast.ops.layer_norm import add_layer_norm
from cosmos_kernels import reference

CROPS = ((2, 197), (6, 37))  # of a sample: how many, tokens of each
HEADS, HEAD_DIM = 12, 64


def attention(device: str) -> Sweep:
    """Both directions of the vision tower's attention: 2 global and 6 local crops a sample, one packed run."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32

    def groups(samples: int) -> list[tuple[int, int]]:
        return [(samples * count, length) for count, length in CROPS]

    def make_inputs(samples: int, seed: int) -> tuple[Sequences, Tensor]:
        tokens = sum(count * length for count, length in groups(samples))
        qkv = draw(tokens, 3, HEADS, HEAD_DIM, device=device, dtype=dtype, seed=seed)
        return Sequences.from_groups(groups(samples), device=device), qkv.requires_grad_()

    def run(backend: str, inputs: tuple[Sequences, Tensor]) -> dict[str, Tensor]:
        sequences, qkv = inputs
        if backend == ORACLE:  # not a backend of this operation: what the others are checked against
            lengths = [length for count, length in sequences.query_groups for _ in range(count)]
            out, _ = reference.packed_attention(*qkv.float().unbind(1), lengths, lengths, causal=False)
        else:
            out = packed_attention(*qkv.unbind(1), sequences, causal=False, backend=backend)
        ramp = torch.linspace(-1, 1, out.numel(), device=device).view_as(out)
        return with_gradients((out * ramp).sum(), {"qkv": qkv})

    def point(samples: int) -> Point:
        tokens = sum(count * length for count, length in groups(samples))
        pairs = sum(count * length**2 for count, length in groups(samples))
        elements = 3 * tokens * HEADS * HEAD_DIM
        return Point(
            size=samples,
            shapes={"crops": CROPS, "heads": HEADS, "head_dim": HEAD_DIM},
            elements=elements,
            flops=7 * 2.0 * pairs * HEADS * HEAD_DIM,  # two products forward, five backward
            bytes=4.0 * elements * dtype.itemsize,  # q, k, v, out, and then these and their gradients
            make_inputs=partial(make_inputs, samples),
            run=run,
            rtol=2e-2 if device == "cuda" else 1e-3,
        )

    return Sweep(
        name="attention",
        op=ATTENTION,
        size_label="samples of 2 x 197 and 6 x 37 tokens",
        points=[point(samples) for samples in ((16, 64, 256) if device == "cuda" else (1, 2, 4))],
        matmul_dtype=dtype,
    )


def layer_norm(device: str) -> Sweep:
    """Both directions of addition and LayerNorm; on a GPU fp32 residual stream and bf16 updates, as under autocast."""
    width = HEADS * HEAD_DIM
    low = torch.bfloat16 if device == "cuda" else torch.float32

    def make_inputs(tokens: int, seed: int) -> dict[str, Tensor]:
        made = {
            "x_TD": draw(tokens, width, device=device, dtype=torch.float32, seed=seed),
            "update_TD": draw(tokens, width, device=device, dtype=low, seed=seed + 1000),
            "weight_D": draw(width, device=device, dtype=torch.float32, seed=1),
            "bias_D": draw(width, device=device, dtype=torch.float32, seed=2),
        }
        return {name: tensor.requires_grad_() for name, tensor in made.items()}

    def run(backend: str, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
        with torch.autocast(device, dtype=torch.bfloat16, enabled=device == "cuda"):
            y_TD, normed_TD = add_layer_norm(**leaves, backend=backend)
        outputs = {"y": y_TD, "normed": normed_TD}
        ramps = [torch.linspace(-1, 1, x.numel(), device=device, dtype=x.dtype).view_as(x) for x in outputs.values()]
        gradients = torch.autograd.grad(list(outputs.values()), list(leaves.values()), ramps)
        return {**{name: x.detach() for name, x in outputs.items()}, **dict(zip(leaves, gradients, strict=True))}

    def point(tokens: int) -> Point:
        elements = 2 * tokens * width
        return Point(
            size=tokens,
            shapes={"width": width},
            elements=elements,
            flops=20.0 * tokens * width,
            bytes=tokens * width * (5.0 * 4 + 4 * low.itemsize),  # stream and its gradient; update, norm, and theirs
            make_inputs=partial(make_inputs, tokens),
            run=run,
            rtol=2e-2 if device == "cuda" else 1e-3,
        )

    return Sweep(
        name="layer_norm",
        op=LAYER_NORM,
        size_label="tokens",
        points=[point(tokens) for tokens in ((10_000, 40_000, 157_000) if device == "cuda" else (500, 2000))],
    )
