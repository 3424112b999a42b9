"""Threads that fetch pieces of remote shards before the samples in them are wanted."""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable

_WAITING = 1024  # further requests are dropped: a reader that is so far behind fetches for itself


class ReadAhead:
    """Runs what it is given on `threads` daemon threads, which never hold up the end of the process."""

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._pid = -1
        self._jobs: queue.Queue[tuple[object, Callable[[], None]]] = queue.Queue(_WAITING)
        self._wanted: set[object] = set()

    def __reduce__(self) -> tuple[type[ReadAhead], tuple[int]]:
        return ReadAhead, (self._threads,)

    def submit(self, name: object, job: Callable[[], None]) -> None:
        """Run `job` soon, unless one of that name is waiting or running. It must not raise."""
        if self._pid != os.getpid():  # threads do not survive a fork
            self._pid, self._jobs, self._wanted = os.getpid(), queue.Queue(_WAITING), set()
            for _ in range(self._threads):
                threading.Thread(target=_work, args=(self._jobs, self._wanted), daemon=True).start()
        if name in self._wanted:
            return
        self._wanted.add(name)
        try:
            self._jobs.put_nowait((name, job))
        except queue.Full:
            self._wanted.discard(name)


def _work(jobs: queue.Queue[tuple[object, Callable[[], None]]], wanted: set[object]) -> None:
    while True:
        name, job = jobs.get()
        try:
            job()
        finally:
            wanted.discard(name)
