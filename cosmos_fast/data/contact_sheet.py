"""A picture to look at: samples with their crops and captions as the model gets them in the first epoch.

Nothing is drawn for show: crops and captions come from the sample stream, are recoloured and tokenized as for training,
and are turned back into pixels and words.
"""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from PIL import Image, ImageDraw, ImageFont

from cosmos_fast.config import TrainConfig
from cosmos_fast.data.faults import SampleFault, stop_where_out_of_reach
from cosmos_fast.data.images import decode
from cosmos_fast.data.index import Index
from cosmos_fast.data.inspect import read_sample
from cosmos_fast.data.mixture import sample_order
from cosmos_fast.data.recolor import color_numbers, recolor_
from cosmos_fast.data.sample import SampleStream
from cosmos_fast.data.token_texts import detokenize, token_counts

_TRIES = 20  # positions looked at for each card wanted

# Layout, px
_PICTURE, _GLOBAL, _LOCAL, _TEXT = (300, 230), 150, 72, 640
_GAP, _BORDER = 14, 3
_FONT_SIZE, _LINE_HEIGHT, _LINE_CHARACTERS = 13, 17, 96
_PAPER, _INK, _FAINT = (250, 250, 248), (30, 30, 30), (130, 130, 130)
# A crop's frame has the colour of its box in the picture; told apart by colour-blind eyes too (Okabe, Ito 2008).
_COLOURS = ((213, 94, 0), (0, 114, 178), (0, 158, 115), (204, 121, 167), (230, 159, 0), (86, 180, 233), (90, 90, 90))


@dataclass(frozen=True)
class Caption:
    """What the model reads of a caption. tokens: what it takes uncut, start and end included. cut: whether it is."""

    text: str
    tokens: int
    cut: bool


@dataclass(frozen=True)
class Card:
    """One sample.

    picture: the whole image, made small. size: width and height before, px. boxes: left, top, right, bottom of each
    crop in the image, px. crops: as the model sees them. global_crops, global_captions: how many of the crops and
    captions are global ones; they come first. sentences: there to draw captions from.
    """

    key: str
    picture: Image.Image
    size: tuple[int, int]
    boxes: list[tuple[int, int, int, int]]
    crops: list[Image.Image]
    captions: list[Caption]
    global_crops: int
    global_captions: int
    sentences: int

    @property
    def about(self) -> str:
        """In one line."""
        return f"{printable(self.key)[:60]}   {self.size[0]} x {self.size[1]} px   {self.sentences} sentences"


