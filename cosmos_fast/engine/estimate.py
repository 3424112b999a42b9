"""What a run will need, worked out from its configuration alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from cosmos_fast.config import ModelConfig, TrainConfig, ViewsConfig
from cosmos_fast.model import create_model
from cosmos_fast.model.flops import sample_flops

# Values that one token leaves behind in one block for the backward pass, in units of the width; measured 17 to 26 over
# the recipes: layer norms, queries, keys, values and outputs (packed and per group of equal length), feed-forward.
_SAVED_WIDTHS = 23
# The last block makes only the rows that are read; token maps and poolers are in here too.
_SAVED_WIDTHS_LAST = 8


@dataclass(frozen=True)
class Estimate:
    """parameters: of the student. *_bytes: on one rank, fp32 unless a run is bf16. flops_per_sample: forward and
    backward of all views, caption contexts counted full."""

    parameters: int
    flops_per_sample: float
    weights_bytes: int
    gradients_bytes: int
    optimizer_bytes: int
    teacher_bytes: int
    activations_bytes: int

    @property
    def total_bytes(self) -> int:
        """All of them."""
        static = self.weights_bytes + self.gradients_bytes + self.optimizer_bytes + self.teacher_bytes
        return static + self.activations_bytes


def estimate(config: TrainConfig, precision: str, world_size: int = 1) -> Estimate:
    """precision: "fp32" or "bf16", resolved. No weights are allocated."""
    with torch.device("meta"):
        parameters = sum(p.numel() for p in create_model(config.model).parameters())
    views, run = config.data.views, config.run
    flops = sample_flops(config.model, views, global_batch=run.batch_size * world_size)
    value_bytes = 2 if precision == "bf16" else 4
    activations = run.batch_size * activation_values(config.model, views) * value_bytes
    weights = 4 * parameters
    return Estimate(
        parameters=parameters,
        flops_per_sample=flops.training,
        weights_bytes=weights,
        gradients_bytes=weights,
        optimizer_bytes=2 * weights,
        teacher_bytes=weights,
        activations_bytes=activations,
    )


def activation_values(model: ModelConfig, views: ViewsConfig) -> int:
    """Numbers that one sample's forward pass keeps for the backward pass, student only, full caption contexts."""
    patch = model.vision.patch_size
    crops = [model.vision.image_size] * views.global_crops + [views.local_image_size] * views.local_crops
    image_tokens = sum((side // patch) ** 2 + 1 for side in crops)
    text_tokens = views.text_views * model.text.context_length
    values = 0
    for tokens, width, layers in (
        (image_tokens, model.vision.width, model.vision.layers),
        (text_tokens, model.text.width, model.text.layers),
    ):
        values += tokens * width * (_SAVED_WIDTHS * (layers - 1) + _SAVED_WIDTHS_LAST)
    return values
