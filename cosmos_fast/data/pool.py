"""Worker processes that write files. They report by a shared counter and die with their parent."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from cosmos_fast.utils.errors import UserError
from cosmos_fast.utils.processes import end_with_parent

Job = TypeVar("Job")
Result = TypeVar("Result")
Progress = Callable[[int], None]

_units_done: Any = None  # a shared counter, set in worker processes


def run_in_pool(
    function: Callable[[Job, Progress], Result], jobs: Sequence[Job], workers: int, progress: Progress
) -> list[Result]:
    """function(job, progress) for every job, in `workers` processes (this one alone where one is enough); in order.

    `progress` gets whatever units the function counts, here. A failure stops the others at once and is raised: what
    they leave half-written is the caller's to remove. UserError where a worker was killed.
    """
    if min(workers, len(jobs)) <= 1:
        return [function(job, progress) for job in jobs]
    context = multiprocessing.get_context("spawn")  # fork would copy the threads' locks of the progress bar
    counter = context.Value("q", 0)
    pool = ProcessPoolExecutor(
        min(workers, len(jobs)), mp_context=context, initializer=_start_worker, initargs=(counter,)
    )
    seen = 0
    try:
        futures: list[Future[Result]] = [pool.submit(_run_in_worker, function, job) for job in jobs]
        pending = set(futures)
        while pending:
            finished, pending = wait(pending, timeout=0.2, return_when=FIRST_COMPLETED)
            done = counter.value
            progress(done - seen)
            seen = done
            for future in finished:
                future.result()
        return [future.result() for future in futures]
    except BrokenProcessPool:
        raise UserError(
            "a worker process was killed (out of memory?): run the same command again with fewer --workers"
        ) from None
    except BaseException:
        for process in list(pool._processes.values()):
            process.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker(counter: Any) -> None:
    global _units_done
    _units_done = counter
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    end_with_parent()


def _run_in_worker(function: Callable[[Job, Progress], Result], job: Job) -> Result:
    return function(job, _count)


def _count(units: int) -> None:
    with _units_done.get_lock():
        _units_done.value += units
