"""Worker processes that write shards. They report by a shared counter and die with their parent."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from cosmos_fast.data.synthetic.scene import SceneSettings
from cosmos_fast.data.synthetic.shards import Shard, write_shard
from cosmos_fast.utils.errors import UserError
from cosmos_fast.utils.processes import end_with_parent

_scenes_done: Any = None  # a shared counter, set in worker processes


def _start_worker(counter: Any) -> None:
    global _scenes_done
    _scenes_done = counter
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    end_with_parent()


def _count_scenes(scenes: int) -> None:
    with _scenes_done.get_lock():
        _scenes_done.value += scenes


def _write_shard_in_worker(shard: Shard, settings: SceneSettings) -> None:
    write_shard(shard, settings, _count_scenes)


def write_in_pool(shards: list[Shard], settings: SceneSettings, workers: int, progress: Callable[[int], None]) -> None:
    """Write shards with `workers` processes; calls `progress` with numbers of scenes done."""
    context = multiprocessing.get_context("spawn")  # fork would copy the threads' locks of the progress bar
    counter = context.Value("q", 0)
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=(counter,))
    seen = 0
    try:
        pending: set[Future[None]] = {pool.submit(_write_shard_in_worker, shard, settings) for shard in shards}
        while pending:
            finished, pending = wait(pending, timeout=0.2, return_when=FIRST_COMPLETED)
            done = counter.value
            progress(done - seen)
            seen = done
            for future in finished:
                future.result()
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
        for shard in shards:  # of workers stopped half-way; a full disk needs the room
            shard.aside.unlink(missing_ok=True)
