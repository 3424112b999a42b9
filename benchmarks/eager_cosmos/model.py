"""The two towers and the COSMOS heads, as the original lays them out: text tower at the root, image tower in `visual`.

Axes: B batch, V views, L tokens, P patches, D embedding. Views are concatenated view-major: row v * B + b.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.eager_cosmos.layers import CrossAttentionPool, Transformer, causal_mask


@dataclass(frozen=True, kw_only=True)
class EagerConfig:
    """Sizes of a model; image and patch sizes in pixels, lengths in tokens."""

    embed_dim: int
    image_size: int
    patch_size: int
    vision_width: int
    vision_layers: int
    head_width: int
    context_length: int
    vocab_size: int
    text_width: int
    text_heads: int
    text_layers: int
    pool_heads: int = 8

    def to_openclip(self) -> dict[str, Any]:
        """The same sizes as the dict that `cosmos_fast.create_model` takes."""
        vision = {
            "image_size": self.image_size,
            "patch_size": self.patch_size,
            "width": self.vision_width,
            "layers": self.vision_layers,
            "head_width": self.head_width,
        }
        text = {
            "context_length": self.context_length,
            "vocab_size": self.vocab_size,
            "width": self.text_width,
            "heads": self.text_heads,
            "layers": self.text_layers,
        }
        return {"embed_dim": self.embed_dim, "vision_cfg": vision, "text_cfg": text, "pool_heads": self.pool_heads}


@dataclass(frozen=True)
class EagerFeatures:
    """Normalised features [V*B, D], view-major, and the exponentiated scales; the teacher has no cross-modal ones."""

    image: Tensor
    text: Tensor
    image_crossmodal: Tensor | None
    text_crossmodal: Tensor | None
    logit_scale: Tensor
    distill_logit_scale: Tensor


class VisionTower(nn.Module):
    """ViT with a class token; accepts crops of any size that is a multiple of the patch."""

    def __init__(self, config: EagerConfig) -> None:
        super().__init__()
        width, patch = config.vision_width, config.patch_size
        self.patch_size = patch
        self.conv1 = nn.Conv2d(3, width, kernel_size=patch, stride=patch, bias=False)
        self.class_embedding = nn.Parameter(width**-0.5 * torch.randn(width))
        patches = (config.image_size // patch) ** 2
        self.positional_embedding = nn.Parameter(width**-0.5 * torch.randn(patches + 1, width))
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = Transformer(width, config.vision_layers, width // config.head_width)
        self.ln_post = nn.LayerNorm(width)
        self.proj = nn.Parameter(width**-0.5 * torch.randn(width, config.embed_dim))
        self.attn_cross_pool = CrossAttentionPool(config.embed_dim, config.pool_heads)

    def positions(self, height: int, width: int) -> Tensor:
        """Position embeddings [1 + P, D] for a crop of height x width pixels.

        Resized bicubically by a scale factor, to which the original adds 0.1 of a patch; trained weights depend on it.
        """
        class_1D, grid_PD = self.positional_embedding[:1], self.positional_embedding[1:]
        rows, columns = height // self.patch_size, width // self.patch_size
        side = math.isqrt(grid_PD.shape[0])
        if (rows, columns) == (side, side):
            return self.positional_embedding
        grid = grid_PD.reshape(1, side, side, -1).permute(0, 3, 1, 2)
        factor = ((rows + 0.1) / side, (columns + 0.1) / side)
        grid = F.interpolate(grid, scale_factor=factor, mode="bicubic")
        assert grid.shape[-2:] == (rows, columns)
        return torch.cat([class_1D, grid.permute(0, 2, 3, 1).flatten(0, 2)])

    def tokens(self, images: Tensor, csa: bool = False) -> Tensor:
        """[B, 3, H, W] -> tokens after `ln_post`, [B, 1 + P, width]; token 0 is the class token."""
        x_BPD = self.conv1(images).flatten(2).permute(0, 2, 1)
        class_B1D = self.class_embedding.expand(x_BPD.shape[0], 1, -1)
        x_BPD = torch.cat([class_B1D, x_BPD], dim=1) + self.positions(*images.shape[-2:])
        return self.ln_post(self.transformer(self.ln_pre(x_BPD), csa=csa))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """[B, 3, H, W] -> un-normalised features [B, D], patch tokens [B, P, width]."""
        tokens = self.tokens(images)
        return tokens[:, 0] @ self.proj, tokens[:, 1:]


class EagerCosmos(nn.Module):
    """Student or teacher."""

    attn_mask: Tensor

    def __init__(self, config: EagerConfig) -> None:
        super().__init__()
        width, embed = config.text_width, config.embed_dim
        self.config = config
        self.positional_embedding = nn.Parameter(0.01 * torch.randn(config.context_length, width))
        self.text_projection = nn.Parameter(width**-0.5 * torch.randn(width, embed))
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        self.distill_logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        self.visual = VisionTower(config)
        self.transformer = Transformer(width, config.text_layers, config.text_heads)
        self.token_embedding = nn.Embedding(config.vocab_size, width)
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        self.ln_final = nn.LayerNorm(width)
        self.text_attn_cross_pool = CrossAttentionPool(embed, config.pool_heads)
        self.image_token_mapping = nn.Linear(config.vision_width, embed)
        self.text_token_mapping = nn.Linear(width, embed)
        self.register_buffer("attn_mask", causal_mask(config.context_length), persistent=False)

    def encode_images(self, images: list[Tensor]) -> tuple[Tensor, Tensor]:
        """V crops [B, 3, H, W] -> features [V*B, D], mapped tokens of the first run of equal sizes.

        Neighbours of equal size are encoded in one forward, as in DINO.
        """
        features, first_tokens = [], None
        start = 0
        while start < len(images):
            end = start + 1
            while end < len(images) and images[end].shape == images[start].shape:
                end += 1
            run_features, run_tokens = self.visual(torch.cat(images[start:end]))
            features.append(run_features)
            if first_tokens is None:
                first_tokens = self.image_token_mapping(run_tokens)
            start = end
        assert first_tokens is not None
        return torch.cat(features), first_tokens

    def encode_texts(self, texts_BL: Tensor) -> tuple[Tensor, Tensor]:
        """Ids [V*B, L] -> un-normalised features [V*B, D], mapped tokens of all captions [V*B, L, D]."""
        x_BLD = self.token_embedding(texts_BL) + self.positional_embedding
        x_BLD = self.ln_final(self.transformer(x_BLD, self.attn_mask))
        rows = torch.arange(x_BLD.shape[0], device=x_BLD.device)
        pooled_BD = x_BLD[rows, texts_BL.argmax(dim=-1)]
        return pooled_BD @ self.text_projection, self.text_token_mapping(x_BLD)

    def encode_dense(self, images: Tensor, csa: bool = False) -> Tensor:
        """[B, 3, H, W] -> un-normalised projected patch features [B, P, D], for segmentation."""
        return self.visual.tokens(images, csa)[:, 1:] @ self.visual.proj

    def forward(self, images: list[Tensor], texts_VBL: Tensor, crossmodal: bool = True) -> EagerFeatures:
        """V crops [B, 3, H, W] and captions [V, B, L]; the teacher passes `crossmodal=False` and two views of each."""
        batch = texts_VBL.shape[1]
        image, image_tokens = self.encode_images(images)
        text, text_tokens = self.encode_texts(texts_VBL.flatten(0, 1))
        image_cross = text_cross = None
        if crossmodal:
            image_cross = F.normalize(image + self.text_attn_cross_pool(image, text_tokens[:batch]), dim=-1)
            text_cross = F.normalize(text + self.visual.attn_cross_pool(text, image_tokens[:batch]), dim=-1)
        scales = self.logit_scale.exp(), self.distill_logit_scale.exp()
        return EagerFeatures(F.normalize(image, dim=-1), F.normalize(text, dim=-1), image_cross, text_cross, *scales)
