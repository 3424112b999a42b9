"""Peak memory of a few optimizer steps at one batch size: noise in the shapes of the run, captions of full length.

On a CPU every size runs in a process of its own, because memory that is freed stays with the allocator and would hide
the peak of the next; the whole process counts, interpreter and libraries included. It is ended as soon as it passes the
limit, and ends by itself when this process does. It is a fork of this process, which should have imported everything
and computed nothing: where fork is unsafe it starts anew. On CUDA the allocator counts exactly, and is told to refuse
what passes the limit: sizes run in place. Under a launcher every rank measures, on CUDA in a process too, which can be
ended where it waits for a rank that ran out of memory. (The part for CUDA has not yet run on hardware.)
"""

from __future__ import annotations

import gc
import logging
import multiprocessing
import re
import signal
import sys
from dataclasses import replace
from importlib import import_module
from itertools import count, islice
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch

from cosmos_fast.config import TrainConfig
from cosmos_fast.data.random_batch import RandomLoader
from cosmos_fast.engine.batch_ranks import OthersFailed, SearchRanks
from cosmos_fast.engine.out_of_memory import is_out_of_memory
from cosmos_fast.engine.precision import resolve_device, resolve_precision
from cosmos_fast.engine.run_folder import RunPlan
from cosmos_fast.engine.trainer import Trainer
from cosmos_fast.utils.errors import UserError
from cosmos_fast.utils.memory import peak_bytes, reset_peak
from cosmos_fast.utils.processes import end_with_parent
from cosmos_fast.utils.ranks import ONE, Ranks, joined_ranks

STEPS = 3  # the optimizer's state exists after the first; a GPU's libraries take their workspaces in the second
POLL_S = 0.02
ASK_EVERY = 25  # polls: the store serves all ranks
CPU = torch.device("cpu")


def measure_peak(
    config: TrainConfig, batch_size: int, limit_bytes: int, ranks: SearchRanks | None = None
) -> int | None:
    """Peak bytes of STEPS optimizer steps at this batch size, None where they do not fit the limit.

    Nothing is written. ranks: of the search; the most that one of them needs, on all. Raises UserError where the
    configuration cannot be trained at all.
    """
    config = replace(config, run=replace(config.run, batch_size=batch_size))
    if ranks is not None and ranks.store is not None:
        return ranks.largest(lambda: _in_a_process(config, limit_bytes, ranks))
    device = resolve_device(config.run.device)
    return _on_cuda(config, device, limit_bytes) if device.type == "cuda" else _in_a_process(config, limit_bytes)


def run_steps(config: TrainConfig, device: torch.device, steps: int = STEPS, ranks: Ranks = ONE) -> None:
    """Train on noise, as `Trainer.fit` does but for data, hooks and files."""
    image_dtype = resolve_precision(config.run.precision, device).image_dtype
    loader = RandomLoader(config, device=device, image_dtype=image_dtype)
    trainer = Trainer(config, loader, plan=RunPlan(Path(config.run.out_dir) / config.name), ranks=ranks)
    batches = iter(loader)
    for _ in range(steps):
        micro_batches = list(islice(batches, config.run.accumulate_steps))
        trainer.train_step(micro_batches)


def _on_cuda(config: TrainConfig, device: torch.device, limit_bytes: int, ranks: Ranks = ONE) -> int | None:
    _, total = torch.cuda.mem_get_info(device)
    torch.cuda.set_per_process_memory_fraction(min(1.0, limit_bytes / total), device)
    reset_peak(device)
    try:
        run_steps(config, device, ranks=ranks)
        torch.cuda.synchronize(device)
        return peak_bytes(device)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return None
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)
        gc.collect()
        torch.cuda.empty_cache()


def _in_a_process(config: TrainConfig, limit_bytes: int, ranks: SearchRanks | None = None) -> int | None:
    import_module("torch._dynamo")  # as torch does when a custom operator first runs: once here, not in every fork
    ranks = ranks or SearchRanks()
    on_cuda = ranks.store is not None and resolve_device(config.run.device).type == "cuda"
    forks = sys.platform == "linux" and not on_cuda
    context = multiprocessing.get_context("fork") if forks else multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_child, args=(sender, config, limit_bytes, ranks.meeting), daemon=True)
    # Ctrl-C reaches the whole process group. Here it ends the search, which ends the child; the child itself, which
    # inherits the mask, is not to answer with a traceback of its own.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        child.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    sender.close()
    try:
        return _watch(child, receiver, limit_bytes, on_cuda, ranks)
    finally:
        child.kill()
        child.join()
        receiver.close()


def _watch(child: BaseProcess, receiver: Connection, limit_bytes: int, on_cuda: bool, ranks: SearchRanks) -> int | None:
    for looks in count():
        if receiver.poll(POLL_S):
            break
        if not on_cuda and _resident_bytes(child.pid) > limit_bytes:
            return None
        if looks % ASK_EVERY == 0 and ranks.someone_failed():
            raise OthersFailed
    try:
        found: int | UserError | None = receiver.recv()
    except EOFError:
        child.join()
        if child.exitcode == -signal.SIGKILL:  # by the kernel, which ran out of memory
            return None
        raise RuntimeError("the process that was to measure memory died; its error stands above") from None
    if isinstance(found, UserError):
        raise found
    return found if found is not None and found <= limit_bytes else None  # it may pass between two looks


def _child(sender: Connection, config: TrainConfig, limit_bytes: int, meeting: str) -> None:
    """Sends peak bytes, None where memory ran out, or what is wrong with the configuration."""
    end_with_parent()
    _be_first_to_go()
    logging.disable(logging.INFO)  # which backends run would be said in every size
    found: int | UserError | None = None
    try:
        with joined_ranks(config.run.device, meeting=meeting) as ranks:
            if ranks.device.type == "cuda":
                found = _on_cuda(config, ranks.device, limit_bytes, ranks)
            else:
                run_steps(config, CPU, ranks=ranks)
                found = peak_bytes(CPU)
    except Exception as error:
        if not is_out_of_memory(error):
            if not isinstance(error, UserError):
                raise
            found = error
    sender.send(found)


def _be_first_to_go() -> None:
    """Should memory run out after all, the kernel ends this process, and nobody else's."""
    try:
        Path("/proc/self/oom_score_adj").write_text("1000")
    except OSError:
        return


def _resident_bytes(pid: int | None) -> int:
    """0 where the system does not tell."""
    try:
        found = re.search(r"^VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text(), re.M)
    except OSError:
        return 0
    return 1024 * int(found[1]) if found else 0
