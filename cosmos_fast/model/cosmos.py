"""COSMOS: two towers, token maps, cross-attention pooling across the modalities.

Axes: V views, B batch, L tokens, P patches, D embedding, H heads.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cosmos_fast.config import ModelConfig, named_model
from cosmos_fast.model.cross_pool import CrossAttentionPool
from cosmos_fast.model.text import TextTower
from cosmos_fast.model.vision import VisionTower
from cosmos_fast.model.weights import check_state_dict, strip_prefixes
from cosmos_fast.utils.errors import UserError

INITIAL_LOG_SCALE = math.log(1 / 0.07)


@dataclass(frozen=True)
class CosmosFeatures:
    """What the losses need of the student; features [V, B, D], fp32, L2-normalised, views global first.

    The cross-modal fields and `distill_logit_scale` are None for a plain CLIP model. Scales are exponentiated.
    """

    image: Tensor
    text: Tensor
    image_crossmodal: Tensor | None
    text_crossmodal: Tensor | None
    logit_scale: Tensor
    distill_logit_scale: Tensor | None


@dataclass(frozen=True)
class TeacherFeatures:
    """Plain tower features of the global views, [V, B, D], fp32, L2-normalised."""

    image: Tensor
    text: Tensor


@dataclass(frozen=True)
class AttentionMaps:
    """Cross-attention weights: of the caption over the patches [B, H, P], of the image over the caption [B, H, L]."""

    image_BHP: Tensor
    text_BHL: Tensor


class CosmosModel(TextTower):
    """The model of arXiv 2412.01814, or plain CLIP without `config.crossmodal`; the original's parameter names."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config.text, config.embed_dim)
        self.config = config
        dim = config.embed_dim
        self.visual = VisionTower(config.vision, dim)
        self.logit_scale = nn.Parameter(torch.tensor(INITIAL_LOG_SCALE))
        if config.crossmodal:
            self.distill_logit_scale = nn.Parameter(torch.tensor(INITIAL_LOG_SCALE))
            self.image_token_mapping = nn.Linear(config.vision.width, dim)
            self.text_token_mapping = nn.Linear(config.text.width, dim)
            self.visual.attn_cross_pool = CrossAttentionPool(dim, config.pool_heads)
            self.text_attn_cross_pool = CrossAttentionPool(dim, config.pool_heads)

    def set_attention(self, backend: str, device: torch.device | None = None) -> None:
        """Choose the backend of the towers' self-attention: "auto", or one that must run on `device` (None: where the
        model is).

        Raises:
            UserError: a backend that is unknown, not installed, or not for this device or these towers. What depends on
                the precision shows in the first forward pass.
        """
        vision, text = self.visual, self.config.text
        # The precision that each kind of device defaults to: some backends know one of them only.
        dtype = torch.float32 if (device or self.logit_scale.device).type == "cpu" else torch.bfloat16
        for tower, longest in ((vision.transformer, vision.grid**2 + 1), (self.transformer, text.context_length)):
            if backend != "auto":
                tower.attention_backend(longest, longest, request=backend, dtype=dtype, device=device)
        vision.transformer.attention = self.transformer.attention = backend

    def encode_image(self, images_BCHW: Tensor, normalize: bool = True) -> Tensor:
        """Images [B, 3, H, W] -> features [B, D]."""
        features_BD = self.visual([images_BCHW]).features_ND
        return _normalize(features_BD) if normalize else features_BD

    def encode_text(self, tokens_BL: Tensor, normalize: bool = True) -> Tensor:
        """Captions [B, L], int64 token ids -> features [B, D]."""
        features_BD = self.run_text(tokens_BL).features_ND
        return _normalize(features_BD) if normalize else features_BD

    def encode_views(self, images: list[Tensor], texts_VBL: Tensor) -> TeacherFeatures:
        """Plain features of several views: images [B, 3, H, W] each, captions [V, B, L]."""
        _check_views(images, texts_VBL)
        batch = texts_VBL.shape[1]
        image_ND = self.visual(images).features_ND
        text_ND = self.run_text(texts_VBL.flatten(0, 1)).features_ND
        return TeacherFeatures(
            _normalize(image_ND.unflatten(0, (-1, batch))), _normalize(text_ND.unflatten(0, (-1, batch)))
        )

    def forward(self, images: list[Tensor], texts_VBL: Tensor) -> CosmosFeatures:
        """All views of a batch.

        Args:
            images: one tensor [B, 3, H, W] a view, global crops first.
            texts_VBL: captions [V, B, L], global captions first. Tokens of view 0 of either modality are what the
                other modality's cross-modal queries attend to.
        """
        _check_views(images, texts_VBL)
        if not self.config.crossmodal:
            plain = self.encode_views(images, texts_VBL)
            return CosmosFeatures(plain.image, plain.text, None, None, self.logit_scale.exp(), None)
        batch = texts_VBL.shape[1]
        image = self.visual(images, keep_patches=batch)
        text = self.run_text(texts_VBL.flatten(0, 1), keep_tokens=batch)
        assert image.patches_MPW is not None
        assert text.tokens_MLW is not None
        assert self.visual.attn_cross_pool is not None
        image_VBD = image.features_ND.unflatten(0, (-1, batch))
        text_VBD = text.features_ND.unflatten(0, (-1, batch))
        image_crossmodal = self.text_attn_cross_pool(
            self.text_token_mapping(text.tokens_MLW), image_VBD.transpose(0, 1)
        )
        text_crossmodal = self.visual.attn_cross_pool(
            self.image_token_mapping(image.patches_MPW), text_VBD.transpose(0, 1)
        )
        return CosmosFeatures(
            image=_normalize(image_VBD),
            text=_normalize(text_VBD),
            image_crossmodal=image_crossmodal.transpose(0, 1),
            text_crossmodal=text_crossmodal.transpose(0, 1),
            logit_scale=self.logit_scale.exp(),
            distill_logit_scale=self.distill_logit_scale.exp(),
        )

    def encode_image_dense(self, images_BCHW: Tensor, csa: bool = False) -> Tensor:
        """Patch features [B, P, D] for segmentation, projected but not normalised.

        With `csa`, the last block's attention weights are softmax(q q^T) + softmax(k k^T).
        """
        return self.visual.forward_dense(images_BCHW, csa)

    def cross_attention_maps(self, images_BCHW: Tensor, tokens_BL: Tensor) -> AttentionMaps:
        """Where each caption looks in its image, and each image in its caption, by the cross-attention pooling."""
        if self.visual.attn_cross_pool is None:
            raise UserError(
                "this model has no cross-attention pooling (plain CLIP): attention maps need a COSMOS model"
            )
        count = len(images_BCHW)
        image = self.visual([images_BCHW], keep_patches=count)
        text = self.run_text(tokens_BL, keep_tokens=count)
        assert image.patches_MPW is not None
        assert text.tokens_MLW is not None
        over_patches = self.visual.attn_cross_pool.attention(
            self.image_token_mapping(image.patches_MPW), text.features_ND.unsqueeze(1)
        )
        over_tokens = self.text_attn_cross_pool.attention(
            self.text_token_mapping(text.tokens_MLW), image.features_ND.unsqueeze(1)
        )
        return AttentionMaps(over_patches.squeeze(1), over_tokens.squeeze(1))

    def reference_state_dict(self) -> dict[str, Tensor]:
        """All weights under the original's names: copies, on the CPU, in their own dtype."""
        return {name: tensor.detach().to("cpu", copy=True) for name, tensor in self.state_dict().items()}

    def load_reference_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        """Load weights under the original's names, bit for bit; a leading `module.` is dropped.

        Raises:
            UserError: names or shapes that do not fit, named.
        """
        stripped = strip_prefixes(state_dict)
        check_state_dict(self.state_dict(), stripped)
        self.load_state_dict(stripped)


