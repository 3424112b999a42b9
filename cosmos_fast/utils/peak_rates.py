"""What the hardware could do at best: dense matrix products, without structured sparsity.

The table is of NVIDIA's data sheets; where a sheet gives the rate with sparsity, half of it. Rates hold at the boost
clock, which a GPU at its power limit does not keep: a large product reaches 70 to 90 % of them.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

MIN_PRODUCTS = 7

# Device name contains -> TFLOP/s by type of the operands. The first match counts: variants stand before the plain name.
_NONE = 0.0
_COLUMNS = ("fp32", "tf32", "bf16", "fp16", "fp8")
_PUBLISHED: tuple[tuple[str, tuple[float, ...]], ...] = (
    ("GB200", (80.0, 1250.0, 2500.0, 2500.0, 5000.0)),
    ("B200", (75.0, 1125.0, 2250.0, 2250.0, 4500.0)),
    ("GH200", (67.0, 494.5, 989.4, 989.4, 1978.9)),
    ("H200 NVL", (60.0, 417.5, 835.5, 835.5, 1670.5)),
    ("H200", (67.0, 494.5, 989.4, 989.4, 1978.9)),
    ("H100 NVL", (60.0, 417.5, 835.5, 835.5, 1670.5)),
    ("H100 PCIe", (51.0, 378.0, 756.0, 756.0, 1513.0)),
    ("H100", (67.0, 494.5, 989.4, 989.4, 1978.9)),
    ("H800 PCIe", (51.0, 378.0, 756.0, 756.0, 1513.0)),
    ("H800", (67.0, 494.5, 989.4, 989.4, 1978.9)),
    ("H20", (44.0, 74.0, 148.0, 148.0, 296.0)),
    ("A100", (19.5, 156.0, 312.0, 312.0, _NONE)),
    ("A800", (19.5, 156.0, 312.0, 312.0, _NONE)),
    ("A30", (10.3, 82.0, 165.0, 165.0, _NONE)),
    ("A40", (37.4, 74.8, 149.7, 149.7, _NONE)),
    ("A10", (31.2, 62.5, 125.0, 125.0, _NONE)),
    ("L40S", (91.6, 183.0, 362.0, 362.0, 733.0)),
    ("L40", (90.5, 90.5, 181.0, 181.0, 362.0)),
    ("L4", (30.3, 60.0, 121.0, 121.0, 242.5)),
    ("V100", (15.7, _NONE, _NONE, 125.0, _NONE)),
    ("T4", (8.1, _NONE, _NONE, 65.0, _NONE)),
    ("RTX 4090", (82.6, 82.6, 165.2, 165.2, 330.3)),
    ("RTX 3090", (35.6, 35.6, 71.0, 71.0, _NONE)),
)


@dataclass(frozen=True)
class PeakRate:
    """FLOP/s that model FLOPs utilisation is measured against, and where the number comes from, in words."""

    flops_per_s: float
    source: str


def published_peak(device_name: str, operands: str) -> PeakRate | None:
    """Data sheet rate of a GPU, by the name that torch gives it; None where it is unknown or has no such arithmetic.

    operands: "fp32", "tf32", "bf16", "fp16" or "fp8".
    """
    if " MIG " in device_name:  # a slice of the GPU
        return None
    # Whole words: "A10" must not answer for an "A100".
    words = f" {device_name.replace('-', ' ')} "
    for name, rates in _PUBLISHED:
        if f" {name} " in words:
            tera = rates[_COLUMNS.index(operands)]
            return PeakRate(1e12 * tera, f"published dense {operands} of {device_name}") if tera else None
    return None


def peak_rate(device: torch.device, precision: str) -> PeakRate | None:
    """The published rate of this device, None where there is none; "fp32" counts as TF32 where torch may use it."""
    if device.type != "cuda":
        return None
    operands = "tf32" if precision == "fp32" and _tf32_allowed() else precision
    return published_peak(torch.cuda.get_device_name(device), operands)


def measured_rate(device: torch.device, precision: str) -> PeakRate:
    """What the library's matrix product reaches here and now, for machines without a published rate."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)
    rate = matmul_flops_per_s(device, dtype)
    return PeakRate(rate, f"measured: the fastest of a second of {precision} matrix products on this {device.type}")


def matmul_flops_per_s(device: torch.device | str, dtype: torch.dtype, seconds: float = 1.0) -> float:
    """The best that the library's square matrix product reaches now.

    The fastest of all that fit into `seconds`, because a neighbour's load can only lower the rate.
    """
    device = torch.device(device)
    side = 8192 if device.type == "cuda" else 1024
    # Random numbers, because a GPU runs faster on smooth ones; of a generator of their own, because a run has its own.
    generator = torch.Generator(device).manual_seed(0)
    a, b = (torch.randn(side, side, device=device, generator=generator).to(dtype) for _ in range(2))
    torch.mm(a, b)
    times: list[float] = []
    while len(times) < MIN_PRODUCTS or sum(times) < seconds:
        times.append(_seconds(a, b))
    return 2 * side**3 / min(times)


def _seconds(a: torch.Tensor, b: torch.Tensor) -> float:
    if a.is_cuda:
        before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize(a.device)
        before.record()
        torch.mm(a, b)
        after.record()
        torch.cuda.synchronize(a.device)
        return before.elapsed_time(after) / 1e3
    start = time.perf_counter()
    torch.mm(a, b)
    return time.perf_counter() - start


def _tf32_allowed() -> bool:
    # torch 2.9 has a setting by operation; asking the older switch beside it may raise.
    setting = getattr(torch.backends.cuda.matmul, "fp32_precision", None)
    return setting == "tf32" if setting is not None else torch.backends.cuda.matmul.allow_tf32
