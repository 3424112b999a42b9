"""What the Triton kernels of the contrastive loss share: a tile of similarities, and how they are launched.

Axes: V views, B rows, G columns, D embedding; in kernels i counts rows, j columns.
"""

# mypy: allow-untyped-defs
from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from cosmos_kernels import triton_support
from cosmos_kernels.triton_support import AheadCase


@triton.jit
def tile_of(pid, row_tiles, column_tiles, GROUP: tl.constexpr):
    """Row and column tile of a program: GROUP row tiles share the columns they pass over, which then stay in L2."""
    group = pid // (GROUP * column_tiles)
    height = tl.minimum(row_tiles - group * GROUP, GROUP)
    within = pid % (GROUP * column_tiles)
    return group * GROUP + within % height, within // height


@triton.jit
def dot_products(
    x_rows,
    y_rows,
    D,
    BLOCK_B: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_D: tl.constexpr,
    EVEN_D: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """<x_i, y_j> [BLOCK_B, BLOCK_G] in fp32; x_rows, y_rows point at the first channel of each row and column."""
    products = tl.zeros((BLOCK_B, BLOCK_G), tl.float32)
    for start in range(0, D, BLOCK_D):
        offs_d = start + tl.arange(0, BLOCK_D)
        if EVEN_D:
            x = tl.load(x_rows[:, None] + offs_d[None, :])
            y = tl.load(y_rows[:, None] + offs_d[None, :])
        else:
            x = tl.load(x_rows[:, None] + offs_d[None, :], mask=offs_d[None, :] < D, other=0.0)
            y = tl.load(y_rows[:, None] + offs_d[None, :], mask=offs_d[None, :] < D, other=0.0)
        if UPCAST:
            x, y = x.to(tl.float32), y.to(tl.float32)
        products = tl.dot(x, tl.trans(y), products, input_precision=PRECISION)
    return products


@dataclass(frozen=True)
class Tile:
    """Launch settings of both kernels: rows, columns and channels of a step, warps, pipeline stages."""

    block_b: int = 128
    block_g: int = 128
    block_d: int = 64
    num_warps: int = 8
    num_stages: int = 3


HALF_TILE = Tile()
FLOAT_TILE = Tile(block_b=64, block_g=64, block_d=32, num_warps=4, num_stages=3)  # TF32 in three products


def tile_for(dtype: torch.dtype) -> Tile:
    """Launch settings for features of a dtype."""
    return FLOAT_TILE if dtype == torch.float32 else HALF_TILE


def fit(tile: Tile, rows: int, columns: int, dim: int) -> Tile:
    """The tile cut to small inputs; 16 is the least that a tensor core takes."""

    def cut(block: int, size: int) -> int:
        return min(block, max(16, triton.next_power_of_2(size)))

    return replace(
        tile,
        block_b=cut(tile.block_b, rows),
        block_g=cut(tile.block_g, columns),
        block_d=cut(tile.block_d, dim),
    )


def launch_constants(tile: Tile, rows_VBD: Tensor) -> dict[str, object]:
    """What both kernels are compiled for."""
    return {
        "BLOCK_B": tile.block_b,
        "BLOCK_G": tile.block_g,
        "BLOCK_D": tile.block_d,
        "EVEN_D": rows_VBD.shape[2] % tile.block_d == 0,
        "GROUP": 8,
        "PRECISION": "tf32x3" if rows_VBD.dtype == torch.float32 else "tf32",  # tf32: of no consequence for 16 bits
        "UPCAST": triton_support.upcast(rows_VBD.dtype),
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
    }


def channels_last(features_VBD: Tensor) -> Tensor:
    """The features, copied only where channels are not contiguous."""
    features_VBD = features_VBD.detach()
    return features_VBD if features_VBD.stride(2) == 1 else features_VBD.contiguous()


def ahead_case(name: str, kernel: Any, dtype: torch.dtype, **constants: object) -> AheadCase:
    """What a launch on features of D = 512 and a batch that fills the tiles compiles."""
    tile = tile_for(dtype)
    constants |= launch_constants(tile, torch.empty(0, 0, 512, dtype=dtype))
    del constants["num_warps"], constants["num_stages"]  # settings of the launch, not arguments of the kernel
    short = "fp32" if dtype == torch.float32 else "fp16"
    features = ("x_ptr", "y_ptr", "g_ptr")
    names = [name for name in kernel.arg_names if name not in constants]
    return AheadCase(
        name=f"{name}/D512/{short}",
        kernel=kernel,
        signature={
            name: f"*{short}" if name in features else "*fp32" if name.endswith("_ptr") else "i32" for name in names
        },
        constexprs=constants,
        divisible_by_16=tuple(name for name in names if name in ("B", "G", "pitch", "rows", "columns", "offset", "D"))
        + tuple(name for name in names if name.startswith("stride_")),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
