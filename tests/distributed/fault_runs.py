"""The train command on two ranks under torchrun's elastic agent, with a fault at a chosen step.

The agent is torchrun's own, in a process of its own; its ranks are forks of one process that has imported everything. A
fault comes from the rank itself, in the middle of its step, so that it is neither early nor late.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.forkserver import _forkserver, ensure_running
from pathlib import Path
from typing import Any

from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from torch.multiprocessing.spawn import ProcessContext

from cosmos_fast.cli.main import run
from cosmos_fast.cli.train import command
from cosmos_fast.engine.metrics import read_rows
from cosmos_fast.engine.trainer import Trainer
from tests.ranks import PRELOADED
from tests.tiny_run import TINY

FORKSERVER = multiprocessing.get_context("forkserver")
WORLD, BATCH, STEPS, SAVED_EVERY = 2, 2, 8, 3
DEADLINE_S = 600.0
# 37 samples, 4 a step: the second epoch begins in step 10.
SETTINGS = (
    *TINY,
    "model.text={context_length: 77, vocab_size: 49408, width: 16, heads: 2, layers: 2}",
    "name=run",
    f"run.max_steps={STEPS}",
    f"run.checkpoint_every_steps={SAVED_EVERY}",
    "run.threads=1",
    "run.device=cpu",
    "data.workers=0",
)

Fault = Callable[["Trainer", "Launch"], None]
"""Called on one rank in the middle of a step of the first life."""


@dataclass
class Launch:
    """One launch of the command. faults: by (rank, steps done). prepare: called on every rank before the command.
    shutdown_s: what the agent gives ranks to end before it kills them."""

    folder: Path
    shards: Path
    arguments: tuple[str, ...] = ()
    faults: dict[tuple[int, int], Fault] = field(default_factory=dict)
    prepare: Callable[[Launch, int], None] | None = None
    max_restarts: int = 0
    shutdown_s: int = 600
    agent_pid: int = 0
    is_preempted: bool = False

    def start(self) -> Any:
        """The agent's process."""
        self.folder.mkdir(exist_ok=True)
        FORKSERVER.set_forkserver_preload(PRELOADED)
        ensure_running()
        process = FORKSERVER.Process(target=_agent, args=(self, _forkserver._forkserver_address))
        process.start()
        return process

    def run(self) -> int:
        """The agent's exit status: 0 only where all ranks have ended well in its last try."""
        process = self.start()
        process.join(DEADLINE_S)
        assert process.exitcode is not None, self.said()
        return process.exitcode

    def said(self) -> str:
        """What the ranks of all lives have written to stderr."""
        return "\n".join(path.read_text() for path in sorted(self.folder.glob("logs*/*/*/*/stderr.log")))

    def pids(self) -> list[int]:
        """Of the ranks of the last life."""
        return [trained(self.folder, rank)[-1]["pid"] for rank in range(WORLD)]


def command_line(folder: Path, shards: Path, *arguments: str) -> list[str]:
    """Of the run `<folder>/run`."""
    settings = (*SETTINGS, f"run.out_dir={folder}", f"data.train={shards}")
    return ["--recipe=demo", *(f"--set={setting}" for setting in settings), *arguments]


