"""`cosmos-fast train`; also `python -m cosmos_fast.cli.train`, which is what launchers start."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import click

from cosmos_fast.cli import batch_size, profiling
from cosmos_fast.cli.named_paths import named_paths
from cosmos_fast.cli.start_up import check_command, check_data, open_loader, watch_hooks
from cosmos_fast.config import TrainConfig, dump_config, load_config
from cosmos_fast.recipes import RECIPES, get_recipe
from cosmos_fast.utils.errors import UserError
from cosmos_fast.utils.logging import get_logger, setup_logging

if TYPE_CHECKING:
    import torch

    from cosmos_fast.engine.hooks import Validator
    from cosmos_fast.utils.ranks import Ranks

_log = get_logger("cosmos_fast.cli.train")  # also where a launcher calls this module __main__


@click.command("train")
@click.option("--recipe", metavar="NAME", help="A built-in configuration; see --list-recipes.")
@click.option("--config", "config_file", metavar="FILE", help="A YAML file, such as the config.yaml of a run.")
@click.option(
    "--set", "overrides", metavar="KEY=VALUE", multiple=True, help="Change a key (value in YAML); repeatable."
)
@click.option(
    "--during-training",
    metavar="NAME=PATH",
    multiple=True,
    callback=named_paths,
    help="Evaluate on this published set every run.evaluate_every_steps; repeatable, `eval sets` lists them.",
)
@click.option(
    "--resume",
    is_flag=False,
    flag_value="auto",
    metavar="[PATH]",
    help="Continue from the newest valid checkpoint of the run folder (from scratch if there is none), or from PATH.",
)
@click.option("--overwrite", is_flag=True, help="Remove the checkpoints and metrics of a former run of this name.")
@click.option("--profile", is_flag=True, help="Train a few steps, show where the time goes; nothing else is touched.")
@click.option(
    "--profile-steps", type=click.IntRange(1), metavar="N", help="Steps that --profile times; 10 if not given."
)
@click.option("--find-batch-size", is_flag=True, help="Measure the largest batch that fits memory; write nothing.")
@click.option(
    "--memory-limit",
    type=click.FloatRange(min=0, min_open=True),
    metavar="GIB",
    help="What --find-batch-size may fill, GiB; nearly all that is free if not given.",
)
@click.option("--dry-run", is_flag=True, help="Print the resolved configuration and what it needs; touch nothing.")
@click.option("--list-recipes", is_flag=True, help="Print the built-in configurations.")
@click.option("--local_rank", "--local-rank", type=int, hidden=True, help="Of the deepspeed launcher, as LOCAL_RANK.")
def command(
    recipe: str | None,
    config_file: str | None,
    overrides: tuple[str, ...],
    during_training: dict[str, Path],
    resume: str | None,
    overwrite: bool,
    profile: bool,
    profile_steps: int | None,
    find_batch_size: bool,
    memory_limit: float | None,
    dry_run: bool,
    list_recipes: bool,
    local_rank: int | None,
) -> None:
    """Train COSMOS or plain CLIP on image-caption shards.

    Writes <run.out_dir>/<name>/: config.yaml, metrics.jsonl, log.txt, checkpoints/. SIGTERM or SIGUSR1 finishes the
    step, saves a checkpoint and ends with exit status 0; a second one kills. Ctrl-C does so on one process, with exit
    status 130.

    --profile writes <run.out_dir>/<name>/profile/ only: ledger.json, trace.json, on CUDA memory_snapshot.pickle.

    \b
    cosmos-fast train --recipe cc12m_vit_b_16 --set data.train='shards/{00000..02175}.tar'
    cosmos-fast train --recipe demo --set run.max_steps=50 --set optimizer.lr=5e-4
    cosmos-fast train --config runs/demo/cosmos/config.yaml --resume
    torchrun --nproc_per_node 2 -m cosmos_fast.cli.train --recipe demo --set deepspeed.zero_optimization.stage=2
    """
    if list_recipes:
        for name, make in RECIPES.items():
            click.echo(f"{name:24}{(make.__doc__ or '').splitlines()[0]}")
        return
    from cosmos_fast.utils.ranks import place_of_environment

    place = place_of_environment()
    setup_logging(place.rank, place.world_size)
    benchmarks = (f"evaluate.benchmarks.{name}={path}" for name, path in during_training.items())
    config = resolve_config(recipe, config_file, (*overrides, *benchmarks))
    if dry_run:
        refuse_several_ranks(place)
    if profile or profile_steps is not None:
        others = resume is not None or overwrite or dry_run or find_batch_size or memory_limit is not None
        check_profile_options(profile, others)
        profiling.profile(config, profile_steps or profiling.DEFAULT_STEPS)
    elif find_batch_size or memory_limit is not None:
        check_batch_size_options(find_batch_size, resume is not None or overwrite or dry_run)
        batch_size.find_batch_size(config, memory_limit)
    elif dry_run:
        describe(config)
    else:
        train(config, resume, overwrite, config_file)


def check_profile_options(profile: bool, others: bool) -> None:
    """--profile stands alone: it starts from fresh weights, and touches no run."""
    if not profile:
        raise UserError("--profile-steps says how long to profile: give --profile as well")
    if others:
        raise UserError(
            "--profile starts from fresh weights and keeps no run: leave out --resume, --overwrite, --dry-run, "
            "--find-batch-size, --memory-limit"
        )


def check_batch_size_options(find_batch_size: bool, others: bool) -> None:
    """--find-batch-size stands alone: it starts from fresh weights, and touches no run."""
    if not find_batch_size:
        raise UserError("--memory-limit says how much may be filled to find the batch size: give --find-batch-size too")
    if others:
        raise UserError("--find-batch-size starts from fresh weights and keeps no run: leave out the other options")


def resolve_config(recipe: str | None, config_file: str | None, overrides: tuple[str, ...]) -> TrainConfig:
    """One of recipe and file, with the overrides applied."""
    if (recipe is None) == (config_file is None):
        raise UserError("give one of --recipe NAME (see --list-recipes) and --config FILE")
    return load_config(get_recipe(recipe) if recipe is not None else str(config_file), overrides)


def refuse_several_ranks(place: Ranks) -> None:
    """Started by a launcher, every rank would print the same."""
    if place.world_size > 1:
        raise UserError(
            f"WORLD_SIZE is {place.world_size}, but --dry-run works on one process: start it without a launcher"
        )


def train(config: TrainConfig, resume: str | None, overwrite: bool, config_file: str | None = None) -> None:
    """Build everything on all ranks, then train; nothing is written before all of it is there."""
    from cosmos_fast.engine.out_of_memory import out_of_memory_explained
    from cosmos_fast.engine.precision import resolve_device
    from cosmos_fast.engine.run_folder import RunPlan, plan_run
    from cosmos_fast.engine.trainer import Trainer
    from cosmos_fast.utils.ranks import device_of_rank, joined_ranks
    from cosmos_fast.utils.watchdog import Watchdog

    always, waits_s = config.run.engine == "deepspeed", config.run.collective_timeout_s
    with joined_ranks(config.run.device, timeout_s=waits_s, always=always) as ranks, ExitStack() as opened:
        check_command(ranks, config)
        plan = RunPlan.from_json(ranks.on_first(lambda: plan_run(config, resume, overwrite, config_file).to_json()))
        with ranks.together():
            device = resolve_device(device_of_rank(config.run.device, ranks))
        validators = make_validators(config, ranks)
        with ranks.together(), out_of_memory_explained(config):
            loader = open_loader(config, device, ranks, plan.state.position)
            opened.callback(loader.close)
        check_data(ranks, loader.identity, loader.samples_per_epoch)
        watchdog = opened.enter_context(Watchdog(config.run.watchdog_s, plan.folder, ranks))
        with out_of_memory_explained(config):
            trainer = Trainer(config, loader, validators, plan=plan, ranks=ranks, clock=watchdog)
            watch_hooks(trainer, watchdog)
            trainer.fit()
    if loader.stats:
        _log.warning("samples skipped: %s", loader.account.summary())
    stopped = f"stopped by {trainer.stop.signal_name or 'another rank'}, continue with --resume"
    done = "finished" if trainer.finished else stopped
    _log.info("%s: %s at step %d of %d", config.name, done, trainer.state.step, trainer.total_steps)


def make_validators(config: TrainConfig, ranks: Ranks) -> Sequence[Validator]:
    """Evaluation during training, where evaluate.data or evaluate.benchmarks is set; divided over the ranks, which all
    call this."""
    if not config.evaluate.data and not config.evaluate.benchmarks:
        return []
    from cosmos_fast.data.sources import source_named
    from cosmos_fast.evaluate.division import Division
    from cosmos_fast.evaluate.validators import build_validators

    with source_named("evaluate.data"):
        return build_validators(config, Division(ranks))


def describe(config: TrainConfig) -> None:
    """The resolved configuration as YAML, and in comments what it needs, so that the output is a valid --config."""
    from cosmos_fast.engine.estimate import estimate
    from cosmos_fast.engine.precision import resolve_device, resolve_precision
    from cosmos_fast.engine.schedules import total_steps
    from cosmos_fast.model.compute import why_not_here

    device = resolve_device(config.run.device)
    precision = resolve_precision(config.run.precision, device).name
    needs = estimate(config, precision)
    click.echo(dump_config(config), nl=False)
    click.echo(f"# device               {device}, {precision}")
    click.echo(f"# compute              {config.compute.changes() or 'defaults'}")
    if (objection := why_not_here(config.model, config.compute, device)) is not None:
        click.echo(f"#   not on this machine: {objection}")
    click.echo(f"# images               decoded by {_decoder(config, device)}")
    click.echo(f"# parameters           {needs.parameters / 1e6:.1f} M")
    click.echo(f"# FLOPs per sample     {needs.flops_per_sample / 1e9:.2f} G (forward and backward, all views)")
    click.echo(f"# memory, about        {needs.total_bytes / 2**30:.2f} GiB")
    for name in ("weights", "gradients", "optimizer", "teacher", "activations"):
        click.echo(f"#   {name:18} {getattr(needs, name + '_bytes') / 2**30:.2f} GiB")
    ranks = config.run.world_size_hint or 1
    batch = config.run.batch_size * config.run.accumulate_steps
    click.echo(f"# samples per step     {batch} a rank, {batch * ranks} on {ranks} rank{'s' if ranks > 1 else ''}")
    samples = config.data.samples_per_epoch
    if config.run.max_steps is not None or samples is not None:
        steps = total_steps(config, samples or 1, ranks)
        epochs = f", {steps * batch * ranks / samples:.2f} epochs of {samples} samples" if samples else ""
        click.echo(f"# steps                {steps}{epochs}")
    else:
        click.echo(f"# steps                {config.run.epochs:g} epochs of the samples in data.train")


def _decoder(config: TrainConfig, device: torch.device) -> str:
    from cosmos_fast.data.dali_loader import explain_choice

    try:
        return explain_choice(config.data.loader, device)[1]
    except UserError as error:
        return f"DALI, not on this machine: {error}"


def main() -> None:
    """Entry point of `python -m cosmos_fast.cli.train`."""
    from cosmos_fast.cli.main import run

    sys.exit(run(command, name="cosmos-fast train"))


if __name__ == "__main__":
    main()
