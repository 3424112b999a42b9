"""The end of a process group: with its block, or with the process of a rank that has failed.

NCCL's shutdown waits until the work of all ranks is through. A rank that has failed alone would wait for others that
wait for it in a collective: its error would not be printed, its process would not end, and launchers start anew only
what has ended. It keeps its group; torch aborts what is left of it when the process ends, after the error is printed.
"""

from __future__ import annotations

import atexit
import signal
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

END_S = 60
"""Seconds that the end of a process may take whose group has not been shut down."""


@contextmanager
def group_ended(*, waits: bool) -> Iterator[None]:
    """A block after which torch's process group, which is there, is shut down.

    Args:
        waits: the shutdown waits for the other ranks: a block that raises leaves it to the end of the process.
    """
    try:
        yield
    except BaseException:
        if waits:
            atexit.register(end_in_time)
        else:
            dist.destroy_process_group()
        raise
    dist.destroy_process_group()


def end_in_time() -> None:
    """From now on this process has END_S seconds. An abort of NCCL may hang where no thread of Python runs any more, so
    the kernel ends it."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(END_S)
