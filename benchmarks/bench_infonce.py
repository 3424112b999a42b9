"""The multi-view loss, forward and backward: all 80 pairs in one tiled pass against 160 logit matrices.

Features are random, of the student's 8 + 8 views and the teacher's 2 + 2. On a CPU: time, peak memory, bytes saved for
backward, and time against the port compiled pair by pair. On a GPU, under bf16 autocast: time against the same two, and
against Inf-CL looped over pairs where `inf_cl` is installed; one rank's rows against a large global batch as a share of
the limit that the matrix products set; peak memory. Axes: V views, B batch, G global batch, D embedding.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import NamedTuple

import click
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import parts, rows, sweeps
from benchmarks.eager_cosmos import EagerFeatures, cosmos_loss, infonce
from benchmarks.harness import MIN_REPEATS, assert_agree, interleave, time_ms
from benchmarks.memory import MIB, peak_mib, saved_bytes
from benchmarks.other_infonce import inf_cl_pair
from benchmarks.rows import Row
from benchmarks.shapes import GLOBAL_VIEWS, LOCAL_VIEWS
from cosmos_fast.loss import CosmosLoss
from cosmos_fast.model import CosmosFeatures, TeacherFeatures
from cosmos_fast.model.compute import why_no_compiler
from cosmos_fast.ops import multiview_infonce
from cosmos_fast.utils.peak_rates import matmul_flops_per_s

VIEWS = GLOBAL_VIEWS + LOCAL_VIEWS
NAMES = ("image", "text", "image_crossmodal", "text_crossmodal", "logit_scale", "distill_logit_scale")
CPU_BATCHES, GPU_BATCHES = (512, 1024), (1024, 4096, 8192)
TIME_BARS = {"cpu": {512: 0.9, 1024: 0.9}, "cuda": {1024: 1 / 10, 4096: 1 / 3, 8192: 1 / 3}}
PEAK_BARS, SAVED_BAR, BEYOND_INPUTS_BAR = {512: 0.3, 1024: 0.2}, 0.03, 0.01
COMPILED_BAR, INF_CL_BAR = 1 / 1.5, 1 / 5
RANKS, RANK_BAR = ((1024, 16384), (4096, 65536)), 1 / 0.55
BASELINE_RTOL = 1e-2
LARGEST_CHECK = 512  # the oracle in fp64 keeps 1280 bytes for each pair of samples


class Features(NamedTuple):
    """Student leaves by the names of `NAMES` ([V, B, D] and scalars, with gradients), teacher's image and text."""

    student: dict[str, Tensor]
    teacher_image: Tensor
    teacher_text: Tensor


def make_features(batch: int, dim: int, device: str, seed: int, dtype: torch.dtype = torch.float32) -> Features:
    generator = torch.Generator(device).manual_seed(seed)

    def unit(views: int) -> Tensor:
        # Drawn in fp32 whatever the dtype, so that the truth in fp64 is of the same features.
        random = torch.randn(views, batch, dim, generator=generator, device=device)
        return F.normalize(random.to(dtype), dim=-1)

    student = {name: unit(VIEWS).requires_grad_() for name in NAMES[:4]}
    for name in NAMES[4:]:
        student[name] = torch.tensor(1 / 0.07, device=device, dtype=dtype, requires_grad=True)
    return Features(student, unit(GLOBAL_VIEWS), unit(GLOBAL_VIEWS))


def autocast(device: str) -> AbstractContextManager[object]:
    """Training on a GPU runs the loss under autocast; on a CPU it does not."""
    return torch.autocast("cuda", dtype=torch.bfloat16) if device == "cuda" else nullcontext()


def forward_eager(features: Features) -> Tensor:
    student = features.student
    flat = {name: student[name].flatten(0, 1) for name in NAMES[:4]}
    batch = student["image"].shape[1]
    scales = {name: student[name] for name in NAMES[4:]}
    teacher = EagerFeatures(
        features.teacher_image.flatten(0, 1), features.teacher_text.flatten(0, 1), None, None, *scales.values()
    )
    return cosmos_loss(EagerFeatures(**flat, **scales), teacher, batch).total


def forward_product(features: Features, backend: str) -> Tensor:
    teacher = TeacherFeatures(features.teacher_image, features.teacher_text)
    return CosmosLoss(backend=backend)(CosmosFeatures(**features.student), teacher).total


