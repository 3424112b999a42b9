"""Cross-attention pooling, forward and backward: absorbed keys and values against keys and values per view.

Baselines: the original's way (tokens repeated once per view, projected each time), and keys and values formed once a
sample. On a CPU: time, peak memory, bytes saved for backward. On a GPU, with bf16 tokens and CUDA graphs: forward and
backward apart. Axes: B batch, V views, L tokens, D embedding, H heads.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeVar

import click
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import graphs, parts, rows, sweeps
from benchmarks.eager_cosmos import CrossAttentionPool as EagerPool
from benchmarks.harness import MIN_REPEATS, assert_agree, interleave
from benchmarks.memory import MIB, peak_mib, saved_bytes
from benchmarks.rows import Row
from benchmarks.shapes import GLOBAL_VIEWS, LOCAL_VIEWS
from cosmos_fast.model.cross_pool import CrossAttentionPool
from cosmos_fast.ops import cross_attention_pool
from cosmos_fast.utils.peak_rates import matmul_flops_per_s

VIEWS = GLOBAL_VIEWS + LOCAL_VIEWS
HEADS = 8
LENGTHS = (77, 196)
BATCH = {"cpu": 32, "cuda": 256}
Pool = TypeVar("Pool", EagerPool, CrossAttentionPool)
REPEATED_BAR, SHARED_BAR, SAVED_BAR = 0.08, 0.6, 0.1
GPU_REPEATED_BAR, GPU_SHARED_BAR = 1 / 15, 1 / 1.5
FORWARD_BARS_US, BACKWARD_BARS_US = {77: 45.0, 196: 60.0}, {77: 100.0, 196: 140.0}


class Inputs(NamedTuple):
    """Tokens [B, L, D] and queries [B, V, D], both with gradients."""

    tokens: Tensor
    queries: Tensor


class Setting(NamedTuple):
    """What one run measures. row: makes a result row of this setting."""

    batch: int
    dim: int
    device: str
    backend: str
    repeats: int

    def row(self, length: int, metric: str, value: float, unit: str, **more: object) -> Row:
        shapes = {"batch": self.batch, "views": VIEWS, "tokens": length, "embed_dim": self.dim, "heads": HEADS}
        shapes["backend"] = self.backend  # type: ignore[assignment]
        device = rows.device_name(self.device)
        return Row(
            name="pool", device=device, shapes=dict(shapes), metric=f"{metric}/{length}", value=value, unit=unit, **more
        )  # type: ignore[arg-type]


def make_inputs(batch: int, length: int, dim: int, device: str, seed: int, dtype: torch.dtype) -> Inputs:
    generator = torch.Generator().manual_seed(seed)
    shapes = (batch, length, dim), (batch, VIEWS, dim)
    # Tokens come from bf16 products on a GPU; drawn so for every dtype, that the truth is of the same tokens.
    drawn = (torch.randn(shape, generator=generator).bfloat16() for shape in shapes)
    tokens, queries = (x.to(device, dtype).requires_grad_() for x in drawn)
    return Inputs(tokens, queries)


def make_pools(dim: int, device: str) -> tuple[EagerPool, CrossAttentionPool]:
    """The same weights for both, biases and LayerNorm included."""
    torch.manual_seed(0)
    eager, product = EagerPool(dim, HEADS), CrossAttentionPool(dim, HEADS)
    with torch.no_grad():
        for parameter in eager.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    product.load_state_dict(eager.state_dict())
    return eager.to(device), product.to(device)


def pool_repeated(pool: EagerPool, inputs: Inputs) -> Tensor:
    views_first_VBD = inputs.queries.transpose(0, 1).flatten(0, 1)
    pooled_VBD = pool(views_first_VBD, inputs.tokens)
    crossmodal_VBD = F.normalize(views_first_VBD + pooled_VBD, dim=-1)
    return crossmodal_VBD.unflatten(0, (VIEWS, -1)).transpose(0, 1)


def pool_shared(pool: EagerPool, inputs: Inputs) -> Tensor:
    keys = pool.ln_k(inputs.tokens)
    pooled = pool.attn(pool.ln_q(inputs.queries), keys, keys, need_weights=False)[0]
    return F.normalize(inputs.queries + pooled, dim=-1)


def pool_product(pool: CrossAttentionPool, inputs: Inputs, backend: str) -> Tensor:
    return cross_attention_pool(inputs.tokens, inputs.queries, pool.weights, backend=backend)


def forward_backward(call: partial[Tensor], inputs: Inputs) -> Tensor:
    """The gradient of the output is random but fixed, so that no channel's gradient vanishes."""
    output = call(inputs)
    output.backward(torch.linspace(-1, 1, output.numel(), device=output.device, dtype=output.dtype).view_as(output))
    return output.detach()


