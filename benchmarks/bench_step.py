"""A whole training step against the eager port of the original: time, peak memory, and where the time goes.

A step is teacher forward, student forward, loss, backward, teacher update, AdamW, clamp. Axes: B batch, V views.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import click
import torch
from torch import Tensor

from benchmarks import rows
from benchmarks.eager_cosmos import EagerCosmos, EagerTrainer
from benchmarks.harness import MIN_REPEATS, Timing, assert_agree, interleave, ledger
from benchmarks.memory import peak_mib
from benchmarks.product import ProductTrainer
from benchmarks.rows import Row
from benchmarks.shapes import StepShape, mini_step, vit_b_16_step
from cosmos_fast.utils.peak_rates import matmul_flops_per_s

LEARNING_RATE = 1e-4
CHECK_EMA_DECAY = 0.5
TIME_BAR, MEMORY_BAR = 0.65, 0.7
Trainer = EagerTrainer | ProductTrainer


class Setting(NamedTuple):
    """What is measured, and how."""

    name: str
    shape: StepShape
    device: str
    precision: str

    def inputs(self, seed: int) -> tuple[list[Tensor], Tensor]:
        return self.shape.images(seed, self.device), self.shape.texts(seed, self.device)

    def row(
        self,
        metric: str,
        value: float,
        unit: str,
        *,
        ratio: float | None = None,
        bar: float | None = None,
        floor_pct: float | None = None,
    ) -> Row:
        return Row(
            name=self.name,
            device=rows.device_name(self.device),
            shapes={**self.shape.describe(), "precision": self.precision},
            metric=metric,
            value=value,
            unit=unit,
            baseline=None if ratio is None else "eager port",
            ratio=ratio,
            bar=bar,
            floor_pct=floor_pct,
        )


def make_eager(setting: Setting) -> EagerTrainer:
    torch.manual_seed(0)
    return EagerTrainer(EagerCosmos(setting.shape.model).to(setting.device), precision=setting.precision)


def make_product(setting: Setting, weights: dict[str, Tensor] | None = None) -> ProductTrainer:
    openclip = setting.shape.model.to_openclip()
    return ProductTrainer.create(openclip, device=setting.device, precision=setting.precision, weights=weights)


def run_step(trainer: Trainer, inputs: tuple[list[Tensor], Tensor]) -> None:
    trainer.step(*inputs, lr=LEARNING_RATE)


def check_agreement(setting: Setting) -> None:
    """From equal weights and inputs: equal losses and gradients, and equal losses after two updates; always in fp32.

    The teacher starts as a copy of the student, so its first update changes nothing: the third step is the first that
    sees AdamW and the moving average, with a decay small enough to show.
    """
    exact = setting._replace(precision="fp32")
    eager = make_eager(exact)
    product = make_product(exact, eager.student.state_dict())
    found: list[tuple[dict[str, Tensor], dict[str, Tensor]]] = []
    for trainer in (eager, product):
        for phase in trainer.phases(*exact.inputs(0), LEARNING_RATE):
            if phase == "backward":
                found.append((losses_of(trainer), gradients_of(trainer)))
    (eager_losses, eager_gradients), (losses, gradients) = found
    assert_agree(losses, eager_losses, rtol=1e-5)
    assert_agree(gradients, eager_gradients, rtol=1e-4, atol=1e-8)
    for trainer in (eager, product):
        trainer.ema_decay = CHECK_EMA_DECAY
        for seed in (1, 2):
            run_step(trainer, exact.inputs(seed))
    assert_agree(losses_of(product), losses_of(eager), rtol=1e-4)


def losses_of(trainer: Trainer) -> dict[str, Tensor]:
    assert trainer.losses is not None
    return {"clip loss": trainer.losses.clip.detach(), "distillation loss": trainer.losses.distill.detach()}


def gradients_of(trainer: Trainer) -> dict[str, Tensor]:
    """Copies; a parameter without a gradient is left out, so that two sides must agree on those too."""
    named = trainer.student.named_parameters()
    return {name: parameter.grad.clone() for name, parameter in named if parameter.grad is not None}


def measure_time(setting: Setting, repeats: int) -> tuple[Timing, list[Row]]:
    eager = make_eager(setting)
    product = make_product(setting, eager.student.state_dict())
    timing = interleave(
        partial(run_step, eager),
        partial(run_step, product),
        setting.inputs,
        check=partial(check_agreement, setting),
        device=setting.device,
        repeats=repeats,
    )
    dtype = torch.bfloat16 if setting.precision == "bf16" else torch.float32
    floor_ms = 1e3 * setting.shape.flops(setting.inputs(0)[1]) / matmul_flops_per_s(setting.device, dtype)
    ours_ms = timing.candidate_median_ms
    return timing, [
        setting.row("eager_step_ms", timing.baseline_median_ms, "ms"),
        setting.row("step_ms", ours_ms, "ms", ratio=timing.ratio, bar=TIME_BAR, floor_pct=100 * floor_ms / ours_ms),
        setting.row("samples_per_s", 1e3 * setting.shape.batch / ours_ms, "1/s"),
    ]


def run_side(setting: Setting, side: str, steps: int) -> None:
    """Build one side and train it: what peak memory is taken of."""
    trainer: Trainer = make_eager(setting) if side == "eager" else make_product(setting)
    for seed in range(steps):
        run_step(trainer, setting.inputs(seed))


def measure_memory(setting: Setting) -> list[Row]:
    """Three steps: the optimizer's state exists from the second on."""
    tiny = setting._replace(shape=mini_step(width=64, layers=1, batch=2))
    eager, product = (
        peak_mib(partial(run_side, setting, side, 3), device=setting.device, settle=partial(run_side, tiny, side, 2))
        for side in ("eager", "product")
    )
    return [
        setting.row("eager_peak_mib", eager, "MiB"),
        setting.row("peak_mib", product, "MiB", ratio=product / eager, bar=MEMORY_BAR),
    ]


