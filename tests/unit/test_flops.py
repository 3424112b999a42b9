"""Counted FLOPs against torch's own counter on the real model."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from cosmos_fast import CosmosLoss, create_model
from cosmos_fast.config import ModelConfig, TextConfig, ViewsConfig, VisionConfig
from cosmos_fast.loss import ClipLoss
from cosmos_fast.model import packing
from cosmos_fast.model.flops import sample_flops
from cosmos_fast.model.transformer import Transformer
from cosmos_fast.ops import cross_pool
from tests.unpruned import run_every_block_on_every_token

CONFIG = ModelConfig(
    embed_dim=32,
    vision=VisionConfig(image_size=48, patch_size=8, width=48, layers=3, head_width=24),
    text=TextConfig(context_length=24, vocab_size=64, width=32, heads=2, layers=2),
)
VIEWS = ViewsConfig(local_image_size=24, local_crops=3, local_captions=2)
BATCH = 5
LENGTHS = [15, 9, 12, 20]  # of captions in a context of 24
RESIZE = 2 * 3**2 * 6**2 * 48  # position embeddings of local crops, once a forward pass: not counted, as norms are not


def _measure(config: ModelConfig, views: ViewsConfig, lengths: list[int]) -> tuple[int, int, int]:
    """Forward of the student, of the teacher, and backward of the student, a batch, by torch's counter."""
    model = create_model(config)
    model.set_attention("sdpa")  # torch's counter does not see into operations of our own
    sides = [48] * views.global_crops + [24] * views.local_crops
    images = [torch.randn(BATCH, 3, side, side) for side in sides]
    texts = torch.zeros(len(lengths), BATCH, config.text.context_length, dtype=torch.long)
    for view, length in enumerate(lengths):
        texts[view, :, length - 1] = 63
    # torch's counter does not see into operators of our own: see test_the_loss_alone, test_the_pooling
    loss = CosmosLoss() if config.crossmodal else ClipLoss()
    counts = []
    with sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as counter:
            student = model(images, texts)
        counts.append(counter.get_total_flops())
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            teacher = model.encode_views(images[: views.global_crops], texts[: views.global_captions])
        counts.append(counter.get_total_flops() if config.crossmodal else 0)
        with FlopCounterMode(display=False) as counter:
            loss(student, teacher).total.backward()
        counts.append(counter.get_total_flops())
    return tuple(counts)


@pytest.fixture(autouse=True)
def _no_padding(monkeypatch):
    """Every caption length in a group of its own: the count is of the work the result needs."""
    monkeypatch.setattr(packing, "GROUP_COST_TOKENS", 0)
    packing._cheapest_runs.cache_clear()
    yield
    packing._cheapest_runs.cache_clear()


def _pooling(config: ModelConfig, views: ViewsConfig) -> int:
    """Forward of both poolings, a batch, counted within the operator; what depends on weights alone is left out."""
    patches, context = (48 // config.vision.patch_size) ** 2, config.text.context_length
    counts = []
    for batch in (1, 1 + BATCH):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            for tokens, queries in ((context, views.global_crops + views.local_crops), (patches, views.text_views)):
                pool = create_model(config).text_attn_cross_pool.weights
                tokens_BLD, queries_BVD = (torch.randn(batch, rows, config.embed_dim) for rows in (tokens, queries))
                cross_pool._pool._init_fn(tokens_BLD, queries_BVD, list(pool.parameters), pool.heads, "tiled")
        counts.append(counter.get_total_flops())
    return counts[1] - counts[0]


@pytest.mark.parametrize("pruned", [True, False])
def test_cosmos_step(pruned, monkeypatch):
    """To the last operation."""
    if not pruned:
        monkeypatch.setattr(Transformer, "forward", run_every_block_on_every_token)
    student, teacher, rest = _measure(CONFIG, VIEWS, LENGTHS)
    counted = sample_flops(CONFIG, VIEWS, caption_tokens=LENGTHS, global_batch=BATCH, pruned=pruned)
    pooling = _pooling(CONFIG, VIEWS)
    assert BATCH * counted.teacher_forward == teacher
    assert BATCH * counted.student_forward == student - RESIZE + pooling
    assert BATCH * counted.student_backward == rest - RESIZE + 2 * pooling


def test_every_row_of_the_last_blocks_counts_where_nothing_is_pruned():
    pruned, whole = (sample_flops(CONFIG, VIEWS, caption_tokens=LENGTHS, pruned=pruned) for pruned in (True, False))
    assert pruned.training < 0.9 * whole.training
    assert (pruned.loss, pruned.loss_recomputed) == (whole.loss, whole.loss_recomputed)


def test_the_loss_alone():
    """One product a pair serves both directions; what the loss forms a second time in its backward does not count."""
    batch, dim = 48, CONFIG.embed_dim

    def features(views):
        return torch.nn.functional.normalize(torch.randn(views, batch, dim), dim=-1).requires_grad_()

    def pair_losses(rows, columns):
        for row in rows:
            for column in columns:
                logits = 10.0 * (row @ column.T)
                labels = torch.arange(batch)
                yield F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)

    image, text, crossmodal, teacher = features(2), features(4), features(5 + 4), features(2 + 2).detach()
    with FlopCounterMode(display=False) as counter:
        torch.stack([*pair_losses(image, text), *pair_losses(crossmodal, teacher)]).mean().backward()
    counted = sample_flops(CONFIG, VIEWS, global_batch=batch)
    assert batch * counted.loss == counter.get_total_flops()
    assert counted.loss_recomputed == (8 + 36) * 2 * batch * dim


def test_plain_clip_step():
    config = replace(CONFIG, crossmodal=False)
    views = replace(VIEWS, global_crops=1, local_crops=0, global_captions=1, local_captions=0)
    student, _, rest = _measure(config, views, [11])
    counted = sample_flops(config, views, caption_tokens=[11], global_batch=BATCH)
    assert counted.teacher_forward == 0
    assert BATCH * counted.student_forward == student
    assert BATCH * counted.student_backward == rest
    # one pair: logits, and gradients of both sides
    assert (counted.loss, counted.loss_recomputed) == (3 * 2 * BATCH * 32, 2 * BATCH * 32)


def test_the_published_size():
    """ViT-B/16 over all views at full captions; near the 560 GFLOP of the original less what is not computed."""
    counted = sample_flops(ModelConfig(), ViewsConfig(), global_batch=1024)
    assert 450e9 < counted.training < 560e9
    unpruned = sample_flops(ModelConfig(), ViewsConfig(), global_batch=1024, pruned=False)
    assert 1.03 < unpruned.training / counted.training < 1.08
