"""What this machine can do at the shapes of the towers: matrix products, copies, products of chunks just written.

Floors and bars hang on these rates; nothing of `cosmos_fast` runs. `matmul_tflops`: the linear layers of ViT-B-16 on
all crops of a batch packed (616 tokens a sample), forward and gradients. `chunk_tflops`: rectangles of similarities are
written (exponential of a product) and multiplied at once, as the contrastive loss's backward does; a rectangle that
fits the L2 cache need not go to memory. Axes: T tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import click
import torch
from torch import Tensor

from benchmarks import parts, rows
from benchmarks.harness import MIN_REPEATS, time_ms
from benchmarks.rows import Row
from benchmarks.sweep import copy_bytes_per_s
from cosmos_fast.utils.memory import MIB
from cosmos_fast.utils.peak_rates import matmul_flops_per_s

TOKENS_A_SAMPLE = 2 * 197 + 6 * 37
SAMPLES = {"cpu": 4, "cuda": 256}
LAYERS = {"qkv": (768, 2304), "out": (768, 768), "mlp up": (768, 3072), "mlp down": (3072, 768)}
CHUNK_MIB = {"cpu": (1, 4, 16), "cuda": (8, 32, 128, 512)}
CHUNK_COLUMNS, CHUNK_DIM = {"cpu": 1024, "cuda": 8192}, 512


def best_ms(call: Callable[[Tensor], object], x: Tensor, device: str) -> float:
    """The least of several: a neighbour's load can only lower a rate."""
    return min(time_ms(call, x, device) for _ in range(MIN_REPEATS + 2))


def layer_products(device: str, dtype: torch.dtype, tokens: int, name: str) -> Iterator[tuple[str, float]]:
    """FLOP/s of a linear layer: forward, gradient of its input, gradient of its weight."""
    inputs, outputs = LAYERS[name]
    shapes = (tokens, inputs), (tokens, outputs), (outputs, inputs)
    x_TD, grad_TD, weight = (torch.randn(shape, device=device).to(dtype) for shape in shapes)
    products: tuple[tuple[str, Tensor, Tensor], ...] = (
        ("forward", x_TD, weight.T),
        ("grad input", grad_TD, weight),
        ("grad weight", grad_TD.T, x_TD),
    )
    for direction, left, right in products:
        rate = 2 * tokens * inputs * outputs / (best_ms(partial(torch.mm, left), right, device) / 1e3)
        yield f"{name} {tokens}x{inputs}x{outputs}/{direction}", rate


def chunk_rate(device: str, dtype: torch.dtype, mib: int) -> float:
    """FLOP/s of both products where the similarities are made and consumed in rectangles of `mib`."""
    columns = CHUNK_COLUMNS[device]
    chunk_rows = mib * MIB // (columns * dtype.itemsize)
    total_rows = max(CHUNK_MIB[device]) * MIB // (columns * dtype.itemsize)
    y = torch.randn(columns, CHUNK_DIM, device=device).to(dtype) / CHUNK_DIM**0.5
    x = torch.randn(total_rows, CHUNK_DIM, device=device).to(dtype) / CHUNK_DIM**0.5

    def run(x: Tensor) -> None:
        for part in x.split(chunk_rows):
            torch.mm((part @ y.T).exp_(), y)

    return 4 * total_rows * columns * CHUNK_DIM / (best_ms(run, x, device) / 1e3)


def plan(device: str, samples: int) -> Iterator[parts.Part]:
    """What is measured, in order: name and function. Rates are also told as shares of a square product's."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    tokens = samples * TOKENS_A_SAMPLE
    shapes = {"samples": samples, "tokens": tokens, "dtype": str(dtype).removeprefix("torch.")}
    row = partial(Row, name="rates", device=rows.device_name(device), shapes=shapes)
    square = matmul_flops_per_s(device, dtype)

    def rate_row(name: str, rate: float) -> Row:
        return row(metric=name, value=rate / 1e12, unit="TFLOP/s", floor_pct=100 * rate / square)

    def products(name: str) -> list[Row]:
        found = layer_products(device, dtype, tokens, name)
        return [rate_row(f"matmul_tflops/{direction}", rate) for direction, rate in found]

    yield "square product", lambda: [row(metric="matmul_tflops/square", value=square / 1e12, unit="TFLOP/s")]
    yield "copy", lambda: [row(metric="copy_gb_per_s", value=copy_bytes_per_s(device) / 1e9, unit="GB/s")]
    for name in LAYERS:
        yield name, partial(products, name)
    for mib in CHUNK_MIB[device]:
        metric = f"chunk_tflops/{mib} MiB"
        yield metric, lambda metric=metric, mib=mib: [rate_row(metric, chunk_rate(device, dtype, mib))]


@click.command(name="rates", help=__doc__, context_settings={"show_default": True})
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", help="fp32 on a CPU, bf16 on CUDA.")
@click.option("--samples", type=click.IntRange(1), help="Samples in the batch; default: 4 on a CPU, 256 on a GPU.")
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), help="JSON file; default: results folder.")
def command(device: str, samples: int | None, out: Path | None) -> None:
    parts.measure(plan(device, samples or SAMPLES[device]), out)


if __name__ == "__main__":
    command()
