"""Packed towers against padded ones: same features, same gradients, whatever the lengths."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from cosmos_fast.config import TextConfig
from cosmos_fast.model.packing import pack_text
from cosmos_fast.model.text import TextTower
from tests import attention_fakes

EOT = 99
CONFIG = TextConfig(context_length=20, vocab_size=100, width=24, heads=3, layers=3)


def _captions(lengths: list[int], context: int = 20) -> torch.Tensor:
    """Captions whose EOT stands at `length - 1`, zeros after it."""
    rows = torch.zeros(len(lengths), context, dtype=torch.long)
    for row, length in zip(rows, lengths, strict=True):
        row[: length - 1] = torch.randint(1, EOT, (length - 1,))
        row[length - 1] = EOT
    return rows


def _padded_features(tower: TextTower, captions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The tower the plain way: padded captions, a mask, every block on every token. Features, all tokens."""
    count, length = captions.shape
    x = tower.token_embedding(captions) + tower.positional_embedding[:length]
    mask = torch.full((length, length), float("-inf"), dtype=x.dtype).triu_(1)
    for block in tower.transformer.blocks:
        attention = nn.MultiheadAttention(CONFIG.width, CONFIG.heads, batch_first=True)
        weights = {"in_proj_weight": block.attn.in_proj_weight, "in_proj_bias": block.attn.in_proj_bias}
        weights |= {"out_proj.weight": block.attn.out_proj.weight, "out_proj.bias": block.attn.out_proj.bias}
        y = block.ln_1(x)
        x = x + torch.func.functional_call(attention, weights, (y, y, y), {"attn_mask": mask, "need_weights": False})[0]
        x = x + block.mlp(block.ln_2(x))
    x = tower.ln_final(x)
    return x[torch.arange(count), captions.argmax(1)] @ tower.text_projection, x


@pytest.mark.parametrize(
    ("lengths", "keep"),
    [
        ([2, 20, 7, 7, 3, 12, 20, 4], 0),
        ([2, 20, 7, 7, 3, 12, 20, 4], 3),
        ([5, 6, 7], 3),
        ([20], 0),
        ([2], 1),
        ([4, 4, 4, 4], 0),
    ],
)
def test_packed_text_equals_padded_text(lengths, keep):
    torch.manual_seed(0)
    tower = TextTower(CONFIG, embed_dim=16).double()
    captions = _captions(lengths)
    expected_features, expected_tokens = _padded_features(tower, captions)
    actual = tower.run_text(captions, keep_tokens=keep)
    torch.testing.assert_close(actual.features_ND, expected_features)
    direction = torch.randn_like(expected_features)
    expected_loss, actual_loss = (expected_features * direction).sum(), (actual.features_ND * direction).sum()
    if keep:
        torch.testing.assert_close(actual.tokens_MLW, expected_tokens[:keep])
        direction = torch.randn_like(expected_tokens[:keep])
        expected_loss = expected_loss + (expected_tokens[:keep] * direction).sum()
        actual_loss = actual_loss + (actual.tokens_MLW * direction).sum()
    else:
        assert actual.tokens_MLW is None
    expected = torch.autograd.grad(expected_loss, list(tower.parameters()))
    for ours, theirs in zip(torch.autograd.grad(actual_loss, list(tower.parameters())), expected, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("backend", attention_fakes.FAKES)
def test_exact_packing_equals_rounded_packing(backend, monkeypatch):
    """A backend that takes any lengths gets each caption at its own; same features, tokens and gradients."""
    torch.manual_seed(0)
    tower = TextTower(CONFIG, embed_dim=16).double()
    captions = _captions([9, 2, 20, 7, 7, 3, 12, 20, 4])
    outcomes = []
    for name in ("sdpa", attention_fakes.use(backend, monkeypatch)):
        tower.transformer.attention = name
        found = tower.run_text(captions, keep_tokens=2)
        loss = found.features_ND.square().sum() + found.tokens_MLW.pow(3).sum()
        outcomes.append([found.features_ND, found.tokens_MLW, *torch.autograd.grad(loss, list(tower.parameters()))])
    for exact, rounded in zip(*outcomes, strict=True):
        torch.testing.assert_close(exact, rounded)


def test_exact_packing_has_a_group_for_every_length():
    packed = pack_text(_captions([9, 3, 20, 4, 4]), keep_all=1, backend="varlen")
    assert [(group.count, group.length) for group in packed.layout.groups] == [(1, 20), (1, 3), (2, 4), (1, 20)]
    assert packed.layout.sequences.cu_queries.tolist() == [0, 20, 23, 27, 31, 51]
    assert packed.layout.kept_sequences.cu_queries.tolist() == [0, 20, 21, 22, 23, 24]
    assert packed.layout.kept_rows.tolist() == [*range(20), 22, 26, 30, 50]
    assert packed.layout.pooled_in_kept.tolist() == [8, 20, 23, 21, 22]  # in the order of the captions
    assert packed.positions.tolist() == [*range(20), *range(3), *range(4), *range(4), *range(20)]
    assert not packed.layout.kept_sequences.rounded


def test_captions_move_after_they_are_packed():
    packed = pack_text(_captions([9, 3, 20]), device=torch.device("meta"))
    assert packed.token_ids.is_meta
    assert packed.layout.kept_sequences.cu_keys.is_meta
    assert packed.layout.kept_sequences.cu_keys is packed.layout.sequences.cu_keys


def test_nothing_is_computed_for_padding():
    captions = _captions([3, 3, 3, 5] * 40)
    packed = pack_text(captions)
    assert [(group.count, group.length) for group in packed.layout.groups] == [(120, 3), (40, 5)]
    assert len(packed.token_ids) == 120 * 3 + 40 * 5


def test_few_captions_share_a_group_rather_than_pay_a_call_each():
    packed = pack_text(_captions([3, 4, *[5] * 10, 18]))
    assert [(group.count, group.length) for group in packed.layout.groups] == [(12, 5), (1, 18)]
    assert packed.layout.groups[0].pooled == (2, 3, *[4] * 10)


def test_caption_longer_than_the_context_is_refused():
    with pytest.raises(
        ValueError, match="captions of 21 tokens do not fit a context of 20: tokenize them with context_length=20"
    ):
        TextTower(CONFIG, embed_dim=8).run_text(_captions([4], context=21))
