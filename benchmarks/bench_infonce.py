"""The multi-view loss, forward and backward: all 80 pairs in one tiled pass against 160 logit matrices.

Features are random, of the student's 8 + 8 views and the teacher's 2 + 2. Axes: V views, B batch, D embedding.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import NamedTuple

import click
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import rows, sweeps
from benchmarks.eager_cosmos import EagerFeatures, cosmos_loss
from benchmarks.harness import MIN_REPEATS, assert_agree, interleave
from benchmarks.memory import peak_mib
from benchmarks.rows import Row
from benchmarks.shapes import GLOBAL_VIEWS, LOCAL_VIEWS
from cosmos_fast.loss import CosmosLoss
from cosmos_fast.model import CosmosFeatures, TeacherFeatures

VIEWS = GLOBAL_VIEWS + LOCAL_VIEWS
TIME_BAR, MEMORY_BAR = 0.9, 0.3
NAMES = ("image", "text", "image_crossmodal", "text_crossmodal", "logit_scale", "distill_logit_scale")


class Features(NamedTuple):
    """Student leaves by the names of `NAMES` ([V, B, D] and scalars, with gradients), teacher's image and text."""

    student: dict[str, Tensor]
    teacher_image: Tensor
    teacher_text: Tensor


def make_features(batch: int, dim: int, device: str, seed: int, dtype: torch.dtype = torch.float32) -> Features:
    generator = torch.Generator().manual_seed(seed)

    def unit(views: int) -> Tensor:
        random = torch.randn(views, batch, dim, generator=generator, dtype=torch.float64)
        return F.normalize(random, dim=-1).to(device, dtype)

    student = {name: unit(VIEWS).requires_grad_() for name in NAMES[:4]}
    for name in NAMES[4:]:
        student[name] = torch.tensor(1 / 0.07, device=device, dtype=dtype, requires_grad=True)
    return Features(student, unit(GLOBAL_VIEWS), unit(GLOBAL_VIEWS))


def run_eager(features: Features) -> Tensor:
    student = features.student
    flat = {name: student[name].flatten(0, 1) for name in NAMES[:4]}
    batch = student["image"].shape[1]
    scales = {name: student[name] for name in NAMES[4:]}
    teacher = EagerFeatures(
        features.teacher_image.flatten(0, 1), features.teacher_text.flatten(0, 1), None, None, *scales.values()
    )
    loss = cosmos_loss(EagerFeatures(**flat, **scales), teacher, batch).total
    loss.backward()
    return loss.detach()


def run_product(features: Features, backend: str) -> Tensor:
    teacher = TeacherFeatures(features.teacher_image, features.teacher_text)
    loss = CosmosLoss(backend=backend)(CosmosFeatures(**features.student), teacher).total
    loss.backward()
    return loss.detach()


def check(batch: int, dim: int, device: str, backend: str) -> None:
    """Loss and gradients against the eager port in fp64."""
    truth = make_features(batch, dim, device, seed=0, dtype=torch.float64)
    ours = make_features(batch, dim, device, seed=0)
    assert_agree({"loss": run_product(ours, backend)}, {"loss": run_eager(truth)}, rtol=1e-5)
    gradients, expected = (
        {name: leaf.grad for name, leaf in side.student.items() if leaf.grad is not None} for side in (ours, truth)
    )
    # Scores reach 14, so the rounding of the unit features shows 14 times in the exponentials.
    assert_agree(gradients, expected, rtol=1e-4)


def run_side(side: str, backend: str, batch: int, dim: int, device: str) -> None:
    features = make_features(batch, dim, device, seed=0)
    _ = run_eager(features) if side == "eager" else run_product(features, backend)


def measure(batch: int, dim: int, device: str, backend: str, repeats: int) -> list[Row]:
    timing = interleave(
        run_eager,
        partial(run_product, backend=backend),
        partial(make_features, batch, dim, device),
        check=partial(check, batch, dim, device, backend),
        device=device,
        repeats=repeats,
    )
    eager_mib, product_mib = (
        peak_mib(
            partial(run_side, side, backend, batch, dim, device),
            device=device,
            settle=partial(run_side, side, backend, 8, dim, device),
        )
        for side in ("eager", "product")
    )
    shapes: dict[str, object] = {"batch": batch, "embed_dim": dim, "views": [VIEWS, GLOBAL_VIEWS], "backend": backend}
    row = partial(Row, name="infonce", device=rows.device_name(device), shapes=shapes)
    ours = partial(row, baseline="eager port")
    return [
        row(metric=f"eager_ms/{batch}", value=timing.baseline_median_ms, unit="ms"),
        ours(
            metric=f"forward_backward_ms/{batch}",
            value=timing.candidate_median_ms,
            unit="ms",
            ratio=timing.ratio,
            bar=TIME_BAR,
        ),
        row(metric=f"eager_peak_mib/{batch}", value=eager_mib, unit="MiB"),
        ours(metric=f"peak_mib/{batch}", value=product_mib, unit="MiB", ratio=product_mib / eager_mib, bar=MEMORY_BAR),
    ]


@click.command(name="infonce", help=__doc__, context_settings={"show_default": True})
@click.option("--batch", "batches", type=click.IntRange(2), multiple=True, default=(512, 1024), help="Samples.")
@click.option("--dim", type=click.IntRange(1), default=512, help="Channels of a feature.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu")
@click.option("--backend", default="auto", help="Backend of multiview_infonce.")
@click.option("--repeats", type=click.IntRange(MIN_REPEATS), default=MIN_REPEATS, help="Timed repetitions.")
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), help="JSON file; default: results folder.")
def command(batches: tuple[int, ...], dim: int, device: str, backend: str, repeats: int, out: Path | None) -> None:
    found = [row for batch in batches for row in measure(batch, dim, device, backend, repeats)]
    rows.show(found)
    click.echo(f"wrote {rows.write(found, out)}")


sweeps.offer(command, "infonce")

if __name__ == "__main__":
    command()
