"""Clipping, AdamW and the teacher's average in two passes over memory, against torch's optimizers plus an average.

The candidate reads the gradients once for their norm (4 B an element) and then does everything else in one pass
(36 B, 2 more for each bf16 copy); the original's way (a loop of AdamW, a loop of averages, clipping) moves several
times as much.

Baselines: torch's AdamW as it comes (a loop on a CPU, foreach on a GPU) with the original's loop of averages; torch's
fused AdamW with foreach averages; apex's FusedAdam with them, where it is installed. All clip with clip_grad_norm_; on
a GPU all keep bf16 copies of both models too. The floor is the candidate's bytes at the rate of one pass in place over
as many elements.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import click
import torch
from torch import Tensor

from benchmarks import parts, rows, sweeps
from benchmarks.harness import MIN_REPEATS, Timing, assert_agree, interleave, time_ms
from benchmarks.rows import Row
from cosmos_fast.ops.adamw_ema import adamw_ema_
from cosmos_fast.ops.backends import table

LR, BETAS, EPS, WEIGHT_DECAY, EMA_DECAY, CLIP = 5e-4, (0.9, 0.98), 1e-8, 0.5, 0.999, 1.0
# name -> (what it is, bar on a CPU, bar on a GPU)
BASELINES = {
    "default": ("torch AdamW + loop of averages + clip_grad_norm_", 0.20, 1 / 3),
    "fused": ("torch AdamW(fused) + foreach lerp + clip_grad_norm_", 0.85, 1 / 1.15),
    "apex": ("apex FusedAdam + foreach lerp + clip_grad_norm_", None, None),
}
TIME_BAR_MS = 1.9  # 152 M parameters on an H200
Grads = tuple[list[Tensor], list[Tensor]]  # one list a side: clipping changes the baseline's in place


def transformer_shapes(width: int, layers: int, vocabulary: int) -> list[tuple[int, ...]]:
    """Parameter shapes of a transformer: what an optimizer meets, large matrices between many small vectors."""
    layer = [(3 * width, width), (3 * width,), (width, width), (width,), (width,), (width,), (width,), (width,)]
    layer += [(4 * width, width), (4 * width,), (width, 4 * width), (width,)]
    return [(vocabulary, width), *layer * layers, (width,), (width,)]


@dataclass
class Weights:
    """fp32 student and teacher, equal for equal seeds, and bf16 copies where they are kept."""

    student: list[Tensor]
    teacher: list[Tensor]
    copies: list[list[Tensor]]

    @staticmethod
    def random(shapes: list[tuple[int, ...]], device: str, *, copies: bool = False) -> Weights:
        generator = torch.Generator(device).manual_seed(0)
        student = [torch.randn(shape, generator=generator, device=device).mul_(0.02) for shape in shapes]
        kept = [[tensor.bfloat16() for tensor in student] for _ in range(2)] if copies else []
        return Weights(student, [tensor.clone() for tensor in student], kept)


def apex_adam() -> type[torch.optim.Optimizer] | None:
    """NVIDIA's FusedAdam. The package of that name on PyPI is another one."""
    try:
        from apex.optimizers import FusedAdam

        FusedAdam([torch.zeros(1, device="cuda", requires_grad=True)])
    except (ImportError, RuntimeError):
        return None
    return FusedAdam


def make_baseline(weights: Weights, name: str) -> Callable[[Grads], None]:
    parameters = [tensor.requires_grad_() for tensor in weights.student]
    settings = {"lr": LR, "betas": BETAS, "eps": EPS, "weight_decay": WEIGHT_DECAY}
    adam = apex_adam() if name == "apex" else None
    optimizer = (
        adam(parameters, **settings)
        if adam
        else torch.optim.AdamW(parameters, fused=True if name == "fused" else None, **settings)
    )

    def step(grads: Grads) -> None:
        for parameter, grad in zip(parameters, grads[0], strict=True):
            parameter.grad = grad
        with torch.no_grad():
            if name == "default":
                for average, parameter in zip(weights.teacher, parameters, strict=True):
                    average.data.mul_(EMA_DECAY).add_((1 - EMA_DECAY) * parameter.detach().data)
            else:
                torch._foreach_lerp_(weights.teacher, parameters, 1 - EMA_DECAY)
        torch.nn.utils.clip_grad_norm_(parameters, CLIP)
        optimizer.step()
        with torch.no_grad():
            for copies, sources in zip(weights.copies, (parameters, weights.teacher), strict=False):
                torch._foreach_copy_(copies, sources)

    return step


