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
from tests.unpruned import run_every_block_on_every_token

CONFIG = ModelConfig(
    embed_dim=32,
    vision=VisionConfig(image_size=48, patch_size=8, width=48, layers=3, head_width=24),
    text=TextConfig(context_length=24, vocab_size=64, width=32, heads=2, layers=2),
)
VIEWS = ViewsConfig(local_image_size=24, local_crops=3, local_captions=2)
BATCH = 5


def _measure(config: ModelConfig, views: ViewsConfig, lengths: list[int]) -> tuple[float, float, float]:
    """Forward of the student, of the teacher, and backward of the student, by torch's counter."""
    model = create_model(config)
    model.set_attention("sdpa")  # torch's counter does not see into operations of our own
    sides = [48] * views.global_crops + [24] * views.local_crops
    images = [torch.randn(BATCH, 3, side, side) for side in sides]
    texts = torch.zeros(len(lengths), BATCH, config.text.context_length, dtype=torch.long)
    for view, length in enumerate(lengths):
        texts[view, :, length - 1] = 63
    # torch's counter does not see into the loss's operators, see test_the_loss_alone
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
    return tuple(count / BATCH for count in counts)


@pytest.fixture(autouse=True)
def _no_padding(monkeypatch):
    """Every caption length in a group of its own: the count is of the work the result needs."""
    monkeypatch.setattr(packing, "GROUP_COST_TOKENS", 0)
    packing._cheapest_runs.cache_clear()
    yield
    packing._cheapest_runs.cache_clear()


def test_cosmos_step():
    lengths = [24, 9, 12, 20]
    student, teacher, rest = _measure(CONFIG, VIEWS, lengths)
    counted = sample_flops(CONFIG, VIEWS, caption_tokens=lengths, global_batch=BATCH)
    # the position embeddings' resize and the per-pair positives are counted by torch, and negligible
    assert counted.student_forward == _close(student)
    assert counted.teacher_forward == _close(teacher)
    assert counted.student_backward == _close(rest)


def test_every_row_of_the_last_blocks_counts_where_nothing_is_pruned(monkeypatch):
    monkeypatch.setattr(Transformer, "forward", run_every_block_on_every_token)
    lengths = [24, 9, 12, 20]
    student, teacher, rest = _measure(CONFIG, VIEWS, lengths)
    counted = sample_flops(CONFIG, VIEWS, caption_tokens=lengths, global_batch=BATCH, pruned=False)
    assert counted.student_forward == _close(student)
    assert counted.teacher_forward == _close(teacher)
    assert counted.student_backward == _close(rest)
    pruned = sample_flops(CONFIG, VIEWS, caption_tokens=lengths, global_batch=BATCH)
    assert pruned.training < 0.9 * counted.training
    assert (pruned.loss, pruned.loss_recomputed) == (counted.loss, counted.loss_recomputed)


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
    assert counted.student_forward == _close(student)
    assert counted.student_backward == _close(rest)


def test_the_published_size():
    """ViT-B/16 over all views at full captions; near the 560 GFLOP of the original less what is not computed."""
    counted = sample_flops(ModelConfig(), ViewsConfig(), global_batch=1024)
    assert 450e9 < counted.training < 560e9
    unpruned = sample_flops(ModelConfig(), ViewsConfig(), global_batch=1024, pruned=False)
    assert 1.03 < unpruned.training / counted.training < 1.08


def _close(value: float):
    return pytest.approx(value, rel=0.03)
