"""Where the ranks of one try meet.

For all tries of a run torchrun keeps one store, and what a former try has left there (addresses of processes that have
ended, ids of groups) is poison for the next. In torch 2.13 nothing keeps them apart; in older ones a count of restarts
does, which differs between hosts.

Here rank 0 of each try thinks of a name that nobody has used, and hands it to those that are alive now:

    rank r   writes hello/r = a random word of its own, waits for name/<word>, writes here/<name>/r
    rank 0   gives the name to every word that it finds in hello/*, until all of its ranks are here

A word of a dead rank may get the name too; it harms nobody, and a living rank overwrites hello/r.
"""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Mapping
from datetime import timedelta

import torch.distributed as dist

from cosmos_fast.utils.errors import UserError

_POLL_S = 0.02


def keeps_store(environ: Mapping[str, str] | None = None) -> bool:
    """Whether the launcher keeps the store, and with it what former tries have left there."""
    environ = os.environ if environ is None else environ
    return environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def store_of_this_try(rank: int, world_size: int, timeout_s: float) -> dist.Store:
    """The launcher's store at MASTER_ADDR, in a part of it that this try has to itself.

    Raises:
        UserError: ranks that do not come in time. RuntimeError: a store that cannot be reached.
    """
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    timeout = timedelta(seconds=timeout_s)
    store = dist.TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=timeout)
    return dist.PrefixStore(agree_on_name(store, rank, world_size, timeout_s), store)


def agree_on_name(store: dist.Store, rank: int, world_size: int, timeout_s: float) -> str:
    """A name that only the ranks of this try know; called by each of them."""
    if rank > 0:
        word = secrets.token_hex(8)
        store.set(f"hello/{rank}", word)
        name = store.get(f"name/{word}").decode()  # waits
        store.set(f"here/{name}/{rank}", "")
        return name
    name, deadline = secrets.token_hex(8), time.monotonic() + timeout_s
    missing = list(range(1, world_size))
    while missing:
        for other in missing:
            if store.check([f"hello/{other}"]):
                store.set(f"name/{store.get(f'hello/{other}').decode()}", name)
        missing = [other for other in missing if not store.check([f"here/{name}/{other}"])]
        if time.monotonic() > deadline:
            raise UserError(f"rank 0 of {world_size} waits for ranks {missing[:8]}: see why they do not start")
        time.sleep(_POLL_S)
    return name
