"""Worker processes that verify parts of shards. They die with their parent; a file that kills one is found out."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from cosmos_fast.config import SourceConfig
from cosmos_fast.data import faults, index_file
from cosmos_fast.data.index import Index
from cosmos_fast.data.index_file import IndexTables
from cosmos_fast.data.quarantine import BadSample, Rules
from cosmos_fast.data.storage import Shard, Storage
from cosmos_fast.data.verify_part import Task, find_bad
from cosmos_fast.utils.errors import UserError
from cosmos_fast.utils.processes import end_with_parent

Result = tuple[Task, list[BadSample]]
Reader = Callable[[Index, Rules, Task], list[BadSample]]

_TASKS_A_WORKER = 3  # handed out ahead, so that none waits for the parent
_setup: Setup | None = None  # set in worker processes, as is
_index: Index | None = None


@dataclass(frozen=True)
class Setup:
    """What a worker needs to read with exactly the parent's index, whatever has become of the source since.

    tables: None where they lie in the file `cache`; a worker maps them from there instead of having a copy of its own.
    """

    source: SourceConfig
    shards: list[Shard]
    stamps: list[list[Any]]
    tables: IndexTables | None
    cache: Path | None
    storage: Storage
    rules: Rules
    reader: Reader

    @classmethod
    def of(cls, index: Index, rules: Rules, reader: Reader) -> Setup:
        """As the parent hands it to its workers."""
        tables = index.tables if index.cache is None else None
        return cls(index.source, index.shards, index.stamps, tables, index.cache, index.storage, rules, reader)

    def open(self) -> Index:
        """The parent's index. UserError where its file has been replaced by one of other versions of the shards."""
        tables = self.tables
        if tables is None:
            assert self.cache is not None
            try:
                tables = index_file.read(self.cache, self.stamps)
            except (OSError, *index_file.DAMAGED) as error:
                raise UserError(f"index cache {self.cache} is unreadable ({error}); run the command again") from error
        if tables is None:
            raise UserError(
                "shards have changed while they were verified; run the command again when nothing writes to them any "
                "more: it continues there"
            )
        return Index(self.source, self.shards, self.stamps, tables, self.cache, storage=self.storage)


def verify_in_pool(
    index: Index, rules: Rules, workers: int, tasks: list[Task], reader: Reader = find_bad
) -> Iterator[Result]:
    """The bad samples of every part, in the order in which they are done.

    A worker that is killed takes the pool with it. What was under way is then read again in processes of its own, in
    ever smaller parts, until the sample that kills its reader stands alone; the rest goes on in a new pool.
    """
    left = list(tasks)
    while left:
        done: set[Task] = set()
        under_way: list[Task] = []
        try:
            for task, bad in _run(workers, Setup.of(index, rules, reader), left, under_way):
                done.add(task)
                yield task, bad
        except BrokenProcessPool:
            _check_that_workers_start(index, rules, reader)
            for task in under_way:
                done.add(task)
                yield task, _carefully(index, rules, task, reader)
        left = [task for task in left if task not in done]


def _run(workers: int, setup: Setup, tasks: list[Task], under_way: list[Task]) -> Iterator[Result]:
    """One pool's work. under_way: on return the tasks whose results were not handed out. Raises BrokenProcessPool."""
    context = multiprocessing.get_context("spawn")  # fork would copy the threads' locks of the progress bar
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=(setup,))
    waiting = iter(tasks)
    pending: dict[Future[list[BadSample]], Task] = {}

    def submit(count: int) -> None:
        for task in islice(waiting, count):
            under_way.append(task)
            pending[pool.submit(_work, task)] = task

    try:
        submit(workers * _TASKS_A_WORKER)
        while pending:
            for future in wait(pending, return_when=FIRST_COMPLETED).done:
                bad = future.result()
                task = pending.pop(future)
                under_way.remove(task)
                submit(1)
                yield task, bad
    except BaseException:
        for process in list((pool._processes or {}).values()):
            process.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _carefully(index: Index, rules: Rules, task: Task, reader: Reader, sure: bool = False) -> list[BadSample]:
    try:
        return next(_run(1, Setup.of(index, rules, reader), [task], []))[1]
    except BrokenProcessPool:
        if len(task) == 1 and not sure:  # it may have been hit by something else, say for want of memory
            return _carefully(index, rules, task, reader, sure=True)
        if len(task) == 1:
            return [BadSample(task.start, index.key(task.first + task.start), faults.KILLS_READER, "")]
    middle = (task.start + task.stop) // 2
    halves = (Task(task.shard, task.first, task.start, middle), Task(task.shard, task.first, middle, task.stop))
    return [bad for half in halves for bad in _carefully(index, rules, half, reader)]


def _check_that_workers_start(index: Index, rules: Rules, reader: Reader) -> None:
    """Else every sample would seem to kill its reader."""
    try:
        next(_run(1, Setup.of(index, rules, reader), [Task(0, 0, 0, 0)], []))
    except BrokenProcessPool as error:
        raise UserError(
            f"worker processes die as soon as they start ({error}): is there memory for one? "
            "With --workers 1 none is used"
        ) from error


def _start_worker(setup: Setup) -> None:
    global _setup
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    end_with_parent()
    _setup = setup


def _work(task: Task) -> list[BadSample]:
    global _index
    assert _setup is not None
    if _index is None:  # not when the process starts: an error would be taken for its death
        _index = _setup.open()
    return _setup.reader(_index, _setup.rules, task)