def _agent(launch: Launch, forks: str) -> None:
    """forks: address of the process that this one is a fork of, as its ranks are to be; else it would start another."""
    _forkserver._forkserver_address, _forkserver.ensure_running = forks, lambda: None  # type: ignore[method-assign]
    launch.agent_pid = os.getpid()
    for stream in (1, 2):  # what the agent says of its failed ranks
        os.dup2(os.open(launch.folder / "agent.txt", os.O_CREAT | os.O_WRONLY | os.O_APPEND), stream)
    os.environ["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] = str(launch.shutdown_s)
    wait = ProcessContext._join_procs_with_timeout  # by itself half a minute where ranks are functions
    ProcessContext._join_procs_with_timeout = lambda ranks, limit_s: wait(ranks, min(limit_s, launch.shutdown_s))  # type: ignore[method-assign]
    logs = launch.folder / f"logs{len(list(launch.folder.glob('logs*')))}"
    config = LaunchConfig(
        *(1, 1, WORLD),
        logs_specs=DefaultLogsSpecs(log_dir=str(logs), redirects=Std.ALL),
        run_id="faults",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=launch.max_restarts,
        monitor_interval=0.05,
        start_method="forkserver",
    )
    elastic_launch(config, _rank)(launch)


def _rank(launch: Launch) -> None:
    rank, life = int(os.environ["RANK"]), int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    multiprocessing.set_start_method("fork", force=True)  # of loader workers, as where the command runs by itself
    logging.getLogger("cosmos_fast").handlers.clear()
    note_steps(launch.folder / f"trained_{rank}.jsonl", lambda trainer: _act(launch, trainer, rank, life))
    if launch.prepare is not None:
        launch.prepare(launch, life)
    status = run(command, command_line(launch.folder, launch.shards, *launch.arguments), name="cosmos-fast train")
    if launch.is_preempted:
        os._exit(status)  # who returns waits for the agent, which then waits for it
    if status:
        sys.exit(status)


def _act(launch: Launch, trainer: Trainer, rank: int, life: int) -> None:
    fault = launch.faults.get((rank, trainer.state.step))
    if fault is not None and life == 0:
        fault(trainer, launch)


def note_steps(file: Path, before: Callable[[Trainer], None] = lambda trainer: None) -> None:
    """From now on every step of a trainer is noted in `file`, one line each."""
    train_step = Trainer.train_step

    def noted(trainer: Trainer, micro_batches: Any, *arguments: Any) -> Any:
        note = {"step": trainer.state.step + 1, "position": trainer.state.position, "pid": os.getpid()}
        note["keys"] = [key for batch in micro_batches for key in batch.keys]
        with file.open("a") as out:
            out.write(json.dumps(note) + "\n")
        before(trainer)
        return train_step(trainer, micro_batches, *arguments)

    Trainer.train_step = noted  # type: ignore[method-assign]


def trained(folder: Path, rank: int) -> list[dict[str, Any]]:
    """What a rank has begun to train on, in the order of time."""
    file = folder / f"trained_{rank}.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def begun(folder: Path, rank: int = 0) -> list[int]:
    """The steps that a rank has begun, in the order of time."""
    return [note["step"] for note in trained(folder, rank)]


def stream(folder: Path, world: int = WORLD) -> list[tuple[int, list[str]]]:
    """(position, keys of all ranks) of every step that is in the weights in the end: of each, its last time."""
    by_rank = [{note["step"]: note for note in trained(folder, rank)} for rank in range(world)]
    assert len({tuple(steps) for steps in by_rank}) == 1
    return [
        (by_rank[0][step]["position"], [key for notes in by_rank for key in notes[step]["keys"]])
        for step in sorted(by_rank[0])
    ]


def rows(folder: Path) -> list[dict[str, Any]]:
    """Rows of training."""
    return [row for row in read_rows(folder / "run" / "metrics.jsonl") if row["kind"] == "train"]


def killed(trainer: Trainer, launch: Launch) -> None:
    """A fault: kill -9."""
    os.kill(os.getpid(), signal.SIGKILL)


def stopped(trainer: Trainer, launch: Launch) -> None:
    """A fault: SIGSTOP, for whoever comes to kill."""
    os.kill(os.getpid(), signal.SIGSTOP)


def asked_to_stop(trainer: Trainer, launch: Launch) -> None:
    """A fault: SIGTERM to this rank; the step goes on when it has come."""
    os.kill(os.getpid(), signal.SIGTERM)
    _wait_for_signal(trainer)


def preempted(trainer: Trainer, launch: Launch) -> None:
    """A fault of every rank: SIGTERM to torchrun, as by a scheduler; the step goes on when this rank has got it."""
    launch.is_preempted = True
    if trainer.ranks.first:
        os.kill(launch.agent_pid, signal.SIGTERM)
    _wait_for_signal(trainer)


def deaf_to_sigterm(launch: Launch, life: int) -> None:
    """A preparation: ranks end by themselves or not at all. Ranks that are functions get SIGTERM twice from the agent,
    and the second would end them in the middle of a word."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _wait_for_signal(trainer: Trainer) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not trainer.stop.requested:
        assert time.monotonic() < deadline
        time.sleep(0.01)
