"""Floating-point operations of a training step, counted from the architecture.

A multiply-add counts two. Matrix products and attention are counted, as is usual for model FLOPs utilisation; norms,
activations and the optimizer are not. Padding that packing adds is left out, and so is whatever is computed a second
time to save memory (logits in the loss's backward, checkpointed activations, features of accumulated micro-batches):
the count is that of the work the result needs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cosmos_fast.config import ModelConfig, ViewsConfig


@dataclass(frozen=True)
class SampleFlops:
    """FLOPs of one sample; `loss` covers its forward and backward. loss_recomputed: logits that the loss's backward
    forms anew, which `training` leaves out."""

    student_forward: float
    student_backward: float
    teacher_forward: float
    loss: float
    loss_recomputed: float

    @property
    def training(self) -> float:
        """One sample's share of a training step."""
        return self.student_forward + self.student_backward + self.teacher_forward + self.loss


def sample_flops(
    config: ModelConfig,
    views: ViewsConfig,
    *,
    caption_tokens: Sequence[float] | None = None,
    global_batch: int = 1,
    pruned: bool = True,
) -> SampleFlops:
    """FLOPs of one training sample.

    Args:
        config: the architecture; without cross-modal heads there is no teacher and one contrastive term.
        views: how many crops and captions, and their sizes.
        caption_tokens: tokens up to EOT of each caption view, globals first; None counts full contexts.
        global_batch: samples that share the loss, over all ranks.
        pruned: count of the last blocks only the rows that are read; False counts every row, which is what other
            programs call the FLOPs of such a model.
    """
    side, local_side = config.vision.image_size, views.local_image_size
    sides = [side] * views.global_crops + [local_side] * views.local_crops
    context = config.text.context_length
    tokens = list(caption_tokens) if caption_tokens is not None else [context] * views.text_views
    assert len(tokens) == views.text_views, f"{len(tokens)} caption lengths for {views.text_views} captions"
    # Every product of the forward has two in the backward, but pixels need no gradient.
    no_gradient = sum(_patch_embedding(config, side) for side in sides)
    pair_products = 2 * global_batch * config.embed_dim
    # Views whose last block makes all rows.
    none, first = (0, 1) if pruned else (len(sides) + len(tokens),) * 2
    if not config.crossmodal:
        student = _images(config, sides, none) + _captions(config, tokens, none)
        pairs = len(sides) * len(tokens)
        # forward, and gradients of both sides
        loss = 3 * pairs * pair_products
        return SampleFlops(student, 2 * student - no_gradient, 0.0, loss, pairs * pair_products)
    student = _images(config, sides, first) + _captions(config, [context, *tokens[1:]], first)
    student += _pooling(config, len(sides), context, config.text.width)
    student += _pooling(config, len(tokens), (side // config.vision.patch_size) ** 2, config.vision.width)
    globals_only = sides[: views.global_crops], tokens[: views.global_captions]
    teacher = _images(config, globals_only[0], none) + _captions(config, globals_only[1], none)
    clip_pairs = views.global_crops * len(tokens)
    distill_pairs = (len(sides) + len(tokens)) * (views.global_crops + views.global_captions)
    loss = (3 * clip_pairs + 2 * distill_pairs) * pair_products  # no gradient to the teacher
    recomputed = (clip_pairs + distill_pairs) * pair_products
    return SampleFlops(student, 2 * student - no_gradient, teacher, loss, recomputed)


def _images(config: ModelConfig, sides: Sequence[int], kept: int) -> float:
    """The vision tower over crops of these sides; the first `kept` need every token of the last block."""
    vision = config.vision
    total = 0.0
    for index, side in enumerate(sides):
        total += _patch_embedding(config, side)
        total += _blocks((side // vision.patch_size) ** 2 + 1, vision.width, vision.layers, keep_all=index < kept)
        total += 2 * vision.width * config.embed_dim
    return total


def _patch_embedding(config: ModelConfig, side: int) -> float:
    return 2 * 3 * side**2 * config.vision.width


def _captions(config: ModelConfig, tokens: Sequence[float], kept: int) -> float:
    """The text tower over captions of these lengths; the first `kept` need every token of the last block."""
    text = config.text
    blocks = sum(_blocks(length, text.width, text.layers, keep_all=index < kept) for index, length in enumerate(tokens))
    return blocks + len(tokens) * 2 * text.width * config.embed_dim


def _blocks(tokens: float, width: int, layers: int, *, keep_all: bool) -> float:
    """A stack of blocks on one sequence; unless all outputs are read, the last one makes a single row."""
    full = 24 * tokens * width**2 + 4 * tokens**2 * width
    last = full if keep_all else (4 * tokens + 20) * width**2 + 4 * tokens * width
    return (layers - 1) * full + last


def _pooling(config: ModelConfig, queries: int, tokens: int, token_width: int) -> float:
    """Token map, and the pooling with absorbed keys and values."""
    dim = config.embed_dim
    return 2 * tokens * token_width * dim + 8 * queries * dim**2 + 4 * queries * config.pool_heads * tokens * dim
