"""Timing of a candidate against a baseline.

Both alternate in one process on the same fresh inputs, so that a noisy neighbour or a clock change hits both; the
result is the median of the per-repetition ratios, not a ratio of two medians. A timing without a passed check of
correctness cannot be had: `interleave` runs `check` first.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

Inputs = TypeVar("Inputs")
MIN_REPEATS = 7


@dataclass(frozen=True)
class Timing:
    """Milliseconds of every repetition, in order; repetition i of both sides had the same inputs."""

    baseline_ms: list[float]
    candidate_ms: list[float]

    @property
    def baseline_median_ms(self) -> float:
        return statistics.median(self.baseline_ms)

    @property
    def candidate_median_ms(self) -> float:
        return statistics.median(self.candidate_ms)

    @property
    def ratios(self) -> list[float]:
        """Candidate over baseline, one a repetition: below 1 the candidate is faster."""
        return [ours / theirs for ours, theirs in zip(self.candidate_ms, self.baseline_ms, strict=True)]

    @property
    def ratio(self) -> float:
        return statistics.median(self.ratios)

    @property
    def spread(self) -> tuple[float, float]:
        """First and third quartile of the ratios."""
        quartiles = statistics.quantiles(self.ratios, n=4)
        return quartiles[0], quartiles[2]


def interleave(
    baseline: Callable[[Inputs], object],
    candidate: Callable[[Inputs], object],
    make_inputs: Callable[[int], Inputs],
    *,
    check: Callable[[], None],
    device: str = "cpu",
    repeats: int = MIN_REPEATS,
    warmup: int = 2,
) -> Timing:
    """Time both callables, alternating which goes first.

    Args:
        make_inputs: seed -> fresh inputs; called once a repetition, outside the clock.
        check: raises when the two sides do not agree; runs before anything is timed.
        repeats: timed repetitions, at least `MIN_REPEATS`. warmup: untimed repetitions before them.
    """
    assert repeats >= MIN_REPEATS, f"{repeats} repetitions are too few for a median; take {MIN_REPEATS}"
    check()
    timing = Timing([], [])
    sides = [(baseline, timing.baseline_ms), (candidate, timing.candidate_ms)]
    for repetition in range(warmup + repeats):
        inputs = make_inputs(repetition)
        for call, times_ms in sides if repetition % 2 == 0 else reversed(sides):
            elapsed_ms = time_ms(call, inputs, device)
            if repetition >= warmup:
                times_ms.append(elapsed_ms)
    return timing


def time_ms(call: Callable[[Inputs], object], inputs: Inputs, device: str) -> float:
    """Milliseconds of one call: CUDA events around its stream, or the wall clock on a CPU."""
    with _no_garbage_collection():
        if torch.device(device).type != "cuda":
            start = time.perf_counter()
            call(inputs)
            return 1e3 * (time.perf_counter() - start)
        before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize(device)
        before.record()
        call(inputs)
        after.record()
        torch.cuda.synchronize(device)
        return before.elapsed_time(after)


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """A collection costs as much as a small step, and would hit either side at random."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def ledger(
    sides: Mapping[str, Callable[[int], Iterator[str]]], *, device: str, repeats: int, warmup: int = 2
) -> dict[str, dict[str, float]]:
    """Where the time of a call goes: side -> phase -> milliseconds, the mean over `repeats` calls; sides alternate.

    sides: name -> function from a seed to an iterator that does a phase's work and then yields the phase's name; inputs
    are made before it returns. The device is synchronised after every phase, so on CUDA the sum is longer than an
    undisturbed call. A side's phases and its "other" sum to its "wall".
    """
    totals: dict[str, dict[str, float]] = {side: {} for side in sides}
    for repetition in range(warmup + repeats):
        for side, start in sides.items():
            phases = start(repetition)
            with _no_garbage_collection():
                laps = _laps(phases, device)
            if repetition >= warmup:
                for name, lap_ms in laps.items():
                    totals[side][name] = totals[side].get(name, 0.0) + lap_ms
    return {side: {name: total / repeats for name, total in phases.items()} for side, phases in totals.items()}


def _laps(phases: Iterator[str], device: str) -> dict[str, float]:
    """Milliseconds of each phase, of what lies between and after them ("other"), and of the whole ("wall")."""
    laps: dict[str, float] = {}
    start = lap_start = time.perf_counter()
    for name in phases:
        if torch.device(device).type == "cuda":
            torch.cuda.synchronize(device)
        now = time.perf_counter()
        laps[name] = laps.get(name, 0.0) + 1e3 * (now - lap_start)
        lap_start = now
    wall_ms = 1e3 * (time.perf_counter() - start)
    return {**laps, "other": wall_ms - sum(laps.values()), "wall": wall_ms}


@contextmanager
def exact_fp32() -> Iterator[None]:
    """Within, CUDA's fp32 products and convolutions are computed in fp32; also a decorator.

    By default cuDNN rounds the operands of a convolution to TF32, 10 bits of mantissa; of a product torch does so only
    if told. These switches are older than the settings by operation, and every torch from 2.6 on has them.
    """
    cudnn, products = torch.backends.cudnn, torch.get_float32_matmul_precision()
    convolutions = cudnn.allow_tf32
    try:
        cudnn.allow_tf32 = False
        torch.set_float32_matmul_precision("highest")
        yield
    finally:
        cudnn.allow_tf32 = convolutions
        torch.set_float32_matmul_precision(products)


def assert_agree(
    actual: Mapping[str, Tensor], expected: Mapping[str, Tensor], *, rtol: float, atol: float = 0.0
) -> None:
    """Largest error of each tensor against its largest entry; raises AssertionError naming the worst tensor."""
    missing = expected.keys() ^ actual.keys()
    assert not missing, f"only one side has {sorted(missing)}"
    excess = {}
    for name, tensor in expected.items():
        error = (actual[name].double() - tensor.double()).abs().max().item()
        excess[name] = error / (rtol * tensor.double().abs().max().item() + atol)
    worst = max(excess, key=lambda name: excess[name])
    # Not "> 1": a NaN must fail too.
    assert excess[worst] <= 1, f"{worst} disagrees: {excess[worst]:.3g} times the tolerance of {rtol:g} relative"
