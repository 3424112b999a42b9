"""CUDA graphs of a piece of work, forward and backward apart: GPU time without the launches of the host.

Inputs are static: fresh values are written into them outside the clock, and the L2 cache is overwritten after that.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

FLUSH_BYTES = 2**28  # more than the L2 cache of any GPU so far
HEAD_START_CYCLES = 400_000  # the GPU waits about 0.2 ms, so that the replay is queued when the clock starts
WARMUP = 3


class Captured(NamedTuple):
    """Replayable forward, and backward of it where it was asked for."""

    forward: torch.cuda.CUDAGraph
    backward: torch.cuda.CUDAGraph | None


def capture(work: Callable[[], Tensor], leaves: Sequence[Tensor] = ()) -> Captured:
    """Capture `work()` and, with leaves, the gradient of its output (a fixed ramp) to them."""

    def gradients(output: Tensor) -> None:
        ramp = torch.linspace(-1, 1, output.numel(), device=output.device, dtype=output.dtype).view_as(output)
        torch.autograd.grad(output, list(leaves), ramp)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), torch.set_grad_enabled(bool(leaves)):
        for _ in range(WARMUP):
            output = work()
            if leaves:
                gradients(output)
    torch.cuda.current_stream().wait_stream(stream)
    forward, backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph() if leaves else None
    with torch.cuda.graph(forward), torch.set_grad_enabled(bool(leaves)):
        output = work()
    if backward is not None:
        ramp = torch.linspace(-1, 1, output.numel(), device=output.device, dtype=output.dtype).view_as(output)
        with torch.cuda.graph(backward, pool=forward.pool()):
            torch.autograd.grad(output, list(leaves), ramp)
    return Captured(forward, backward)


def interleave_us(
    graphs: Mapping[str, torch.cuda.CUDAGraph], refresh: Callable[[int], None], repeats: int, warmup: int = 2
) -> dict[str, list[float]]:
    """Microseconds of every replay by name; the graphs take turns in who goes first. refresh: seed -> fresh inputs."""
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")
    times: dict[str, list[float]] = {name: [] for name in graphs}
    for repetition in range(warmup + repeats):
        refresh(repetition)
        names = list(graphs)
        for name in names if repetition % 2 == 0 else reversed(names):
            elapsed_us = _replay_us(graphs[name], flush)
            if repetition >= warmup:
                times[name].append(elapsed_us)
    return times


def median_ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


def _replay_us(graph: torch.cuda.CUDAGraph, flush: Tensor) -> float:
    before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    flush.zero_()
    torch.cuda._sleep(HEAD_START_CYCLES)
    before.record()
    graph.replay()
    after.record()
    torch.cuda.synchronize()
    return 1e3 * before.elapsed_time(after)