def check(length: int, setting: Setting) -> None:
    """Output and gradients of inputs and weights against the original's way in fp64."""
    batch, dim, device, backend, _ = setting
    batch = min(batch, 32)
    eager, product = make_pools(dim, device)
    dtype, rtol = (torch.bfloat16, 2e-2) if device == "cuda" else (torch.float32, 1e-4)
    ours = outcome(product, partial(pool_product, backend=backend), make_inputs(batch, length, dim, device, 0, dtype))
    truth = outcome(eager.double(), pool_repeated, make_inputs(batch, length, dim, device, 0, torch.float64))
    assert_agree(ours, truth, rtol=rtol)


def outcome(pool: Pool, call: Callable[[Pool, Inputs], Tensor], inputs: Inputs) -> dict[str, Tensor]:
    """The output and all gradients, by name."""
    output = forward_backward(partial(call, pool), inputs)
    leaves = {"tokens": inputs.tokens, "queries": inputs.queries, **dict(pool.named_parameters())}
    return {"output": output, **{name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}}


def measure_time(length: int, setting: Setting) -> Iterator[Row]:
    batch, dim, device, backend, repeats = setting
    eager, product = make_pools(dim, device)
    baselines = (
        ("keys and values repeated per view", pool_repeated, REPEATED_BAR),
        ("keys and values once a sample", pool_shared, SHARED_BAR),
    )
    for name, call, bar in baselines:
        timing = interleave(
            partial(forward_backward, partial(call, eager)),
            partial(forward_backward, partial(pool_product, product, backend=backend)),
            lambda seed: make_inputs(batch, length, dim, device, seed, torch.float32),
            check=partial(check, length, setting),
            device=device,
            repeats=repeats,
        )
        more = {"baseline": name, "ratio": timing.ratio, "bar": bar}
        yield setting.row(length, "forward_backward_ms", timing.candidate_median_ms, "ms", **more)


def run_side(side: str, batch: int, length: int, dim: int, device: str, backend: str) -> None:
    eager, product = make_pools(dim, device)
    call = partial(pool_repeated, eager) if side == "eager" else partial(pool_product, product, backend=backend)
    forward_backward(call, make_inputs(batch, length, dim, device, 0, torch.float32))


def measure_memory(length: int, setting: Setting) -> Iterator[Row]:
    """Peak, and what autograd keeps from forward to backward (parameters, which live anyway, apart)."""
    batch, dim, device, backend, _ = setting
    eager_peak, peak = (
        peak_mib(
            partial(run_side, side, batch, length, dim, device, backend),
            device=device,
            settle=partial(run_side, side, 1, length, dim, device, backend),
        )
        for side in ("eager", "product")
    )
    eager, product = make_pools(dim, device)
    inputs = make_inputs(batch, length, dim, device, 0, torch.float32)
    eager_kept = saved_bytes(partial(pool_repeated, eager, inputs), eager.parameters()) / MIB
    kept = saved_bytes(partial(pool_product, product, inputs, backend), product.parameters()) / MIB
    repeated = "keys and values repeated per view"
    yield setting.row(length, "eager_peak_mib", eager_peak, "MiB")
    yield setting.row(length, "peak_mib", peak, "MiB", baseline=repeated, ratio=peak / eager_peak)
    yield setting.row(length, "eager_saved_mib", eager_kept, "MiB")
    yield setting.row(length, "saved_mib", kept, "MiB", baseline=repeated, ratio=kept / eager_kept, bar=SAVED_BAR)


class OnGpu:
    """Graphs of one length: bf16 tokens, the baselines under autocast."""

    def __init__(self, length: int, setting: Setting) -> None:
        self._draw = partial(make_inputs, setting.batch, length, setting.dim, setting.device)
        self._eager, product = make_pools(setting.dim, setting.device)
        self._static = self._draw(0, torch.bfloat16)
        leaves = (*self._static, *product.parameters())
        self.ours = graphs.capture(partial(pool_product, product, self._static, setting.backend), leaves)

    def refresh(self, seed: int) -> None:
        """Fresh values in the same places."""
        with torch.no_grad():
            for old, new in zip(self._static, self._draw(seed, torch.bfloat16), strict=True):
                old.copy_(new)

    def baseline(self, call: Callable[[EagerPool, Inputs], Tensor]) -> torch.cuda.CUDAGraph:
        """Its forward pass."""

        def under_autocast() -> Tensor:
            with torch.autocast("cuda", dtype=torch.bfloat16, cache_enabled=False):
                return call(self._eager, self._static)

        return graphs.capture(under_autocast).forward


