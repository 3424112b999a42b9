"""Sheets: pictures with words below or beside them, drawn as one image. Sizes in pixels; shown on white."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import matplotlib
from matplotlib.ft2font import FT2Font
from PIL import Image, ImageDraw, ImageFont

from cosmos_fast.evaluate.report.pictures import rgb
from cosmos_fast.evaluate.report.theme import LIGHT

GAP, PAD = 16, 24
TEXT, TITLE = 15, 20
INK, FAINT, PAPER = rgb(LIGHT.ink), rgb(LIGHT.muted), rgb(LIGHT.card)
GOOD, BAD, LINE, ACCENT = rgb(LIGHT.good), rgb(LIGHT.bad), rgb(LIGHT.line), rgb(LIGHT.accent)
Colour = tuple[int, int, int]


@lru_cache
def font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    """matplotlib's own font: the same on every machine, Latin, Greek and Cyrillic."""
    return ImageFont.truetype(_font_file("DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"), size)


def _font_file(name: str) -> str:
    return str(Path(matplotlib.get_data_path()) / "fonts/ttf" / name)


def undrawn(text: str) -> str:
    """The printable characters of a text that the font lacks, each once, sorted: sheets show boxes for them."""
    known = FT2Font(_font_file("DejaVuSans.ttf")).get_charmap()
    return "".join(sorted(letter for letter in set(text) if letter.isprintable() and ord(letter) not in known))


def wrapped(text: str, width: int, size: int = TEXT, bold: bool = False) -> list[str]:
    """Lines of at most `width` pixels; a word that is longer is cut."""
    face = font(size, bold)
    lines: list[str] = []
    for word in " ".join(text.split()).split(" "):
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and face.getlength(longer) <= width:
            lines[-1] = longer
            continue
        while len(word) > 1 and face.getlength(word) > width:
            starts = [word[:n] for n in range(1, min(len(word), width + 1))]  # letters are a pixel wide or more
            fits = max(1, bisect_right(starts, float(width), key=face.getlength))
            lines.append(word[:fits])
            word = word[fits:]
        lines.append(word)
    return lines


def text_block(
    text: str, width: int, size: int = TEXT, colour: Colour = INK, bold: bool = False, most: int = 6
) -> Image.Image:
    """Words in a box `width` wide and as high as they need, `most` lines of them."""
    lines = wrapped(text, width, size, bold)
    if len(lines) > most:
        lines = [*lines[: most - 1], _shortened(lines[most - 1].rstrip(" .,") + " …", width, font(size, bold))]
    step = round(1.35 * size)
    block = Image.new("RGB", (width, max(1, step * len(lines))), PAPER)
    draw = ImageDraw.Draw(block)
    for number, line in enumerate(lines):
        draw.text((0, number * step), line, fill=colour, font=font(size, bold))
    return block


def _shortened(text: str, width: int, face: ImageFont.FreeTypeFont) -> str:
    """One line: a text that is wider loses letters before an ellipsis at its end."""
    if face.getlength(text) <= width:
        return text
    kept = text.removesuffix(" …")
    while kept and face.getlength(f"{kept} …") > width:
        kept = kept[:-1]
    return f"{kept} …"


def framed(image: Image.Image, colour: Colour, border: int = 4) -> Image.Image:
    frame = Image.new("RGB", (image.width + 2 * border, image.height + 2 * border), colour)
    frame.paste(image, (border, border))
    return frame


def stacked(parts: Sequence[Image.Image], gap: int = 6) -> Image.Image:
    """Below each other, at the left."""
    width = max(part.width for part in parts)
    sheet = Image.new("RGB", (width, sum(part.height for part in parts) + gap * (len(parts) - 1)), PAPER)
    top = 0
    for part in parts:
        sheet.paste(part, (0, top))
        top += part.height + gap
    return sheet


def rows(parts: Sequence[Image.Image], across: int, gap: int = GAP) -> Image.Image:
    """Beside each other, `across` to a row, at the top of it."""
    lines = [parts[start : start + across] for start in range(0, len(parts), across)]
    return stacked([_beside(line, gap) for line in lines], gap)


def _beside(parts: Sequence[Image.Image], gap: int) -> Image.Image:
    sheet = Image.new(
        "RGB", (sum(part.width for part in parts) + gap * (len(parts) - 1), max(p.height for p in parts)), PAPER
    )
    left = 0
    for part in parts:
        sheet.paste(part, (left, 0))
        left += part.width + gap
    return sheet


def titled(title: str, parts: Sequence[Image.Image]) -> Image.Image:
    """A whole sheet: a title, parts below it, a margin around."""
    width = max(part.width for part in parts)
    body = stacked([text_block(title, width, TITLE, bold=True, most=4), *parts], gap=GAP)
    return framed(body, PAPER, PAD)


@dataclass(frozen=True)
class Shade:
    """A word on a ground of `strength` 0-1."""

    text: str
    strength: float


def shaded_words(words: Sequence[Shade], width: int, size: int = TEXT) -> Image.Image:
    """Words in lines, each on a ground that is the darker the stronger it is; one longer than a line is cut."""
    face = font(size)
    step, inner = round(2.0 * size), 6
    places: list[tuple[int, int, int, Shade]] = []
    left = top = 0
    cut = (Shade(part, word.strength) for word in words for part in wrapped(word.text, width - 2 * inner, size))
    for word in cut:
        reach = round(face.getlength(word.text)) + 2 * inner
        if left and left + reach > width:
            left, top = 0, top + step
        places.append((left, top, reach, word))
        left += reach + 4
    block = Image.new("RGB", (width, top + step), PAPER)
    draw = ImageDraw.Draw(block)
    for x, y, reach, word in places:
        strength = 0.75 * word.strength
        ground = tuple(round(p * (1 - strength) + a * strength) for p, a in zip(PAPER, ACCENT, strict=True))
        draw.rounded_rectangle((x, y, x + reach, y + step - 6), radius=5, fill=ground)
        draw.text((x + inner, y + 4), word.text, fill=INK, font=face)
    return block


def legend(names: Sequence[str], colours: Sequence[str], width: int, size: int = TEXT) -> Image.Image:
    """Names, each behind a square of its colour; one longer than a line ends in an ellipsis."""
    face, square = font(size), size
    step = round(1.7 * size)
    places: list[tuple[int, int, str, str]] = []
    left = top = 0
    for whole, colour in zip(names, colours, strict=True):
        name = _shortened(whole, width - square - 7, face)
        reach = square + 7 + round(face.getlength(name)) + 18
        if left and left + reach > width:
            left, top = 0, top + step
        places.append((left, top, name, colour))
        left += reach
    block = Image.new("RGB", (width, top + step), PAPER)
    draw = ImageDraw.Draw(block)
    for x, y, name, colour in places:
        draw.rounded_rectangle((x, y + 3, x + square, y + 3 + square), radius=3, fill=colour, outline=FAINT)
        draw.text((x + square + 7, y + 1), name, fill=INK, font=face)
    return block
