"""A whole training step against the eager port of the original: time, peak memory, and where the time goes.

A step is teacher forward, student forward, loss, backward, teacher update, AdamW, clamp, on synthetic input. Second
baseline: that port through torch.compile. Axes: B batch, V views.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import click
import torch
from click.core import ParameterSource
from torch import Tensor

from benchmarks import parts
from benchmarks.harness import MIN_REPEATS, Timing, assert_agree, exact_fp32, interleave, ledger
from benchmarks.memory import peak_mib
from benchmarks.other_ranks import AmongOtherRanks
from benchmarks.rows import Row
from benchmarks.shapes import StepShape, mini_step
from benchmarks.step_setting import (
    Setting,
    Trainer,
    make_port,
    make_product,
    named_shape,
    recipe_setting,
    widened,
)
from cosmos_fast.cli.main import run
from cosmos_fast.config import ComputeConfig
from cosmos_fast.model.compute import why_no_compiler
from cosmos_fast.utils.errors import UserError
from cosmos_fast.utils.peak_rates import matmul_flops_per_s, peak_rate

LEARNING_RATE = 1e-4
CHECK_EMA_DECAY = 0.5
CHECK_BATCH = 16  # in fp32, a GPU's batch keeps more for the backward pass than its memory holds


def run_step(trainer: Trainer, inputs: tuple[list[Tensor], Tensor]) -> None:
    trainer.step(*inputs, lr=LEARNING_RATE)


@exact_fp32()  # the port embeds patches by a convolution, the product by a product
def check_agreement(setting: Setting) -> None:
    """From equal weights and inputs: equal losses and gradients, and equal losses after two updates; always in fp32.

    The teacher starts as a copy of the student, so its first update changes nothing: the third step is the first that
    sees AdamW and the moving average, with a decay small enough to show. A made-up global batch is left out: with it
    the sides differ in what they compute, see `check_among_others`.
    """
    shape = replace(setting.shape, global_batch=None, batch=min(setting.shape.batch, CHECK_BATCH))
    exact = replace(setting, precision="fp32", shape=shape)
    eager = make_port(exact)
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
    if setting.others is not None:
        check_among_others(replace(setting, precision="fp32"))


def check_among_others(setting: Setting) -> None:
    """The loss against made-up columns: as its oracle computes it."""
    product = make_product(setting)
    images, texts = setting.inputs(0)
    with torch.no_grad():
        teacher = product.teacher.encode_views(images[:2], texts[:2])
        student = product.student(images, texts)
    names = ("image", "text", "image_crossmodal", "text_crossmodal", "logit_scale", "distill_logit_scale")
    found: list[dict[str, Tensor]] = []
    for backend in ("eager", "auto"):
        leaves = {name: getattr(student, name).clone().requires_grad_() for name in names}
        assert setting.others is not None
        losses = AmongOtherRanks(setting.others, backend)(replace(student, **leaves), teacher)
        losses.total.backward()
        gradients = {f"gradient of {name}": leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
        found.append({"clip loss": losses.clip.detach(), "distillation loss": losses.distill.detach(), **gradients})
    assert_agree(found[1], found[0], rtol=1e-4)


def losses_of(trainer: Trainer) -> dict[str, Tensor]:
    assert trainer.losses is not None
    return {"clip loss": trainer.losses.clip.detach(), "distillation loss": trainer.losses.distill.detach()}


def gradients_of(trainer: Trainer) -> dict[str, Tensor]:
    """Copies; a parameter without a gradient is left out, so that two sides must agree on those too."""
    named = trainer.student.named_parameters()
    return {name: parameter.grad.clone() for name, parameter in named if parameter.grad is not None}


def measure_time(setting: Setting, repeats: int) -> list[Row]:
    """Against the eager port; and how close to the hardware's rate."""
    timing = _time(setting, repeats, compiled=False, check=partial(check_agreement, setting))
    texts = setting.inputs(0)[1]
    flops, unpruned = (setting.shape.flops(texts, pruned) for pruned in (True, False))
    measured = matmul_flops_per_s(setting.device, setting.dtype)
    ours_ms = timing.candidate_median_ms
    tera = flops / (ours_ms / 1e3) / 1e12
    found = [
        setting.row("eager_step_ms", timing.baseline_median_ms, "ms"),
        setting.row(
            "step_ms",
            ours_ms,
            "ms",
            ratio=timing.ratio,
            bar=setting.bars.eager,
            floor_pct=100 * 1e3 * flops / measured / ours_ms,
        ),
        setting.rate_row("samples_per_s", 1e3 * setting.shape.batch / ours_ms, "1/s", setting.bars.samples_per_s),
        setting.row("tflops_per_s", tera, "TFLOP/s"),
    ]
    peak = peak_rate(torch.device(setting.device), setting.precision)
    if peak is not None:
        found += [
            setting.rate_row("mfu_pct", 100 * 1e12 * tera / peak.flops_per_s, "%", setting.bars.mfu_pct),
            setting.row("mfu_unpruned_pct", 100 * unpruned / (ours_ms / 1e3) / peak.flops_per_s, "%"),
        ]
    low, high = timing.spread
    click.echo(f"half of the {repeats} step-time ratios lie in {low:.3f} to {high:.3f}")
    return found


