"""Real ranks for tests: processes that a launcher's environment tells who they are, on a port that is theirs."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

TIMEOUT_S = 300.0  # of whatever the ranks wait for: a failure, never a measure of speed
# By the process that all others are forks of. One such process serves all tests: these are for all of them.
PRELOADED = [
    *("torch.distributed", "cosmos_fast.engine.trainer", "cosmos_fast.cli.train", "cosmos_fast.data.loader"),
    "torch._dynamo",  # which every optimizer imports when it is made, for seconds
    "tests.preload",  # the last
]


def run_ranks(function: Callable[..., None], world: int, *arguments: Any) -> None:
    """`function(*arguments)` in `world` processes with one thread each; a failure of any is raised here.

    The parent keeps the store that they meet at, as torchrun does: its port is free because it is bound.
    """
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=TIMEOUT_S))
    mp.get_context("forkserver").set_forkserver_preload(PRELOADED)
    mp.start_processes(_run, (function, world, store.port, arguments), nprocs=world, start_method="forkserver")


def environment(rank: int, world: int, port: int) -> dict[str, str]:
    """What torchrun sets for a rank of one host."""
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }


def _run(rank: int, function: Callable[..., None], world: int, port: int, arguments: tuple[Any, ...]) -> None:
    os.environ.update(environment(rank, world, port))
    torch.set_num_threads(1)
    function(*arguments)
