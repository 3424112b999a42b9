"""The quarantine: which samples of which shard versions are unusable, as `cosmos-fast data verify` found.

A text file beside the index, one JSON object a line. The first line holds the rules that samples were held to; every
other one a verified part of a shard: the shard's name, size and time, a range of its samples, and the bad ones among
them. Parts of a shard that has changed since say nothing any more; quarantine_search says which shards the others are
about. The file may lie beside untrusted shards, so what it says is checked before use.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cosmos_fast.data import index_file, storage
from cosmos_fast.data.index_file import IndexTables
from cosmos_fast.data.storage import Shard
from cosmos_fast.utils.files import replacing

FORMAT = "cosmos-fast-quarantine/1"
SUFFIX = ".quarantine"


class BadSample(NamedTuple):
    """number: of the sample in its shard. key, cause and detail as in faults.Fault."""

    number: int
    key: str
    cause: str
    detail: str


@dataclass(frozen=True)
class Rules:
    """What a sample was held to. schema: of its record. max_pixels, max_member_bytes: caps, as in DataConfig."""

    schema: str
    max_pixels: int
    max_member_bytes: int


@dataclass(frozen=True)
class Part:
    """The samples start..stop-1 of shard number `shard`, verified, and the bad ones among them in order.

    stamp: the shard as it was then, see index_file.stamp().
    """

    shard: int
    stamp: list[Any]
    start: int
    stop: int
    bad: list[BadSample]


def place(shards: Sequence[Shard]) -> Path:
    """Where the quarantine of these shards is to be written: beside them, else in the user's cache."""
    paths = [path.with_suffix(SUFFIX) for path in index_file.places(shards)]
    for path in paths:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=path.parent):
                return path
        except OSError:
            continue
    return paths[0]  # writing there will say why it cannot be done


def read(path: Path, *, torn: bool = False) -> tuple[Rules, list[Part]]:
    """What a file holds. torn: a last line cut short is forgotten, as a killed process leaves one.

    Raises ValueError for anything that is not such a file, OSError.
    """
    with open(path, "rb") as file:
        rules = _rules(file.readline(1 << 16))
        parts = []
        for line in file:
            if torn and not line.endswith(b"\n"):
                break
            parts.append(_part(line))
    return rules, parts


def write(path: Path, rules: Rules, parts: Iterable[Part]) -> None:
    """Replace the file; neighbouring parts of a shard become one. Raises OSError."""
    with replacing(path) as out:
        out.write(head_line(rules))
        for part in _joined(parts):
            out.write(part_line(part))


def save(shards: Sequence[Shard], rules: Rules, parts: Sequence[Part]) -> None:
    """Write the quarantine of these shards at its place(). Raises OSError.

    Shards in other folders than the first one's have theirs beside them too, where whoever opens them alone finds it.
    """
    write(place(shards), rules, parts)
    homes = [storage.folder(shard) for shard in shards]
    for home in dict.fromkeys(homes):
        numbers = [n for n, folder in enumerate(homes) if folder == home]
        if home is None or home == homes[0]:
            continue
        new = {old: n for n, old in enumerate(numbers)}
        own = [replace(part, shard=new[part.shard]) for part in parts if part.shard in new]
        write(place([shards[n] for n in numbers]), rules, own)


def head_line(rules: Rules) -> bytes:
    """The first line of a file."""
    return json.dumps({"format": FORMAT, **asdict(rules)}).encode() + b"\n"


def part_line(part: Part) -> bytes:
    """Any other line."""
    return json.dumps({**asdict(part), "bad": [list(bad) for bad in part.bad]}).encode() + b"\n"


def shard_edges(tables: IndexTables, shards: int) -> list[int]:
    """Where the samples of each shard begin, and the end: `shards` + 1 rows."""
    return [int(row) for row in np.searchsorted(tables.sample_shard, np.arange(shards + 1, dtype=np.uint32))]


def _joined(parts: Iterable[Part]) -> Iterator[Part]:
    ordered = sorted(parts, key=lambda part: (part.shard, part.start))
    for shard, group in groupby(ordered, key=lambda part: part.shard):
        whole: Part | None = None
        for part in group:
            if whole is not None and part.start == whole.stop and part.stamp == whole.stamp:
                whole = Part(shard, part.stamp, whole.start, part.stop, whole.bad + part.bad)
                continue
            if whole is not None:
                yield whole
            whole = part
        assert whole is not None
        yield whole


def _rules(line: bytes) -> Rules:
    try:
        head = json.loads(line)
    except RecursionError:
        raise ValueError("its first line is wrong") from None
    if not isinstance(head, dict) or head.pop("format", None) != FORMAT:
        raise ValueError("not a quarantine file of this version")
    try:
        return Rules(**head)
    except TypeError:
        raise ValueError("its first line is wrong") from None


def _part(line: bytes) -> Part:
    try:
        row = json.loads(line)
        shard, stamp, start, stop = row["shard"], row["stamp"], row["start"], row["stop"]
        bad = [BadSample(*entry) for entry in row["bad"]]
        sound = isinstance(stamp, list) and shard >= 0 and 0 <= start <= stop
        sound = sound and all(start <= entry.number < stop for entry in bad)
        numbers = (shard, start, stop, *(entry.number for entry in bad))
        texts = [text for entry in bad for text in entry[1:]]
    except (KeyError, TypeError, RecursionError):
        raise ValueError("a line is wrong") from None
    if not sound or not all(type(n) is int for n in numbers) or not all(isinstance(text, str) for text in texts):
        raise ValueError("a line is wrong")
    return Part(shard, stamp, start, stop, bad)
