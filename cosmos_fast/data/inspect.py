"""What is in a source of shards: counts, sizes, statistics of captions and their tokens, bad samples by cause."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from cosmos_fast.config import SourceConfig, TrainConfig
from cosmos_fast.data import faults, rng
from cosmos_fast.data.captions import draw_captions
from cosmos_fast.data.faults import Fault, SampleFault, stop_where_out_of_reach
from cosmos_fast.data.histogram import Histogram, histogram
from cosmos_fast.data.images import decode
from cosmos_fast.data.index import RECORD_EXTENSION, Index, image_extension, is_used_in_training, open_source
from cosmos_fast.data.records import Record, guess_schema, parse_record
from cosmos_fast.data.storage import Storage, size_bytes
from cosmos_fast.data.token_texts import token_counts
from cosmos_fast.data.transport import shown

_NAMED_FAULTS = 5


@dataclass
class Survey:
    """Statistics of one source. Only `examined` of its `samples` were read.

    kinds: members of a sample, as extensions. formats: file format and colour mode of the images. tokens: ids that a
    text takes uncut, start and end included: of every sentence, and of the captions that epoch 0 draws.
    """

    name: str
    shards: int
    shard_bytes: int
    samples: int
    left_out: int
    context_length: int
    examined: int = 0
    kinds: Counter[str] = field(default_factory=Counter)
    schemas: Counter[str] = field(default_factory=Counter)
    formats: Counter[str] = field(default_factory=Counter)
    image_bytes: list[int] = field(default_factory=list)
    sides: list[tuple[int, int]] = field(default_factory=list)  # width, height in pixels
    sentences: list[int] = field(default_factory=list)  # a sample
    words: list[int] = field(default_factory=list)  # a sentence
    sentence_tokens: list[int] = field(default_factory=list)
    global_tokens: list[int] = field(default_factory=list)
    local_tokens: list[int] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)

    @property
    def causes(self) -> Counter[str]:
        """Bad samples by cause."""
        return Counter(fault.cause for fault in self.faults)

    def histograms(self) -> list[Histogram]:
        """Every distribution that there are values of."""
        found = [
            histogram("short side, px", [min(side) for side in self.sides]),
            histogram("width / height, %", [round(100 * width / height) for width, height in self.sides]),
            histogram("image file, KiB", [-(-size // 1024) for size in self.image_bytes]),
            histogram("sentences a sample", self.sentences),
            histogram("words a sentence", self.words),
            histogram("tokens a sentence", self.sentence_tokens),
            histogram("tokens a global caption", self.global_tokens),
            histogram("tokens a local caption", self.local_tokens),
        ]
        return [each for each in found if each is not None]

    def cut(self) -> list[tuple[str, int, int]]:
        """(caption kind, how many are longer than the context and lose their end, how many there are)."""
        kinds = (("global captions", self.global_tokens), ("local captions", self.local_tokens))
        return [(name, sum(n > self.context_length for n in counts), len(counts)) for name, counts in kinds if counts]


def open_sources(path: str, storage: Storage | None = None, opener: Callable[..., Index] = open_source) -> list[Index]:
    """The source at `path`; for a directory of directories of shards (a synthetic data set), all of them.

    storage: how remote shards are read; of these, members are fetched one by one. opener: takes what open_source()
    takes.
    """
    paths = [path]
    folder = Path(path).expanduser()
    if folder.is_dir() and not any(folder.glob("*.tar")):
        folders = sorted({shard.parent for shard in folder.glob("*/*.tar")}, key=lambda f: (f.name != "train", f.name))
        paths = [str(each) for each in folders] or paths
    indexes = [opener(SourceConfig(path=each), storage=storage) for each in paths]
    for index in indexes:
        index.keeps_pieces = False  # neighbours are not looked at
    return indexes


def spread(count: int, limit: int) -> list[int]:
    """Up to `limit` numbers below `count`, evenly spread."""
    taken = min(count, limit)
    return [(2 * i + 1) * count // (2 * taken) for i in range(taken)]


def survey(
    index: Index, config: TrainConfig, limit: int, progress: Callable[[int], None] = lambda samples: None
) -> Survey:
    """Read and decode up to `limit` samples, evenly spread over the source; caps and captions are those of `config`.

    UserError: a remote shard is out of reach.
    """
    found = Survey(
        name=shown(index.source.path),
        shards=len(index.shards),
        shard_bytes=sum(map(size_bytes, index.shards)),
        samples=len(index),
        left_out=index.left_out,
        context_length=config.model.text.context_length,
        faults=list(index.faults),
    )
    for i in spread(len(index), limit):
        found.examined += 1
        try:
            _examine(found, index, i, config)
        except SampleFault as fault:
            stop_where_out_of_reach(fault, index.name(i))
            found.faults.append(Fault(fault.cause, index.name(i), fault.detail))
        progress(1)
    return found


def read_sample(index: Index, i: int, config: TrainConfig) -> tuple[bytes, Record]:
    """The image file and the captions of sample `i`. Raises SampleFault."""
    members = index.read(i, max_bytes=config.data.max_member_bytes, only=is_used_in_training)
    extension = image_extension(members)
    if extension is None:
        raise SampleFault(faults.MISSING_IMAGE)
    if RECORD_EXTENSION not in members:
        raise SampleFault(faults.MISSING_RECORD)
    return members[extension], parse_record(members[RECORD_EXTENSION], index.source.schema)


def _examine(found: Survey, index: Index, i: int, config: TrainConfig) -> None:
    """Add one sample to a survey. Raises SampleFault."""
    found.kinds[" ".join(sorted(index.members(i)))] += 1
    file, record = read_sample(index, i, config)
    found.schemas[guess_schema(record.raw)] += 1
    image = decode(file, config.data.max_pixels)
    with Image.open(io.BytesIO(file)) as header:  # decode() has turned it into RGB
        found.formats[f"{header.format} {header.mode}"] += 1
    found.sides.append(image.size)
    found.image_bytes.append(len(file))
    found.sentences.append(len(record.sentences))
    found.words.extend(len(sentence.split()) for sentence in record.sentences)
    found.sentence_tokens.extend(token_counts(record.sentences))
    views = config.data.views
    tokens = token_counts(draw_captions(record.sentences, views, rng.generator(config.seed, rng.CAPTIONS, item=i)))
    found.global_tokens.extend(tokens[: views.global_captions])
    found.local_tokens.extend(tokens[views.global_captions :])


def describe(found: Survey) -> str:
    """The survey as text, with bars for distributions."""
    lines = [headline(found)]
    for kinds, count in found.kinds.most_common(8):
        lines.append(f"  members {kinds}: {percent(count, found.examined)}")
    for title, counts in (("schema", found.schemas), ("images", found.formats)):
        if counts:
            lines.append(f"  {title} " + ", ".join(f"{name}: {count:,}" for name, count in counts.most_common()))
    for each in found.histograms():
        lines += each.lines()
    for name, cut, count in found.cut():
        lines.append(f"  {name} longer than {found.context_length} tokens, cut: {percent(cut, count)}")
    lines.append(f"  bad samples: {len(found.faults):,}")
    for cause, count in found.causes.most_common():
        lines.append(f"    {cause}: {count:,}")
        lines += [f"      {where}" for where in named(found, cause)]
    return "\n".join(lines)


def headline(found: Survey) -> str:
    """What and how much, in one line."""
    text = f"{found.name}: {found.samples:,} samples in {found.shards:,} shards, {found.shard_bytes / 2**20:,.1f} MiB"
    text += f"; {found.left_out:,} more are in quarantine" if found.left_out else ""
    return text + (f" ({found.examined:,} samples read)" if found.examined < found.samples else "")


def named(found: Survey, cause: str) -> list[str]:
    """The first few samples with this fault."""
    faulty = [fault for fault in found.faults if fault.cause == cause][:_NAMED_FAULTS]
    return [fault.where + (f" ({fault.detail})" if fault.detail else "") for fault in faulty]


def percent(part: int, whole: int) -> str:
    """`part` and its share of `whole`."""
    return f"{part:,} ({100 * part / whole:.1f} %)"
