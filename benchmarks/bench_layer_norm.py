"""Residual addition and LayerNorm in one pass, against PyTorch's two, compiled ones, and other libraries' kernels.

On a GPU: rows of a bf16 step of ViT-B/16 at 256 samples, a residual stream in fp32 (autocast) and in bf16, from CUDA
graphs, forward and backward apart; Liger and quack where they are installed. On a CPU PyTorch is measured against
itself, which shows only what a custom operation costs.

Axes: T rows, D channels.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import click
import torch
from torch import Tensor

from benchmarks import graphs, parts, rows, sweeps
from benchmarks.harness import MIN_REPEATS, assert_agree, interleave
from benchmarks.rows import Row
from benchmarks.sweep import copy_bytes_per_s
from cosmos_fast.ops.layer_norm import add_layer_norm
from cosmos_kernels import reference

ROWS = {"cpu": 4_000, "cuda": 157_000}
EAGER, COMPILED = "PyTorch", "PyTorch, compiled"
STREAMS = {"fp32": torch.float32, "bf16": torch.bfloat16}
FORWARD_BAR_PCT, BACKWARD_BAR_PCT = 85.0, 75.0

Norm = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


class Inputs(NamedTuple):
    """Residual stream and update [T, D], weight and bias [D], all with gradients."""

    x: Tensor
    update: Tensor
    weight: Tensor
    bias: Tensor


class Setting(NamedTuple):
    """What one run measures."""

    rows: int
    dim: int
    stream: str
    device: str
    backend: str
    repeats: int

    def row(self, metric: str, value: float, unit: str, **more: Any) -> Row:
        shapes = {"rows": self.rows, "dim": self.dim, "stream": self.stream, "backend": self.backend}
        device = rows.device_name(self.device)
        metric = f"{metric}/{self.stream}"
        return Row(name="layer_norm", device=device, shapes=dict(shapes), metric=metric, value=value, unit=unit, **more)


def make_inputs(setting: Setting, seed: int) -> Inputs:
    """On a GPU the update comes from a bf16 product."""
    generator = torch.Generator(setting.device).manual_seed(seed)
    low = torch.bfloat16 if setting.device == "cuda" else torch.float32
    shapes_and_dtypes = (
        *(((setting.rows, setting.dim), dtype) for dtype in (STREAMS[setting.stream], low)),
        *(((setting.dim,), torch.float32) for _ in range(2)),
    )
    drawn = (
        torch.randn(shape, generator=generator, device=setting.device).to(dtype) for shape, dtype in shapes_and_dtypes
    )
    return Inputs(*(tensor.requires_grad_() for tensor in drawn))


def both(norm: Norm, inputs: Inputs, device: str) -> Tensor:
    """Sum and norm as one tensor for the gradient to flow into: [2, T, D] is never formed, its halves are."""
    with torch.autocast(device, dtype=torch.bfloat16, enabled=device == "cuda"):
        y, normed = norm(*inputs)
    # As a block uses them: the norm goes into a bf16 product, the sum goes on.
    return _Pair.apply(y, normed.to(torch.bfloat16) if device == "cuda" else normed)


class _Pair(torch.autograd.Function):
    """Stands for what reads both results: costs nothing, and gives each a gradient of its own dtype."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, normed: Tensor) -> Tensor:
        ctx.save_for_backward(y, normed)
        return y.new_zeros(())

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor, ...]:
        return ctx.saved_tensors  # as good as any other values


