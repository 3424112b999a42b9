"""Shell text that starts `train` on one or several servers."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass

MODULE = "cosmos_fast.cli.train"
_PAIRED = ("--set", "--recipe", "--config")


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """nodes: servers. gpus: of each, one rank a GPU. hosts: their names, the first one is where ranks meet; none where
    a scheduler gives them. port: that they meet at. restarts: of all ranks, by torchrun, after one has failed."""

    nodes: int
    gpus: int
    hosts: tuple[str, ...] = ()
    hostfile: str | None = None
    port: int = 29500
    restarts: int = 0

    @property
    def ranks(self) -> int:
        """One a GPU."""
        return self.nodes * self.gpus


@dataclass(frozen=True, kw_only=True)
class SlurmJob:
    """time: limit of the job, as Slurm writes it. cpus: of each rank. partition, account: None leaves the default."""

    time: str = "24:00:00"
    cpus: int = 8
    partition: str | None = None
    account: str | None = None


def torchrun(cluster: Cluster, name: str, arguments: Sequence[str]) -> str:
    """For one server, or to be run on each of several."""
    restarts = f" --max_restarts {cluster.restarts}" if cluster.restarts else ""
    if cluster.nodes == 1:
        start = f"torchrun --standalone --nproc_per_node {cluster.gpus}{restarts}"
        return _on_one_server(cluster) + _lines([f"{start} -m {MODULE}", *_argument_lines(arguments)])
    meeting = f"--rdzv_backend c10d --rdzv_endpoint {shlex.quote(cluster.hosts[0])}:{cluster.port}"
    return f"# The same on each of the {cluster.nodes} servers: {' '.join(cluster.hosts)}\n" + _lines(
        [
            f"torchrun --nnodes {cluster.nodes} --nproc_per_node {cluster.gpus}{restarts}",
            f"{meeting} --rdzv_id {shlex.quote(name)}",
            f"-m {MODULE}",
            *_argument_lines(arguments),
        ]
    )


def deepspeed(cluster: Cluster, arguments: Sequence[str]) -> str:
    """On one server, or from the first of several, which reaches the others through pdsh and ssh."""
    if cluster.nodes == 1:
        start = f"deepspeed --num_gpus {cluster.gpus} --no_local_rank"
        return _on_one_server(cluster) + _lines([f"{start} --module {MODULE}", *_argument_lines(arguments)])
    hostfile = cluster.hostfile or "hostfile"
    text = "" if cluster.hostfile else f"cat > hostfile <<'END'\n{hostfile_text(cluster)}END\n"
    meeting = f"--master_addr {shlex.quote(cluster.hosts[0])} --master_port {cluster.port}"
    return text + _lines(
        [
            f"deepspeed --hostfile {shlex.quote(hostfile)} {meeting} --no_local_rank",
            f"--module {MODULE}",
            *_argument_lines([_for_a_second_shell(argument) for argument in arguments]),
        ]
    )


def _on_one_server(cluster: Cluster) -> str:
    """Launchers start a single server's ranks where they are called, whatever its name is."""
    return f"# On {cluster.hosts[0]}\n" if cluster.hosts else ""


def hostfile_text(cluster: Cluster) -> str:
    """The file that names the servers and how many ranks each takes."""
    return "".join(f"{host} slots={cluster.gpus}\n" for host in cluster.hosts)


def slurm(cluster: Cluster, job: SlurmJob, name: str, arguments: Sequence[str]) -> str:
    """A batch script: one task a GPU, started by srun without a launcher between, so that signals reach each rank."""
    options = {
        "job-name": name,
        "nodes": cluster.nodes,
        "ntasks-per-node": cluster.gpus,
        "gpus-per-node": cluster.gpus,
        "cpus-per-task": job.cpus,
        "time": job.time,
        "partition": job.partition,
        "account": job.account,
        # Before the time is up every rank finishes its step; then they save, and the job ends with status 0.
        "signal": "USR1@300",
        "requeue": "",
        "open-mode": "append",
        "output": "%x-%j.log",
    }
    directives = [
        f"#SBATCH --{key}{f'={value}' if value != '' else ''}" for key, value in options.items() if value is not None
    ]
    arguments = [*arguments, *([] if resumes(arguments) else ["--resume"])]
    return "\n".join(
        [
            "#!/bin/bash",
            *directives,
            "set -euo pipefail",
            "# Activate the environment that has cosmos-fast here.",
            "",
            'MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)',
            "MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))",
            "WORLD_SIZE=$SLURM_NTASKS",
            "export MASTER_ADDR MASTER_PORT WORLD_SIZE",
            "# One task is one rank; exec lets Slurm's signals reach it. srun must be told the CPUs of a task again.",
            'srun --cpus-per-task="$SLURM_CPUS_PER_TASK" --kill-on-bad-exit=1 bash -c \'',
            "  export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID LOCAL_WORLD_SIZE=$SLURM_NTASKS_PER_NODE",
            f'  exec python -m {MODULE} "$@"',
            _lines(["' train", *_argument_lines(arguments)]),
        ]
    )


def resumes(arguments: Sequence[str]) -> bool:
    """Whether these options of `train` continue a run that is there."""
    return any(argument.partition("=")[0] == "--resume" for argument in arguments)


def _for_a_second_shell(argument: str) -> str:
    """DeepSpeed hands arguments to the shells of other servers, in double quotes if there is a space in them, else as
    they are: braces, stars and dollars would be read once more."""
    key, equals, value = argument.partition("=")
    if not equals or not re.fullmatch(r"[\w.-]+", key):
        key, equals, value = "", "", argument
    escaped = re.sub(r"([\\$`])", r"\\\1", value)
    if " " in argument:
        return f"{key}{equals}{escaped}"
    if shlex.quote(value) == value:
        return argument
    escaped = escaped.replace('"', '\\"')
    return f'{key}{equals}"{escaped}"'


def _argument_lines(arguments: Sequence[str]) -> list[str]:
    """Arguments quoted for a shell, an option and its value to a line."""
    lines: list[str] = []
    for argument in arguments:
        if lines and lines[-1] in _PAIRED:
            lines[-1] += f" {_quoted(argument)}"
        else:
            lines.append(_quoted(argument))
    return lines


def _quoted(argument: str) -> str:
    """key='value' reads better than 'key=value'."""
    key, equals, value = argument.partition("=")
    if equals and re.fullmatch(r"[\w.-]+", key):
        return f"{key}={shlex.quote(value)}"
    return shlex.quote(argument)


def _lines(parts: Sequence[str]) -> str:
    return " \\\n  ".join(parts) + "\n"
