"""Checkpoints: folders of safetensors and JSON that are whole or not there.

    <run>/checkpoints/step_00000100/state.json, manifest.json, and
        {student,teacher,optimizer}.safetensors     of one process
        part_00000_of_00002.safetensors, ...        of several ranks: what each of them held (model.stored)

A folder is begun aside; every rank writes its files there, forces them to disk and leaves a record of them; when all
have, the records become manifest.json and one rename makes the folder visible. The manifest holds the size and SHA-256
of every other file, so damage is found before anything is loaded. Nothing is pickled.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from cosmos_fast.engine.state import TrainState
from cosmos_fast.model.stored import FORMAT, MANIFEST, StoredTensors, TensorSlice, part_metadata, part_name
from cosmos_fast.utils.errors import UserError
from cosmos_fast.utils.files import fsync_path, sha256_of
from cosmos_fast.utils.logging import get_logger

_log = get_logger(__name__)
_STEP_FOLDER = re.compile(r"step_(\d{8,})")
_ASIDE = ".aside_"
_TENSOR_FILES = ("student", "teacher", "optimizer")


@dataclass(frozen=True)
class Snapshot:
    """All that a checkpoint holds. model: OpenCLIP-style dict of the architecture. rng: of engine.rng."""

    student: Mapping[str, Tensor]
    teacher: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor]
    state: TrainState
    model: dict[str, Any]
    rng: dict[str, Any]


@dataclass(frozen=True)
class Part:
    """What one rank of several gives to a checkpoint. slices: by "<student, teacher or optimizer>/<name>"; those of all
    ranks are every element once. The rest as in Snapshot; rank 0's counts."""

    rank: int
    world_size: int
    slices: Mapping[str, TensorSlice]
    state: TrainState
    model: dict[str, Any]
    rng: dict[str, Any]


def step_of(folder: Path) -> int:
    """Of a checkpoint folder."""
    return int(folder.name.removeprefix("step_"))


