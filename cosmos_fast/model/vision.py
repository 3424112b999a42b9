"""The vision tower: patches, position embedding for any crop size, transformer, class-token feature.

Axes: V views, B batch, N crops, P patches, T packed tokens, W width, D embedding.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cosmos_fast.config import VisionConfig
from cosmos_fast.model.cross_pool import CrossAttentionPool
from cosmos_fast.model.packing import PackedLayout, SequenceGroup
from cosmos_fast.model.transformer import Transformer
from cosmos_fast.utils.transfer import move

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
        runs = _runs_of_one_size([self._grid_of(piece) for piece in pieces], first_alone=bool(keep_patches))
        tokens = [self._embed([pieces[index] for index in run]) for run in runs]
        counts, lengths = tuple(len(piece) for piece in pieces), tuple(group.shape[1] for group in tokens)
        layout = crop_layout(
            runs, counts, lengths, bool(keep_patches), self._attention_backend(tokens), tokens[0].device
        )
        x_TW = self._stream(torch.cat([group.flatten(0, 1) for group in tokens]))
        kept_KW = self.transformer(x_TW, layout)
        features_ND = self.ln_post(kept_KW.index_select(0, layout.pooled_in_kept)) @ self.proj
        if not keep_patches:
            return VisionOutput(features_ND, None)
        first_MLW = kept_KW[: keep_patches * lengths[0]].view(keep_patches, lengths[0], -1)
        return VisionOutput(features_ND, self.ln_post(first_MLW[:, 1:]))

    def forward_dense(self, images_N3HW: Tensor, csa: bool) -> Tensor:
        """Projected patch features [N, P, D], optionally with correlative self-attention in the last block."""
        tokens_NLW = self._embed([images_N3HW])
        count, length, width = tokens_NLW.shape
        backend = self._attention_backend([tokens_NLW])
        layout = crop_layout(((0,),), (count,), (length,), True, backend, tokens_NLW.device)
        run = self.transformer.forward_csa if csa else self.transformer
        x_NLW = run(self._stream(tokens_NLW.flatten(0, 1)), layout).view(count, length, width)
        return self.ln_post(x_NLW[:, 1:]) @ self.proj

    def _stream(self, tokens_TW: Tensor) -> Tensor:
        """What the blocks add to: in the precision of the weights, which autocast sees to on a GPU only."""
        return self.ln_pre(tokens_TW.to(self.ln_pre.weight.dtype))

    def _attention_backend(self, groups: list[Tensor]) -> str:
        count = sum(tokens_NLW.shape[0] * tokens_NLW.shape[1] for tokens_NLW in groups)
        return self.transformer.attention_backend(count, longest=max(tokens_NLW.shape[1] for tokens_NLW in groups))

    def _grid_of(self, images_N3HW: Tensor) -> tuple[int, int]:
        """Rows and columns of patches."""
        height, width = images_N3HW.shape[2:]
        patch = self.config.patch_size
        if height % patch or width % patch:
            raise ValueError(
                f"crop of {height} x {width} px is not divisible by the patch size {patch}: give sides that are "
                f"multiples of {patch}"
            )
        return height // patch, width // patch

    def _embed(self, crops: list[Tensor]) -> Tensor:
        """Crops [N, 3, H, W] of one size, together -> [N, 1 + P, W]: class token, patches, position embedding."""
        rows, columns = self._grid_of(crops[0])
        patch = self.config.patch_size
        by_patch = [
            crop_N3HW.unflatten(3, (columns, patch)).unflatten(2, (rows, patch)).permute(0, 2, 4, 1, 3, 5)
            for crop_N3HW in crops
        ]
        pixels_NPC = torch.cat(by_patch).reshape(-1, rows * columns, 3 * patch**2)
        patches_NPW = F.linear(pixels_NPC, self.conv1.weight.flatten(1))
        position_class, position_patches = self._positions(rows, columns)
        class_N1W = (self.class_embedding + position_class).to(patches_NPW.dtype).expand(len(patches_NPW), 1, -1)
        return torch.cat([class_N1W, patches_NPW + position_patches.to(patches_NPW.dtype)], dim=1)

    def _positions(self, rows: int, columns: int) -> tuple[Tensor, Tensor]:
        """Position embedding of the class token [W] and of a grid of patches [rows * columns, W]."""
        position_class, position_grid = self.positional_embedding[0], self.positional_embedding[1:]
        if rows == columns == self.grid:
            return position_class, position_grid
        resize = resize_matrix(self.grid, rows, columns, position_grid.dtype, position_grid.device)
        # The original interpolates in the precision of the weights, under autocast too.
        with _no_autocast(position_grid.device):
            return position_class, resize @ position_grid


def _no_autocast(device: torch.device) -> AbstractContextManager[object]:
    known = torch.amp.is_autocast_available(device.type)  # not where tensors have shapes only
    return torch.autocast(device.type, enabled=False) if known else nullcontext()


def _runs_of_one_size(sizes: list[tuple[int, int]], first_alone: bool) -> tuple[tuple[int, ...], ...]:
    """Indices of the pieces, grouped by size; the first piece may stay a group of its own."""
    by_size: dict[tuple[bool, tuple[int, int]], list[int]] = {}
    for index, size in enumerate(sizes):
        by_size.setdefault((first_alone and index == 0, size), []).append(index)
    return tuple(tuple(run) for run in by_size.values())


@cache  # without bounds: a CUDA graph goes on reading what it was captured with
def crop_layout(
    runs: tuple[tuple[int, ...], ...],
    counts: tuple[int, ...],
    lengths: tuple[int, ...],
    keep_first: bool,
    backend: str,
    device: torch.device,
) -> PackedLayout:
    """The layout of crops, on `device`; computed once for the sizes of a training run.

    Args:
        runs: indices of the pieces that each group consists of.
        counts: crops of each piece.
        lengths: tokens of a crop, for each run.
        keep_first: all outputs of the first run are read.
        backend: of the attention.
        device: where the layout's tensors go.
    """
    groups: list[SequenceGroup] = []
    order: list[int] = []
    for run, length in zip(runs, lengths, strict=True):
        count = sum(counts[piece] for piece in run)
        groups.append(SequenceGroup(count, length, (0,) * count, keep_all=keep_first and not groups))
        for piece in run:
            start = sum(counts[:piece])
            order.extend(range(start, start + counts[piece]))
    # Kept for later calls, which a tensor made in inference mode would not serve.
    with torch.inference_mode(False):
        return move(PackedLayout.build(groups, causal=False, backend=backend, order=order), device)


@cache
def resize_matrix(
    grid: int,
    rows: int,
    columns: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Bicubic interpolation of a square grid as a matrix [rows * columns, grid * grid], computed in fp32.

    The interpolation is linear in the embedding, so its matrix is computed once per size, by interpolating the
    identity with scale factors (side + 0.1) / grid and no antialiasing.
    """
    with torch.inference_mode(False):
        identity = torch.eye(grid * grid).view(grid * grid, 1, grid, grid)
        factors = ((rows + POSITION_SCALE_OFFSET) / grid, (columns + POSITION_SCALE_OFFSET) / grid)
        resized = F.interpolate(identity, scale_factor=factors, mode="bicubic")
        assert resized.shape[2:] == (rows, columns), (resized.shape, rows, columns)
        return resized.view(grid * grid, rows * columns).T.contiguous().to(device, dtype)