def create_model(name_or_config: str | Path | ModelConfig | Mapping[str, Any]) -> CosmosModel:
    """A freshly initialised model.

    Args:
        name_or_config: "ViT-B-16" or "ViT-B-32", the path of a JSON file, an OpenCLIP-style dict, or a ModelConfig.

    Raises:
        UserError: an unknown name or key, or sizes that do not fit together.
    """
    if isinstance(name_or_config, ModelConfig):
        return CosmosModel(name_or_config)
    if isinstance(name_or_config, Mapping):
        return CosmosModel(ModelConfig.from_openclip(name_or_config))
    path = Path(name_or_config)
    if path.suffix != ".json":
        return CosmosModel(named_model(str(name_or_config)))
    if not path.is_file():
        raise UserError(f"model configuration {path} does not exist")
    try:
        return CosmosModel(ModelConfig.from_openclip(json.loads(path.read_text())))
    except json.JSONDecodeError as error:
        raise UserError(f"model configuration {path} is not valid JSON ({error})") from None


def _normalize(features: Tensor) -> Tensor:
    """L2-normalise the last axis, in fp32 or better."""
    return F.normalize(features.to(torch.promote_types(features.dtype, torch.float32)), dim=-1)


def _check_views(images: list[Tensor], texts_VBL: Tensor) -> None:
    if not images or texts_VBL.dim() != 3:
        raise ValueError(
            f"expected a list of image views and captions [V, B, L], got {len(images)} image views and captions of "
            f"shape {tuple(texts_VBL.shape)}"
        )
    batch = texts_VBL.shape[1]
    for view, image in enumerate(images):
        if image.dim() != 4 or image.shape[0] != batch or image.shape[1] != 3:
            raise ValueError(f"images[{view}] has shape {tuple(image.shape)}, expected [{batch}, 3, H, W]")
