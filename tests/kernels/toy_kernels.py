"""A matrix product for the tests of the compile-ahead tool: one specialisation fits, one needs too many registers."""

from __future__ import annotations

import triton
import triton.language as tl

from cosmos_kernels.triton_support import AheadCase


@triton.jit
def product_kernel(
    a_ptr, b_ptr, c_ptr, n, K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr
):
    """c [M, N] = a [M, K] b [N, K]^T, sizes multiples of the blocks."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, K, BLOCK_K):
        inner = start + tl.arange(0, BLOCK_K)
        a = tl.load(a_ptr + rows[:, None] * K + inner[None, :])
        b = tl.load(b_ptr + columns[None, :] * K + inner[:, None])
        total = tl.dot(a, b, total)
    tl.store(c_ptr + rows[:, None] * n + columns[None, :], total)


def _case(name: str, block_n: int, archs: tuple[int, ...], **sizes: int) -> AheadCase:
    return AheadCase(
        name=name,
        kernel=product_kernel,
        signature={"a_ptr": "*fp16", "b_ptr": "*fp16", "c_ptr": "*fp32", "n": "i32"},
        constexprs={"K": 512, "BLOCK_M": 128, "BLOCK_N": block_n, "BLOCK_K": 32, **sizes},
        archs=archs,
    )


COMPILE_AHEAD = [
    _case("fits", 64, (80, 90, 100)),
    _case("spills", 256, (80,)),
    _case("forgets an argument", 64, (80,), BLOCK_Q=1),
]
