"""Sources of batches, each in a process of its own, measured in turns: seconds of all its processes and threads.

A loader works in threads and worker processes, also ahead of what is asked for. So its cost is the processor time of
everything below its process, taken when all of it has come to rest: every buffer is full then, before a lap as after
it, and what a lap has cost is what its batches cost. Processor time, unlike the wall clock, hardly moves when a
neighbour is busy. Linux only (/proc).
"""

from __future__ import annotations

import multiprocessing
import os
import time
import traceback
from collections.abc import Callable, Generator, Mapping
from contextlib import ExitStack, suppress
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import torch

from benchmarks.harness import Timing

Make = Callable[[], Generator[Any, None, None]]
REST_S = 0.12  # nothing has run for so long: all is at rest; the kernel counts in hundredths of a second
PATIENCE_S = 30.0


class Lap(NamedTuple):
    """wall_s: until the last batch was there. cpu_s: of all processes and threads, at rest before and after."""

    wall_s: float
    cpu_s: float


class Side:
    """One source of batches. make: builds it, in the new process; it must pickle. threads: torch's, in there."""

    def __init__(self, name: str, make: Make, threads: int = 1) -> None:
        self.name = name
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, make, threads))  # may have children: no daemon
        self._process.start()
        self._is_ready = False
        theirs.close()

    def lap(self, batches: int, *, ahead: int = 0) -> Lap:
        """Take so many batches. ahead: taken before the clock starts, to empty the buffers."""
        if not self._is_ready:  # it starts while the others do, however long that takes
            self._hear()
            self._is_ready = True
        before_s = self._rest()
        with suppress(OSError):
            self._pipe.send((ahead, batches))
        return Lap(self._hear(), self._rest() - before_s)

    def _hear(self) -> float:
        told: Any = "its process died; its error stands above"
        with suppress(EOFError, OSError):
            told = self._pipe.recv()
        if not isinstance(told, float):
            raise RuntimeError(f"{self.name}: {told}")
        return told

    def _rest(self) -> float:
        assert self._process.pid is not None
        return resting_cpu_seconds(self._process.pid, self.name)

    def close(self) -> None:
        """End the process; it ends its workers."""
        with suppress(OSError):  # it is gone already
            self._pipe.send(None)
        self._process.join(20)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        self._pipe.close()

    def __enter__(self) -> Side:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def _serve(pipe: Connection, make: Make, threads: int) -> None:
    """What runs in the process of a side. Tells 0 seconds when it is ready, then those of every lap."""
    torch.set_num_threads(threads)
    try:
        batches = make()
        pipe.send(0.0)
        try:
            while (asked := pipe.recv()) is not None:
                ahead, count = asked
                for _ in range(ahead):
                    next(batches)
                start = time.perf_counter()
                for _ in range(count):
                    next(batches)
                pipe.send(time.perf_counter() - start)
        finally:
            batches.close()
    except EOFError:  # whoever asked is gone
        pass
    except Exception:
        pipe.send(traceback.format_exc())


def resting_cpu_seconds(pid: int, name: str, *, itself: bool = True) -> float:
    """cpu_seconds() once nothing below the process has run for a moment."""
    last, since_s, until_s = -1.0, time.monotonic(), time.monotonic() + PATIENCE_S
    while (now_s := time.monotonic()) - since_s < REST_S:
        found = cpu_seconds(pid, itself=itself)
        if found != last:
            last, since_s = found, now_s
        if now_s > until_s:
            raise RuntimeError(f"{name} works on although nobody takes its batches")
        time.sleep(REST_S / 6)
    return last


def cpu_seconds(pid: int, *, itself: bool = True) -> float:
    """User and system time of a process (or not itself) and everything below it, ended children included."""
    times: dict[int, int] = {}
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()  # a command's name may hold anything
        except OSError:  # it has ended
            continue
        one = int(path.parent.name)
        children.setdefault(int(fields[1]), []).append(one)
        times[one] = sum(map(int, fields[11:15]))
    total, below = 0, [pid] if itself else list(children.get(pid, []))
    while below:
        one = below.pop()
        total += times.get(one, 0)
        below += children.get(one, [])
    return total / os.sysconf("SC_CLK_TCK")


def take_turns(
    makes: Mapping[str, Make], *, batches: int, repeats: int, warmup: int = 1, ahead: int = 0, threads: int = 1
) -> dict[str, list[Lap]]:
    """Laps of every side, taken in turns; who goes first moves on with every repetition."""
    laps: dict[str, list[Lap]] = {name: [] for name in makes}
    with ExitStack() as stack:
        sides = [stack.enter_context(Side(name, make, threads)) for name, make in makes.items()]
        for repetition in range(warmup + repeats):
            first = repetition % len(sides)
            for side in [*sides[first:], *sides[:first]]:
                lap = side.lap(batches, ahead=ahead)
                if repetition >= warmup:
                    laps[side.name].append(lap)
    return laps


def cpu_timing(laps: Mapping[str, list[Lap]], baseline: str, candidate: str) -> Timing:
    """Processor milliseconds of two sides, repetition by repetition."""
    theirs, ours = ([1e3 * lap.cpu_s for lap in laps[name]] for name in (baseline, candidate))
    return Timing(theirs, ours)


def wall_timing(laps: Mapping[str, list[Lap]], baseline: str, candidate: str) -> Timing:
    """The same of the wall clock."""
    theirs, ours = ([1e3 * lap.wall_s for lap in laps[name]] for name in (baseline, candidate))
    return Timing(theirs, ours)