def forward_pairs(features: Features, pair: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
    """The objective as a loop over pairs of views, `pair` being the loss of one."""
    student = features.student

    def mean(left: Tensor, right: Tensor, scale: Tensor) -> Tensor:
        return torch.stack([pair(a, b, scale) for a in left for b in right]).mean()

    clip = mean(student["image"][:GLOBAL_VIEWS], student["text"], student["logit_scale"])
    crossmodal = torch.cat([student["image_crossmodal"], student["text_crossmodal"]])
    teacher = torch.cat([features.teacher_image, features.teacher_text])
    return clip + mean(crossmodal, teacher, student["distill_logit_scale"])


def run(forward: Callable[[Features], Tensor], features: Features) -> Tensor:
    """Forward and backward; returns the loss."""
    with autocast(features.teacher_image.device.type):
        loss = forward(features)
    loss.backward()
    return loss.detach()


def run_eager(features: Features) -> Tensor:
    return run(forward_eager, features)


def run_product(features: Features, backend: str) -> Tensor:
    return run(partial(forward_product, backend=backend), features)


def check(batch: int, dim: int, device: str, backend: str) -> None:
    """Loss and gradients against the eager port in fp64."""
    batch = min(batch, LARGEST_CHECK)
    ours, truth = (make_features(batch, dim, device, 0, dtype) for dtype in (torch.float32, torch.float64))
    loss = forward_eager(truth)  # without autocast
    loss.backward()
    assert_agree({"loss": run_product(ours, backend)}, {"loss": loss.detach()}, rtol=1e-5)
    gradients, expected = (
        {name: leaf.grad for name, leaf in side.student.items() if leaf.grad is not None} for side in (ours, truth)
    )
    # Scores reach 14, so the rounding of the unit features shows 14 times in the exponentials.
    assert_agree(gradients, expected, rtol=1e-3 if device == "cuda" else 1e-4)


def check_baseline(call: Callable[[Features], Tensor], batch: int, dim: int, device: str, backend: str) -> None:
    """The baseline's loss, as it will be timed, against ours: in bf16 or TF32 as they come."""
    theirs, ours = (make_features(batch, dim, device, 0) for _ in range(2))
    assert_agree({"baseline's loss": call(theirs)}, {"baseline's loss": run_product(ours, backend)}, rtol=BASELINE_RTOL)


def run_side(side: str, backend: str, batch: int, dim: int, device: str) -> None:
    features = make_features(batch, dim, device, seed=0)
    _ = run_eager(features) if side == "eager" else run_product(features, backend)


def kept_bytes(forward: Callable[[Features], Tensor], features: Features) -> int:
    """What autograd keeps from forward to backward, beyond the features themselves."""

    def run_forward() -> Tensor:
        with autocast(features.teacher_image.device.type):
            return forward(features)

    return saved_bytes(run_forward, (*features.student.values(), *features[1:]))


class Setting(NamedTuple):
    """What one run measures. row: makes a result row of this setting."""

    dim: int
    device: str
    backend: str
    repeats: int

    def row(self, batch: int, metric: str, value: float, unit: str, **more: object) -> Row:
        shapes = {"batch": batch, "embed_dim": self.dim, "views": [VIEWS, GLOBAL_VIEWS], "backend": self.backend}
        shapes |= more.pop("shapes", {})  # type: ignore[arg-type]
        device = rows.device_name(self.device)
        return Row(name="infonce", device=device, shapes=shapes, metric=metric, value=value, unit=unit, **more)  # type: ignore[arg-type]


def floor_ms(batch: int, total: int, dim: int, flops_per_s: float) -> float:
    """Least time of forward and backward: the products' operations at the library's rate.

    A pair costs 2 B G D forward; backward makes its logits again and the rows' gradient, for CLIP's also the columns'.
    """
    crossmodal, clip = 2 * VIEWS * 2 * GLOBAL_VIEWS, VIEWS * GLOBAL_VIEWS
    return 1e3 * 2.0 * batch * total * dim * (3 * crossmodal + 4 * clip) / flops_per_s


def measure_time(
    batch: int, setting: Setting, baseline: str, call: Callable[[Features], Tensor], bar: float | None
) -> list[Row]:
    dim, device, backend, repeats = setting
    check_baseline(call, batch, dim, device, backend)
    timing = interleave(
        call,
        partial(run_product, backend=backend),
        partial(make_features, batch, dim, device),
        check=partial(check, batch, dim, device, backend),
        device=device,
        repeats=repeats,
    )
    rate = matmul_flops_per_s(device, torch.float16 if device == "cuda" else torch.float32)
    floor_pct = 100 * floor_ms(batch, batch, dim, rate) / timing.candidate_median_ms
    name = baseline.replace(" ", "_")
    ours = {"baseline": baseline, "ratio": timing.ratio, "bar": bar, "floor_pct": floor_pct}
    suffix = "" if baseline == "eager port" else f"/{name}"
    return [
        setting.row(batch, f"{name.removesuffix('_port')}_ms/{batch}", timing.baseline_median_ms, "ms"),
        setting.row(batch, f"forward_backward_ms/{batch}{suffix}", timing.candidate_median_ms, "ms", **ours),
    ]


def measure_memory(batch: int, setting: Setting) -> list[Row]:
    """Peak, and what autograd keeps. On a GPU the peak is counted beyond features and their gradients."""
    dim, device, backend, _ = setting
    sides = ("eager", "product")
    runs = [partial(run_side, side, backend, batch, dim, device) for side in sides]
    settle = [partial(run_side, side, backend, 8, dim, device) for side in sides]
    eager, ours = (peak_mib(work, device=device, settle=small) for work, small in zip(runs, settle, strict=True))
    beyond = ""
    if device == "cuda":
        beyond = "_beyond_inputs_and_gradients"
        # Each student feature has a gradient of its own size, zeros in the views that no loss reads among them.
        inputs_mib = (2 * 4 * VIEWS + 2 * GLOBAL_VIEWS) * batch * dim * 4 / MIB
        eager, ours = eager - inputs_mib, ours - inputs_mib
    bar = BEYOND_INPUTS_BAR if device == "cuda" and batch == 8192 else PEAK_BARS.get(batch) if device == "cpu" else None
    features = make_features(batch, dim, device, seed=0)
    kept = [kept_bytes(forward, features) for forward in (forward_eager, partial(forward_product, backend=backend))]
    peak = {"baseline": "eager port", "ratio": ours / eager, "bar": bar}
    saved = {"baseline": "eager port", "ratio": kept[1] / kept[0], "bar": SAVED_BAR}
    return [
        setting.row(batch, f"eager_peak_mib{beyond}/{batch}", eager, "MiB"),
        setting.row(batch, f"peak_mib{beyond}/{batch}", ours, "MiB", **peak),
        setting.row(batch, f"eager_saved_mib/{batch}", kept[0] / MIB, "MiB"),
        setting.row(batch, f"saved_mib/{batch}", kept[1] / MIB, "MiB", **saved),
    ]


def measure_rank(batch: int, total: int, setting: Setting) -> list[Row]:
    """One rank's part of a large global batch, both terms; columns that other ranks would send are random."""
    dim, device, backend, repeats = setting

    def unit(views: int, samples: int) -> Tensor:
        return F.normalize(torch.randn(views, samples, dim, device=device), dim=-1).half().requires_grad_()

    text, image, teacher = unit(VIEWS, batch), unit(GLOBAL_VIEWS, total), unit(2 * GLOBAL_VIEWS, total).detach()
    crossmodal, scale = unit(2 * VIEWS, batch), torch.tensor(1 / 0.07, device=device, requires_grad=True)

    def step(_: object) -> None:
        clip = multiview_infonce(text, image, scale, backend=backend)
        (clip + multiview_infonce(crossmodal, teacher, scale, backend=backend)).backward()
        for leaf in (text, image, crossmodal, scale):
            leaf.grad = None

    step(None)
    best_ms = floor_ms(batch, total, dim, matmul_flops_per_s(device, torch.float16))
    value = sorted(time_ms(step, None, device) for _ in range(repeats))[repeats // 2]
    more = {"baseline": "limit of the matrix products", "ratio": value / best_ms, "bar": RANK_BAR}
    more |= {"floor_pct": 100 * best_ms / value, "shapes": {"columns": total}}
    return [setting.row(batch, f"rank_ms/{batch}x{total}", value, "ms", **more)]


def plan(batches: tuple[int, ...], setting: Setting) -> Iterator[tuple[str, Callable[[], list[Row]]]]:
    """What is measured, in order: name and function."""
    device = setting.device
    for batch in batches:
        bar = TIME_BARS[device].get(batch)
        yield f"time at {batch}", partial(measure_time, batch, setting, "eager port", run_eager, bar)
        if device == "cpu":
            yield f"memory at {batch}", partial(measure_memory, batch, setting)
    if device == "cuda":
        for batch, total in RANKS:
            yield f"one rank, {batch} of {total}", partial(measure_rank, batch, total, setting)
        yield f"memory at {batches[-1]}", partial(measure_memory, batches[-1], setting)
    for name, forward, bar in pairwise_baselines(device):
        for batch in batches:
            yield f"{name} at {batch}", partial(measure_time, batch, setting, name, partial(run, forward), bar)


def pairwise_baselines(device: str) -> Iterator[tuple[str, Callable[[Features], Tensor], float | None]]:
    """What else computes the loss of a pair of views, where it is installed, and the bar against it."""
    if (missing := why_no_compiler(torch.device(device))) is None:
        compiled = partial(forward_pairs, pair=torch.compile(infonce))
        yield "pairs compiled", compiled, COMPILED_BAR if device == "cuda" else None
    else:
        click.echo(f"without the compiled pairs: {missing}")
    if device == "cuda" and importlib.util.find_spec("inf_cl"):
        yield "Inf-CL", partial(forward_pairs, pair=inf_cl_pair), INF_CL_BAR


@click.command(name="infonce", help=__doc__, context_settings={"show_default": True})
@click.option("--batch", "batches", type=click.IntRange(2), multiple=True, help="Samples; default: those of the bars.")
@click.option("--dim", type=click.IntRange(1), default=512, help="Channels of a feature.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu")
@click.option("--backend", default="auto", help="Backend of multiview_infonce.")
@click.option("--repeats", type=click.IntRange(MIN_REPEATS), default=MIN_REPEATS, help="Timed repetitions.")
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), help="JSON file; default: results folder.")
def command(batches: tuple[int, ...], dim: int, device: str, backend: str, repeats: int, out: Path | None) -> None:
    batches = batches or (GPU_BATCHES if device == "cuda" else CPU_BATCHES)
    parts.measure(plan(batches, Setting(dim, device, backend, repeats)), out)


sweeps.offer(command, "infonce")

if __name__ == "__main__":
    command()