def list_checkpoints(root: Path) -> list[Path]:
    """Checkpoint folders below `root`, oldest step first, damaged ones included."""
    found = [(int(match[1]), path) for path in root.glob("step_*") if (match := _STEP_FOLDER.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def save(root: Path, snapshot: Snapshot, keep: int) -> Path:
    """Write a checkpoint of snapshot.state.step below `root`, then drop all but the newest `keep`.

    Raises UserError when it cannot be written (a full disk); what was there before stays as it was.
    """
    aside = begin(root, snapshot.state.step)
    try:
        write(aside, snapshot)
        target = publish(aside)
    except UserError:
        abandon(aside)
        raise
    prune(root, keep)
    return target


def begin(root: Path, step: int) -> Path:
    """A folder aside for the checkpoint of a step; what is left of saves that were not finished is removed."""
    target = root / f"step_{step:08d}"
    with _saving(target):
        root.mkdir(parents=True, exist_ok=True)
        for leftover in root.glob(f"{_ASIDE}*"):
            shutil.rmtree(leftover, ignore_errors=True)
        # Named anew each time: a process that outlives its run finds no folder to write into.
        aside = root / f"{_ASIDE}{target.name}.{secrets.token_hex(4)}"
        aside.mkdir()
    return aside


def write(aside: Path, content: Snapshot | Part) -> None:
    """This rank's files, forced to disk, then the record of them."""
    rank = content.rank if isinstance(content, Part) else 0
    with _saving(_target_of(aside)):
        if not aside.is_dir():
            raise OSError(f"rank {rank} does not see the folder that rank 0 has made, which all ranks have to share")
        files = [_write_part(aside, content)] if isinstance(content, Part) else _write_whole(aside, content)
        if rank == 0:
            document = {"state": content.state.to_json(), "model": content.model, "rng": content.rng}
            files.append(aside / "state.json")
            files[-1].write_text(json.dumps(document), encoding="utf-8")
        record = {path.name: {"bytes": path.stat().st_size, "sha256": sha256_of(path)} for path in sorted(files)}
        for path in files:
            fsync_path(path)
        _record_of(aside, rank).write_text(json.dumps(record), encoding="utf-8")


def publish(aside: Path, world_size: int = 1) -> Path:
    """Make the checkpoint visible, when all ranks have written. UserError when one's files are not there."""
    target = _target_of(aside)
    with _saving(target):
        files: dict[str, dict[str, Any]] = {}
        records = [_record_of(aside, rank) for rank in range(world_size)]
        for rank, record in enumerate(records):
            try:
                files |= json.loads(record.read_text(encoding="utf-8"))
            except (FileNotFoundError, ValueError):
                message = f"what rank {rank} has written is not in {aside.parent}, which all ranks have to share"
                raise OSError(message) from None
        for name, entry in files.items():
            if (size := (aside / name).stat().st_size) != entry["bytes"]:
                raise OSError(f"{name} has {size} bytes instead of {entry['bytes']}")
        for record in records:
            record.unlink()
        parts = {"parts": world_size} if part_name(0, world_size) in files else {}
        manifest = {"format": FORMAT, "step": step_of(target), **parts, "files": dict(sorted(files.items()))}
        (aside / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        fsync_path(aside / MANIFEST)
        fsync_path(aside)
        if target.exists():  # a damaged one that a resumed run has passed over
            _discard(target)
        os.rename(aside, target)
        fsync_path(target.parent)
    return target


def abandon(aside: Path) -> None:
    """Remove what there is of a checkpoint that will not be finished."""
    shutil.rmtree(aside, ignore_errors=True)


def prune(root: Path, keep: int, others: Collection[Path] = ()) -> None:
    """Drop all checkpoints but the newest `keep`, and `others`."""
    for old in list_checkpoints(root)[:-keep]:
        if old not in others:
            _discard(old)


def read_state(folder: Path) -> tuple[TrainState, dict[str, Any]]:
    """Check a whole checkpoint, and read where it stands and its architecture. UserError when it is unusable."""
    problem = find_problem(folder)
    if problem is not None:
        raise UserError(f"checkpoint {folder} is unusable: {problem}")
    found = load_unchecked(folder)
    return found.state, found.model


def load(folder: Path) -> Snapshot:
    """Read one checkpoint. UserError when it is incomplete or damaged."""
    read_state(folder)
    found = load_unchecked(folder)
    return replace(found, student=dict(found.student), teacher=dict(found.teacher), optimizer=dict(found.optimizer))


def load_unchecked(folder: Path) -> Snapshot:
    """As load(), of a checkpoint that is known to be whole. Its tensors are read when they are asked for."""
    try:
        document = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        tensors = {name: StoredTensors(folder, name) for name in _TENSOR_FILES}
        state = TrainState.from_json(document["state"])
        return Snapshot(state=state, model=document["model"], rng=document["rng"], **tensors)
    except UserError:
        raise
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"checkpoint {folder} cannot be read: {error}") from error


def newest_valid(root: Path, otherwise: str = "") -> Path | None:
    """The newest undamaged checkpoint; the damaged ones passed over are named in the log.

    None when there is no checkpoint at all; UserError when there are only damaged ones, which advises to restore one,
    and what `otherwise` says.
    """
    checkpoints = list_checkpoints(root)
    for folder in reversed(checkpoints):
        problem = find_problem(folder)
        if problem is None:
            return folder
        _log.warning("checkpoint %s is unusable (%s): trying the one before it", folder, problem)
    if checkpoints:
        raise UserError(f"every checkpoint in {root} is damaged: restore one{otherwise}")
    return None


def find_problem(folder: Path) -> str | None:
    """Why a checkpoint cannot be used, None for a whole one. Reads every byte."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        files = manifest["files"]
        if manifest["format"] != FORMAT:
            return f"its format is {manifest['format']!r}, this program reads {FORMAT!r}"
        parts = int(manifest.get("parts", 0))
        several = range(min(parts, len(files)))  # a number of parts may be any
        tensors = {part_name(rank, parts) for rank in several} or {f"{name}.safetensors" for name in _TENSOR_FILES}
        if set(files) != tensors | {"state.json"}:
            return f"its manifest names {sorted(files)}"
        for name, entry in files.items():
            size = (folder / name).stat().st_size
            if size != entry["bytes"]:
                return f"{name} has {size} bytes instead of {entry['bytes']}"
            if sha256_of(folder / name) != entry["sha256"]:
                return f"{name} has changed since it was written"
    except FileNotFoundError as error:
        return f"{Path(str(error.filename)).name} is missing"
    except (OSError, UnicodeDecodeError) as error:
        return str(error)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return "manifest.json is damaged"
    return None


def supersede_after(root: Path, step: int) -> None:
    """Set aside checkpoints later than `step`: a run that continues from there must not mix with its former future."""
    for folder in list_checkpoints(root):
        if step_of(folder) > step:
            target = folder.with_name(f"superseded_{folder.name}")
            if target.exists():
                _discard(target)
            folder.rename(target)
            _log.warning("checkpoint %s is later than the one resumed from: kept as %s", folder.name, target.name)


def _write_whole(folder: Path, snapshot: Snapshot) -> list[Path]:
    files = []
    for name in _TENSOR_FILES:
        metadata = {"format": FORMAT, "weights": name}
        if name != "optimizer":
            metadata["model"] = json.dumps(snapshot.model)
        tensors = {key: value.detach().contiguous() for key, value in getattr(snapshot, name).items()}
        files.append(_write_tensors(folder / f"{name}.safetensors", tensors, metadata))
    return files


def _write_part(folder: Path, part: Part) -> Path:
    metadata = part_metadata(part.slices, part.rank, part.world_size, part.model)
    tensors = {key: piece.values.detach().contiguous() for key, piece in part.slices.items()}
    return _write_tensors(folder / part_name(part.rank, part.world_size), tensors, metadata)


def _write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> Path:
    save_file(tensors, path, metadata)
    # safetensors makes files that only their owner reads; give them the mode of any other file.
    os.chmod(path, (path.parent.stat().st_mode & 0o666) | 0o200)
    return path


def _target_of(aside: Path) -> Path:
    return aside.with_name(aside.name.removeprefix(_ASIDE).partition(".")[0])


def _record_of(aside: Path, rank: int) -> Path:
    return aside / f".record_{rank:05d}.json"


def _discard(folder: Path) -> None:
    """Remove a checkpoint in a way that never leaves a half-empty folder under a checkpoint's name."""
    doomed = folder.with_name(f"{_ASIDE}doomed_{folder.name}")
    shutil.rmtree(doomed, ignore_errors=True)
    os.rename(folder, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


@contextmanager
def _saving(target: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"checkpoint {target} could not be written ({error}): make room, then continue with --resume; "
            "earlier checkpoints are untouched"
        ) from error
