"""What is in a source of shards: counts, sizes, caption statistics, bad samples; and a contact sheet to look at."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from cosmos_fast.config import SourceConfig
from cosmos_fast.data import faults
from cosmos_fast.data.faults import Fault, SampleFault
from cosmos_fast.data.images import decode
from cosmos_fast.data.index import RECORD_EXTENSION, Index, image_extension, is_used_in_training, open_source
from cosmos_fast.data.records import guess_schema, parse_record

MAX_MEMBER_BYTES = 64 << 20
_NAMED_FAULTS = 5

# Contact sheet, px
_COLUMNS = 4
_CELL_WIDTH, _PICTURE_HEIGHT, _TEXT_HEIGHT, _GAP = 340, 230, 150, 14
_FONT_SIZE = 13
_LINE_HEIGHT = 17
_LINE_CHARACTERS = 49


@dataclass
class Survey:
    """Statistics of one source. Only `examined` of its `samples` were read."""

    name: str
    shards: int
    shard_bytes: int
    samples: int
    examined: int = 0
    member_kinds: Counter[str] = field(default_factory=Counter)
    schemas: Counter[str] = field(default_factory=Counter)
    sides: list[tuple[int, int]] = field(default_factory=list)  # width, height in pixels
    sentences: list[int] = field(default_factory=list)  # a sample
    words: list[int] = field(default_factory=list)  # a sentence
    faults: list[Fault] = field(default_factory=list)


@dataclass(frozen=True)
class Card:
    """A sample on the contact sheet."""

    key: str
    image: Image.Image
    sentences: list[str]


def open_sources(path: Path) -> list[Index]:
    """The source at `path`; for a directory of directories of shards (a synthetic data set), all of them."""
    if path.is_dir() and not any(path.glob("*.tar")):
        folders = sorted({shard.parent for shard in path.glob("*/*.tar")}, key=lambda f: (f.name != "train", f.name))
        if folders:
            return [open_source(SourceConfig(path=str(folder))) for folder in folders]
    return [open_source(SourceConfig(path=str(path)))]


def spread(count: int, limit: int) -> list[int]:
    """Up to `limit` numbers below `count`, evenly spread."""
    taken = min(count, limit)
    return [(2 * i + 1) * count // (2 * taken) for i in range(taken)]


def survey(index: Index, limit: int, progress: Callable[[int], None] = lambda samples: None) -> Survey:
    """Read and decode up to `limit` samples, evenly spread over the source."""
    found = Survey(
        name=index.source.path,
        shards=len(index.shards),
        shard_bytes=sum(shard.stat().st_size for shard in index.shards),
        samples=len(index),
        faults=list(index.faults),
    )
    for i in spread(len(index), limit):
        found.examined += 1
        found.member_kinds[" ".join(sorted(index.members(i)))] += 1
        try:
            card = read_card(index, i, found.schemas)
        except SampleFault as fault:
            found.faults.append(Fault(fault.cause, index.name(i), fault.detail))
        else:
            found.sides.append(card.image.size)
            found.sentences.append(len(card.sentences))
            found.words.extend(len(sentence.split()) for sentence in card.sentences)
        progress(1)
    return found


def read_card(index: Index, i: int, schemas: Counter[str] | None = None) -> Card:
    """Image and captions of sample `i`, as training would get them. Raises SampleFault."""
    members = index.read(i, max_bytes=MAX_MEMBER_BYTES, only=is_used_in_training)
    extension = image_extension(members)
    if extension is None:
        raise SampleFault(faults.MISSING_IMAGE)
    if RECORD_EXTENSION not in members:
        raise SampleFault(faults.MISSING_RECORD)
    record = parse_record(members[RECORD_EXTENSION], index.source.schema)
    if schemas is not None:
        schemas[guess_schema(record.raw)] += 1
    return Card(index.key(i), decode(members[extension]), record.sentences)


def describe(found: Survey) -> str:
    """The survey as text, with bars for distributions."""
    lines = [
        f"{found.name}: {found.samples:,} samples in {found.shards:,} shards, {found.shard_bytes / 2**20:,.1f} MiB"
        + (f" ({found.examined:,} samples read)" if found.examined < found.samples else "")
    ]
    for kinds, count in found.member_kinds.most_common(8):
        lines.append(f"  members {kinds}: {_percent(count, found.examined)}")
    if found.schemas:
        lines.append("  schema " + ", ".join(f"{name}: {count:,}" for name, count in found.schemas.most_common()))
    lines += _bars("short side, px", [min(side) for side in found.sides])
    lines += _bars("width / height, %", [round(100 * width / height) for width, height in found.sides])
    lines += _bars("sentences a sample", found.sentences)
    lines += _bars("words a sentence", found.words)
    causes = Counter(fault.cause for fault in found.faults)
    lines.append(f"  bad samples: {len(found.faults):,}")
    for cause, count in causes.most_common():
        lines.append(f"    {cause}: {count:,}")
        named = [fault for fault in found.faults if fault.cause == cause][:_NAMED_FAULTS]
        lines += [f"      {fault.where}" + (f" ({fault.detail})" if fault.detail else "") for fault in named]
    return "\n".join(lines)


def _percent(part: int, whole: int) -> str:
    return f"{part:,} ({100 * part / whole:.1f} %)"


def _bars(title: str, values: Sequence[int], bins: int = 10, width: int = 32) -> list[str]:
    """A histogram of whole numbers, one line a bin."""
    if not values:
        return []
    low, high = min(values), max(values)
    median = sorted(values)[len(values) // 2]
    lines = [f"  {title}: {low} to {high}, median {median}, mean {sum(values) / len(values):.1f}"]
    if low == high:
        return lines
    step = -(-(high - low + 1) // bins)
    counts = Counter((value - low) // step for value in values)
    for number in range((high - low) // step + 1):
        first = low + number * step
        label = f"{first}" if step == 1 else f"{first}-{first + step - 1}"
        bar = "█" * round(width * counts[number] / max(counts.values()))
        lines.append(f"    {label:>9} {bar:<{width}} {_percent(counts[number], len(values))}")
    return lines


def pick_cards(indexes: Sequence[Index], count: int) -> list[Card]:
    """`count` usable samples, evenly spread over each source and shared out between the sources."""
    cards: list[Card] = []
    for number, index in enumerate(indexes):
        wanted = count // len(indexes) + (number < count % len(indexes))
        cards += _usable_cards(index, wanted)
    return cards


def _usable_cards(index: Index, wanted: int) -> list[Card]:
    cards: list[Card] = []
    for i in spread(len(index), wanted):
        for step in range(20):  # a bad sample gives its place to the next good one
            try:
                cards.append(read_card(index, (i + step) % len(index)))
                break
            except SampleFault:
                continue
    return cards


def contact_sheet(cards: Sequence[Card]) -> Image.Image:
    """Pictures in a grid, each with its key, the first caption and a few others."""
    columns = min(_COLUMNS, max(len(cards), 1))
    rows = -(-len(cards) // columns)
    step_x, step_y = _CELL_WIDTH + _GAP, _PICTURE_HEIGHT + _TEXT_HEIGHT + _GAP
    sheet = Image.new("RGB", (columns * step_x + _GAP, max(rows, 1) * step_y + _GAP), (250, 250, 248))
    pen = ImageDraw.Draw(sheet)
    for number, card in enumerate(cards):
        left, top = _GAP + number % columns * step_x, _GAP + number // columns * step_y
        _draw_card(sheet, pen, card, left, top)
    return sheet


def _draw_card(sheet: Image.Image, pen: ImageDraw.ImageDraw, card: Card, left: int, top: int) -> None:
    scale = min(_CELL_WIDTH / card.image.width, _PICTURE_HEIGHT / card.image.height)
    size = (max(1, round(card.image.width * scale)), max(1, round(card.image.height * scale)))
    picture = card.image.resize(size, Image.Resampling.LANCZOS)
    sheet.paste(picture, (left + (_CELL_WIDTH - size[0]) // 2, top + (_PICTURE_HEIGHT - size[1]) // 2))
    font, bold = ImageFont.load_default(_FONT_SIZE), (30, 30, 30)
    y = top + _PICTURE_HEIGHT + 6
    about = f"{card.key}   {card.image.width} x {card.image.height}   {len(card.sentences)} sentences"
    pen.text((left, y), _printable(about)[:_LINE_CHARACTERS], fill=(130, 130, 130), font=font)
    # The first sentence, and one from far down the list: a long caption in DreamLIP's order.
    chosen = [card.sentences[0]] + ([card.sentences[len(card.sentences) // 2]] if len(card.sentences) > 1 else [])
    for sentence, colour in zip(chosen, (bold, (90, 90, 110)), strict=False):
        for line in textwrap.wrap(_printable(sentence), _LINE_CHARACTERS, max_lines=3, placeholder=" …"):
            y += _LINE_HEIGHT
            pen.text((left, y), line, fill=colour, font=font)
        y += 4


def _printable(text: str) -> str:
    """Captions come from anywhere: no control characters."""
    return "".join(character if character.isprintable() else " " for character in text)