def pick_cards(indexes: Sequence[Index], config: TrainConfig, count: int) -> list[Card]:
    """`count` usable samples, shared out between the sources: the first ones of each in training order."""
    cards: list[Card] = []
    for number, index in enumerate(indexes):
        data = replace(config.data, train=(index.source,))
        stream = SampleStream(
            data,
            [index],
            sample_order(data, [index], config.seed),
            image_size=config.model.vision.image_size,
            context_length=config.model.text.context_length,
        )
        wanted = min(len(index), count // len(indexes) + (number < count % len(indexes)))
        cards += _usable_cards(stream, config, wanted)
    return cards


def _usable_cards(stream: SampleStream, config: TrainConfig, wanted: int) -> list[Card]:
    cards: list[Card] = []
    for position in range(min(len(stream.indexes[0]), _TRIES * wanted)):
        if len(cards) == wanted:
            break
        try:
            cards.append(make_card(stream, position, config))
        except SampleFault as fault:
            index = stream.indexes[0]
            stop_where_out_of_reach(fault, index.name(stream.order.locate(position).sample))
    return cards


def make_card(stream: SampleStream, position: int, config: TrainConfig) -> Card:
    """The sample at a position of a stream over one source. Raises SampleFault."""
    place = stream.order.locate(position)
    sample = stream.make(place)
    file, record = read_sample(stream.indexes[place.source], place.sample, config)
    image = decode(file, config.data.max_pixels)
    pairs = zip(sample.crops, sample.views, strict=True)
    crops = [recolor_(crop.contiguous()[None], color_numbers([view])) for crop, view in pairs]
    counts = token_counts(sample.captions)
    ids = stream.tokens([sample])[:, 0].tolist()
    context = stream.context_length
    captions = [Caption(detokenize(row), n, n > context) for row, n in zip(ids, counts, strict=True)]
    return Card(
        key=sample.key,
        picture=_thumbnail(image),
        size=image.size,
        boxes=[view.box for view in sample.views],
        crops=[_picture(crop[0]) for crop in crops],
        captions=captions,
        global_crops=config.data.views.global_crops,
        global_captions=config.data.views.global_captions,
        sentences=len(record.sentences),
    )


def contact_sheet(cards: Sequence[Card]) -> Image.Image:
    """The cards below each other, each a strip of pictures with its captions beside it."""
    strips = [strip(card) for card in cards]
    width = max(each.width for each in strips)
    texts = [_text_block(card) for card in cards]
    heights = [max(a.height, b.height) + _GAP for a, b in zip(strips, texts, strict=True)]
    sheet = Image.new("RGB", (width + _TEXT + 3 * _GAP, sum(heights) + _GAP), _PAPER)
    top = _GAP
    for pictures, text, height in zip(strips, texts, heights, strict=True):
        sheet.paste(pictures, (_GAP, top))
        sheet.paste(text, (width + 2 * _GAP, top))
        top += height
    return sheet


def to_png(cards: Sequence[Card]) -> bytes:
    """The contact sheet as a file."""
    file = io.BytesIO()
    contact_sheet(cards).save(file, "PNG")
    return file.getvalue()


def strip(card: Card) -> Image.Image:
    """The picture with the boxes of its crops, and beside it the crops: globals in a row, locals in one below."""
    split = card.global_crops
    rows = [(card.crops[:split], _GLOBAL, 0), (card.crops[split:], _LOCAL, split)]
    widths = [len(crops) * (side + 2 * _BORDER + 4) for crops, side, _ in rows]
    sheet = Image.new("RGB", (_PICTURE[0] + _GAP + max(widths), _PICTURE[1] + 6), _PAPER)
    sheet.paste(_with_boxes(card), (0, 0))
    top = 0
    for crops, side, first in rows:
        for number, crop in enumerate(crops):
            framed = Image.new("RGB", (side + 2 * _BORDER,) * 2, _colour(first + number))
            framed.paste(crop.resize((side, side), Image.Resampling.LANCZOS), (_BORDER, _BORDER))
            sheet.paste(framed, (_PICTURE[0] + _GAP + number * (side + 2 * _BORDER + 4), top))
        top += side + 2 * _BORDER + 2
    return sheet


def printable(text: str) -> str:
    """Captions and keys come from anywhere: no control characters."""
    return "".join(character if character.isprintable() else " " for character in text)


def _picture(pixels: torch.Tensor) -> Image.Image:
    return Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())


def _thumbnail(image: Image.Image) -> Image.Image:
    scale = min(_PICTURE[0] / image.width, _PICTURE[1] / image.height)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.resize(size, Image.Resampling.LANCZOS)


def _with_boxes(card: Card) -> Image.Image:
    picture = card.picture.copy()
    pen, scale = ImageDraw.Draw(picture), card.picture.width / card.size[0]
    for number, box in reversed(list(enumerate(card.boxes))):  # globals on top
        left, top, right, bottom = (scale * edge for edge in box)
        inside = (left, top, max(left, right - 1), max(top, bottom - 1))
        pen.rectangle(inside, outline=_colour(number), width=2 if number < card.global_crops else 1)
    return picture


def _text_block(card: Card) -> Image.Image:
    font = ImageFont.load_default(_FONT_SIZE)
    lines = [(card.about, _FAINT)]
    for number, caption in enumerate(card.captions):
        is_global = number < card.global_captions
        label = f"{'global' if is_global else 'local'}, {caption.tokens} tokens{', cut' if caption.cut else ''}: "
        wrapped = textwrap.wrap(label + printable(caption.text), _LINE_CHARACTERS, subsequent_indent="    ")
        lines += [(line, _INK if is_global else (90, 90, 110)) for line in wrapped]
    block = Image.new("RGB", (_TEXT, len(lines) * _LINE_HEIGHT), _PAPER)
    pen = ImageDraw.Draw(block)
    for number, (line, colour) in enumerate(lines):
        pen.text((0, number * _LINE_HEIGHT), line, fill=colour, font=font)
    return block


def _colour(number: int) -> tuple[int, int, int]:
    return _COLOURS[number % len(_COLOURS)]
