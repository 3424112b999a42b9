"""Collectives that torch is asked for, whoever asks: calls, and the bytes that this rank receives in a ring of them."""

from __future__ import annotations

from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

# Operation of torch -> which argument is the full tensor, and how often it is received but for this rank's own part.
OPERATIONS = {
    "allreduce_": (0, 2),
    "_allgather_base_": (0, 1),
    "_reduce_scatter_base_": (1, 1),
    "alltoall_base_": (0, 1),
    "broadcast_": (0, 1),
}


class CountedCollectives(TorchDispatchMode):
    """Counts while it is entered. An operation that it does not know raises KeyError."""

    def __init__(self, rank: int, world: int) -> None:
        super().__init__()
        self.calls, self.received_bytes = 0, 0.0
        self._rank, self._world = rank, world

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            place, times = OPERATIONS[func._opname]
            full = args[place]
            size = sum(tensor.nbytes for tensor in (full if isinstance(full, (list, tuple)) else [full]))
            share = (self._world - 1) / self._world
            if func._opname == "broadcast_":
                share = float(args[2] != self._rank)
            self.calls += 1
            self.received_bytes += times * size * share
        return func(*args, **(kwargs or {}))
