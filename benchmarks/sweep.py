"""Time against size, for every backend of an operation that runs here, against its oracle and the machine's limits.

A `Sweep` describes one operation at several sizes; `measure` checks each backend against the oracle, times all of them
interleaved, and returns rows. `benchmarks/sweeps.py` holds the sweeps, `benchmarks/plots.py` draws them.

On CUDA the calls run back to back over several sets of inputs, together larger than twice the L2 cache, so that inputs
come from memory as they do in training; `graph_ms` is the same replayed from CUDA graphs, without launch gaps. On a CPU
every repetition has fresh inputs.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks import rows
from benchmarks.harness import MIN_REPEATS, assert_agree, time_ms
from benchmarks.memory import peak_mib
from benchmarks.rows import Row
from cosmos_fast.ops import backends
from cosmos_fast.utils.peak_rates import matmul_flops_per_s

ORACLE = "eager"
MAX_SETS = 16
LAP_MS = 10.0  # a lap of calls on CUDA takes at least this long, so that events resolve it


@dataclass(frozen=True, kw_only=True)
class Point:
    """One size of an operation.

    size: what the plot's horizontal axis shows. elements: of all tensors that choose the backend, together. flops,
    bytes: the least the result needs, whoever computes it. make_inputs: seed -> inputs on the device, equal for equal
    seeds. run: backend and inputs -> named results, gradients included; may change its inputs.
    bar: largest ratio to the oracle that the best backend may have; None for no bar.
    """

    size: int
    shapes: Mapping[str, object]
    elements: int
    flops: float
    bytes: float
    make_inputs: Callable[[int], Any]
    run: Callable[[str, Any], Mapping[str, Tensor]]
    rtol: float
    bar: float | None = None


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """One operation over its sizes, smallest first. `extra`: names that `run` takes beside registered backends."""

    name: str
    op: str
    size_label: str
    points: Sequence[Point]
    matmul_dtype: torch.dtype = torch.float32
    extra: tuple[str, ...] = ()


class Rates(NamedTuple):
    """What the machine reached just now: the limits that floors are derived from."""

    flops_per_s: float
    bytes_per_s: float

    def floor_ms(self, flops: float, size_bytes: float) -> float:
        return 1e3 * max(flops / self.flops_per_s, size_bytes / self.bytes_per_s)


@dataclass
class Laps:
    """Milliseconds of each repetition, by backend, and why the others were left out, or what was wrong with them."""

    device: torch.device
    ms: dict[str, list[float]] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    wrong: dict[str, str] = field(default_factory=dict)


class Wrong(AssertionError):
    """A backend broke, or computed something else than the oracle. The others have been measured."""


def measure(
    sweep: Sweep,
    device: str,
    *,
    budget_s: float = 300.0,
    repeats: int = MIN_REPEATS,
    keep: Callable[[list[Row]], object] = len,
) -> list[Row]:
    """Rows of every size and backend, as far as the budget goes; what was left out is printed.

    keep: is given all rows so far after each size. Raises Wrong, after everything has been measured, naming the
    backends that were not because they broke or disagreed with the oracle.
    """
    deadline = time.monotonic() + budget_s
    rates = Rates(matmul_flops_per_s(device, sweep.matmul_dtype), copy_bytes_per_s(device))
    row = partial(Row, name=f"{sweep.name}_sweep", device=rows.device_name(device))
    common = {"op": sweep.op, "size_label": sweep.size_label}
    found = [
        row(shapes=common, metric="matmul rate", value=rates.flops_per_s / 1e12, unit="TFLOP/s"),
        row(shapes=common, metric="copy rate", value=rates.bytes_per_s / 1e9, unit="GB/s"),
    ]
    names = [*backend_names(sweep.op), *sweep.extra]
    slow: set[str] = set()
    wrong: list[str] = []
    for point in sweep.points:
        if time.monotonic() > deadline:
            print(f"{sweep.name}: no time left for size {point.size} and larger")
            break
        laps = time_point(point, [name for name in names if name not in slow], device, repeats, deadline)
        for name, why in laps.skipped.items():
            print(f"{sweep.name} {point.size}: {name} left out: {why}")
        wrong += [f"{sweep.name} {point.size}: {name}: {what}" for name, what in laps.wrong.items()]
        remaining_s = max(0.0, deadline - time.monotonic())
        # The next size costs about four times as much.
        slow |= {name for name, ms in laps.ms.items() if 4e-3 * statistics.median(ms) * (repeats + 2) > remaining_s}
        shapes = {**common, **point.shapes, "size": point.size, "elements": point.elements}
        sizes = {**shapes, "flops": point.flops, "bytes": point.bytes}
        for name in laps.ms:
            found += backend_rows(point, laps, name, rates, partial(row, shapes={**sizes, "backend": name}))
        keep(found)
    if wrong:
        raise Wrong("; ".join(wrong))
    return found


def backend_rows(point: Point, laps: Laps, name: str, rates: Rates, row: Callable[..., Row]) -> list[Row]:
    """What is told of one backend at one size: time; on CUDA also time from a graph, and peak memory."""
    ms = statistics.median(laps.ms[name])
    floor_ms = rates.floor_ms(point.flops, point.bytes)
    against: dict[str, Any] = {}
    if ORACLE in laps.ms and name != ORACLE:
        pairs = zip(laps.ms[name], laps.ms[ORACLE], strict=True)
        fastest = min(laps.ms, key=lambda other: statistics.median(laps.ms[other]))
        against = {"baseline": ORACLE, "ratio": statistics.median(ours / theirs for ours, theirs in pairs)}
        against["bar"] = point.bar if name == fastest else None
    found = [row(metric=f"ms/{name}/{point.size}", value=ms, unit="ms", floor_pct=100 * floor_ms / ms, **against)]
    if laps.device.type == "cuda":
        from_graph_ms = graph_ms(point, name)
        if from_graph_ms is not None:
            pct = 100 * floor_ms / from_graph_ms
            found.append(row(metric=f"graph_ms/{name}/{point.size}", value=from_graph_ms, unit="ms", floor_pct=pct))
        peak = peak_mib(partial(_run_once, point, name), device=str(laps.device))
        found.append(row(metric=f"peak_mib/{name}/{point.size}", value=peak, unit="MiB"))
    return found


def backend_names(op: str) -> list[str]:
    """Registered backends of the operation that this machine has; an interpreter of GPU code is not one to time."""
    names = [row["backend"] for row in backends.table() if row["op"] == op and row["status"] == "available"]
    return [name for name in names if name not in backends.GPU_BACKENDS or torch.cuda.is_available()]


def time_point(point: Point, names: Sequence[str], device: str, repeats: int, deadline: float) -> Laps:
    """Check every backend against the oracle, then time all that passed, interleaved."""
    laps = Laps(torch.device(device))
    expected, why = _attempt(point, ORACLE)
    found = None
    for name in names:
        try:
            found, why_not = (expected, why) if name == ORACLE else _attempt(point, name)
            if found is not None and expected is not None:
                assert_agree(found, expected, rtol=point.rtol)
        except Exception as error:  # this backend only
            laps.wrong[name] = f"{type(error).__name__}: {error}"
            continue
        if found is None:
            laps.skipped[name] = why_not
        else:
            laps.ms[name] = []
    del expected, found  # their memory
    sets = input_sets(point, device)
    for repetition in range(repeats):
        order = list(laps.ms) if repetition % 2 == 0 else list(reversed(laps.ms))
        if torch.device(device).type != "cuda":
            sets = [point.make_inputs(repetition)]
        for name in order:
            laps.ms[name].append(lap_ms(partial(point.run, name), sets, device))
        if repetition >= 2 and time.monotonic() > deadline:
            print(f"size {point.size}: {repetition + 1} repetitions only, the time is up")
            break
    return laps


def _attempt(point: Point, name: str) -> tuple[Mapping[str, Tensor] | None, str]:
    """The results of one call, or None and why it does not run at this size."""
    try:
        return point.run(name, point.make_inputs(0)), ""
    except ValueError as error:  # it does not take such tensors
        return None, str(error)
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return None, "out of memory"
    except torch._dynamo.exc.TorchDynamoException as error:  # the compiler has no compiler, for one
        return None, str(error).splitlines()[0]


def _run_once(point: Point, name: str) -> None:
    point.run(name, point.make_inputs(0))


def lap_ms(call: Callable[[Any], object], sets: Sequence[Any], device: str) -> float:
    """Milliseconds a call, over all sets of inputs, as often as a lap needs to be long enough."""

    def lap(times: int) -> None:
        for _ in range(times):
            for inputs in sets:
                call(inputs)

    if torch.device(device).type != "cuda":
        return time_ms(lap, 1, device) / len(sets)
    once = time_ms(lap, 1, device)
    times = max(1, min(100, round(LAP_MS / max(once, 1e-3))))
    return time_ms(lap, times, device) / (times * len(sets))


def graph_ms(point: Point, name: str) -> float | None:
    """Milliseconds a call, replayed from CUDA graphs over rotating inputs; None where it cannot be captured."""
    device = "cuda"
    sets = input_sets(point, device)
    graphs = []
    try:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                point.run(name, sets[0])
        torch.cuda.current_stream().wait_stream(side)
        for inputs in sets:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                point.run(name, inputs)
            graphs.append(graph)
    except Exception as error:  # a synchronisation inside, most often
        torch.cuda.synchronize()
        print(f"size {point.size}: {name} not captured: {str(error).splitlines()[0]}")
        return None
    return statistics.median(lap_ms(lambda graph: graph.replay(), graphs, device) for _ in range(MIN_REPEATS))


def input_sets(point: Point, device: str) -> list[Any]:
    """Sets of inputs that together exceed the L2 cache twice, at most MAX_SETS; one set on a CPU."""
    first = point.make_inputs(0)
    if torch.device(device).type != "cuda":
        return [first]
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return [first, *(point.make_inputs(seed) for seed in range(1, sets_needed(bytes_of(first), cache)))]


def sets_needed(set_bytes: int, cache_bytes: int) -> int:
    return max(2, min(MAX_SETS, -(-2 * cache_bytes // max(set_bytes, 1))))


def bytes_of(inputs: object) -> int:
    """Bytes of all tensors in nested tuples, lists, dictionaries and dataclasses."""
    if isinstance(inputs, Tensor):
        return inputs.numel() * inputs.element_size()
    if isinstance(inputs, Mapping):
        return sum(bytes_of(value) for value in inputs.values())
    if isinstance(inputs, tuple | list):
        return sum(bytes_of(value) for value in inputs)
    if is_dataclass(inputs):
        return sum(bytes_of(getattr(inputs, entry.name)) for entry in fields(inputs))
    return 0


def copy_bytes_per_s(device: str) -> float:
    """Bytes read plus bytes written by a large copy: the rate that a memory floor is derived from; best of several."""
    elements = 2**30 if torch.device(device).type == "cuda" else 2**26
    source = torch.ones(elements, dtype=torch.float32, device=device).normal_()
    target = torch.empty_like(source)
    times_ms = [time_ms(target.copy_, source, device) for _ in range(MIN_REPEATS + 2)]
    return 2 * source.numel() * source.element_size() / (min(times_ms[2:]) / 1e3)


def draw(*shape: int, device: str, dtype: torch.dtype, seed: int) -> Tensor:
    """Standard normal numbers, the same for the same seed and kind of device."""
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(shape, generator=generator, device=device).to(dtype)


def with_gradients(loss: Tensor, leaves: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The loss and its gradients by the leaves' names."""
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    return {"loss": loss.detach(), **dict(zip(leaves, gradients, strict=True))}
