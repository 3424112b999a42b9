"""Checkpoints survive full disks, kills and damage, and hold nothing that could run code."""

from __future__ import annotations

import contextlib
import errno
import json
import multiprocessing
import os
import subprocess
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch

from cosmos_fast.engine import checkpoint
from cosmos_fast.engine.checkpoint import Snapshot
from cosmos_fast.engine.rng import rng_state, set_rng_state
from cosmos_fast.engine.state import TrainState
from cosmos_fast.utils.errors import UserError
from tests.ranks import PRELOADED

MODEL = {"embed_dim": 4}


def snapshot(step: int, size: int = 64) -> Snapshot:
    weights = {"w": torch.full((size,), float(step)), "scalar": torch.tensor(step)}
    return Snapshot(
        student=weights,
        teacher={name: tensor + 1 for name, tensor in weights.items()},
        optimizer={"exp_avg/w": torch.arange(size).float().view(2, -1).t()},  # not contiguous
        state=TrainState(step=step, position=10 * step, epoch=0.5, samples_seen=10 * step, skipped=1),
        model=MODEL,
        rng=rng_state(),
    )


def test_round_trip(tmp_path: Path) -> None:
    saved = snapshot(3)
    loaded = checkpoint.load(checkpoint.save(tmp_path, saved, keep=2))
    for name in ("student", "teacher", "optimizer"):
        before, after = getattr(saved, name), getattr(loaded, name)
        assert set(before) == set(after)
        assert all(torch.equal(before[key], after[key]) and before[key].dtype == after[key].dtype for key in before)
    assert (loaded.state, loaded.model, loaded.rng) == (saved.state, MODEL, saved.rng)


def test_generators_continue_from_the_stored_state() -> None:
    import random

    import numpy as np

    np.random.normal()  # leaves a cached second value behind, which is part of the state
    state = json.loads(json.dumps(rng_state()))
    first = (torch.rand(3), random.gauss(0, 1), np.random.normal())
    set_rng_state(state)
    again = (torch.rand(3), random.gauss(0, 1), np.random.normal())
    assert torch.equal(first[0], again[0])
    assert first[1:] == again[1:]


def test_only_safetensors_and_json_readable_by_others(tmp_path: Path) -> None:
    folder = checkpoint.save(tmp_path, snapshot(1), keep=1)
    names = {path.name for path in folder.iterdir()}
    tensors = {f"{name}.safetensors" for name in ("student", "teacher", "optimizer")}
    assert names == tensors | {"state.json", "manifest.json"}
    modes = {path.stat().st_mode for path in folder.iterdir()}
    assert len(modes) == 1


def test_newest_are_kept(tmp_path: Path) -> None:
    for step in (8, 9, 10, 100_000_000):
        checkpoint.save(tmp_path, snapshot(step), keep=2)
    assert [path.name for path in checkpoint.list_checkpoints(tmp_path)] == ["step_00000010", "step_100000000"]
    assert checkpoint.newest_valid(tmp_path) == tmp_path / "step_100000000"


def flip_a_byte(folder: Path) -> None:
    content = bytearray((folder / "teacher.safetensors").read_bytes())
    content[-5] ^= 1
    (folder / "teacher.safetensors").write_bytes(content)


def truncate(folder: Path) -> None:
    os.truncate(folder / "optimizer.safetensors", 100)


def lose_a_file(folder: Path) -> None:
    (folder / "student.safetensors").unlink()


def lose_the_manifest(folder: Path) -> None:
    (folder / "manifest.json").unlink()


def garble_the_manifest(folder: Path) -> None:
    (folder / "manifest.json").write_text('{"format": "cosmos-fast/1", "files": [1, 2')


def empty_the_manifest(folder: Path) -> None:
    (folder / "manifest.json").write_text('{"format": "cosmos-fast/1", "files": {}}')


def other_format(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "format": "cosmos-fast/99"}))


DAMAGES = (
    (flip_a_byte, "teacher.safetensors has changed"),
    (truncate, "optimizer.safetensors has 100 bytes"),
    (lose_a_file, "student.safetensors is missing"),
    (lose_the_manifest, "manifest.json is missing"),
    (garble_the_manifest, "manifest.json is damaged"),
    (empty_the_manifest, "its manifest names"),
    (other_format, "its format is 'cosmos-fast/99'"),
)


