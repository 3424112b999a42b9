"""The end of a process in which nothing moves any more: where it stands is written down, then it ends by force.

A rank that hangs (in a driver, on a dead file system, in a collective that another rank never comes to) holds all
others, and a launcher starts anew only what has ended. The watchdogs of a run tell each other through the store that
the ranks met at: where one finds its rank hanging all write down where theirs stand, and all end.

What holds Python's interpreter lock itself, or stops the process, stops its watchdog too; the other ranks' end the run.
"""

from __future__ import annotations

import os
import sys
import threading
import time
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from types import TracebackType

import torch.distributed as dist

from cosmos_fast.utils.logging import get_logger
from cosmos_fast.utils.ranks import Ranks

EXIT_HANGS = 3
TICK_S = 5.0
GRACE_S = 30.0
"""How long a process that is to end waits for its dump to be written, and for the other ranks'."""
SLOW = 2
"""So many times as long may take what is slow by nature: all before the first step is done, evaluation, saving, and
what is no phase, such as the end of a run."""

_THREADS = "cosmos watchdog"
_HANGS = "hangs"
_log = get_logger(__name__)


class Watchdog:
    """Watches while its `with` block lasts, and is told of every phase of a step (it is a PhaseClock).

    Args:
        limit_s: seconds without the beginning or the end of a phase or a step after which this process ends, with
            status EXIT_HANGS; 0 watches nothing. Time in which the process itself was stopped does not count.
        folder: where stacks_rank_N.txt is written.
        ranks: of the run.
        end: what ends the process.
    """

    def __init__(self, limit_s: float, folder: Path, ranks: Ranks, *, end: Callable[[int], object] = os._exit) -> None:
        self._limit_s, self._end = limit_s, end
        self._file = folder / f"stacks_rank_{ranks.rank}.txt"
        self._rank, self._world_size = ranks.rank, ranks.world_size
        self._store = _own_store() if limit_s and ranks.group is not None else None
        self._phases: list[tuple[str, bool]] = []  # name, and whether it is slow by nature; the last is the innermost
        self._steps_done: int | None = None
        self._moves = 0
        self._is_over, self._wake = threading.Event(), threading.Event()
        self._called = False
        self._threads: list[threading.Thread] = []

    # told by those who work

    def __call__(self, phase: str) -> AbstractContextManager[object]:
        """The time inside belongs to `phase` of a step."""
        return self._within(phase, slow=False)

    def slow(self, phase: str) -> AbstractContextManager[object]:
        """The time inside belongs to something that may take long."""
        return self._within(phase, slow=True)

    def step_done(self, step: int) -> None:
        """So many steps are done."""
        self._steps_done = step
        self._moves += 1

    @property
    def place(self) -> str:
        """What is going on, in words."""
        phase = self._phases[-1][0] if self._phases else "between phases"
        steps = "no step" if self._steps_done is None else f"{self._steps_done} steps"
        code = sys._current_frames()[threading.main_thread().ident or 0].f_code
        return f"{phase}, {steps} done, in {code.co_name} ({Path(code.co_filename).name})"

    @contextmanager
    def _within(self, phase: str, slow: bool) -> Iterator[None]:
        self._phases.append((phase, slow))
        self._moves += 1
        try:
            yield
        finally:
            self._phases.pop()
            self._moves += 1

    # the watching

    def __enter__(self) -> Watchdog:
        if self._limit_s:
            self._start(self._watch)
        if self._store is not None:
            self._start(self._listen)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._is_over.set()
        self._wake.set()
        for thread in self._threads:
            thread.join(GRACE_S)

    def _start(self, work: Callable[[], None]) -> threading.Thread:
        thread = threading.Thread(target=work, name=_THREADS, daemon=True)
        self._threads.append(thread)
        thread.start()
        return thread

    def _watch(self) -> None:
        quiet_s, seen = 0.0, self._moves
        while True:
            passed_s = self._tick()
            if self._is_over.is_set():
                return
            quiet_s, seen = (quiet_s + passed_s if seen == self._moves else 0.0), self._moves
            phases = list(self._phases)
            is_slow = self._steps_done is None or not phases or any(slow for _, slow in phases)
            if quiet_s >= self._limit_s * (SLOW if is_slow else 1) or self._called:
                # In a thread of its own: what hangs may be the very disk, terminal or network that this needs.
                self._start(lambda quiet_s=quiet_s: self._report(quiet_s)).join(GRACE_S)  # type: ignore[misc]
                self._end(EXIT_HANGS)
                return

    def _tick(self) -> float:
        """Wait a little; the seconds that count. A process that was stopped meanwhile has not been hanging."""
        begin = time.monotonic()
        self._wake.wait(TICK_S)
        return min(time.monotonic() - begin, 2 * TICK_S)

    def _listen(self) -> None:
        """Wait for the word of another rank's watchdog. Without the store nobody calls, and this one is alone."""
        with suppress(Exception):
            while not self._is_over.wait(TICK_S):
                if self._store is not None and self._store.check([_HANGS]):
                    self._called = True
                    self._wake.set()
                    return

    # the end

    def _report(self, quiet_s: float) -> None:
        """Tell the other ranks, write down where this one stands, and say where all do."""
        place = self.place
        found = f"rank {self._rank}: nothing has moved for {quiet_s:.0f} s: {place}"
        if self._called:
            found = f"rank {self._rank}: another rank hangs, this one is at: {place}"
        elif self._store is not None:
            with suppress(Exception):
                self._store.set(_HANGS, found)
        stacks = f"{found}\n{stacks_of_threads()}"
        with suppress(OSError):
            os.write(2, stacks.encode())
        with suppress(OSError):
            self._file.write_text(stacks, encoding="utf-8")
        self._tell_where_all_are(place)
        _log.error(
            "%s. Stacks are in %s. This process ends; the run goes on from its last checkpoint with --resume",
            *(found, self._file),
        )

    def _tell_where_all_are(self, place: str) -> None:
        """The lowest rank that is still there says it in the log; all write it down."""
        if self._store is None:
            return
        with suppress(Exception):
            there = self._wait_for_all("at", place)
            places = defaultdict(list)
            for rank in range(self._world_size):
                at = self._store.get(f"at/{rank}").decode() if rank in there else "no word, stopped or cut off"
                places[at].append(str(rank))
            described = "; ".join(f"rank {', '.join(ranks)}: {at}" for at, ranks in places.items())
            with self._file.open("a", encoding="utf-8") as file:
                file.write(f"\n{described}\n")
            if self._rank == min(there):
                _log.error("%s", described)
            self._wait_for_all("said", "")  # who ends takes the others with it

    def _wait_for_all(self, name: str, word: str) -> set[int]:
        """Say one's word; the ranks that have said theirs in good time."""
        assert self._store is not None
        self._store.set(f"{name}/{self._rank}", word)
        deadline = time.monotonic() + GRACE_S / 3
        there: set[int] = set()
        while len(there) < self._world_size and time.monotonic() < deadline:
            there |= {rank for rank in range(self._world_size) if self._store.check([f"{name}/{rank}"])}
            time.sleep(0.02)
        return there


def stacks_of_threads() -> str:
    """Where every thread of this process but the watchdog's is, as in a traceback; the main thread first."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    main = threading.main_thread().ident
    parts = []
    for ident, frame in sorted(sys._current_frames().items(), key=lambda item: item[0] != main):
        if names.get(ident) != _THREADS:
            parts.append(f"\nthread {names.get(ident, ident)}:\n{''.join(traceback.format_stack(frame))}")
    return "".join(parts)


def _own_store() -> dist.Store | None:
    """A connection of its own to the store of the ranks: the main thread may be waiting on theirs."""
    store = dist.distributed_c10d._get_default_store()
    with suppress(AttributeError, RuntimeError, NotImplementedError):
        store = store.clone()  # type: ignore[attr-defined]  # newer than torch 2.6
    return dist.PrefixStore("watchdog", store)
