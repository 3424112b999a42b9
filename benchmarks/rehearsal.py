"""A benchmark's GPU side without a GPU: the CPU plays CUDA, sizes are cut down, every line of it runs.

    python -m benchmarks.rehearsal bench_infonce --device cuda --out /tmp/infonce.json

runs `benchmarks/bench_infonce.py` as `make gpu-check` does on a GPU, to find wrong names, shapes and keys before one is
at hand. Tensors lie on the CPU, so operations run on its backends, or on Triton's interpreter where a benchmark asks
for Triton by name; graphs and events are empty shells, nothing is compiled. Its figures mean nothing.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from importlib import import_module
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

os.environ.setdefault("TRITON_INTERPRET", "1")  # Triton looks at it when it is imported

import torch
from torch.overrides import TorchFunctionMode

DEVICE = "rehearsal of NVIDIA H200"  # the published rate of that GPU is known, so rates are rehearsed too
MEMORY_BYTES = 2**36
DIM = 16
TORCH_GENERATOR = torch.Generator


class TensorsOnCpu(TorchFunctionMode):
    """Whoever asks torch for a tensor on "cuda" gets one on the CPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.device:  # benchmarks read its type
            return func(*args, **(kwargs or {}))
        if func is torch.Tensor.pin_memory:
            return args[0]
        named = {name: _on_cpu(value) for name, value in (kwargs or {}).items() if name != "pin_memory"}
        return func(*map(_on_cpu, args), **named)


def _on_cpu(value: Any) -> Any:
    if isinstance(value, str | torch.device) and str(value).split(":")[0] == "cuda":
        return "cpu" if isinstance(value, str) else torch.device("cpu")
    return value


class _MadeOnCpu(type):
    """Stands for torch's class, which cannot be inherited from: calls and type checks are about that one."""

    def __call__(cls, device: Any = "cpu") -> Any:
        return TORCH_GENERATOR(_on_cpu(device))

    def __instancecheck__(cls, instance: object) -> bool:
        return isinstance(instance, TORCH_GENERATOR)


class Generator(metaclass=_MadeOnCpu):
    pass


class Autocast(torch.autocast):
    def __init__(self, device_type: str, *others: Any, **more: Any) -> None:
        super().__init__(_on_cpu(device_type), *others, **more)


class Event:
    """The wall clock."""

    def __init__(self, enable_timing: bool = False) -> None:
        self._at_s = 0.0

    def record(self, stream: object = None) -> None:
        self._at_s = time.perf_counter()

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, later: Event) -> float:
        return max(1e-3, 1e3 * (later._at_s - self._at_s))


class Stream:
    def wait_stream(self, other: Stream) -> None:
        pass

    def synchronize(self) -> None:
        pass


class Graph:
    """What is captured has run once, as it does on a CPU anyway; a replay does nothing."""

    def pool(self) -> tuple[int, int]:
        return (0, 0)

    def replay(self) -> None:
        pass


def _cuda() -> dict[str, Any]:
    """Attributes of `torch.cuda` while the CPU plays it."""
    properties = SimpleNamespace(L2_cache_size=1024, multi_processor_count=4, total_memory=MEMORY_BYTES, name=DEVICE)
    nothing: Callable[..., None] = lambda *_: None  # noqa: E731
    return {
        "is_available": lambda: True,
        "get_device_name": lambda *_: DEVICE,
        "get_device_capability": lambda *_: (9, 0),
        "get_device_properties": lambda *_: properties,
        "mem_get_info": lambda *_: (MEMORY_BYTES, MEMORY_BYTES),
        "memory_allocated": lambda *_: 0,
        "max_memory_allocated": lambda *_: MEMORY_BYTES,
        "reset_peak_memory_stats": nothing,
        "empty_cache": nothing,
        "synchronize": nothing,
        "_sleep": nothing,
        "is_current_stream_capturing": lambda: False,
        "current_stream": lambda *_: Stream(),
        "stream": lambda *_: nullcontext(),
        "graph": lambda *_, **__: nullcontext(),
        "Stream": Stream,
        "Event": Event,
        "CUDAGraph": Graph,
    }


