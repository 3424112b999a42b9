"""Runs the steps of a GPU check: one deadline for all, a share and an end for each, whatever a step does.

A step is a process group of its own. When its time is up, or when it has ended, everything it started is ended with it,
also what left the group: each process carries a mark in its environment. A process that does not even die is left
behind after `KILL_S`. Imports nothing beyond Python, so that nothing can hang it.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from benchmarks.gpu_plan import ROOT, Step, groups

KILL_S = 3.0  # a killed process on a hung driver may never be gone
LEAST_OF_A_GROUP_S = 5.0
MARK = "COSMOS_GPU_CHECK"
TAIL = 6000  # characters of a step's output in the report
PASSED, FAILED, STOPPED = "passed", "failed", "stopped: its time was up"
NOT_YET, NO_TIME, INTERRUPTED = "not run: yet to come", "not run: out of time", "not run: interrupted"


@dataclass(kw_only=True)
class Outcome:
    """status: PASSED, FAILED, STOPPED, or "not run: ..."; output_tail: the end of what it printed."""

    name: str
    status: str = NOT_YET
    seconds: float = 0.0
    output_tail: str = ""


class Interrupted(Exception):
    """Somebody asked us to stop: SIGTERM, SIGINT or SIGHUP."""


@dataclass(frozen=True)
class Folders:
    """out: what benchmarks write. logs: a file a step. tallies: what became of each test, a file a step."""

    out: Path
    logs: Path
    tallies: Path

    @staticmethod
    def below(folder: Path) -> Folders:
        made = Folders(*(folder / name for name in ("out", "logs", "tallies")))
        for path in (made.out, made.logs, made.tallies):
            path.mkdir(parents=True)
        return made


class Listener(Protocol):
    """Who is told of every step that has ended."""

    def ended(self, outcome: Outcome) -> None: ...


Run = Callable[[Step, float, Folders], Outcome]


def allowance(group: Sequence[Step], later: Sequence[Sequence[Step]], remaining_s: float) -> float:
    """Seconds a group may take: its limit, less if the later ones would not get their least; 0 where it cannot run.

    What it is given never exceeds what remains, less the time that ending it may take.
    """
    first = group[0]
    remaining_s -= KILL_S
    spare_s = remaining_s - sum(other[0].least_s + KILL_S for other in later)
    allowed_s = min(first.limit_s, max(spare_s, first.least_s), remaining_s)
    return allowed_s if allowed_s >= first.least_s else 0.0


def run_all(
    steps: list[Step],
    folders: Folders,
    listener: Listener,
    total_s: float,
    *,
    clock: Callable[[], float] = time.monotonic,
    run: Run | None = None,
    side_by_side: int = 8,
) -> None:
    """Run the steps in order within `total_s`; the listener is told of each as it ends, one call at a time.

    clock, run: for tests. side_by_side: how many steps of a group run at once.
    """
    end_s = clock() + total_s
    run = run or run_step
    refused = {step.name: why for step in steps if (why := why_not(step))}
    planned = groups(steps)
    able = [[step for step in group if step.name not in refused] for group in planned]
    for i, ready in enumerate(able):
        for step in planned[i]:
            if step.name in refused:
                listener.ended(Outcome(name=step.name, status=f"not run: {refused[step.name]}"))
        if not ready:
            continue
        allowed_s = allowance(ready, [later for later in able[i + 1 :] if later], end_s - clock())
        if allowed_s == 0:
            for step in ready:
                listener.ended(Outcome(name=step.name, status=NO_TIME))
        elif len(ready) == 1:
            listener.ended(run(ready[0], allowed_s, folders))
        else:
            until_s = clock() + allowed_s
            for outcome in _run_group(ready, until_s, folders, clock, run, side_by_side):
                listener.ended(outcome)


def _run_group(
    steps: Sequence[Step], until_s: float, folders: Folders, clock: Callable[[], float], run: Run, side_by_side: int
) -> Iterator[Outcome]:
    """Outcomes in the order of the steps; a step that gets its turn too late does not run."""

    stopping = threading.Event()

    def run_until(step: Step) -> Outcome:
        left_s = 0.0 if stopping.is_set() else until_s - clock()
        return run(step, left_s, folders) if left_s >= LEAST_OF_A_GROUP_S else Outcome(name=step.name, status=NO_TIME)

    with ThreadPoolExecutor(side_by_side) as pool:
        waiting = [pool.submit(run_until, step) for step in steps]
        try:
            for future in waiting:
                yield future.result()
        except BaseException:
            stopping.set()
            end_marked(f"{MARK}={os.getpid()}-")  # so that the threads come back
            raise


def why_not(step: Step) -> str | None:
    """What the step needs and this machine lacks."""
    missing = [f"no package {name}" for name in step.modules if importlib.util.find_spec(name) is None]
    missing += [f"no program {name}" for name in step.programs if shutil.which(name) is None]
    return ", ".join(missing) or None


def run_step(step: Step, allowed_s: float, folders: Folders) -> Outcome:
    """Run one step, for `allowed_s` and `KILL_S` at most."""
    values = {"{out}": str(folders.out), "{budget}": f"{allowed_s * 2 / 3:.0f}"}
    command = [sys.executable]
    for part in step.command:
        for name, value in values.items():
            part = part.replace(name, value)
        command.append(part)
    mark = f"{os.getpid()}-{step.slug}-"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {MARK: mark, "COSMOS_TALLY": str(folders.tallies / f"{step.slug}.jsonl"), "PYTHONUNBUFFERED": "1"}
    carried = [part for part in os.environ.get("PYTHONPATH", "").split(os.pathsep) if part]
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), *carried])
    log = folders.logs / f"{step.slug}.txt"
    print(f"$ {' '.join(command)}   (at most {allowed_s:.0f} s)", flush=True)
    start_s = time.monotonic()
    with log.open("w") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            status = _status(process.wait(allowed_s))
        except subprocess.TimeoutExpired:
            status = STOPPED
        finally:
            _end(process, mark)
    seconds = round(time.monotonic() - start_s, 1)
    return Outcome(name=step.name, status=status, seconds=seconds, output_tail=_tail(log))


def _status(code: int) -> str:
    if code >= 0:
        return FAILED if code else PASSED
    return f"{FAILED}: ended by {signal.Signals(-code).name}"


def _end(process: subprocess.Popen[bytes], mark: str) -> None:
    """End the step's process group and whatever else carries its mark."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    end_marked(f"{MARK}={mark}")
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(KILL_S)


def end_marked(mark: str) -> None:
    """Kill every process whose environment at its start held an entry that begins so. Linux only; elsewhere nothing."""
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):  # it has ended, or is somebody else's
            if any(entry.startswith(mark.encode()) for entry in path.read_bytes().split(b"\0")):
                os.kill(int(path.parent.name), signal.SIGKILL)


def _tail(log: Path) -> str:
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 4 * TAIL))
        return file.read().decode(errors="replace")[-TAIL:]


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Within, a signal to stop raises `Interrupted` in the main thread, so that the report is written."""

    def stop(number: int, _: object) -> None:
        raise Interrupted(signal.Signals(number).name)

    kinds = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    before = [signal.signal(kind, stop) for kind in kinds]
    try:
        yield
    finally:
        for kind, handler in zip(kinds, before, strict=True):
            signal.signal(kind, handler)
