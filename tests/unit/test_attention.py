"""Attention maps as pictures and shaded words."""

from __future__ import annotations

import pytest
import torch

from cosmos_fast.data.tokenizer import tokenize
from cosmos_fast.evaluate.attention import END, START, patch_map, scale_01, word_spans, word_weights


def test_scaling_spans_0_to_1_and_a_constant_map_is_dark() -> None:
    assert scale_01(torch.tensor([2.0, 4.0, 3.0])).tolist() == [0.0, 1.0, 0.5]
    assert scale_01(torch.full((3,), 0.25)).tolist() == [0.0, 0.0, 0.0]


def test_patch_map_is_the_mean_over_heads_in_row_order() -> None:
    heads = torch.zeros(2, 9)
    heads[0, 5], heads[1, 5], heads[1, 0] = 0.6, 0.2, 0.2  # patch 5 = row 1, column 2
    grid = patch_map(heads)
    assert grid.shape == (3, 3)
    assert float(grid[1, 2]) == 1.0
    assert float(grid[0, 0]) == pytest.approx(0.25)
    assert int((grid > 0).sum()) == 2


def test_pieces_are_joined_to_words_and_padding_is_left_out() -> None:
    ids = tokenize(["a checkered kaleidoscopes, red"], 32)[0]
    spans = word_spans(ids.tolist())
    assert [word for word, _ in spans] == [START, "a", "checkered", "kaleidoscopes", ",", "red", END]
    places = [place for _, parts in spans for place in parts]
    assert places == list(range(len(places)))
    assert ids[places[-1]] == ids.max()  # the last one is the end token


def test_a_caption_that_fills_the_context_has_no_padding() -> None:
    ids = tokenize(["red star " * 50], 8)[0]
    assert [word for word, _ in word_spans(ids.tolist())] == [START, *["red", "star"] * 3, END]
    assert word_weights(torch.full((2, 8), 1 / 8), ids)[1] == pytest.approx(0.0, abs=1e-6)


def test_words_are_letters_again_and_the_beginning_of_a_cut_word_counts() -> None:
    ids = tokenize(["Ein Café für Zoë"], 16)[0]
    assert [word for word, _ in word_spans(ids.tolist())] == [START, "ein", "café", "für", "zoë", END]
    cut = tokenize(["red kaleidoscopes"], 4)[0]  # start, red, the first piece of the second word, end
    words, padding = word_weights(torch.full((2, 4), 1 / 4), cut)
    assert [word.word for word in words][:2] == [START, "red"]
    assert "kaleidoscopes".startswith(words[2].word)
    assert [word.share for word in words] == pytest.approx([0.25] * 4)
    assert padding == pytest.approx(0.0, abs=1e-6)


def test_word_weights_sum_pieces_and_account_for_padding() -> None:
    ids = tokenize(["kaleidoscopes red"], 16)[0]
    spans = word_spans(ids.tolist())
    pieces = spans[1][1]
    assert len(pieces) > 1
    attention = torch.zeros(2, 16)
    attention[:, pieces] = 0.4 / len(pieces)
    attention[:, spans[2][1]] = 0.1
    attention[:, -1] = 0.5
    words, padding = word_weights(attention, ids)
    assert [w.share for w in words] == pytest.approx([0.0, 0.4, 0.1, 0.0])
    assert [w.shade for w in words] == pytest.approx([0.0, 1.0, 0.25, 0.0])
    assert padding == pytest.approx(0.5)
