"""What a run will need, worked out from its configuration alone; and what a step of it has needed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from cosmos_fast.config import ModelConfig, TrainConfig, ViewsConfig
from cosmos_fast.data.batch import Batch
from cosmos_fast.model import create_model
from cosmos_fast.model.flops import sample_flops

# Values that one token leaves behind in one block for the backward pass, in units of the width, by what is made anew
# instead (compute.checkpoint_activations). Measured: 17 (norms 4, queries, keys and values 3, attention 2, MLP 8), 8
# and 1; attention over several groups of equal length keeps one more.
_SAVED_WIDTHS = {"none": 18, "mlp": 9, "blocks": 1}
# The last block makes only the rows that are read; token maps and poolers are in here too. Measured: 8 to 10, 6 to 8,
# 2 to 4.
_SAVED_WIDTHS_LAST = {"none": 9, "mlp": 7, "blocks": 3}


@dataclass(frozen=True)
class Estimate:
    """parameters: of the student. *_bytes: on one rank; activations in fp32 unless a run is bf16 or fp16.
    flops_per_sample: forward and backward of all views, caption contexts counted full."""

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
    """precision: "fp32", "bf16" or "fp16", resolved. No weights are allocated."""
    with torch.device("meta"):
        parameters = sum(p.numel() for p in create_model(config.model).parameters())
    views, run = config.data.views, config.run
    flops = sample_flops(config.model, views, global_batch=run.batch_size * world_size)
    value_bytes = 4 if precision == "fp32" else 2
    recompute = config.compute.checkpoint_activations
    kept = activation_values(config.model, views, recompute)
    activations = run.batch_size * (kept + remade_values(config.model, views, recompute)) * value_bytes
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


def activation_values(model: ModelConfig, views: ViewsConfig, recompute: str = "none") -> int:
    """Numbers that one sample's forward pass keeps for the backward pass, student only, full caption contexts."""
    kept, last = _SAVED_WIDTHS[recompute], _SAVED_WIDTHS_LAST[recompute]
    return sum(channels * (kept * (layers - 1) + last) for channels, layers in _towers(model, views))


def remade_values(model: ModelConfig, views: ViewsConfig, recompute: str) -> int:
    """Numbers that the backward pass makes anew at a time: those of one block of the larger tower."""
    return max(channels for channels, _ in _towers(model, views)) * (_SAVED_WIDTHS["none"] - _SAVED_WIDTHS[recompute])


def _towers(model: ModelConfig, views: ViewsConfig) -> list[tuple[int, int]]:
    """Numbers in one packed matrix [tokens, width] of a sample, and blocks, of each tower."""
    patch = model.vision.patch_size
    crops = [model.vision.image_size] * views.global_crops + [views.local_image_size] * views.local_crops
    image_tokens = sum((side // patch) ** 2 + 1 for side in crops)
    text_tokens = views.text_views * model.text.context_length
    vision, text = model.vision, model.text
    return [(image_tokens * vision.width, vision.layers), (text_tokens * text.width, text.layers)]


def step_flops(
    config: TrainConfig, micro_batches: Sequence[Batch], world_size: int = 1, *, pruned: bool = True
) -> float:
    """What the result of an optimizer step needs on all ranks, if theirs are like this one; nothing recomputed counts.

    pruned: see `sample_flops`.
    """
    sizes = [len(batch.keys) * world_size for batch in micro_batches]
    together = config.run.negatives == "all"
    counted = (
        sample_flops(
            config.model,
            config.data.views,
            caption_tokens=batch.caption_tokens or None,
            global_batch=sum(sizes) if together else size,
            pruned=pruned,
        )
        for batch, size in zip(micro_batches, sizes, strict=True)
    )
    return sum(size * flops.training for size, flops in zip(sizes, counted, strict=True))