def make_candidate(weights: Weights, backend: str) -> Callable[[Grads], None]:
    exp_avgs, exp_avg_sqs = ([torch.zeros_like(tensor) for tensor in weights.student] for _ in range(2))
    settings = {"lr": LR, "beta1": BETAS[0], "beta2": BETAS[1], "eps": EPS, "weight_decay": WEIGHT_DECAY}
    copies = dict(zip(("param_copies", "ema_copies"), weights.copies, strict=False))
    steps = 0

    def step(grads: Grads) -> None:
        nonlocal steps
        steps += 1
        lists = (weights.student, grads[1], exp_avgs, exp_avg_sqs, weights.teacher)
        adamw_ema_(*lists, step=steps, ema_decay=EMA_DECAY, clip_norm=CLIP, backend=backend, **settings, **copies)

    return step


def compare(shapes: list[tuple[int, ...]], device: str, *, baseline: str, backend: str, repeats: int) -> Timing:
    """Time one backend against one baseline, after three steps of both have agreed."""
    on_gpu = torch.device(device).type == "cuda"
    theirs, ours = (Weights.random(shapes, device, copies=on_gpu) for _ in range(2))
    sides = make_baseline(theirs, baseline), make_candidate(ours, backend)

    def make_inputs(seed: int) -> Grads:
        generator = torch.Generator(device).manual_seed(seed + 1)
        grads = [torch.randn(shape, generator=generator, device=device).mul_(1e-2) for shape in shapes]
        return grads, [grad.clone() for grad in grads]

    def check() -> None:
        for seed in range(3):
            grads = make_inputs(1000 + seed)
            for side in sides:
                side(grads)
        for name in ("student", "teacher"):
            expected = {f"{name} {i}": tensor.detach() for i, tensor in enumerate(getattr(theirs, name))}
            assert_agree(dict(zip(expected, getattr(ours, name), strict=True)), expected, rtol=1e-5)

    return interleave(*sides, make_inputs, check=check, device=device, repeats=repeats)


def pass_bytes_per_s(device: str, elements: int) -> float:
    """Bytes read and written a second by the best of several passes in place: a neighbour can only slow one down.

    In place as the step itself: a CPU reads the target of a copy before it writes it, which nobody counts.
    """
    tensor = torch.ones(elements, device=device)
    times_ms = [time_ms(Tensor.neg_, tensor, device) for _ in range(2 * MIN_REPEATS)]
    return 8 * elements / (min(times_ms) / 1e3)


def plan(device: str, repeats: int) -> Iterator[parts.Part]:
    """What is measured, in order: name and function."""
    on_gpu = torch.device(device).type == "cuda"
    shapes = transformer_shapes(768, 16, 49408) if on_gpu else transformer_shapes(512, 5, 49408)
    wanted = ("cuda", "triton") if on_gpu else ("native",)
    available = {row["backend"] for row in table() if row["op"] == "adamw_ema" and row["status"] == "available"}
    for backend in [name for name in wanted if name in available] or ["auto"]:
        for baseline in BASELINES:
            if baseline == "apex" and (not on_gpu or apex_adam() is None):
                continue
            yield f"{backend} against {baseline}", partial(measure, shapes, device, backend, baseline, repeats)


def measure(shapes: list[tuple[int, ...]], device: str, backend: str, baseline: str, repeats: int) -> Iterator[Row]:
    """One backend against one baseline; on a GPU, beside the first one, against the time that is asked for."""
    on_gpu = torch.device(device).type == "cuda"
    parameters = sum(torch.Size(shape).numel() for shape in shapes)
    bytes_moved = parameters * (44 if on_gpu else 40)
    floor_ms = 1e3 * bytes_moved / pass_bytes_per_s(device, parameters)
    description, cpu_bar, gpu_bar = BASELINES[baseline]
    timing = compare(shapes, device, baseline=baseline, backend=backend, repeats=repeats)
    ours_ms = timing.candidate_median_ms
    found = Row(
        name="optimizer",
        device=rows.device_name(device),
        shapes={
            "parameters": parameters,
            "tensors": len(shapes),
            "backend": backend,
            "bytes": bytes_moved,
            "floor_ms": floor_ms,
            "baseline_ms": timing.baseline_median_ms,
            "ratio_quartiles": timing.spread,
        },
        metric=f"step time, {backend}",
        value=ours_ms,
        unit="ms",
        baseline=description,
        ratio=timing.ratio,
        floor_pct=100 * floor_ms / ours_ms,
        bar=gpu_bar if on_gpu else cpu_bar,
    )
    yield found
    if on_gpu and baseline == "default":
        yield replace(found, baseline=f"{TIME_BAR_MS:g} ms", ratio=ours_ms / TIME_BAR_MS, bar=1.0)


@click.command("optimizer")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option(
    "--repeats", type=click.IntRange(MIN_REPEATS), default=MIN_REPEATS, show_default=True, help="Timed repetitions."
)
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="JSON file; default benchmarks/results/.")
def command(device: str, repeats: int, out: Path | None) -> None:
    """Fused AdamW + average + clipping against torch, 41 M parameters on a CPU, 152 M on a GPU; times in ms."""
    parts.measure(plan(device, repeats), out)


sweeps.offer(command, "optimizer")

if __name__ == "__main__":
    command()
