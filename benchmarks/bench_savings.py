"""What options that trade time for memory cost and save: the student, forward and backward, against it as it comes.

Options: `compute.checkpoint_activations` mlp and blocks, and with --compiled `compute.compile` (minutes of compiling on
first use, which are not in the time). Saved: what autograd keeps from forward to backward, parameters and inputs apart.
Axes: B batch, V views.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import click
import torch
from torch import Tensor

from benchmarks import parts, rows
from benchmarks.harness import MIN_REPEATS, assert_agree, interleave
from benchmarks.memory import MIB, saved_bytes
from benchmarks.rows import Row
from benchmarks.shapes import StepShape, mini_step, vit_b_16_step
from cosmos_fast.config import ComputeConfig
from cosmos_fast.model import CosmosModel, create_model
from cosmos_fast.model.compute import apply_compute, why_no_compiler

PLAIN = ComputeConfig()
CHECKPOINTED = (ComputeConfig(checkpoint_activations="mlp"), ComputeConfig(checkpoint_activations="blocks"))
COMPILED = (ComputeConfig(compile=True), ComputeConfig(compile=True, checkpoint_activations="mlp"))
BATCH = {"cpu": 16, "cuda": 128}
Inputs = tuple[list[Tensor], Tensor]


class Setting(NamedTuple):
    """The published model on a GPU, the small one on a CPU."""

    batch: int
    device: str

    @property
    def shape(self) -> StepShape:
        return vit_b_16_step(self.batch) if self.device == "cuda" else mini_step(batch=self.batch)

    def inputs(self, seed: int) -> Inputs:
        """Images on the device, captions on the host."""
        return self.shape.images(seed, self.device), self.shape.texts(seed)

    def model(self, compute: ComputeConfig) -> CosmosModel:
        """Equal weights every time."""
        torch.manual_seed(0)
        model = create_model(self.shape.model.to_openclip()).to(self.device)
        apply_compute(model, compute, torch.device(self.device))
        return model

    def row(self, metric: str, value: float, unit: str, **more: object) -> Row:
        shapes = {**self.shape.describe(), "precision": "bf16" if self.device == "cuda" else "fp32"}
        device = rows.device_name(self.device)
        return Row(name="savings", device=device, shapes=shapes, metric=metric, value=value, unit=unit, **more)  # type: ignore[arg-type]


def forward(model: CosmosModel, device: str, inputs: Inputs) -> Tensor:
    """A fixed weighing of all features stands for the loss, so that no gradient vanishes."""
    with torch.autocast(device, dtype=torch.bfloat16, enabled=device == "cuda"):
        student = model(*inputs)
    features = (student.image, student.text, student.image_crossmodal, student.text_crossmodal)
    ramps = (torch.linspace(-1, 1, x.numel(), device=x.device).view_as(x) for x in features)
    return torch.stack([(x.float() * ramp).sum() for x, ramp in zip(features, ramps, strict=True)]).sum()


def forward_backward(model: CosmosModel, device: str, inputs: Inputs) -> None:
    model.zero_grad()
    forward(model, device, inputs).backward()


def check(setting: Setting, compute: ComputeConfig) -> None:
    """All gradients against those of the model as it comes."""
    found = []
    for one in (compute, PLAIN):
        model = setting.model(one)
        forward_backward(model, setting.device, setting.inputs(0))
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert_agree(*found, rtol=2e-2 if setting.device == "cuda" else 1e-4, atol=1e-6)


def measure(setting: Setting, compute: ComputeConfig, repeats: int) -> Iterator[Row]:
    """One option."""
    device, name = setting.device, compute.changes()
    plain, saving = (setting.model(one) for one in (PLAIN, compute))
    timing = interleave(
        partial(forward_backward, plain, device),
        partial(forward_backward, saving, device),
        setting.inputs,
        check=partial(check, setting, compute),
        device=device,
        repeats=repeats,
    )
    yield setting.row(f"plain_ms/{name}", timing.baseline_median_ms, "ms")
    against = {"baseline": "as it comes", "ratio": timing.ratio}
    yield setting.row(f"forward_backward_ms/{name}", timing.candidate_median_ms, "ms", **against)
    inputs = setting.inputs(0)
    kept = [
        saved_bytes(partial(forward, model, device, inputs), [*model.parameters(), *inputs[0]])
        for model in (plain, saving)
    ]
    yield setting.row(f"plain_saved_mib/{name}", kept[0] / MIB, "MiB")
    against = {"baseline": "as it comes", "ratio": kept[1] / kept[0]}
    yield setting.row(f"saved_mib/{name}", kept[1] / MIB, "MiB", **against)


@click.command(name="savings", help=__doc__, context_settings={"show_default": True})
@click.option("--batch", type=click.IntRange(1), help="Samples; default: 16 on a CPU, 128 on a GPU.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", help="cuda: ViT-B/16 under bf16 autocast.")
@click.option("--repeats", type=click.IntRange(MIN_REPEATS), default=MIN_REPEATS, help="Timed repetitions.")
@click.option("--compiled", is_flag=True, help="Also torch.compile of the blocks, alone and with mlp.")
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), help="JSON file; default: results folder.")
def command(batch: int | None, device: str, repeats: int, compiled: bool, out: Path | None) -> None:
    setting = Setting(batch or BATCH[device], device)
    reason = why_no_compiler(torch.device(device)) if compiled else None
    if reason:
        click.echo(f"left out: compiled blocks ({reason})")
    options = CHECKPOINTED + (COMPILED if compiled and not reason else ())
    parts.measure([(one.changes(), partial(measure, setting, one, repeats)) for one in options], out)


if __name__ == "__main__":
    command()
