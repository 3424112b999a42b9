"""Collectives of a group of ranks: counted, timed, and under way while other work goes on.

Bytes are those that a rank receives when the network is used well (ring algorithms), W ranks, n bytes of a whole
tensor: an all-gather to n bytes, a reduce-scatter from n and an exchange of n bytes take n (W - 1) / W.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from cosmos_fast.utils.phases import PhaseClock, no_clock

# torch 2.13 has renamed them, and warns of the old names.
ALL_GATHER = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
REDUCE_SCATTER = "reduce_scatter_single" if hasattr(dist, "reduce_scatter_single") else "reduce_scatter_tensor"


@dataclass
class Traffic:
    """Collectives since the last take(), by name: how many, and the bytes that this rank has received in them."""

    calls: Counter[str] = field(default_factory=Counter)
    received_bytes: Counter[str] = field(default_factory=Counter)

    @property
    def total_calls(self) -> int:
        """Of all names."""
        return sum(self.calls.values())

    @property
    def total_bytes(self) -> int:
        """Of all names."""
        return sum(self.received_bytes.values())

    def add(self, name: str, received_bytes: int) -> None:
        """One more collective."""
        self.calls[name] += 1
        self.received_bytes[name] += received_bytes

    def take(self) -> Traffic:
        """What has been counted; counting starts again."""
        taken = Traffic(self.calls, self.received_bytes)
        self.calls, self.received_bytes = Counter(), Counter()
        return taken


class Pending:
    """A collective under way. The tensors that it reads and writes live as long as this."""

    def __init__(self, work: Any, result: Tensor, source: Tensor, clock: PhaseClock) -> None:
        self._work, self._result, self._source, self._clock = work, result, source, clock

    @property
    def unfinished(self) -> Tensor:
        """The tensor that is being written: only to be handed on to whoever waits."""
        return self._result

    def wait(self) -> Tensor:
        """The result. On a GPU only the current stream waits."""
        if self._work is not None:
            with self._clock("communication"):
                self._work.wait()
            self._work = None
        return self._result


@dataclass(frozen=True)
class Collectives:
    """What the ranks of a group do together.

    clock: told of the time that collectives take from other work, up to the slowest rank's coming. traffic: counts.
    """

    group: dist.ProcessGroup
    clock: PhaseClock = no_clock
    traffic: Traffic = field(default_factory=Traffic)

    @property
    def world_size(self) -> int:
        """Ranks of the group, W."""
        return dist.get_world_size(self.group)

    @property
    def rank(self) -> int:
        """This process's place in the group."""
        return dist.get_rank(self.group)

    def all_gather(self, own: Tensor, name: str = "all_gather") -> Pending:
        """Every rank's tensor: [W, *own.shape]; equal shapes and dtypes everywhere, any dtype."""
        source = own.contiguous()
        result = source.new_empty(self.world_size, *source.shape)
        self._count(name, result)
        with self.clock("communication"):
            # As bytes: gloo does not gather every dtype.
            work = getattr(dist, ALL_GATHER)(_bytes(result), _bytes(source), group=self.group, async_op=True)
        return Pending(work, result, source, self.clock)

    def exchange(self, by_rank: Tensor, name: str = "all_to_all") -> Tensor:
        """by_rank [W, ...]: what this rank has for each -> [W, ...]: what each has for this rank."""
        source = by_rank.contiguous()
        result = torch.empty_like(source)
        self._count(name, result)
        with self.clock("communication"):
            dist.all_to_all_single(result, source, group=self.group)
        return result

    def reduce_scatter(self, by_rank: Tensor, name: str = "reduce_scatter") -> Pending:
        """by_rank [W, ...]: what this rank adds to each -> [...]: the sum of what all have for this rank."""
        source = by_rank.contiguous()
        result = torch.zeros_like(source[0])  # whoever looks before the end finds no NaN
        self._count(name, source)
        with self.clock("communication"):
            work = getattr(dist, REDUCE_SCATTER)(result, source.flatten(0, 1), group=self.group, async_op=True)
        return Pending(work, result, source, self.clock)

    def _count(self, name: str, whole: Tensor) -> None:
        self.traffic.add(name, whole.nbytes * (self.world_size - 1) // self.world_size)


def _bytes(tensor: Tensor) -> Tensor:
    """The same memory as a flat row of bytes."""
    return tensor.view(-1).view(torch.uint8)