def measure_against_compiled(setting: Setting, repeats: int) -> list[Row]:
    """Against the port compiled, whose losses must be those of the port as it stands.

    They are compared as they will be timed: another precision or batch would compile for minutes once more.
    """

    def check() -> None:
        plain, compiled = make_port(setting), make_port(setting, compiled=True)
        for trainer in (plain, compiled):
            for seed in (0, 1):
                run_step(trainer, setting.inputs(seed))
        rtol = 1e-4 if setting.precision == "fp32" else 2e-2
        assert_agree(losses_of(compiled), losses_of(plain), rtol=rtol)

    timing = _time(setting, repeats, compiled=True, check=check)
    ours_ms, bar = timing.candidate_median_ms, setting.bars.compiled
    return [
        setting.row("compiled_step_ms", timing.baseline_median_ms, "ms"),
        setting.row("step_ms/compiled", ours_ms, "ms", ratio=timing.ratio, bar=bar, baseline="compiled port"),
    ]


def _time(setting: Setting, repeats: int, *, compiled: bool, check: partial[None] | object) -> Timing:
    port = make_port(setting, compiled)
    product = make_product(setting, port.student.state_dict())
    return interleave(
        partial(run_step, port),
        partial(run_step, product),
        setting.inputs,
        check=check,  # type: ignore[arg-type]
        device=setting.device,
        repeats=repeats,
    )


def run_side(setting: Setting, side: str, steps: int) -> None:
    """Build one side and train it: what peak memory is taken of."""
    trainer: Trainer = make_port(setting) if side == "eager" else make_product(setting)
    for seed in range(steps):
        run_step(trainer, setting.inputs(seed))


def measure_memory(setting: Setting) -> list[Row]:
    """Three steps: the optimizer's state exists from the second on."""
    tiny = replace(setting, shape=mini_step(width=64, layers=1, batch=2))
    eager, product = (
        peak_mib(partial(run_side, setting, side, 3), device=setting.device, settle=partial(run_side, tiny, side, 2))
        for side in ("eager", "product")
    )
    return [
        setting.row("eager_peak_mib", eager, "MiB"),
        setting.row("peak_mib", product, "MiB", ratio=product / eager, bar=setting.bars.memory),
    ]


def measure_phases(setting: Setting, repeats: int) -> list[Row]:
    """Milliseconds of each phase of both sides; the phases and "other" sum to "wall"."""
    eager = make_port(setting)
    product = make_product(setting, eager.student.state_dict())
    sides = {"eager": partial(start_step, setting, eager), "product": partial(start_step, setting, product)}
    found = ledger(sides, device=setting.device, repeats=repeats)
    theirs = [setting.row(f"eager_phase_ms/{name}", value, "ms") for name, value in found["eager"].items()]
    return theirs + [
        setting.row(f"phase_ms/{name}", value, "ms", ratio=None if name == "other" else value / found["eager"][name])
        for name, value in found["product"].items()
    ]


def start_step(setting: Setting, trainer: Trainer, seed: int) -> Iterator[str]:
    return trainer.phases(*setting.inputs(seed), LEARNING_RATE)


