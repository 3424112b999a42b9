"""Where a caption looks in an image, and which of its words the image looks at.

Axis legend: B captions, H heads, P patches, L tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from PIL import Image

from cosmos_fast.data.images import eval_crop, to_tensor
from cosmos_fast.data.tokenizer import tokenize
from cosmos_fast.evaluate.attention import END, START, WordWeight, patch_map, scale_01, word_weights
from cosmos_fast.evaluate.pictures import drawing
from cosmos_fast.evaluate.pictures.album import Sheet
from cosmos_fast.evaluate.pictures.sources import Source
from cosmos_fast.evaluate.report.pictures import heat_overlay, jpeg
from cosmos_fast.evaluate.set_runs import check_finite
from cosmos_fast.model.cosmos import CosmosModel
from cosmos_fast.utils.errors import UserError

SIDE = 336
OWN_CAPTIONS = 3
BATCH = 32


@dataclass(frozen=True)
class Look:
    """One caption and one image. overlay: the map over the image. words: without start and end, shades scaled so that
    the least attended word is 0 and the most attended 1. rest: (where the rest of the attention goes, its share)."""

    caption: str
    overlay: bytes
    words: list[WordWeight]
    rest: list[tuple[str, float]]


@dataclass(frozen=True)
class Looks:
    key: str
    picture: bytes
    looks: list[Look]


def check_model(model: CosmosModel) -> None:
    """UserError for a model that has no cross-attention."""
    if not model.config.crossmodal:
        raise UserError(
            "these weights have no cross-modal heads (plain CLIP): there is no cross-attention to show; take a "
            "checkpoint of COSMOS that was not exported to open_clip or hf"
        )


def captions_of(source: Source, number: int, captions: Sequence[str]) -> tuple[str, ...]:
    """The captions given, else the first of the image's own. UserError: neither."""
    own = (*source.captions[number], *(source.sentences[number] if source.sentences else ()))
    found = tuple(captions) or tuple(dict.fromkeys(own))[:OWN_CAPTIONS]
    if not found:
        raise UserError(
            f"no caption for {source.images.key(number)}: give --caption, or put captions into a .txt file beside it"
        )
    return found


@torch.inference_mode()
def attention_sheets(
    model: CosmosModel,
    source: Source,
    numbers: Sequence[int],
    captions: Sequence[str],
    on_sheet: Callable[[], None] = lambda: None,
) -> Iterator[Sheet]:
    """A sheet an image, with every caption on it. UserError: no cross-attention, no caption, a broken image."""
    check_model(model)
    for number, texts in [(number, captions_of(source, number, captions)) for number in numbers]:
        yield _sheet(model, source.images.key(number), source.images.image(number), texts)
        on_sheet()


def _sheet(model: CosmosModel, key: str, image: Image.Image, captions: Sequence[str]) -> Sheet:
    device = next(model.parameters()).device
    pixels_3HW = to_tensor(eval_crop(image, model.config.vision.image_size)).to(device)
    tokens_BL = tokenize(list(captions), model.config.text.context_length)
    over_patches, over_tokens = [], []
    for part_BL in tokens_BL.split(BATCH):
        maps = model.cross_attention_maps(pixels_3HW.expand(len(part_BL), -1, -1, -1), part_BL.to(device))
        over_patches.append(maps.image_BHP.float().cpu())
        over_tokens.append(maps.text_BHL.float().cpu())
    patches_BHP, tokens_BHL = torch.cat(over_patches), torch.cat(over_tokens)
    check_finite(patches_BHP)
    check_finite(tokens_BHL)
    large = eval_crop(image, SIDE)
    looks, drawn, numbers = [], [_captioned(large, key)], []
    for text, patches_HP, tokens_HL, ids_L in zip(captions, patches_BHP, tokens_BHL, tokens_BL, strict=True):
        grid = patch_map(patches_HP)
        overlay = heat_overlay(large, grid.numpy(), SIDE)
        words, rest = words_scaled(*word_weights(tokens_HL, ids_L))
        looks.append(Look(text, jpeg(overlay), words, rest))
        drawn.append(_captioned(overlay, text, words))
        numbers.append(
            {
                "caption": text,
                "patches": [[round(value, 6) for value in row] for row in grid.tolist()],
                "words": [{"word": w.word, "share": round(w.share, 6), "shade": round(w.shade, 6)} for w in words],
                "rest": {name: round(share, 6) for name, share in rest},
            }
        )
    sheet = drawing.titled(key, [drawing.rows(drawn, across=4)])
    return Sheet(key, sheet, Looks(key, jpeg(large), looks), {"captions": numbers})


def words_scaled(weights: Sequence[WordWeight], padding: float) -> tuple[list[WordWeight], list[tuple[str, float]]]:
    """The caption's words with shades from 0 (least attended) to 1, and the shares of what is no word."""
    words = [weight for weight in weights if weight.word not in (START, END)]
    rest = [(weight.word, weight.share) for weight in weights if weight.word in (START, END)]
    if not words:
        return [], [*rest, ("padding", padding)]
    shades = scale_01(torch.tensor([word.share for word in words], dtype=torch.float64)).tolist()
    scaled = [WordWeight(word.word, word.share, shade) for word, shade in zip(words, shades, strict=True)]
    return scaled, [*rest, ("padding", padding)]


def _captioned(picture: Image.Image, text: str, words: Sequence[WordWeight] = ()) -> Image.Image:
    below = drawing.text_block(text, picture.width, colour=drawing.INK if words else drawing.FAINT)
    shaded = [drawing.shaded_words([drawing.Shade(w.word, w.shade) for w in words], picture.width)] if words else []
    return drawing.stacked([picture, *(shaded or [below])])
