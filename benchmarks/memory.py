"""Peak memory of a piece of work, and what autograd keeps between forward and backward.

On a CPU the work runs in a process of its own: memory that an earlier run has freed stays with the allocator, and would
hide the peak of the next. On CUDA the allocator counts exactly, and the work runs in place.
"""

from __future__ import annotations

import gc
import multiprocessing
from collections.abc import Callable, Iterable
from multiprocessing.connection import Connection

import torch
from torch import Tensor

from cosmos_fast.utils.memory import MIB, peak_bytes, reset_peak

CPU = torch.device("cpu")


def peak_mib(work: Callable[[], object], *, device: str = "cpu", settle: Callable[[], object] | None = None) -> float:
    """Peak of `work` in MiB over what the process held before it: parameters and states that `work` makes count.

    Args:
        work: builds what it needs and runs; on a CPU it and `settle` travel to another process, so they must pickle
            (module-level functions, or `functools.partial` of them).
        settle: runs before the base is read: a small version of the work, which loads code and starts threads.
    """
    if torch.device(device).type == "cuda":
        return _cuda_peak_mib(work, device, settle)
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_child, args=(sender, work, settle, torch.get_num_threads()))
    child.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        raise RuntimeError("the process that was to measure memory died; its error stands above") from None
    finally:
        child.join()


def _child(sender: Connection, work: Callable[[], object], settle: Callable[[], object] | None, threads: int) -> None:
    torch.set_num_threads(threads)
    if settle is not None:
        settle()
    gc.collect()
    base = reset_peak(CPU)
    work()
    sender.send((peak_bytes(CPU) - base) / MIB)


def _cuda_peak_mib(work: Callable[[], object], device: str, settle: Callable[[], object] | None) -> float:
    if settle is not None:
        settle()
    gc.collect()
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    base = torch.cuda.memory_allocated(device)
    work()
    torch.cuda.synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - base) / MIB


def saved_bytes(forward: Callable[[], object], apart_from: Iterable[Tensor]) -> int:
    """Storage that autograd keeps from this forward pass for the backward one, each once; `apart_from` lives anyway."""
    known = {tensor.untyped_storage().data_ptr() for tensor in apart_from}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        output = forward()  # alive until all is counted: no storage is used twice
    del output
    return sum(kept.values())
