"""The quarantine: which samples of which shard versions are unusable, as `cosmos-fast data verify` found.

A text file beside the index, one JSON object a line. The first line holds the rules that samples were held to; every
other one a verified part of a shard: the shard's name, size and time, a range of its samples, and the bad ones among
them. Parts of a shard that has changed since say nothing any more. The file may lie beside untrusted shards, so what it
says is checked before use.
"""

from __future__ import annotations

import json
import logging
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cosmos_fast.data import index_file
from cosmos_fast.data.index_file import IndexTables
from cosmos_fast.data.storage import Shard
from cosmos_fast.utils.errors import UserError
from cosmos_fast.utils.files import replacing

log = logging.getLogger(__name__)

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
    paths = _places(shards)
    for path in paths:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=path.parent):
                return path
        except OSError:
            continue
    return paths[0]  # writing there will say why it cannot be done


def load(shards: Sequence[Shard]) -> tuple[Path | None, list[Part]]:
    """(file, parts) of the newest quarantine of these shards, (None, []) where there is none that can be read."""
    there = [path for path in _places(shards) if path.is_file()]
    for path in sorted(there, key=lambda path: path.stat().st_mtime_ns, reverse=True):
        try:
            return path, read(path)[1]
        except (OSError, ValueError) as error:
            log.warning("quarantine %s is unreadable (%s) and not used: run `cosmos-fast data verify`", path, error)
    return None, []


def _places(shards: Sequence[Shard]) -> list[Path]:
    return [path.with_suffix(SUFFIX) for path in index_file.places(shards)]


def rows_left_out(source: str, shards: Sequence[Shard], tables: IndexTables) -> list[int]:
    """Rows of the samples in quarantine, ascending; says in the log how many, and what it no longer knows.

    UserError if every sample is in quarantine.
    """
    path, parts = load(shards)
    if not parts:
        return []
    rows, causes, changed = bad_rows(parts, shards, tables)
    if changed:
        log.warning(
            "data source %r: %d shards changed since they were verified: run `cosmos-fast data verify`", source, changed
        )
    if rows and len(rows) == len(tables.sample_shard):
        raise UserError(
            f"data source {source!r}: all {len(rows)} samples are in quarantine ({_summary(causes)}): mend the shards, "
            f"or delete {path} and `cosmos-fast data verify` them with other limits"
        )
    if rows:
        log.info("data source %r: %d samples in quarantine are left out (%s)", source, len(rows), _summary(causes))
    return rows


def _summary(causes: Counter[str]) -> str:
    return ", ".join(f"{count} x {cause}" for cause, count in causes.most_common())


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


def head_line(rules: Rules) -> bytes:
    """The first line of a file."""
    return json.dumps({"format": FORMAT, **asdict(rules)}).encode() + b"\n"


def part_line(part: Part) -> bytes:
    """Any other line."""
    return json.dumps({**asdict(part), "bad": [list(bad) for bad in part.bad]}).encode() + b"\n"


def bad_rows(parts: list[Part], shards: Sequence[Shard], tables: IndexTables) -> tuple[list[int], Counter[str], int]:
    """(rows of the bad samples, ascending; their causes; how many shards have changed since they were verified).

    A shard that was verified in an older version keeps all of its samples.
    """
    now = index_file.stamp(shards)
    edges = shard_edges(tables, len(shards))
    rows: list[int] = []
    causes: Counter[str] = Counter()
    changed: set[int] = set()
    for part in parts:
        if not still_holds(part, now, edges):
            changed.add(part.shard)
            continue
        first = edges[part.shard]
        rows.extend(first + bad.number for bad in part.bad)
        causes.update(bad.cause for bad in part.bad)
    return sorted(set(rows)), causes, len(changed)


def shard_edges(tables: IndexTables, shards: int) -> list[int]:
    """Where the samples of each shard begin, and the end: `shards` + 1 rows."""
    return [int(row) for row in np.searchsorted(tables.sample_shard, np.arange(shards + 1, dtype=np.uint32))]


def still_holds(part: Part, now: list[list[Any]], edges: list[int]) -> bool:
    """Whether the shard is still the one that was verified; now: index_file.stamp() of the shards."""
    shard = part.shard
    return shard < len(now) and now[shard] == part.stamp and part.stop <= edges[shard + 1] - edges[shard]


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
