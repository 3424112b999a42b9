"""Training processes that are killed: real processes which use a loader as a trainer does, in lockstep, until kill -9.

One life is what happens between a start and a kill: some ranks with some workers each begin at the saved position.
Every rank notes what it trained on; rank 0 saves the position every few steps. What counts in the end is what a run
would have in its weights: of each life, the samples before the position that the next life began at.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import torch

from cosmos_fast.data.batch import Batch
from cosmos_fast.data.loader import Loader
from cosmos_fast.utils.files import write_atomic

SAVE_EVERY_STEPS = 2
_FORK = multiprocessing.get_context("fork")  # a fresh interpreter takes seconds to import torch


@dataclass(frozen=True)
class Split:
    """How one life divides the stream: ranks, loader workers a rank, samples a rank and step."""

    ranks: int
    workers: int
    batch_size: int


MakeLoader = Callable[[Split, int, int], Loader]  # split, rank, start position

# For lives that differ: global batches of 5 to 20 samples.
SPLITS = (Split(1, 2, 12), Split(2, 1, 6), Split(3, 0, 4), Split(4, 1, 3), Split(2, 2, 5), Split(1, 0, 7))


class Run:
    """A run folder, and the lives it has had."""

    def __init__(self, folder: Path, make_loader: MakeLoader) -> None:
        self.folder = folder
        self.make_loader = make_loader
        self.starts: list[int] = []  # position that each life began at
        self.workers: set[int] = set()  # process ids of all loader workers there were

    @property
    def position(self) -> int:
        """The saved position."""
        file = self.folder / "position"
        return int(file.read_text()) if file.exists() else 0

    def live(self, split: Split, stop: int, when: Callable[[int], bool] | None = None) -> None:
        """Train from the saved position up to `stop`; kill -9 every rank as soon as when(steps of this life).

        Where it is to be killed, a life that reaches `stop` waits for it, without saving once more: however slow the
        machine, a kill is a kill, and what it costs does not depend on when it comes.
        """
        life, start = len(self.starts), self.position
        self.starts.append(start)
        barrier = _FORK.Barrier(split.ranks)
        arguments = [(self, life, split, rank, stop, barrier, when is not None) for rank in range(split.ranks)]
        processes = [_FORK.Process(target=_train, args=each) for each in arguments]
        for process in processes:
            process.start()
        deadline = time.monotonic() + 600
        is_over, looked_at = False, -1
        while not is_over and any(process.is_alive() for process in processes):
            assert time.monotonic() < deadline, "a life does not end"
            steps = self.steps(life)
            is_over = when is not None and when(steps)
            if is_over or steps != looked_at:
                # After that look, not before: a step that was noted had its workers.
                self.workers |= {child for process in processes for child in children(process.pid or 0)}
                looked_at = steps
            time.sleep(0 if is_over else 0.002)
        for process in processes if is_over else ():
            os.kill(process.pid or 0, signal.SIGKILL)
        for process in processes:
            process.join()
            assert process.exitcode == (0 if when is None else -signal.SIGKILL)

    def steps(self, life: int) -> int:
        """How many steps of a life rank 0 has noted."""
        file = self.folder / f"{life}_0.jsonl"
        return file.read_bytes().count(b"\n") if file.exists() else 0

    def notes(self, life: int, rank: int) -> list[dict[str, Any]]:
        """What a rank trained on, a batch each; a line that the kill cut in two was not trained on."""
        file = self.folder / f"{life}_{rank}.jsonl"
        if not file.exists():
            return []
        return [json.loads(line) for line in file.read_text().splitlines(keepends=True) if line.endswith("\n")]

    def history(self) -> list[tuple[str, int]]:
        """(key, checksum of its views) of every sample in the weights, in the order of the stream."""
        ends = [*self.starts[1:], self.position]
        batches = []
        for life, (start, end) in enumerate(zip(self.starts, ends, strict=True)):
            ranks = len(list(self.folder.glob(f"{life}_*.jsonl")))
            for rank in range(ranks):
                kept = [note for note in self.notes(life, rank) if start <= note["position"] < end]
                batches += [(note["position"], rank, note) for note in kept]
        batches.sort(key=lambda batch: batch[:2])
        return [tuple(sample) for _, _, note in batches for sample in note["samples"]]


def killed_at_random(run: Run, seed: int, samples: int) -> list[tuple[str, int]]:
    """What a run has seen, at least so many samples, whose every life but the last was killed.

    Each ends at a random step, a random moment after it, and the next has other ranks, workers and batches.
    """
    chance = random.Random(seed)
    while len(run.starts) < 3 or run.position < samples:
        assert len(run.starts) < 60, "lives that get nowhere"
        split, last_step, delay = chance.choice(SPLITS), chance.randrange(9), chance.random() * 0.02
        furthest = run.position + (last_step + 3) * split.ranks * split.batch_size  # for a slow machine

        def moment(steps: int, last_step: int = last_step, delay: float = delay) -> bool:
            if steps < last_step:
                return False
            time.sleep(delay)
            return True

        run.live(split, stop=furthest, when=moment)
    run.live(chance.choice(SPLITS), stop=run.position + 20)
    history = run.history()
    assert len(history) >= samples
    return history


def _train(run: Run, life: int, split: Split, rank: int, stop: int, barrier: Barrier, until_killed: bool) -> None:
    torch.set_num_threads(1)
    loader = run.make_loader(split, rank, run.starts[life])
    file = os.open(run.folder / f"{life}_{rank}.jsonl", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    for step, batch in enumerate(loader, start=1):
        note = {"position": batch.position, "samples": checksums(batch)}
        os.write(file, json.dumps(note).encode() + b"\n")
        barrier.wait()  # a step needs the gradients of every rank
        is_last = batch.next_position >= stop
        if rank == 0 and (step % SAVE_EVERY_STEPS == 0 or (is_last and not until_killed)):
            write_atomic(run.folder / "position", str(batch.next_position))
        if is_last:
            break
    while until_killed:
        signal.pause()
    loader.close()


def checksums(batch: Batch) -> list[tuple[str, int]]:
    """(key, checksum of crops and captions) of each sample of a batch."""
    found = []
    for row, key in enumerate(batch.keys):
        tensors = [*(view[row] for view in batch.images), batch.texts[:, row]]
        checksum = 0
        for tensor in tensors:
            checksum = zlib.crc32(tensor.contiguous().numpy().tobytes(), checksum)
        found.append((key, checksum))
    return found


def children(pid: int) -> list[int]:
    """Process ids of the children of a process, none where it has ended."""
    try:
        lists = [(task / "children").read_text() for task in Path(f"/proc/{pid}/task").iterdir()]
        return [int(child) for children in lists for child in children.split()]
    except (OSError, ValueError):
        return []


def is_running(pid: int) -> bool:
    """Whether a process is there and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False