@contextmanager
def played_by_cpu() -> Iterator[None]:
    """Within, torch has a CUDA device as far as the benchmarks look."""
    own = {"Generator": Generator, "autocast": Autocast, "compile": lambda what=None, **_: what}
    native = import_module("cosmos_kernels.native")
    why_missing = native.why_missing
    no_cuda = {"why_missing": lambda library: f"no {library} code here" if library == "cuda" else why_missing(library)}
    with ExitStack() as stack:
        for place, values in ((torch.cuda, _cuda()), (torch, own), (native, no_cuda)):
            for name, value in values.items():
                stack.enter_context(mock.patch.object(place, name, value))
        stack.enter_context(TensorsOnCpu())
        stack.callback(_forget)
        _forget()
        yield


def _forget() -> None:
    """Empty our caches: they hold what one of the two machines, played and real, said of itself."""
    for name, module in list(sys.modules.items()):
        if name.startswith(("cosmos_fast", "cosmos_kernels", "benchmarks")):
            for value in list(vars(module).values()):
                if callable(getattr(value, "cache_clear", None)):
                    value.cache_clear()


def _few(function: Callable[..., Any], **named: int) -> Callable[..., Any]:
    """The function with these arguments, whatever it is called with."""

    def call(*arguments: Any, **others: Any) -> Any:
        return function(*arguments, **{**others, **named})

    return call


def _cut(function: Callable[..., Any], **largest: int) -> Callable[..., Any]:
    """The function with the named positional arguments no larger than given; "_0" is the first."""
    limits = {int(name[1:]): limit for name, limit in largest.items()}

    def call(*arguments: Any, **named: Any) -> Any:
        return function(*(min(x, limits[i]) if i in limits else x for i, x in enumerate(arguments)), **named)

    return call


def _tiny_sweep(make: Callable[[str], Any], size: int) -> Callable[[str], Any]:
    """A sweep of its first point, which keeps its names and takes small inputs."""

    def made(device: str) -> Any:
        planned = make(device)
        first = planned.points[0]
        return replace(planned, points=[replace(first, make_inputs=partial(first.make_inputs.func, size))])

    return made


SWEEP_SIZES = {"infonce": 4, "pool": 1, "distill": 64, "optimizer": 1, "attention": 1, "layer_norm": 3}
LOADER_PARTS = ("fed_step", "loader_gpu", "loader_parts")


def _tiny_step() -> Any:
    shapes = import_module("benchmarks.shapes")
    step = shapes.mini_step(width=64, layers=1, batch=2)
    return replace(step, model=replace(step.model, vocab_size=512))


def _small(name: str, module: ModuleType) -> Mapping[str, Any]:
    """What stands in a benchmark's module in place of its own: the metrics keep their names, the work is little."""
    shapes = import_module("benchmarks.shapes")
    if name == "bench_infonce":
        return {"make_features": _cut(module.make_features, _0=6, _1=DIM), "RANKS": ((4, 8),)}
    if name == "bench_pool":
        made = {"make_inputs": _cut(module.make_inputs, _0=2, _2=DIM), "make_pools": _cut(module.make_pools, _0=DIM)}
        return made
    if name == "bench_attention":
        return {"GPU_COUNTS": {"global crops": 1, "local crops": 2, "captions": 3}, "HEADS": 1, "HEAD_DIM": DIM}
    if name == "bench_layer_norm":
        return {"ROWS": {"cuda": 6}}
    if name == "bench_optimizer":
        return {"transformer_shapes": lambda *_: [(8, 4), (4,)]}
    if name == "bench_distill":
        logits = module.make_logits
        few = lambda shape, *others: logits((min(shape[0], 4), min(shape[1], 64)), *others)  # noqa: E731
        return {"make_features": _cut(module.make_features, _0=6), "DIM": DIM, "make_logits": few}
    if name == "bench_rates":
        layers = dict.fromkeys(module.LAYERS, (3 * DIM, 2 * DIM))
        return {"SAMPLES": {"cuda": 1}, "LAYERS": layers, "CHUNK_MIB": {"cuda": (1, 2)}, "CHUNK_DIM": 8}
    if name == "bench_packed_text":
        text = {"text_width": 64, "text_heads": 1, "vocab_size": 512, "embed_dim": 64}
        return {"VIT_B_16": replace(shapes.VIT_B_16, **text), "Setting": _cut(module.Setting, _0=1, _1=1)}
    if name == "bench_loader":
        found = import_module("benchmarks.loader_setting").missing_loaders
        return {"SAMPLES": {"cuda": 4}, "BATCH": {"cpu": 2, "cuda": 2}, "missing_loaders": lambda _: found("cpu")}
    if name == "bench_tokenizer":
        return {"SEEN_SAMPLES": 2}
    if name == "bench_eval":
        return {"SETTINGS": {"cuda": module.tiny("cuda")}}
    if name == "bench_savings":
        return {"vit_b_16_step": lambda batch: _tiny_step()}
    if name == "sweeps":
        return {"SWEEPS": {key: _tiny_sweep(make, SWEEP_SIZES[key]) for key, make in module.SWEEPS.items()}}
    return {}


