"""Where the ranks of a run are, in a line of its log."""

from __future__ import annotations

import os
import socket
from collections import Counter
from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist

from cosmos_fast.utils.ranks import Ranks

_NAME_BYTES = 64
_SHOWN_HOSTS = 4


def topology(ranks: Ranks, environ: Mapping[str, str] | None = None) -> str:
    """`16 ranks on 2 hosts (a: 8, b: 8), nccl, started by torchrun`; collective: all ranks call it."""
    if ranks.group is None:
        return "1 rank"
    backend = dist.get_backend(ranks.group)
    return f"{describe_hosts(_host_names(ranks))}, {backend}, started by {launcher(environ)}"


def describe_hosts(names: Sequence[str]) -> str:
    """names: the host of each rank."""
    counts = Counter(names)
    if len(counts) == 1:
        return f"{len(names)} ranks on {names[0]}"
    shown = [f"{name}: {count}" for name, count in counts.items()]
    if len(shown) > _SHOWN_HOSTS:
        shown = [*shown[: _SHOWN_HOSTS - 1], "…", shown[-1]]
    return f"{len(names)} ranks on {len(counts)} hosts ({', '.join(shown)})"


def launcher(environ: Mapping[str, str] | None = None) -> str:
    """Who started this process, by what it left in the environment."""
    environ = os.environ if environ is None else environ
    if "TORCHELASTIC_RUN_ID" in environ:
        return "torchrun"
    if "CROSS_RANK" in environ:
        return "deepspeed"
    if "SLURM_PROCID" in environ:
        return "srun"
    return "the variables RANK and WORLD_SIZE"


def _host_names(ranks: Ranks) -> list[str]:
    """Of every rank, cut to 64 bytes."""
    own = socket.gethostname().encode()[:_NAME_BYTES].ljust(_NAME_BYTES, b"\0")
    sent = torch.tensor(list(own), dtype=torch.uint8)
    found = [torch.empty_like(sent) for _ in range(ranks.world_size)]
    dist.all_gather(found, sent, group=ranks.control)
    return [bytes(name.tolist()).rstrip(b"\0").decode(errors="replace") for name in found]
