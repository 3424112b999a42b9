"""`cosmos-fast launch`: prints what starts a run on a cluster; starts nothing."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import click

from cosmos_fast.cli import launch_lines
from cosmos_fast.cli.launch_lines import Cluster, SlurmJob
from cosmos_fast.config import TrainConfig
from cosmos_fast.utils.errors import UserError

LAUNCHERS = ("torchrun", "deepspeed", "slurm")
MOST_SLOTS = 1024
_HOST = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?")


@click.command("launch")
@click.argument("launcher", type=click.Choice(LAUNCHERS))
@click.option("--nodes", type=click.IntRange(1), help="Servers.  [default: as many as hosts, or 1]")
@click.option("--gpus-per-node", "gpus", type=click.IntRange(1), help="GPUs of a server, one rank each.  [default: 8]")
@click.option("--hosts", metavar="NAME[,NAME]...", help="The servers' names; the first is where the ranks meet.")
@click.option("--hostfile", metavar="FILE", help="The same from a file of DeepSpeed: lines of `name slots=8`.")
@click.option("--port", type=click.IntRange(1, 65535), default=29500, show_default=True, help="The ranks meet at.")
@click.option("--max-restarts", type=click.IntRange(0), default=0, help="torchrun: starts again after a failure.")
@click.option("--time", default=SlurmJob.time, show_default=True, help="slurm: limit of the job.")
@click.option(
    "--cpus-per-rank", "cpus", type=click.IntRange(1), default=SlurmJob.cpus, show_default=True, help="slurm."
)
@click.option("--partition", help="slurm.")
@click.option("--account", help="slurm.")
@click.argument("arguments", nargs=-1, metavar="-- [OPTION OF train]...", type=click.UNPROCESSED)
def command(
    launcher: str,
    nodes: int | None,
    gpus: int | None,
    hosts: str | None,
    hostfile: str | None,
    port: int,
    max_restarts: int,
    time: str,
    cpus: int,
    partition: str | None,
    account: str | None,
    arguments: tuple[str, ...],
) -> None:
    """Print the command, or the batch script, that starts `train` on a cluster. Nothing is started or written.

    The options of `train` stand after `--`; they are checked first, so that a mistake does not wait in a queue.

    \b
    cosmos-fast launch torchrun --gpus-per-node 8 -- --recipe cc3m_vit_b_16 --set data.train='shards/*.tar'
    cosmos-fast launch deepspeed --hostfile hostfile -- --recipe cc3m_vit_b_16 --set data.train='shards/*.tar' --resume
    cosmos-fast launch slurm --nodes 16 -- --recipe cc12m_vit_b_16 --set data.train='shards/*.tar' > train.sbatch
    """
    given = _given(arguments)
    config = _checked(given)
    cluster = _cluster(launcher, nodes, gpus, hosts, hostfile, port, max_restarts)
    _check_restarts(launcher, max_restarts, given["resume"], given["overwrite"])
    _check_ranks(config, cluster.ranks)
    if launcher == "torchrun":
        text = launch_lines.torchrun(cluster, config.name, arguments)
    elif launcher == "deepspeed":
        text = launch_lines.deepspeed(cluster, arguments)
    else:
        job = SlurmJob(time=_slurm_time(time), cpus=cpus, partition=partition, account=account)
        text = launch_lines.slurm(cluster, job, config.name, arguments)
    click.echo(f"# {_samples(config, cluster)}", err=True)
    click.echo(text, nl=False)


def _given(arguments: tuple[str, ...]) -> dict[str, Any]:
    """These options of `train`, by name."""
    from cosmos_fast.cli import train

    with train.command.make_context("cosmos-fast train", list(arguments)) as context:
        return context.params


def _checked(given: dict[str, Any]) -> TrainConfig:
    """The configuration that these options of `train` come to."""
    from cosmos_fast.cli import train

    others = ("profile", "find_batch_size", "dry_run", "list_recipes")
    if wrong := [name for name in others if given[name]]:
        raise UserError(f"launch starts a training: leave out --{wrong[0].replace('_', '-')}")
    config = train.resolve_config(given["recipe"], given["config_file"], given["overrides"])
    if not config.data.train:
        raise UserError("data.train is empty: name the shards behind --, e.g. --set data.train='shards/*.tar'")
    return config


def _check_ranks(config: TrainConfig, count: int) -> None:
    """UserError for what every rank would refuse, as far as the configuration and their number tell."""
    from cosmos_fast.engine.build import divides_work
    from cosmos_fast.utils.ranks import Ranks, device_of_rank

    place = Ranks(0, count)
    device_of_rank(config.run.device, place)
    divides_work(config, place)


def _check_restarts(launcher: str, restarts: int, resume: str | None, overwrite: bool) -> None:
    """A run that is started again must neither begin anew nor go back."""
    if restarts and (launcher != "torchrun" or resume is None):
        raise UserError("--max-restarts is torchrun's, and continues a run only with --resume among train's options")
    if launcher == "slurm" and overwrite:
        raise UserError("a job of Slurm may be started again, so it gets --resume: leave out --overwrite")
    if (restarts or launcher == "slurm") and resume not in (None, "auto"):
        raise UserError(
            f"every time it is started again, the run would go back to {resume}: give --resume without a path, which "
            "continues from the newest checkpoint of the run folder"
        )


def _cluster(
    launcher: str,
    nodes: int | None,
    gpus: int | None,
    hosts: str | None,
    hostfile: str | None,
    port: int,
    restarts: int,
) -> Cluster:
    if hosts and hostfile:
        raise UserError("--hosts and --hostfile both name servers: give one of them")
    named, slots = read_hostfile(Path(hostfile)) if hostfile else (_host_names(hosts), None)
    if slots is not None and gpus not in (None, slots):
        raise UserError(f"--gpus-per-node is {gpus}, but {hostfile} has slots={slots}: leave one of them out")
    if named and nodes not in (None, len(named)):
        raise UserError(f"--nodes is {nodes}, but {len(named)} servers are named: leave --nodes out")
    nodes = nodes or len(named) or 1
    if launcher == "slurm" and named:
        raise UserError("Slurm chooses the servers: give --nodes, without --hosts and --hostfile")
    if launcher != "slurm" and nodes > 1 and not named:
        raise UserError(f"{nodes} servers have to know where to meet: give --hosts or --hostfile")
    return Cluster(
        nodes=nodes,
        gpus=gpus or slots or 8,
        hosts=named,
        hostfile=hostfile,
        port=port,
        restarts=restarts,
    )


def read_hostfile(path: Path) -> tuple[tuple[str, ...], int]:
    """Names, and ranks of each.

    Raises:
        UserError: a file that is not there or not of the form `name slots=8`, different numbers of slots, or more than
            a server can have, a name twice.
    """
    try:
        lines = [line.partition("#")[0].split() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"hostfile {path} cannot be read: {error}") from None
    names: list[str] = []
    slots: set[int] = set()
    for number, words in enumerate(lines, start=1):
        if not words:
            continue
        found = re.fullmatch(r"slots=([1-9]\d*)", words[1]) if len(words) == 2 else None
        if found is None or not _HOST.fullmatch(words[0]) or words[0] in names:
            raise UserError(
                f"hostfile {path}, line {number}: expected a name of its own and slots, as in `gpu-01 slots=8`"
            )
        names.append(words[0])
        slots.add(int(found.group(1)))
    if not names:
        raise UserError(f"hostfile {path} names no server: write lines such as `gpu-01 slots=8`")
    if max(slots) > MOST_SLOTS:
        raise UserError(
            f"hostfile {path}: slots={max(slots)}, and a server has {MOST_SLOTS} GPUs at most: one slot a GPU"
        )
    if len(slots) != 1:
        raise UserError(f"hostfile {path}: all servers need the same number of slots, one a GPU")
    return tuple(names), slots.pop()


def _host_names(text: str | None) -> tuple[str, ...]:
    names = tuple(text.split(",")) if text else ()
    if wrong := [name for name in names if not _HOST.fullmatch(name)]:
        raise UserError(f"--hosts: {wrong[0]!r} is no host name; separate names with commas")
    if len(set(names)) != len(names):
        raise UserError("--hosts names a server twice")
    return names


def _slurm_time(text: str) -> str:
    if not re.fullmatch(r"\d+(:\d\d){0,2}|\d+-\d\d(:\d\d){0,2}", text):
        raise UserError(f"--time is {text!r}: write minutes, hours:minutes:seconds or days-hours:minutes:seconds")
    return text


def _samples(config: TrainConfig, cluster: Cluster) -> str:
    run = config.run
    samples = run.batch_size * run.accumulate_steps * cluster.ranks
    text = f"{cluster.ranks} ranks, {samples} samples a step"
    if run.published_batch in (0, samples):
        return text
    return f"{text}; the recipe was published with {run.published_batch}"
