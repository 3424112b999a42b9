"""Scanning shards into index tables: members grouped by key, shards in parallel."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat

import numpy as np

from cosmos_fast.data import faults, tar
from cosmos_fast.data.faults import Fault
from cosmos_fast.data.index_file import IndexTables
from cosmos_fast.data.shard_reader import open_shard
from cosmos_fast.data.storage import RemoteShard, Shard, Storage
from cosmos_fast.data.transport import StorageError
from cosmos_fast.utils.errors import UserError

_NAME = re.compile(r"^((?:.*/)?[^/.]+)\.([^/]+)$")
_MAX_SIZE = (1 << 32) - 1  # sizes are stored in 32 bits; a larger member is over every cap anyway
_CUT = (faults.TRUNCATED_SHARD, faults.CORRUPT_SHARD)
_THREADS = 8  # scanning waits for the disk more than it computes
_REMOTE_THREADS = 32  # and for the network still more
_WHOLE_THREADS = 4  # where shards go through the cache as a whole

Sample = dict[str, tar.Member]  # extension -> member


def build_tables(
    shards: Sequence[Shard], on_shard: Callable[[int, int], None] | None = None, storage: Storage | None = None
) -> IndexTables:
    """Scan every shard. Bad shards are recorded in the tables' faults; UserError only for one that cannot be opened."""
    rows: list[_ShardRows] = []
    extensions: dict[str, int] = {}
    storage = storage or Storage()
    with ThreadPoolExecutor(_threads(shards)) as pool:
        for number, (samples, problems) in enumerate(pool.map(scan_samples, shards, repeat(storage))):
            rows.append(_ShardRows(samples, problems, extensions))
            if on_shard is not None:
                on_shard(number + 1, len(shards))
    return _join(rows, list(extensions))


def _threads(shards: Sequence[Shard]) -> int:
    remote = [shard for shard in shards if isinstance(shard, RemoteShard)]
    if not remote:
        return _THREADS
    return _REMOTE_THREADS if all(shard.facts.ranged for shard in remote) else _WHOLE_THREADS


def scan_samples(shard: Shard, storage: Storage | None = None) -> tuple[dict[str, Sample], list[Fault]]:
    """Key -> members of one shard, in order of first appearance, and what was wrong with it."""
    samples: dict[str, Sample] = {}
    problems: list[Fault] = []
    try:
        with open_shard(shard, storage or Storage()) as reader:
            members = list(tar.scan(reader, problems))
        for member in members:
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
    except StorageError as error:
        raise UserError(f"cannot read a shard: {error}") from error
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
