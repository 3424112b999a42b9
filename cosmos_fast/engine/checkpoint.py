"""Checkpoints: folders of safetensors and JSON that are whole or not there.

    <run>/checkpoints/step_00000100/{student,teacher,optimizer}.safetensors, state.json, manifest.json

A folder is written aside, every file is forced to disk, then one rename makes it visible. manifest.json holds the size
and SHA-256 of every other file, so damage is found before anything is loaded. Nothing is pickled.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from cosmos_fast.engine.state import TrainState
from cosmos_fast.model.checkpoints import FORMAT
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

    student: dict[str, Tensor]
    teacher: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    state: TrainState
    model: dict[str, Any]
    rng: dict[str, Any]


def list_checkpoints(root: Path) -> list[Path]:
    """Checkpoint folders below `root`, oldest step first, damaged ones included."""
    found = [(int(match[1]), path) for path in root.glob("step_*") if (match := _STEP_FOLDER.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def save(root: Path, snapshot: Snapshot, keep: int) -> Path:
    """Write a checkpoint of snapshot.state.step below `root`, then drop all but the newest `keep`.

    Raises UserError when it cannot be written (a full disk); what was there before stays as it was.
    """
    target = root / f"step_{snapshot.state.step:08d}"
    aside = root / f"{_ASIDE}{target.name}"
    try:
        root.mkdir(parents=True, exist_ok=True)
        _sweep(root)
        aside.mkdir()
        _write(aside, snapshot)
        _publish(aside, target)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise UserError(
            f"checkpoint {target} could not be written ({error}): make room, then continue with --resume; "
            "earlier checkpoints are untouched"
        ) from error
    for old in list_checkpoints(root)[:-keep]:
        _discard(old)
    return target


def read_state(folder: Path) -> tuple[TrainState, dict[str, Any]]:
    """Check a whole checkpoint, and read where it stands and its architecture. UserError when it is unusable."""
    problem = find_problem(folder)
    if problem is not None:
        raise UserError(f"checkpoint {folder} is unusable: {problem}")
    with _as_user_error(folder):
        document = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        return TrainState.from_json(document["state"]), document["model"]


def load(folder: Path) -> Snapshot:
    """Read one checkpoint. UserError when it is incomplete or damaged."""
    state, model = read_state(folder)
    with _as_user_error(folder):
        document = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        tensors = {name: load_file(folder / f"{name}.safetensors") for name in _TENSOR_FILES}
        return Snapshot(state=state, model=model, rng=document["rng"], **tensors)


def newest_valid(root: Path) -> Path | None:
    """The newest undamaged checkpoint; the damaged ones passed over are named in the log.

    None when there is no checkpoint at all; UserError when there are only damaged ones.
    """
    checkpoints = list_checkpoints(root)
    for folder in reversed(checkpoints):
        problem = find_problem(folder)
        if problem is None:
            return folder
        _log.warning("checkpoint %s is unusable (%s): trying the one before it", folder, problem)
    if checkpoints:
        raise UserError(f"every checkpoint in {root} is damaged: restore one, or start anew with --overwrite")
    return None


def find_problem(folder: Path) -> str | None:
    """Why a checkpoint cannot be used, None for a whole one. Reads every byte."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        files = manifest["files"]
        if manifest["format"] != FORMAT:
            return f"its format is {manifest['format']!r}, this program reads {FORMAT!r}"
        expected = {f"{name}.safetensors" for name in _TENSOR_FILES} | {"state.json"}
        if set(files) != expected:
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
    except (ValueError, KeyError, TypeError, AttributeError):
        return "manifest.json is damaged"
    return None


def supersede_after(root: Path, step: int) -> None:
    """Set aside checkpoints later than `step`: a run that continues from there must not mix with its former future."""
    for folder in list_checkpoints(root):
        if int(folder.name.removeprefix("step_")) > step:
            target = folder.with_name(f"superseded_{folder.name}")
            if target.exists():
                _discard(target)
            folder.rename(target)
            _log.warning("checkpoint %s is later than the one resumed from: kept as %s", folder.name, target.name)


def _write(folder: Path, snapshot: Snapshot) -> None:
    for name in _TENSOR_FILES:
        metadata = {"format": FORMAT, "weights": name}
        if name != "optimizer":
            metadata["model"] = json.dumps(snapshot.model)
        tensors = {key: value.detach().contiguous() for key, value in getattr(snapshot, name).items()}
        save_file(tensors, folder / f"{name}.safetensors", metadata)
        # safetensors makes files that only their owner reads; give them the mode of any other file.
        os.chmod(folder / f"{name}.safetensors", (folder.stat().st_mode & 0o666) | 0o200)
    document = {"state": snapshot.state.to_json(), "model": snapshot.model, "rng": snapshot.rng}
    (folder / "state.json").write_text(json.dumps(document), encoding="utf-8")
    written = sorted(folder.iterdir())
    files = {path.name: {"bytes": path.stat().st_size, "sha256": sha256_of(path)} for path in written}
    manifest = {"format": FORMAT, "step": snapshot.state.step, "files": files}
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    for path in folder.iterdir():
        fsync_path(path)
    fsync_path(folder)


def _publish(aside: Path, target: Path) -> None:
    if target.exists():  # a damaged one that a resumed run has passed over
        _discard(target)
    os.rename(aside, target)
    fsync_path(target.parent)


def _discard(folder: Path) -> None:
    """Remove a checkpoint in a way that never leaves a half-empty folder under a checkpoint's name."""
    doomed = folder.with_name(f"{_ASIDE}doomed_{folder.name}")
    shutil.rmtree(doomed, ignore_errors=True)
    os.rename(folder, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def _sweep(root: Path) -> None:
    for leftover in root.glob(f"{_ASIDE}*"):
        shutil.rmtree(leftover, ignore_errors=True)


@contextmanager
def _as_user_error(folder: Path) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise UserError(f"checkpoint {folder} cannot be read: {error}") from error
