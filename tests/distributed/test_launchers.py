"""`train` by the lines that `launch` prints: torchrun and DeepSpeed, on one host and on two, whose cable is cut."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cosmos_fast.cli.main import command, run
from cosmos_fast.engine.checkpoint import find_problem, load
from cosmos_fast.engine.metrics import read_rows
from tests.distributed.test_deepspeed import off
from tests.hosts import Host, two_hosts
from tests.launched import ENVIRONMENT, TIMEOUT_S, TRAIN, make_shards, options

pytest.importorskip("deepspeed", reason="the extra `deepspeed` is not installed")
pytestmark = [pytest.mark.slow, pytest.mark.long]

STEPS, CUT_AFTER = 6, 5
SETTINGS = ("run.checkpoint_every_steps=2", f"run.max_steps={STEPS}", "run.collective_timeout_s=299")
PATH = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
# What torchrun starts instead of the module: rank 1 cuts the cable in the middle of its first life.
CUT = """
import json, os, subprocess, time
from pathlib import Path
import torch.distributed as dist
from torch.distributed import distributed_c10d
from cosmos_fast.cli.train import main
from cosmos_fast.engine.trainer import Trainer
from cosmos_fast.utils.network import limit_waits

folder, step = Path({folder!r}), Trainer.train_step

def train_step(self, *arguments):
    if self.state.step == {after} and not (folder / "cut").exists():
        groups = [group._get_backend(self.device) for group in distributed_c10d._world.pg_map]
        waits = [group.options._timeout.total_seconds() for group in groups]
        (folder / ("waits_" + os.environ["RANK"])).write_text(json.dumps(waits))
        dist.barrier()
        if os.environ["RANK"] == "1":
            subprocess.run(["ip", "link", "set", "cable0", "down"], check=True)
            (folder / "cut").touch()
        while not (folder / "cut").exists():
            time.sleep(0.01)
        limit_waits(1.0)  # however late the other one is: from here on nobody gets an answer
    return step(self, *arguments)

Trainer.train_step = train_step
if __name__ == "__main__":
    main()
"""
# Stand-ins for the programs that reach other servers; they enter a host, and read their arguments as the real ones do.
SSH = """#!/bin/bash
while [[ $1 == -* ]]; do [[ $1 == -o ]] && shift; shift; done
host=$1; shift
cd /
exec env -i PATH="$PATH" HOME="$HOME" OMP_NUM_THREADS=1 \\
  nsenter --target="$(cat "$(dirname "$0")/pid_$host")" --net --uts --mount -- bash -c "$*"
