"""Ranks on this machine: processes that are told who they are as a launcher tells them, one thread each."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

TIMEOUT_S = 600.0  # of whatever ranks wait for: a failure, no measure of speed
# Imported by the process that all ranks are forks of.
PRELOADED = [
    "torch.distributed",
    "cosmos_fast.engine.deepspeed_engine",
    "benchmarks.rank_steps",
    "benchmarks.rank_losses",
]


def run_ranks(function: Callable[..., Any], world: int, *arguments: Any) -> list[Any]:
    """What `function(*arguments)`, of a module, returns in each of `world` processes: something that JSON can hold.

    A failure of any is raised here. The parent keeps the store that they meet at, as torchrun does.
    """
    wait = timedelta(seconds=TIMEOUT_S)
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=wait)
    mp.get_context("forkserver").set_forkserver_preload(PRELOADED)
    with tempfile.TemporaryDirectory() as folder:
        given = (function, world, store.port, folder, arguments)
        mp.start_processes(_run, given, nprocs=world, start_method="forkserver")
        return [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(world)]


def _run(
    rank: int, function: Callable[..., Any], world: int, port: int, folder: str, arguments: tuple[Any, ...]
) -> None:
    place = {"RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": world, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()})
    os.environ.update(MASTER_ADDR="127.0.0.1", TORCHELASTIC_USE_AGENT_STORE="True")
    torch.set_num_threads(1)
    Path(folder, f"{rank}.json").write_text(json.dumps(function(*arguments)))