def make_setting(shape_name: str, shape: StepShape, compute: ComputeConfig, device: str, precision: str) -> Setting:
    """Settle what "auto" means, and the name of the results."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no CUDA device here, use cpu")
    if precision == "auto":
        precision = "bf16" if device == "cuda" else "fp32"
    parts = ["step", shape_name.replace("-", "_").lower()]
    parts += [f"n{shape.global_batch}"] if shape.global_batch else []
    parts += [key if value is True else f"{key}_{value}" for key, value in compute.changed().items()]
    return Setting("_".join(parts), shape, device, precision, compute)


def refuse_two_models(recipe: str | None, overrides: tuple[str, ...]) -> None:
    """A recipe says what the model is; --set changes recipes only."""
    if overrides and recipe is None:
        raise UserError("--set changes a key of a recipe: give --recipe as well")
    source = click.get_current_context().get_parameter_source
    given = [f"--{name}" for name in ("model", "width", "layers") if source(name) is ParameterSource.COMMANDLINE]
    if recipe is not None and given:
        raise UserError(f"--recipe {recipe} has a model of its own: leave out {', '.join(given)}")


@click.command(name="step", help=__doc__, context_settings={"show_default": True})
@click.option("--model", type=click.Choice(["mini", "ViT-B-16"]), default="mini", help="64/32 px or 224/96 px crops.")
@click.option("--recipe", metavar="NAME", help="The model, crops and batch of a recipe (train --list-recipes) instead.")
@click.option("--set", "overrides", metavar="KEY=VALUE", multiple=True, help="Change a key of the recipe; repeatable.")
@click.option("--width", type=click.IntRange(64), default=192, help="Channels of both towers (mini).")
@click.option("--layers", type=click.IntRange(1), default=4, help="Blocks of each tower (mini).")
@click.option("--batch", type=click.IntRange(1), help="Samples a step; default: 16 mini, 256 ViT-B-16, a recipe's own.")
@click.option("--global-batch", type=click.IntRange(1), help="Samples of the loss; those beyond the batch are made up.")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto")
@click.option("--precision", type=click.Choice(["auto", "fp32", "bf16"]), default="auto", help="auto: bf16 on CUDA.")
@click.option("--threads", type=click.IntRange(1), help="CPU threads; torch's choice if not given.")
@click.option("--repeats", type=click.IntRange(MIN_REPEATS), default=MIN_REPEATS, help="Timed repetitions.")
@click.option("--compiled/--no-compiled", default=None, help="Also against the port compiled; not given: on CUDA only.")
@click.option("--profile", is_flag=True, help="Also the milliseconds of each phase, of both sides.")
@click.option("--memory/--no-memory", default=True, help="Also peak memory over what the process held before.")
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), help="JSON file; default: results folder.")
def command(
    model: str,
    recipe: str | None,
    overrides: tuple[str, ...],
    width: int,
    layers: int,
    batch: int | None,
    global_batch: int | None,
    device: str,
    precision: str,
    threads: int | None,
    repeats: int,
    compiled: bool | None,
    profile: bool,
    memory: bool,
    out: Path | None,
) -> None:
    if threads is not None:
        torch.set_num_threads(threads)
    refuse_two_models(recipe, overrides)
    if recipe:
        shape, compute = recipe_setting(recipe, overrides, batch)
    else:
        shape, compute = named_shape(model, width, layers, batch), ComputeConfig()
    setting = make_setting(recipe or model, widened(shape, global_batch), compute, device, precision)
    planned: list[parts.Part] = [("time", partial(measure_time, setting, repeats))]
    if memory:
        planned.append(("memory", partial(measure_memory, setting)))
    if profile:
        planned.append(("phases", partial(measure_phases, setting, repeats)))
    if setting.device == "cuda" if compiled is None else compiled:
        if reason := why_no_compiler(torch.device(setting.device)):
            click.echo(f"left out: the port compiled ({reason})")
        else:
            planned.append(("port compiled", partial(measure_against_compiled, setting, repeats)))
    parts.measure(planned, out)


if __name__ == "__main__":
    sys.exit(run(command, name="bench step"))