def separate(x: Tensor, update: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """What the towers do: an addition and a LayerNorm."""
    return reference.add_layer_norm(x, update, weight, bias)


def others(setting: Setting) -> dict[str, Norm]:
    """Baselines of a GPU; says which are missing."""
    found: dict[str, Norm] = {EAGER: separate, COMPILED: torch.compile(separate)}
    for name, module, attribute in (
        ("Liger", "liger_kernel.transformers.functional", "liger_layer_norm"),
        ("quack", "quack.rmsnorm", "layernorm_fwd"),
    ):
        try:
            function = getattr(import_module(module), attribute)
        except Exception as error:  # a broken installation raises anything
            click.echo(f"left out: {name}: {type(error).__name__}: {error}")
            continue
        found[name] = partial(_with_addition, function)
    return found


def _with_addition(function: Callable[..., Tensor], *inputs: Tensor) -> tuple[Tensor, Tensor]:
    x, update, weight, bias = inputs
    y = x + update
    return y, function(y, weight, bias, 1e-5)


def check(setting: Setting) -> None:
    """Results and gradients of a few rows against fp64."""
    few = setting._replace(rows=min(setting.rows, 2000))
    inputs = make_inputs(few, 0)
    exact = Inputs(*(tensor.detach().double().requires_grad_() for tensor in inputs))
    sides = []
    for norm, leaves in ((partial(add_layer_norm, backend=setting.backend), inputs), (separate, exact)):
        # As it is timed; but autocast would take the truth to fp32.
        with torch.autocast(
            setting.device, dtype=torch.bfloat16, enabled=setting.device == "cuda" and leaves is inputs
        ):
            outputs = norm(*leaves)
        gradients = torch.autograd.grad(outputs, list(leaves), [torch.ones_like(y) / (1 + y.abs()) for y in outputs])
        names = ("y", "normed", *(f"gradient of {name}" for name in Inputs._fields))
        sides.append(dict(zip(names, (*(output.detach() for output in outputs), *gradients), strict=True)))
    assert_agree(*sides, rtol=2e-2 if setting.device == "cuda" else 1e-4)


def measure_time(setting: Setting) -> Iterator[Row]:
    """Wall time on a CPU, forward and backward."""
    ours = partial(add_layer_norm, backend=setting.backend)
    timing = interleave(
        lambda inputs: both(separate, inputs, "cpu").backward(),
        lambda inputs: both(ours, inputs, "cpu").backward(),
        partial(make_inputs, setting),
        check=partial(check, setting),
        repeats=setting.repeats,
    )
    more = {"baseline": EAGER, "ratio": timing.ratio}
    yield setting.row("forward_backward_ms", timing.candidate_median_ms, "ms", **more)


def measure_graphs(setting: Setting) -> Iterator[Row]:
    """GPU time of forward and backward, replayed from CUDA graphs."""
    check(setting)
    static = make_inputs(setting, 0)

    def refresh(seed: int) -> None:
        with torch.no_grad():
            for old, new in zip(static, make_inputs(setting, seed), strict=True):
                old.copy_(new)

    captured = {}
    for name, norm in {"ours": partial(add_layer_norm, backend=setting.backend), **others(setting)}.items():
        try:
            captured[name] = graphs.capture(partial(both, norm, static, "cuda"), static)
        except Exception as error:  # a compiler or a package that is broken raises anything
            if name == "ours":
                raise
            torch.cuda.synchronize()
            click.echo(f"left out: {name}: not captured: {type(error).__name__}: {str(error).splitlines()[:1]}")
    rate = copy_bytes_per_s("cuda")
    forward = {name: graph.forward for name, graph in captured.items()}
    backward = {name: graph.backward for name, graph in captured.items() if graph.backward is not None}
    limits = zip((forward, backward), least_bytes(setting), (FORWARD_BAR_PCT, BACKWARD_BAR_PCT), strict=True)
    for metric, (sides, size_bytes, bar_pct) in zip(("forward_us", "backward_us"), limits, strict=True):
        times = graphs.interleave_us(sides, refresh, setting.repeats)
        value = statistics.median(times["ours"])
        floor_us = 1e6 * size_bytes / rate
        more = {"baseline": "copy rate", "ratio": value / floor_us, "bar": 100 / bar_pct}
        yield setting.row(metric, value, "us", floor_pct=100 * floor_us / value, **more)
        for name in sorted(times.keys() - {"ours"}):
            ratio = graphs.median_ratio(times["ours"], times[name])
            yield setting.row(metric, value, "us", baseline=name, ratio=ratio, bar=1.0)


def least_bytes(setting: Setting) -> tuple[float, float]:
    """Forward: stream and update read, stream and norm written. Backward: stream, and both gradients, read; the
    stream's gradient written, and the update's where its dtype is another."""
    elements = float(setting.rows * setting.dim)
    wide = STREAMS[setting.stream].itemsize
    return elements * (2 * wide + 4), elements * (3 * wide + 2 + (2 if wide == 4 else 0))


@click.command(name="layer_norm", help=__doc__, context_settings={"show_default": True})
@click.option("--rows", "count", type=click.IntRange(1), help="Rows; default: 4000 on a CPU, 157000 on a GPU.")
@click.option("--dim", type=click.IntRange(8), default=768, help="Channels.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu")
@click.option("--backend", help="What is measured; default: triton on a GPU, eager on a CPU.")
@click.option("--repeats", type=click.IntRange(MIN_REPEATS), default=MIN_REPEATS, help="Timed repetitions.")
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), help="JSON file; default: results folder.")
def command(count: int | None, dim: int, device: str, backend: str | None, repeats: int, out: Path | None) -> None:
    backend = backend or ("triton" if device == "cuda" else "eager")
    measure = measure_graphs if device == "cuda" else measure_time
    streams = STREAMS if device == "cuda" else ("fp32",)
    settings = [Setting(count or ROWS[device], dim, stream, device, backend, repeats) for stream in streams]
    parts.measure([(setting.stream, partial(measure, setting)) for setting in settings], out)


sweeps.offer(command, "layer_norm")

if __name__ == "__main__":
    command()