def _small_input() -> list[tuple[Any, Mapping[str, Any]]]:
    """What `bench loader` measures with: DALI's pipelines are the CPU's, steps are few and small."""
    shapes, fed, gpu, host = (import_module(f"benchmarks.{name}") for name in ("shapes", *LOADER_PARTS))
    dali = import_module("cosmos_fast.data.dali_pipeline")
    make, reason = dali.DaliPipeline.__init__, dali.why_unusable
    on_cpu = lambda self, crops, batch, _, **more: make(self, crops, batch, torch.device("cpu"), **more)  # noqa: E731
    tiny = {"vit_b_16_step": lambda _: shapes.mini_step(width=64, layers=1, batch=2)}
    return [
        (fed, {"STEPS": 1, "alternate": _cut(fed.alternate, _3=1), **tiny}),
        (gpu, {"BATCHES": 1}),
        (host, {"STAGE_BATCHES": 1}),
        (dali, {"why_unusable": lambda _: reason("cpu")}),
        (dali.DaliPipeline, {"__init__": on_cpu}),
    ]


@contextmanager
def cut_down(name: str) -> Iterator[ModuleType]:
    """The module `benchmarks.<name>` with small inputs, and rates of the machine that need no measuring."""
    module = import_module(f"benchmarks.{name}")
    setting, others, sweep = (import_module(f"benchmarks.{name}") for name in ("step_setting", "other_ranks", "sweep"))
    lengths = {"CROP_TOKENS": {"global crops": 33, "local crops": 7}, "CAPTION_TOKENS": (3, 12)}
    names = sweep.backend_names  # Triton's interpreter takes seconds where a sweep's other backends take none
    harness, graphs = import_module("benchmarks.harness"), import_module("benchmarks.graphs")
    tiny_step = lambda batch=256: _tiny_step()  # noqa: E731
    patches: list[tuple[Any, Mapping[str, Any]]] = [
        (module, _small(name, module)),
        (graphs, {"FLUSH_BYTES": 64, "WARMUP": 1, "interleave_us": _cut(graphs.interleave_us, _2=2)}),
        (harness, {"MIN_REPEATS": 2}),
        (
            sweep,
            {
                "LAP_MS": 1e-3,
                "MIN_REPEATS": 2,
                "time_point": _cut(sweep.time_point, _3=2),
                "backend_names": lambda op: [name for name in names(op) if name != "triton"],
            },
        ),
        (setting, {"vit_b_16_step": tiny_step, "OtherRanks": _cut(others.OtherRanks, _0=6)}),
    ]
    patches += _small_input() if name == "bench_loader" else []
    rates: dict[str, Any] = {"matmul_flops_per_s": lambda *_: 1e12, "copy_bytes_per_s": lambda *_: 1e12}
    loaded = [found for key, found in sys.modules.items() if key.startswith("benchmarks.")]
    few = {
        "interleave": _few(harness.interleave, repeats=2, warmup=0),
        "ledger": _few(harness.ledger, repeats=1, warmup=0),
    }
    anywhere = rates | lengths | few
    patches += [(found, {key: value for key, value in anywhere.items() if hasattr(found, key)}) for found in loaded]
    with ExitStack() as stack:
        for place, values in patches:
            for key, value in values.items():
                stack.enter_context(mock.patch.object(place, key, value))
        yield module


def rehearse(name: str, arguments: list[str]) -> None:
    """Run the command of `benchmarks.<name>`; raises what it raises."""
    with cut_down(name) as module, played_by_cpu():
        module.command.main(args=arguments, prog_name=name, standalone_mode=False)


if __name__ == "__main__":
    rehearse(sys.argv[1], sys.argv[2:])
