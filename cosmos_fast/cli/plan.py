"""`cosmos-fast plan`: what a run would need on so many GPUs, by a model."""

from __future__ import annotations

import json

import click

from cosmos_fast.cli.train import resolve_config
from cosmos_fast.config import TrainConfig
from cosmos_fast.utils.errors import UserError

MOST_SAMPLES = 10**9
DEFAULT_GPUS = "8,16,32,64,128,256,512,1024"


@click.command("plan")
@click.option("--recipe", metavar="NAME", help="A built-in configuration.")
@click.option("--config", "config_file", metavar="FILE", help="A YAML file, such as the config.yaml of a run.")
@click.option("--set", "overrides", metavar="KEY=VALUE", multiple=True, help="Change a key; repeatable.")
@click.option("--gpus", default=DEFAULT_GPUS, show_default=True, metavar="N[,N]...", help="GPUs, one rank each.")
@click.option("--gpu", default="h100", show_default=True, help="As on its data sheet: h100, h200, 'a100 40gb', ...")
@click.option("--gpus-per-node", type=click.IntRange(1), default=8, show_default=True, help="GPUs of one server.")
@click.option("--global-batch", type=click.IntRange(1), help="Samples a step.  [default: as the recipe was published]")
@click.option("--precision", type=click.Choice(["bf16", "fp16", "fp32"]), help="[default: run.precision; auto is bf16]")
@click.option(
    "--assume", "assumed", metavar="NAME=VALUE", multiple=True, help="Another value for an assumed rate; repeatable."
)
@click.option("--json", "as_json", is_flag=True, help="Everything as JSON, for scripts.")
def command(
    recipe: str | None,
    config_file: str | None,
    overrides: tuple[str, ...],
    gpus: str,
    gpu: str,
    gpus_per_node: int,
    global_batch: int | None,
    precision: str | None,
    assumed: tuple[str, ...],
    as_json: bool,
) -> None:
    """Estimate step time, memory and communication on 8 to 1024 GPUs: a model of counts and assumed rates.

    NOT A MEASUREMENT. Work, bytes and memory are counted; how fast they go is assumed. The assumptions are printed
    with their sources, and --assume replaces them. docs/scale.md has the formulas.

    One number of GPUs shows every ZeRO stage, and where time, memory and bytes go; several show the best stage of each.

    \b
    cosmos-fast plan --recipe cc12m_vit_b_16 --gpus 128 --gpu h100 --global-batch 32768
    cosmos-fast plan --recipe cc12m_vit_b_16 --gpus 8,64,512 --gpu a100 --assume mfu=0.3 --assume network_gb_s=25
    """
    from cosmos_fast.cli.plan_tables import show, show_several, to_json
    from cosmos_fast.engine.plan import assume, stages_of

    counts = _counts(gpus)
    config = resolve_config(recipe, config_file, overrides)
    precision = precision or ("bf16" if config.run.precision == "auto" else config.run.precision)
    rates = assume(gpu, precision, _rates(assumed))
    samples = global_batch or _published_batch(config)
    if samples > MOST_SAMPLES:
        raise UserError(f"{samples} samples a step are more than the plan takes, {MOST_SAMPLES}: change --global-batch")
    usable = [count for count in counts if samples % count == 0]
    if not usable:
        raise UserError(f"{samples} samples a step do not divide evenly among {gpus} ranks: change --global-batch")
    found = {
        count: stages_of(config, count, samples, rates, precision=precision, gpus_per_node=gpus_per_node)
        for count in usable
    }
    if as_json:
        click.echo(json.dumps(to_json(config, gpu, rates, gpus_per_node, found), indent=1))
    elif len(counts) == 1:
        show(config, gpu, rates, gpus_per_node, found[counts[0]])
    else:
        show_several(config, gpu, rates, found, [count for count in counts if count not in usable])


def _counts(text: str) -> list[int]:
    try:
        counts = sorted({int(part) for part in text.split(",")})
    except ValueError:
        counts = [0]
    if counts[0] < 1:
        raise UserError(f"--gpus is {text!r}: give a number of GPUs, or several with commas between them")
    return counts


def _rates(assumed: tuple[str, ...]) -> dict[str, float]:
    rates = {}
    for text in assumed:
        name, _, value = text.partition("=")
        try:
            rates[name.strip()] = float(value)
        except ValueError:
            raise UserError(f"--assume {text!r} is not of the form NAME=NUMBER") from None
    return rates


def _published_batch(config: TrainConfig) -> int:
    """Samples a step of the recipe; of a configuration that was never published, those of its settings."""
    run = config.run
    return run.published_batch or run.batch_size * run.accumulate_steps * (run.world_size_hint or 1)
