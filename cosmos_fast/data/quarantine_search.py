"""What the quarantine files of a folder, and of the user's cache, say of the shards of a source as they are now.

The shards may have been verified by another name of their folder, or in other company: a part belongs to the shard
whose name, size and time it has.
"""

from __future__ import annotations

import contextlib
import logging
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from cosmos_fast.data import index_file, storage
from cosmos_fast.data.index_file import IndexTables
from cosmos_fast.data.quarantine import SUFFIX, Part, Rules, read, shard_edges
from cosmos_fast.data.storage import Shard
from cosmos_fast.utils.errors import UserError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Known:
    """What is known of the shards of a source as they are now.

    parts: numbered as these shards are; no two overlap. files: that hold them. changed: how many shards are told of in
    other versions only.
    """

    parts: list[Part]
    files: list[Path]
    changed: int


def rows_left_out(source: str, shards: Sequence[Shard], stamps: list[list[Any]], tables: IndexTables) -> list[int]:
    """Rows of the samples in quarantine, ascending; says in the log how many, and what it no longer knows.

    UserError if every sample is in quarantine.
    """
    known = find(shards, stamps, tables)
    edges = shard_edges(tables, len(shards))
    rows = sorted({edges[part.shard] + bad.number for part in known.parts for bad in part.bad})
    causes = Counter(bad.cause for part in known.parts for bad in part.bad)
    if known.changed:
        log.warning(
            "data source %r: %d shards changed since they were verified: run `cosmos-fast data verify`",
            source,
            known.changed,
        )
    if rows and len(rows) == len(tables.sample_shard):
        raise UserError(
            f"data source {source!r}: all {len(rows)} samples are in quarantine ({_summary(causes)}): mend the shards, "
            f"or delete {' and '.join(map(str, known.files))} and `cosmos-fast data verify` them with other limits"
        )
    if rows:
        log.info("data source %r: %d samples in quarantine are left out (%s)", source, len(rows), _summary(causes))
    return rows


def _summary(causes: Counter[str]) -> str:
    return ", ".join(f"{count} x {cause}" for cause, count in causes.most_common())


def find(
    shards: Sequence[Shard],
    stamps: list[list[Any]],
    tables: IndexTables,
    suffixes: Sequence[str] = (SUFFIX,),
    rules: Rules | None = None,
    *,
    others: bool = True,
) -> Known:
    """What is known of these versions of the shards. Of two files that tell of the same samples the newer one counts.

    stamps: of the versions, see index_file.stamp(). suffixes: of the files to read, in this order. rules: files made by
    others are left out. others: with files of other lists of shards.
    """
    edges = shard_edges(tables, len(shards))
    beside = [folder / index_file.FOLDER for folder in storage.folders(shards)]
    spans: defaultdict[int, list[tuple[int, int]]] = defaultdict(list)
    known: list[Part] = []
    used: list[Path] = []
    names: set[str] = set()
    for path, own in (found for suffix in suffixes for found in _files(shards, beside, suffix)):
        is_near = own or path.parent in beside
        if not (own or others):
            continue
        made_by, parts = _read_or_warn(path, logging.WARNING if is_near else logging.DEBUG)
        if rules not in (None, made_by):
            continue
        if is_near:  # another file of the cache may tell of another source
            names.update(str(part.stamp[0]) for part in parts if part.stamp)
        fitting = parts if own else _renumbered(parts, stamps, edges, tables)
        added = [part for part in fitting if _holds(part, stamps, edges) and _take(spans[part.shard], part)]
        known += added
        used += [path] if added else []
    samples = np.diff(edges)
    missing = [n for n in range(len(shards)) if samples[n] and not spans[n]]
    return Known(known, used, sum(shards[n].name in names for n in missing))


def _files(shards: Sequence[Shard], beside: Sequence[Path], suffix: str) -> list[tuple[Path, bool]]:
    """(file, whether it was made for exactly these shards in this order), newest first."""
    own = {path.with_suffix(suffix) for path in index_file.places(shards)}
    found: list[tuple[int, Path]] = []
    for folder in {*beside, *(path.parent for path in own)}:
        for path in folder.glob(f"*{suffix}"):
            with contextlib.suppress(OSError):  # it may have gone since
                found.append((path.stat().st_mtime_ns, path))
    return [(path, path in own) for _, path in sorted(found, reverse=True)]


def _read_or_warn(path: Path, level: int) -> tuple[Rules | None, list[Part]]:
    is_journal = path.suffix != SUFFIX
    try:
        if is_journal and path.stat().st_size == 0:  # killed before the first line
            return None, []
        return read(path, torn=is_journal)
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        log.log(level, "%s is unreadable (%s) and not used: delete it and run `cosmos-fast data verify`", path, error)
    return None, []


def _renumbered(parts: list[Part], stamps: list[list[Any]], edges: list[int], tables: IndexTables) -> Iterator[Part]:
    """Those of another list of shards that are about these ones, by stamp. None where that leaves a doubt."""
    here, there = defaultdict(set), defaultdict(set)
    for number, stamp in enumerate(stamps):
        here[repr(stamp)].add(number)
    for part in parts:
        there[repr(part.stamp)].add(part.shard)
    for part in parts:
        version = repr(part.stamp)
        if len(here.get(version, ())) != 1 or len(there[version]) != 1 or part.stamp[-1] == "":
            continue
        (shard,) = here[version]
        first, count = edges[shard], edges[shard + 1] - edges[shard]
        if part.stop <= count and all(tables.key(first + bad.number) == bad.key for bad in part.bad):
            yield replace(part, shard=shard)


def _take(spans: list[tuple[int, int]], part: Part) -> bool:
    """Add the part to the ordered spans, unless it overlaps one of them; whether it was added."""
    span = part.start, part.stop
    after = bisect_left(spans, span)
    if (after and spans[after - 1][1] > part.start) or (after < len(spans) and spans[after][0] < part.stop):
        return False
    spans.insert(after, span)
    return True


def _holds(part: Part, stamps: list[list[Any]], edges: list[int]) -> bool:
    """Whether the shard is still the one that was verified."""
    shard = part.shard
    return shard < len(stamps) and stamps[shard] == part.stamp and part.stop <= edges[shard + 1] - edges[shard]
