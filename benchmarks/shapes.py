"""Sizes that the benchmarks use, and random inputs of those sizes.

Axes: B batch, V views, L tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from benchmarks.eager_cosmos import EagerConfig
from cosmos_fast.config import ModelConfig, TrainConfig, ViewsConfig
from cosmos_fast.model.flops import sample_flops

GLOBAL_VIEWS, LOCAL_VIEWS = 2, 6

VIT_B_16 = EagerConfig(
    embed_dim=512,
    image_size=224,
    patch_size=16,
    vision_width=768,
    vision_layers=12,
    head_width=64,
    context_length=77,
    vocab_size=49408,
    text_width=512,
    text_heads=8,
    text_layers=12,
)
VIT_B_32 = replace(VIT_B_16, patch_size=32)


def mini_model(width: int = 192, layers: int = 4) -> EagerConfig:
    """The model of the CPU mini-step: both towers of one width, 64 px crops in patches of 8, the real vocabulary."""
    return EagerConfig(
        embed_dim=width,
        image_size=64,
        patch_size=8,
        vision_width=width,
        vision_layers=layers,
        head_width=64,
        context_length=77,
        vocab_size=49408,
        text_width=width,
        text_heads=width // 64,
        text_layers=layers,
    )


@dataclass(frozen=True, kw_only=True)
class StepShape:
    """One training step. Crop sides in pixels; caption lengths in tokens, start and end of text included, inclusive.
    global_batch: samples that the loss is over; those beyond `batch` are made up, and on other ranks in truth."""

    model: EagerConfig
    batch: int
    local_px: int
    global_caption_tokens: tuple[int, int]
    local_caption_tokens: tuple[int, int]
    global_batch: int | None = None

    def images(self, seed: int, device: str = "cpu") -> list[Tensor]:
        """Two global and six local crops, float32 [B, 3, side, side], standard normal.

        Drawn on the device: a GPU's batch takes a host longer than the step.
        """
        generator = torch.Generator(device).manual_seed(seed)
        sides = [self.model.image_size] * GLOBAL_VIEWS + [self.local_px] * LOCAL_VIEWS
        return [torch.randn(self.batch, 3, side, side, generator=generator, device=device) for side in sides]

    def texts(self, seed: int, device: str = "cpu") -> Tensor:
        """Ids, int64 [V, B, L]: start, words, end of text (the largest id), padding 0."""
        generator = torch.Generator().manual_seed(seed)
        end_of_text = self.model.vocab_size - 1
        texts = torch.zeros(GLOBAL_VIEWS + LOCAL_VIEWS, self.batch, self.model.context_length, dtype=torch.long)
        for view, captions in enumerate(texts):
            low, high = self.global_caption_tokens if view < GLOBAL_VIEWS else self.local_caption_tokens
            lengths = torch.randint(low, high + 1, (self.batch,), generator=generator).tolist()
            for caption, length in zip(captions, lengths, strict=True):
                caption[0], caption[length - 1] = end_of_text - 1, end_of_text
                caption[1 : length - 1] = torch.randint(1, end_of_text - 1, (length - 2,), generator=generator)
        return texts.to(device)

    @property
    def samples_in_loss(self) -> int:
        """Columns of a similarity matrix."""
        return self.global_batch or self.batch

    def flops(self, texts_VBL: Tensor, pruned: bool = True) -> float:
        """Floating-point operations that a step needs with these captions, whoever does it: see `model.flops`."""
        views = ViewsConfig(local_image_size=self.local_px)
        caption_tokens = (texts_VBL.argmax(dim=-1) + 1).double().mean(dim=1).tolist()
        config = ModelConfig.from_openclip(self.model.to_openclip())
        counted = sample_flops(
            config, views, caption_tokens=caption_tokens, global_batch=self.samples_in_loss, pruned=pruned
        )
        return self.batch * counted.training

    def describe(self) -> dict[str, object]:
        """The sizes as they stand in a result row."""
        model = self.model
        return {
            "batch": self.batch,
            **({} if self.global_batch is None else {"global_batch": self.global_batch}),
            "embed_dim": model.embed_dim,
            "vision": [model.vision_width, model.vision_layers, model.head_width],
            "text": [model.text_width, model.text_layers, model.text_heads],
            "vocab_size": model.vocab_size,
            "context_length": model.context_length,
            "crop_px": [model.image_size, self.local_px],
            "patch_px": model.patch_size,
            "views": [GLOBAL_VIEWS, LOCAL_VIEWS],
            "global_caption_tokens": list(self.global_caption_tokens),
            "local_caption_tokens": list(self.local_caption_tokens),
        }


def mini_step(width: int = 192, layers: int = 4, batch: int = 16) -> StepShape:
    """The whole training step that is measured on a CPU."""
    return StepShape(
        model=mini_model(width, layers),
        batch=batch,
        local_px=32,
        global_caption_tokens=(30, 70),
        local_caption_tokens=(10, 35),
    )


def vit_b_16_step(batch: int = 256) -> StepShape:
    """The whole training step that is measured on a GPU: the published model and crops."""
    return StepShape(
        model=VIT_B_16, batch=batch, local_px=96, global_caption_tokens=(30, 77), local_caption_tokens=(12, 48)
    )


def recipe_step(config: TrainConfig, batch: int) -> StepShape:
    """The step of a COSMOS recipe. Captions are as long as those of `vit_b_16_step`, in shares of the context."""
    views, model, published = config.data.views, config.model, vit_b_16_step()
    assert (views.global_crops, views.local_crops) == (GLOBAL_VIEWS, LOCAL_VIEWS), views
    assert (views.global_captions, views.local_captions) == (GLOBAL_VIEWS, LOCAL_VIEWS), views
    share = model.text.context_length / published.model.context_length
    return StepShape(
        model=EagerConfig(
            embed_dim=model.embed_dim,
            image_size=model.vision.image_size,
            patch_size=model.vision.patch_size,
            vision_width=model.vision.width,
            vision_layers=model.vision.layers,
            head_width=model.vision.head_width,
            context_length=model.text.context_length,
            vocab_size=model.text.vocab_size,
            text_width=model.text.width,
            text_heads=model.text.heads,
            text_layers=model.text.layers,
            pool_heads=model.pool_heads,
        ),
        batch=batch,
        local_px=views.local_image_size,
        global_caption_tokens=_shortened(published.global_caption_tokens, share),
        local_caption_tokens=_shortened(published.local_caption_tokens, share),
    )


def _shortened(tokens: tuple[int, int], share: float) -> tuple[int, int]:
    low, high = (max(2, round(share * count)) for count in tokens)
    return low, high