@pytest.mark.parametrize(("damage", "message"), DAMAGES, ids=lambda value: getattr(value, "__name__", ""))
def test_damaged_checkpoint_is_named_and_the_one_before_it_used(damage, message, tmp_path: Path, caplog) -> None:
    for step in (1, 2):
        newest = checkpoint.save(tmp_path, snapshot(step), keep=3)
    damage(newest)
    with caplog.at_level("WARNING", logger="cosmos_fast"):
        assert checkpoint.newest_valid(tmp_path) == tmp_path / "step_00000001"
    assert message in caplog.text
    assert "step_00000002" in caplog.text
    with pytest.raises(UserError, match="is unusable"):
        checkpoint.load(newest)
    checkpoint.save(tmp_path, snapshot(2), keep=3)  # a resumed run comes by again
    assert checkpoint.newest_valid(tmp_path) == newest


def test_only_damaged_checkpoints_is_an_error_not_a_silent_start_from_scratch(tmp_path: Path) -> None:
    assert checkpoint.newest_valid(tmp_path) is None
    truncate(checkpoint.save(tmp_path, snapshot(1), keep=1))
    with pytest.raises(UserError, match="every checkpoint"):
        checkpoint.newest_valid(tmp_path)


@pytest.mark.parametrize("call", ["save_file", "fsync_path", "sha256_of", "rename"])
def test_a_failing_save_leaves_the_former_checkpoint(call: str, tmp_path: Path, monkeypatch) -> None:
    former = checkpoint.save(tmp_path, snapshot(1), keep=1)

    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.os if call == "rename" else checkpoint, call, fail)
        with pytest.raises(UserError, match="No space left on device"):
            checkpoint.save(tmp_path, snapshot(2), keep=1)
    assert checkpoint.newest_valid(tmp_path) == former
    assert [path.name for path in tmp_path.iterdir()] == [former.name]
    checkpoint.save(tmp_path, snapshot(2), keep=1)
    assert checkpoint.load(tmp_path / "step_00000002").state.step == 2


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip("a tmpfs cannot be mounted here")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk(small_disk: Path) -> None:
    root = small_disk / "checkpoints"
    former = checkpoint.save(root, snapshot(1, size=20_000), keep=1)
    (small_disk / "hog").write_bytes(bytes(500_000))
    with pytest.raises(UserError, match="No space left on device"):
        checkpoint.save(root, snapshot(2, size=20_000), keep=1)
    assert checkpoint.newest_valid(root) == former
    (small_disk / "hog").unlink()
    checkpoint.save(root, snapshot(2, size=20_000), keep=1)
    assert [path.name for path in root.iterdir()] == ["step_00000002"]


def save_forever(folder: Path, step: int, told: Connection) -> None:
    while True:
        step += 1
        checkpoint.save(folder, snapshot(step, size=200_000), keep=2)
        told.send(step)


@pytest.mark.slow
def test_kill_during_a_save(tmp_path: Path) -> None:
    """Killed at a random moment of an endless row of saves, the last completed one is whole."""
    done = 0
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    for count in (3, 5):
        here, there = context.Pipe(duplex=False)
        process = context.Process(target=save_forever, args=(tmp_path, done, there))
        process.start()
        there.close()
        for _ in range(count):
            done = here.recv()
        process.kill()
        process.join()
        with here, contextlib.suppress(EOFError):
            while True:  # what it said until then: the kill may have come late
                done = here.recv()
        newest = checkpoint.newest_valid(tmp_path)
        assert newest is not None
        state = checkpoint.load(newest).state
        assert state.step in (done, done + 1)
        done = state.step
        assert len(checkpoint.list_checkpoints(tmp_path)) <= 3
    checkpoint.save(tmp_path, snapshot(done + 1), keep=2)
    assert all(path.name.startswith("step_") for path in tmp_path.iterdir())  # leftovers of the kills are gone


def test_checkpoints_later_than_the_resumed_one_are_set_aside(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        checkpoint.save(tmp_path, snapshot(step), keep=5)
    checkpoint.supersede_after(tmp_path, 1)
    assert [path.name for path in checkpoint.list_checkpoints(tmp_path)] == ["step_00000001"]
    assert checkpoint.load(tmp_path / "superseded_step_00000003").state.step == 3
