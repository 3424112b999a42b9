"""Cross-attention maps as something to look at: caption over patches, image over words, scaled to 0-1.

Axis legend: H heads, P patches, L tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cosmos_fast.data.token_texts import of_letters
from cosmos_fast.data.tokenizer import END_ID, START_ID, tokenizer

START, END = "⟨start⟩", "⟨end⟩"


@dataclass(frozen=True)
class WordWeight:
    """A word of a caption, its share of the attention (0-1, all shares and the padding's sum to 1), and shade 0-1."""

    word: str
    share: float
    shade: float


def scale_01(values: Tensor) -> Tensor:
    """Lowest to 0, highest to 1; a constant map becomes 0."""
    low, high = values.min(), values.max()
    return (values - low) / (high - low) if high > low else torch.zeros_like(values)


def patch_map(attention_HP: Tensor) -> Tensor:
    """Mean over heads as a square map scaled to 0-1: float32 [side, side]."""
    side = round(attention_HP.shape[-1] ** 0.5)
    return scale_01(attention_HP.float().mean(dim=0)).reshape(side, side)


def word_spans(ids: Sequence[int]) -> list[tuple[str, list[int]]]:
    """Words of a token row with the positions of their pieces: start, words, end; padding left out.

    The last word of a caption that was cut to the context may be the beginning of one.
    """
    vocabulary = tokenizer()
    words: list[tuple[str, list[int]]] = []
    letters, places = "", []
    for position, token in enumerate(ids):
        if token == START_ID and position == 0:
            words.append((START, [position]))
            continue
        ends = token == END_ID
        if not ends:
            piece = vocabulary.id_to_token(int(token)) or "?"
            letters += piece.removesuffix("</w>")
            places.append(position)
        if places and (ends or piece.endswith("</w>")):
            words.append((of_letters(letters), places))
            letters, places = "", []
        if ends:
            words.append((END, [position]))
            break
    return words


def word_weights(attention_HL: Tensor, ids_L: Tensor) -> tuple[list[WordWeight], float]:
    """Attention of an image over the words of a caption (mean over heads, pieces of a word summed).

    Returns the words, shaded 0-1 by share between none and the most attended word, and the share that padding gets:
    the keys of the pooling are all positions, padding included.
    """
    mean_L = attention_HL.float().mean(dim=0)
    spans = word_spans(ids_L.tolist())
    shares = [float(mean_L[places].sum()) for _, places in spans]
    top = max(shares) or 1.0
    weights = [WordWeight(word, share, share / top) for (word, _), share in zip(spans, shares, strict=True)]
    return weights, max(0.0, float(mean_L.sum()) - sum(shares))