"""
PDSH = """#!/bin/bash
while [[ $1 == -* ]]; do case $1 in -S) shift;; -f) shift 2;; -w) hosts=$2; shift 2;; *) exit 99;; esac; done
number=0 status=0
for host in ${hosts//,/ }; do
  ssh "$host" "$(echo "$*" | sed "s/%n/$number/g")" &
  started+=($!)
  number=$((number + 1))
done
for process in "${started[@]}"; do wait "$process" || status=$?; done
exit "$status"
"""


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shards(tmp_path_factory.mktemp("shards"))


@pytest.fixture(scope="module")
def alone(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process."""
    folder = tmp_path_factory.mktemp("alone")
    assert run(command, ["train", *options(folder, shards, *SETTINGS, "run.batch_size=4")]) == 0
    return folder / "run"


def printed(capsys: pytest.CaptureFixture[str], how: list[str], *given: str) -> str:
    """The line that `launch` prints for these options of `train`."""
    capsys.readouterr()
    assert run(command, ["launch", *how, "--", *given]) == 0
    return capsys.readouterr().out


def execute(line: str, folder: Path, host: Host | None = None) -> str:
    """What a shell's line that ends well says."""
    bash = ["bash", "-c", line]
    environ = {**ENVIRONMENT, "PATH": f"{folder}:{PATH}"}
    done = subprocess.run(
        bash if host is None else host.inside(bash),
        env=environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=TIMEOUT_S,
    )
    assert done.returncode == 0, done.stdout[-5000:]
    return done.stdout


def assert_same_run(found: Path, expected: Path) -> None:
    rows = [[row for row in read_rows(each / "metrics.jsonl") if row["kind"] == "train"] for each in (found, expected)]
    assert [row["step"] for row in rows[0]] == list(range(1, STEPS + 1))
    assert [row["loss"] for row in rows[0]] == pytest.approx([row["loss"] for row in rows[1]], rel=1e-5)
    both = [load(each / "checkpoints" / f"step_{STEPS:08d}") for each in (found, expected)]
    for part in ("student", "teacher"):
        assert off(dict(getattr(both[0], part)), dict(getattr(both[1], part))) < 1e-5, part


def test_four_ranks_of_torchrun(shards: Path, alone: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = options(tmp_path, shards, *SETTINGS, "run.batch_size=1", "deepspeed.zero_optimization.stage=2")
    said = execute(printed(capsys, ["torchrun", "--gpus-per-node", "4"], *given), tmp_path)
    assert "4 ranks on" in said
    assert_same_run(tmp_path / "run", alone)


def test_two_ranks_of_deepspeed(shards: Path, alone: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = options(tmp_path, shards, *SETTINGS, "run.batch_size=2")
    line = printed(capsys, ["deepspeed", "--gpus-per-node", "2"], *given)
    with two_hosts(tmp_path) as hosts:  # where DeepSpeed's fixed port is free
        said = execute(f"export DS_ACCELERATOR=cpu; {line}", tmp_path, hosts[0])
    assert "2 ranks on host-a, gloo, started by deepspeed" in said
    assert_same_run(tmp_path / "run", alone)


def test_two_hosts_of_a_hostfile(shards: Path, alone: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """DeepSpeed's own runner for several nodes; ssh and pdsh are stand-ins."""
    given = options(tmp_path, shards, *SETTINGS, "run.batch_size=2")
    given += ["--set", f"data.train={shards / 'train'}/{{00000..00001}}.tar"]  # braces are ours, and no shell's
    (tmp_path / "hostfile").write_text("host-a slots=1\nhost-b slots=1\n")
    line = printed(capsys, ["deepspeed", "--hostfile", str(tmp_path / "hostfile")], *given)
    for name, text in (("ssh", SSH), ("pdsh", PDSH)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    with two_hosts(tmp_path) as hosts:
        for host in hosts:
            (tmp_path / f"pid_{host.name}").write_text(str(host.pid))
        said = execute(line, tmp_path, hosts[0])
    assert "2 ranks on 2 hosts (host-a: 1, host-b: 1), gloo, started by deepspeed" in said
    assert_same_run(tmp_path / "run", alone)


def test_a_cut_cable_ends_all_ranks_and_they_go_on_with_the_same_samples_when_it_is_whole(
    shards: Path, alone: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script = tmp_path / "cut.py"
    script.write_text(CUT.format(folder=str(tmp_path), after=CUT_AFTER))
    given = options(tmp_path, shards, *SETTINGS, "run.batch_size=2")
    how = ["torchrun", "--hosts", "host-a,host-b", "--gpus-per-node", "1", "--max-restarts", "9"]
    line = printed(capsys, how, *given, "--resume").replace(f"-m {TRAIN}", str(script))
    line = line.replace(" c10d ", " c10d --rdzv_conf read_timeout=600 ")  # torchrun itself gives up after a minute
    assert "read_timeout" in line
    with two_hosts(tmp_path) as hosts:
        said = [tmp_path / f"said_{host.name}" for host in hosts]
        agents = []
        for host, file in zip(hosts, said, strict=True):
            with file.open("w") as opened:
                environ = {**ENVIRONMENT, "PATH": PATH}
                agents.append(host.start(["bash", "-c", line], env=environ, stdout=opened, stderr=opened))
        try:
            for rank, (host, file) in enumerate(zip(hosts, said, strict=True)):
                wait_for(f"rank {rank} of 2 on {host.name} no longer reaches the others (", file, agents[rank])
            saved = sorted((tmp_path / "run" / "checkpoints").glob("step_*"))
            assert saved
            assert [find_problem(folder) for folder in saved] == [None] * len(saved)
            hosts[1].heal()
            statuses = [agent.wait(timeout=TIMEOUT_S) for agent in agents]
        finally:
            for agent in agents:
                agent.kill()
                agent.wait()
    assert statuses == [0, 0], "".join(file.read_text()[-5000:] for file in said)
    assert_same_run(tmp_path / "run", alone)
    for rank in (0, 1):
        waits = json.loads((tmp_path / f"waits_{rank}").read_text())
        assert len(waits) > 1, "DeepSpeed makes groups of its own"
        assert set(waits) == {299.0}


def wait_for(text: str, file: Path, process: subprocess.Popen[str]) -> None:
    """Until a process that runs has said it."""
    deadline = time.monotonic() + TIMEOUT_S
    while text not in file.read_text():
        assert process.poll() is None, file.read_text()[-5000:]
        assert time.monotonic() < deadline, file.read_text()[-5000:]
        time.sleep(0.05)
