"""Reading every sample of a source in full, before training does: what is unusable goes into quarantine.

Parallel over parts of shards, and resumable: each finished part is a line of a journal beside the quarantine, so a
stopped verification continues where it was, and one of a source that changed reads the changed shards only.
"""

from __future__ import annotations

import contextlib
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from cosmos_fast.data import quarantine, quarantine_search, storage
from cosmos_fast.data.index import Index
from cosmos_fast.data.quarantine import BadSample, Part, Rules
from cosmos_fast.data.verify_part import Task, find_bad
from cosmos_fast.data.verify_pool import Result, verify_in_pool
from cosmos_fast.utils.errors import UserError
from cosmos_fast.utils.files import locked

PART_SAMPLES = 256  # half a second of decoding, or a second
# One for each kind of run, so that `--again` neither uses nor loses what the other one has found so far.
_JOURNAL, _AGAIN = ".verify", ".verify-again"


@dataclass(frozen=True)
class Verdict:
    """samples: of the source. read: by this run; the others were verified before. bad: shard's name and sample, in
    order. causes: how many of each. quarantine: the file."""

    samples: int
    read: int
    bad: list[tuple[str, BadSample]]
    causes: Counter[str]
    quarantine: Path


def plan(index: Index, rules: Rules, again: bool = False) -> tuple[list[Part], list[Task]]:
    """(parts that are known already, what is left to read). again: leave out what earlier verifications found."""
    edges = quarantine.shard_edges(index.tables, len(index.shards))
    suffixes = (_AGAIN,) if again else (quarantine.SUFFIX, _JOURNAL)
    known = quarantine_search.find(index.shards, index.stamps, index.tables, suffixes, rules, others=not again).parts
    spans: defaultdict[int, list[tuple[int, int]]] = defaultdict(list)
    for part in known:
        spans[part.shard].append((part.start, part.stop))
    tasks: list[Task] = []
    for shard, first in enumerate(edges[:-1]):
        for start, stop in _gaps(sorted(spans[shard]), edges[shard + 1] - first):
            begins = range(start, stop, PART_SAMPLES)
            tasks += [Task(shard, first, begin, min(begin + PART_SAMPLES, stop)) for begin in begins]
    return known, tasks


def verify(
    index: Index,
    rules: Rules,
    workers: int,
    *,
    again: bool = False,
    progress: Callable[[int], None] = lambda samples: None,
) -> Verdict:
    """Read what is not verified yet and write the quarantine. index: of the whole source, see open_source().

    Shards that were added since the index was opened are no part of it.

    Raises UserError: another process verifies this source, a shard cannot be read or has changed since the index was
    opened, the disk is full or read-only.
    """
    assert not index.left_out
    path = quarantine.place(index.shards)
    busy = f"another process verifies these shards ({path.parent}): wait for it"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with locked(path.with_suffix(".verify-lock"), busy):
            known, tasks = plan(index, rules, again)
            with _open_journal(_journal(path, again), rules) as journal:
                for task, bad in _results(index, rules, workers, tasks):
                    _check_unchanged(index, task.shard)
                    part = Part(task.shard, index.stamps[task.shard], task.start, task.stop, bad)
                    journal.write(quarantine.part_line(part))
                    journal.flush()
                    known.append(part)
                    progress(len(task))
            quarantine.save(index.shards, rules, known)
            for done in (_journal(path, False), _journal(path, True)):
                done.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot write {error.filename or path}: {error.strerror or error}; free some space, or set "
            "COSMOS_CACHE_DIR to a writable folder where that of the shards is not, and run the command again"
        ) from error
    return _verdict(index, known, sum(map(len, tasks)), path)


def _results(index: Index, rules: Rules, workers: int, tasks: list[Task]) -> Iterator[Result]:
    if workers > 1 and sum(map(len, tasks)) > 2 * PART_SAMPLES:  # fewer are read before a process has started
        yield from verify_in_pool(index, rules, min(workers, len(tasks)), tasks)
        return
    for task in tasks:
        yield task, find_bad(index, rules, task)


def _check_unchanged(index: Index, shard: int) -> None:
    """What was read of a shard so far is of the version that was indexed, or UserError."""
    path = index.shards[shard]
    try:
        is_same = storage.stamp(path) == index.stamps[shard]
    except OSError as error:
        raise UserError(f"shard {path} cannot be read any more ({error.strerror}); run the command again") from error
    if not is_same:
        raise UserError(
            f"shard {path} has changed while it was verified; run the command again when nothing writes to it any "
            "more: it continues there"
        )


def _verdict(index: Index, parts: list[Part], read: int, path: Path) -> Verdict:
    found = {(part.shard, bad.number): bad for part in parts for bad in part.bad}
    bad = [(index.shards[shard].name, found[shard, number]) for shard, number in sorted(found)]
    return Verdict(len(index), read, bad, Counter(sample.cause for _, sample in bad), path)


def _gaps(spans: list[tuple[int, int]], count: int) -> Iterator[tuple[int, int]]:
    """What of 0..count the sorted spans leave uncovered."""
    reached = 0
    for start, stop in [*spans, (count, count)]:
        if start > reached:
            yield reached, start
        reached = max(reached, stop)


def _journal(path: Path, again: bool) -> Path:
    return path.with_suffix(_AGAIN if again else _JOURNAL)


@contextlib.contextmanager
def _open_journal(path: Path, rules: Rules) -> Iterator[BinaryIO]:
    """Behind the last whole line of a journal made by the same rules, else a new one."""
    try:
        goes_on = quarantine.read(path, torn=True)[0] == rules
    except (FileNotFoundError, ValueError):
        goes_on = False
    with open(path, "r+b" if goes_on else "wb") as journal:
        if goes_on:
            journal.truncate(journal.read().rfind(b"\n") + 1)
            journal.seek(0, os.SEEK_END)
        else:
            journal.write(quarantine.head_line(rules))
            journal.flush()
        yield journal
