"""Clipping, AdamW and the teacher's average in two passes over memory, against torch's optimizers plus an average.

The candidate reads the gradients once for their norm (4 B an element) and then does everything else in one pass
(36 B); the original's way (a loop of AdamW, a loop of averages, clipping) moves several times that.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import click
import torch
from torch import Tensor

from benchmarks import rows, sweeps
from benchmarks.harness import MIN_REPEATS, Timing, assert_agree, interleave
from benchmarks.rows import Row
from cosmos_fast.ops.adamw_ema import adamw_ema_, grad_norm

LR, BETAS, EPS, WEIGHT_DECAY, EMA_DECAY, CLIP = 5e-4, (0.9, 0.98), 1e-8, 0.5, 0.999, 1.0
LOOP_BAR, FUSED_BAR = 0.20, 0.85
Grads = tuple[list[Tensor], list[Tensor]]  # one list a side: clipping changes the baseline's in place


def transformer_shapes(width: int, layers: int, vocabulary: int) -> list[tuple[int, ...]]:
    """Parameter shapes of a transformer: what an optimizer meets, large matrices between many small vectors."""
    layer = [(3 * width, width), (3 * width,), (width, width), (width,), (width,), (width,), (width,), (width,)]
    layer += [(4 * width, width), (4 * width,), (width, 4 * width), (width,)]
    return [(vocabulary, width), *layer * layers, (width,), (width,)]


@dataclass
class Weights:
    """fp32 student and teacher, equal for equal seeds."""

    student: list[Tensor]
    teacher: list[Tensor]

    @staticmethod
    def random(shapes: list[tuple[int, ...]], device: str) -> Weights:
        generator = torch.Generator().manual_seed(0)
        student = [torch.randn(shape, generator=generator).mul_(0.02).to(device) for shape in shapes]
        return Weights(student, [tensor.clone() for tensor in student])


def make_torch(weights: Weights, *, fused: bool) -> Callable[[Grads], None]:
    """torch's AdamW: fused with foreach averages, or its default loop with a loop of averages."""
    parameters = [tensor.requires_grad_() for tensor in weights.student]
    settings = {"lr": LR, "betas": BETAS, "eps": EPS, "weight_decay": WEIGHT_DECAY}
    optimizer = torch.optim.AdamW(parameters, fused=True if fused else None, **settings)

    def step(grads: Grads) -> None:
        for parameter, grad in zip(parameters, grads[0], strict=True):
            parameter.grad = grad
        with torch.no_grad():
            if fused:
                torch._foreach_lerp_(weights.teacher, parameters, 1 - EMA_DECAY)
            else:
                for average, parameter in zip(weights.teacher, parameters, strict=True):
                    average.mul_(EMA_DECAY).add_(parameter, alpha=1 - EMA_DECAY)
        torch.nn.utils.clip_grad_norm_(parameters, CLIP)
        optimizer.step()

    return step


def make_ours(weights: Weights) -> Callable[[Grads], None]:
    exp_avgs = [torch.zeros_like(tensor) for tensor in weights.student]
    exp_avg_sqs = [torch.zeros_like(tensor) for tensor in weights.student]
    settings = {"lr": LR, "beta1": BETAS[0], "beta2": BETAS[1], "eps": EPS, "weight_decay": WEIGHT_DECAY}
    steps = 0

    def step(grads: Grads) -> None:
        nonlocal steps
        steps += 1
        scale = (CLIP / (grad_norm(grads[1]) + 1e-6)).clamp(max=1.0)
        lists = (weights.student, grads[1], exp_avgs, exp_avg_sqs, weights.teacher)
        adamw_ema_(*lists, step=steps, ema_decay=EMA_DECAY, grad_scale=scale, **settings)

    return step


def compare(shapes: list[tuple[int, ...]], device: str, *, fused: bool, repeats: int) -> Timing:
    theirs, ours = Weights.random(shapes, device), Weights.random(shapes, device)
    baseline, candidate = make_torch(theirs, fused=fused), make_ours(ours)

    def make_inputs(seed: int) -> Grads:
        generator = torch.Generator().manual_seed(seed + 1)
        grads = [torch.randn(shape, generator=generator).mul_(1e-2).to(device) for shape in shapes]
        return grads, [grad.clone() for grad in grads]

    def check() -> None:
        for seed in range(3):
            grads = make_inputs(1000 + seed)
            baseline(grads)
            candidate(grads)
        for name in ("student", "teacher"):
            expected = {f"{name} {i}": tensor.detach() for i, tensor in enumerate(getattr(theirs, name))}
            assert_agree(dict(zip(expected, getattr(ours, name), strict=True)), expected, rtol=1e-5)

    return interleave(baseline, candidate, make_inputs, check=check, device=device, repeats=repeats)


@click.command("optimizer")
@click.option("--device", default="cpu", show_default=True, help="cpu or cuda.")
@click.option("--repeats", default=MIN_REPEATS, show_default=True, help="Timed repetitions.")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="JSON file; default benchmarks/results/.")
def command(device: str, repeats: int, out: Path | None) -> None:
    """Fused AdamW + average + clipping against torch, 41 M parameters on a CPU, 152 M on a GPU; times in ms."""
    shapes = transformer_shapes(512, 12, 6250) if device == "cpu" else transformer_shapes(768, 16, 49408)
    sizes = {"parameters": sum(torch.Size(shape).numel() for shape in shapes), "tensors": len(shapes)}
    found = []
    for baseline, fused, bar in (
        ("torch AdamW loop + EMA loop + clip_grad_norm_", False, LOOP_BAR),
        ("torch AdamW(fused) + foreach lerp + clip_grad_norm_", True, FUSED_BAR),
    ):
        timing = compare(shapes, device, fused=fused, repeats=repeats)
        found.append(
            Row(
                name="optimizer",
                device=rows.device_name(device),
                shapes={
                    **sizes,
                    "baseline_ms": statistics.median(timing.baseline_ms),
                    "ratio_quartiles": timing.spread,
                },
                metric="step time",
                value=statistics.median(timing.candidate_ms),
                unit="ms",
                baseline=baseline,
                ratio=timing.ratio,
                bar=bar,
            )
        )
    rows.show(found)
    print(f"written to {rows.write(found, out)}")


sweeps.offer(command, "optimizer")

if __name__ == "__main__":
    command()