def measure_phases(setting: Setting, repeats: int) -> list[Row]:
    """Milliseconds of each phase; the phases and "other" sum to "wall"."""
    eager = make_eager(setting)
    product = make_product(setting, eager.student.state_dict())
    sides = {"eager": partial(start_step, setting, eager), "product": partial(start_step, setting, product)}
    found = ledger(sides, device=setting.device, repeats=repeats)
    return [
        setting.row(f"phase_ms/{name}", value, "ms", ratio=None if name == "other" else value / found["eager"][name])
        for name, value in found["product"].items()
    ]


def start_step(setting: Setting, trainer: Trainer, seed: int) -> Iterator[str]:
    return trainer.phases(*setting.inputs(seed), LEARNING_RATE)


def make_setting(model: str, width: int, layers: int, batch: int | None, device: str, precision: str) -> Setting:
    """Settle what "auto" and None mean."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if precision == "auto":
        precision = "bf16" if device == "cuda" else "fp32"
    if width % 64:
        raise click.BadParameter(f"{width}: heads are 64 wide, give a multiple of 64", param_hint="--width")
    shape = mini_step(width, layers, batch or 16) if model == "mini" else vit_b_16_step(batch or 256)
    return Setting(f"step_{model.replace('-', '_').lower()}", shape, device, precision)


@click.command(name="step", help=__doc__, context_settings={"show_default": True})
@click.option("--model", type=click.Choice(["mini", "ViT-B-16"]), default="mini", help="64/32 px or 224/96 px crops.")
@click.option("--width", type=click.IntRange(64), default=192, help="Channels of both towers (mini).")
@click.option("--layers", type=click.IntRange(1), default=4, help="Blocks of each tower (mini).")
@click.option("--batch", type=click.IntRange(1), help="Samples a step; 16 for mini, 256 for ViT-B-16.")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto")
@click.option("--precision", type=click.Choice(["auto", "fp32", "bf16"]), default="auto", help="auto: bf16 on CUDA.")
@click.option("--threads", type=click.IntRange(1), help="CPU threads; torch's choice if not given.")
@click.option("--repeats", type=click.IntRange(MIN_REPEATS), default=MIN_REPEATS, help="Timed repetitions.")
@click.option("--profile", is_flag=True, help="Also the milliseconds of each phase.")
@click.option("--memory/--no-memory", default=True, help="Also peak memory over what the process held before.")
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), help="JSON file; default: results folder.")
def command(
    model: str,
    width: int,
    layers: int,
    batch: int | None,
    device: str,
    precision: str,
    threads: int | None,
    repeats: int,
    profile: bool,
    memory: bool,
    out: Path | None,
) -> None:
    if threads is not None:
        torch.set_num_threads(threads)
    setting = make_setting(model, width, layers, batch, device, precision)
    timing, found = measure_time(setting, repeats)
    if memory:
        found += measure_memory(setting)
    if profile:
        found += measure_phases(setting, repeats)
    rows.show(found)
    low, high = timing.spread
    click.echo(f"half of the {repeats} step-time ratios lie in {low:.3f} to {high:.3f}")
    click.echo(f"wrote {rows.write(found, out)}")


if __name__ == "__main__":
    command()
