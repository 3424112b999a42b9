"""Scanning shards into index tables: members grouped by key, shards in parallel."""

from __future__ import annotations

import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from cosmos_fast.data import faults, tar
from cosmos_fast.data.faults import Fault
from cosmos_fast.data.index_file import IndexTables
from cosmos_fast.utils.errors import UserError

_NAME = re.compile(r"^((?:.*/)?[^/.]+)\.([^/]+)$")
_MAX_SIZE = (1 << 32) - 1  # sizes are stored in 32 bits; a larger member is over every cap anyway
_CUT = (faults.TRUNCATED_SHARD, faults.CORRUPT_SHARD)
_THREADS = 8  # scanning waits for the disk more than it computes

Sample = dict[str, tar.Member]  # extension -> member


def build_tables(shards: list[Path], on_shard: Callable[[int, int], None] | None = None) -> IndexTables:
    """Scan every shard. Bad shards are recorded in the tables' faults; UserError only for one that cannot be opened."""
    rows: list[_ShardRows] = []
    extensions: dict[str, int] = {}
    with ThreadPoolExecutor(_THREADS) as pool:
        for number, (samples, problems) in enumerate(pool.map(scan_samples, shards)):
            rows.append(_ShardRows(samples, problems, extensions))
            if on_shard is not None:
                on_shard(number + 1, len(shards))
    return _join(rows, list(extensions))


def scan_samples(shard: Path) -> tuple[dict[str, Sample], list[Fault]]:
    """Key -> members of one shard, in order of first appearance, and what was wrong with it."""
    samples: dict[str, Sample] = {}
    problems: list[Fault] = []
    try:
        for member in tar.scan(shard, problems):
            split = split_name(member.name)
            if split is None:
                continue
            key, extension = split
            sample = samples.setdefault(key, {})
            if extension in sample:
                problems.append(
                    Fault(faults.DUPLICATE_MEMBER, f"{shard.name}:{key}", f"{extension}; the first is kept")
                )
            else:
                sample[extension] = member
    except OSError as error:
        raise UserError(f"cannot read shard {shard}: {error.strerror}") from error
    if len(samples) > 1 and any(problem.cause in _CUT for problem in problems):
        before, last = list(samples)[-2:]
        if len(samples[last]) < len(samples[before]):  # the cut took some of its members
            del samples[last]
    return samples, problems


def split_name(name: str) -> tuple[str, str] | None:
    """`a/b.mask.PNG` -> (`a/b`, `mask.png`); None for names without an extension and for hidden files."""
    match = _NAME.match(name.removeprefix("./"))
    return (match[1], match[2].lower()) if match else None


class _ShardRows:
    """The columns one shard adds; small arrays instead of dictionaries, so that 27 M samples fit in memory."""

    def __init__(self, samples: dict[str, Sample], problems: list[Fault], extensions: dict[str, int]) -> None:
        members = [(extension, member) for sample in samples.values() for extension, member in sample.items()]
        self.problems = problems
        self.member_count = np.array([len(sample) for sample in samples.values()], dtype=np.int64)
        self.member_block = np.array([member.offset // tar.BLOCK for _, member in members], dtype=np.uint32)
        self.member_size = np.array([min(member.size, _MAX_SIZE) for _, member in members], dtype=np.uint32)
        self.member_extension = np.array(
            [extensions.setdefault(extension, len(extensions)) for extension, _ in members], dtype=np.uint16
        )
        keys = [key.encode() for key in samples]
        self.key_size = np.array([len(key) for key in keys], dtype=np.int64)
        self.keys = np.frombuffer(b"".join(keys), dtype=np.uint8)


def _join(rows: list[_ShardRows], extensions: list[str]) -> IndexTables:
    return IndexTables(
        sample_shard=np.repeat(np.arange(len(rows), dtype=np.uint32), [len(row.member_count) for row in rows]),
        member_start=_starts(np.concatenate([row.member_count for row in rows])),
        member_block=np.concatenate([row.member_block for row in rows]),
        member_size=np.concatenate([row.member_size for row in rows]),
        member_extension=np.concatenate([row.member_extension for row in rows]),
        key_start=_starts(np.concatenate([row.key_size for row in rows])),
        keys=np.concatenate([row.keys for row in rows]),
        extensions=extensions,
        faults=[problem for row in rows for problem in row.problems],
    )


def _starts(counts: np.ndarray) -> np.ndarray:
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)])