def measure_graphs(length: int, setting: Setting) -> Iterator[Row]:
    """Forward and backward on a GPU, and forward against the original's way."""
    check(length, setting)
    on_gpu = OnGpu(length, setting)
    assert on_gpu.ours.backward is not None
    sides = {"forward_us": on_gpu.ours.forward, "backward_us": on_gpu.ours.backward}
    times = graphs.interleave_us({**sides, "repeated": on_gpu.baseline(pool_repeated)}, on_gpu.refresh, setting.repeats)
    rate = matmul_flops_per_s(setting.device, torch.bfloat16)
    bars = FORWARD_BARS_US, BACKWARD_BARS_US
    for name, flops, bars_us in zip(sides, flops_a_sample(length, setting.dim), bars, strict=True):
        value, bar = statistics.median(times[name]), bars_us.get(length)
        more = {"floor_pct": 100 * 1e6 * setting.batch * flops / rate / value}
        if bar is not None and (setting.batch, setting.dim) == (BATCH["cuda"], 512):
            more |= {"baseline": f"{bar:g} us", "ratio": value / bar, "bar": 1.0}  # type: ignore[dict-item]
        yield setting.row(length, name, value, "us", **more)
    yield _against(length, setting, times, "repeated", "keys and values repeated per view", GPU_REPEATED_BAR)


def measure_compiled(length: int, setting: Setting) -> Iterator[Row]:
    """Forward on a GPU against keys and values once a sample, compiled: a part of its own, since that takes long."""
    on_gpu = OnGpu(length, setting)
    sides = {"forward_us": on_gpu.ours.forward, "compiled": on_gpu.baseline(torch.compile(pool_shared))}
    times = graphs.interleave_us(sides, on_gpu.refresh, setting.repeats)
    yield _against(length, setting, times, "compiled", "keys and values once a sample, compiled", GPU_SHARED_BAR)


def _against(length: int, setting: Setting, times: dict[str, list[float]], key: str, baseline: str, bar: float) -> Row:
    ratio, value = graphs.median_ratio(times["forward_us"], times[key]), statistics.median(times["forward_us"])
    return setting.row(length, "forward_us", value, "us", baseline=baseline, ratio=ratio, bar=bar)


def flops_a_sample(length: int, dim: int) -> tuple[float, float]:
    """Operations of forward and backward: four projections of the queries, two products with the tokens; backward
    has two for each of them, and the scores again."""
    projections, tokens = 8.0 * VIEWS * dim**2, 2.0 * VIEWS * HEADS * length * dim
    return projections + 2 * tokens, 2 * projections + 5 * tokens


@click.command(name="pool", help=__doc__, context_settings={"show_default": True})
@click.option("--batch", type=click.IntRange(1), help="Samples; default: 32 on a CPU, 256 on a GPU.")
@click.option("--length", "lengths", type=click.IntRange(1), multiple=True, default=LENGTHS, help="Tokens a sample.")
@click.option("--dim", type=click.IntRange(8), default=512, help="Channels; a multiple of 8.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu")
@click.option("--backend", default="auto", help="Backend of cross_attention_pool.")
@click.option("--repeats", type=click.IntRange(MIN_REPEATS), default=MIN_REPEATS, help="Timed repetitions.")
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), help="JSON file; default: results folder.")
def command(
    batch: int | None, lengths: tuple[int, ...], dim: int, device: str, backend: str, repeats: int, out: Path | None
) -> None:
    setting = Setting(batch or BATCH[device], dim, device, backend, repeats)
    on_gpu = {"graphs": measure_graphs, "graphs, compiled baseline": measure_compiled}
    kinds = on_gpu if device == "cuda" else {"time": measure_time, "memory": measure_memory}
    cases = [(name, kind, length) for name, kind in kinds.items() for length in lengths]
    parts.measure([(f"{name} at {length}", partial(kind, length, setting)) for name, kind, length in cases], out)


sweeps.offer(command, "pool")

if __name__ == "__main__":
    command()
