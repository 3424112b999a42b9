"""The vision tower: patches, position embedding for any crop size, transformer, class-token feature.

Axes: V views, B batch, N crops, P patches, T packed tokens, W width, D embedding.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cosmos_fast.config import VisionConfig
from cosmos_fast.model.cross_pool import CrossAttentionPool
from cosmos_fast.model.packing import PackedLayout, SequenceGroup
from cosmos_fast.model.transformer import Transformer

POSITION_SCALE_OFFSET = 0.1  # part of the interpolation's scale factor; released weights were trained with it


@dataclass(frozen=True)
class VisionOutput:
    """`features_ND`: projected class tokens in the order of the crops given. `patches_MPW`: patch tokens after
    `ln_post` of the first M crops, those asked to be kept, or None."""

    features_ND: Tensor
    patches_MPW: Tensor | None


class VisionTower(nn.Module):
    """CLIP's ViT with the original's parameter names."""

    def __init__(self, config: VisionConfig, embed_dim: int) -> None:
        super().__init__()
        self.config = config
        width, patch = config.width, config.patch_size
        self.grid = config.image_size // patch
        scale = width**-0.5
        self.class_embedding = nn.Parameter(scale * torch.randn(width))
        self.positional_embedding = nn.Parameter(scale * torch.randn(self.grid**2 + 1, width))
        self.proj = nn.Parameter(scale * torch.randn(width, embed_dim))
        self.conv1 = nn.Conv2d(3, width, kernel_size=patch, stride=patch, bias=False)
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = Transformer(width, config.layers, width // config.head_width)
        self.ln_post = nn.LayerNorm(width)
        self.attn_cross_pool: CrossAttentionPool | None = None  # set by the model that has cross-modal heads

    def forward(self, crops: list[Tensor], keep_patches: int = 0) -> VisionOutput:
        """Encode crops of any mix of sizes in one packed run.

        Args:
            crops: tensors [B, 3, H, W]; H and W multiples of the patch size.
            keep_patches: how many crops, from the start of the first tensor, also return their patch tokens.
        """
        pieces = list(crops)
        if keep_patches:
            first, rest = crops[0].split([keep_patches, len(crops[0]) - keep_patches])
            pieces = [first, *([rest] if len(rest) else []), *crops[1:]]
        runs = _runs_of_one_size(pieces, first_alone=bool(keep_patches))
        tokens = [self._embed(torch.cat([pieces[index] for index in run])) for run in runs]
        groups = [
            SequenceGroup(len(group), group.shape[1], (0,) * len(group), keep_all=bool(keep_patches) and number == 0)
            for number, group in enumerate(tokens)
        ]
        layout = PackedLayout.build(groups, causal=False, device=crops[0].device)
        x_TW = self.ln_pre(torch.cat([group.flatten(0, 1) for group in tokens]))
        kept_KW = self.transformer(x_TW, layout)
        pooled_NW = self.ln_post(kept_KW.index_select(0, layout.pooled_in_kept))
        features_ND = _in_given_order(pooled_NW @ self.proj, pieces, runs)
        if not keep_patches:
            return VisionOutput(features_ND, None)
        first_MLW = kept_KW[: groups[0].tokens].view(groups[0].count, groups[0].length, -1)
        return VisionOutput(features_ND, self.ln_post(first_MLW[:, 1:]))

    def forward_dense(self, images_N3HW: Tensor, csa: bool) -> Tensor:
        """Projected patch features [N, P, D], optionally with correlative self-attention in the last block."""
        tokens_NLW = self._embed(images_N3HW)
        count, length, width = tokens_NLW.shape
        group = SequenceGroup(count, length, (0,) * count, keep_all=True)
        layout = PackedLayout.build([group], causal=False, device=images_N3HW.device)
        run = self.transformer.forward_csa if csa else self.transformer
        x_NLW = run(self.ln_pre(tokens_NLW.flatten(0, 1)), layout).view(count, length, width)
        return self.ln_post(x_NLW[:, 1:]) @ self.proj

    def _embed(self, images_N3HW: Tensor) -> Tensor:
        """[N, 3, H, W] -> [N, 1 + P, W]: class token, patches, position embedding."""
        count, _, height, width = images_N3HW.shape
        patch = self.config.patch_size
        if height % patch or width % patch:
            raise ValueError(f"crop of {height} x {width} px is not divisible by the patch size {patch}")
        rows, columns = height // patch, width // patch
        pixels = images_N3HW.view(count, 3, rows, patch, columns, patch).permute(0, 2, 4, 1, 3, 5)
        patches_NPW = F.linear(pixels.reshape(count, rows * columns, -1), self.conv1.weight.flatten(1))
        position_class, position_patches = self._positions(rows, columns)
        class_N1W = (self.class_embedding + position_class).to(patches_NPW.dtype).expand(count, 1, -1)
        return torch.cat([class_N1W, patches_NPW + position_patches.to(patches_NPW.dtype)], dim=1)

    def _positions(self, rows: int, columns: int) -> tuple[Tensor, Tensor]:
        """Position embedding of the class token [W] and of a grid of patches [rows * columns, W]."""
        position_class, position_grid = self.positional_embedding[0], self.positional_embedding[1:]
        if rows == columns == self.grid:
            return position_class, position_grid
        resize = resize_matrix(self.grid, rows, columns).to(position_grid)
        return position_class, resize @ position_grid


def _runs_of_one_size(pieces: list[Tensor], first_alone: bool) -> list[list[int]]:
    """Indices of the pieces, grouped by size; the first piece may stay a group of its own."""
    by_size: dict[tuple[bool, torch.Size], list[int]] = {}
    for index, piece in enumerate(pieces):
        by_size.setdefault((first_alone and index == 0, piece.shape[2:]), []).append(index)
    return list(by_size.values())


def _in_given_order(features_ND: Tensor, pieces: list[Tensor], runs: list[list[int]]) -> Tensor:
    """Rows of the packed runs, back in the order of the pieces."""
    packed_order = [index for run in runs for index in run]
    if packed_order == sorted(packed_order):
        return features_ND
    parts = features_ND.split([len(pieces[index]) for index in packed_order])
    return torch.cat([part for _, part in sorted(zip(packed_order, parts, strict=True), key=lambda pair: pair[0])])


@lru_cache(maxsize=64)
def resize_matrix(grid: int, rows: int, columns: int) -> Tensor:
    """Bicubic interpolation of a square grid as a matrix [rows * columns, grid * grid], fp32.

    The interpolation is linear in the embedding, so its matrix is computed once per size, by interpolating the
    identity with scale factors (side + 0.1) / grid and no antialiasing.
    """
    identity = torch.eye(grid * grid).view(grid * grid, 1, grid, grid)
    factors = ((rows + POSITION_SCALE_OFFSET) / grid, (columns + POSITION_SCALE_OFFSET) / grid)
    resized = F.interpolate(identity, scale_factor=factors, mode="bicubic")
    assert resized.shape[2:] == (rows, columns), (resized.shape, rows, columns)
    return resized.view(grid * grid, rows * columns).T.contiguous()
