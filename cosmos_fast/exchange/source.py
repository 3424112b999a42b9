"""What is exported: one or both models of a checkpoint, checked whole before anything is written."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cosmos_fast.engine import checkpoint
from cosmos_fast.model.checkpoints import WeightsOf, load_checkpoint, reading, weights_in
from cosmos_fast.model.cosmos import CosmosModel
from cosmos_fast.model.open_clip_config import local_weights
from cosmos_fast.utils.errors import UserError

Wanted = Literal["teacher", "student", "both"]


@dataclass(frozen=True)
class Source:
    """Models by their name in the checkpoint, on the CPU, of one step. name: of the run or file. epoch: whole passes
    over the data done, 0 where a file does not say."""

    models: Mapping[WeightsOf, CosmosModel]
    name: str
    epoch: int = 0


def read_source(path: Path, wanted: Wanted, step: Callable[[str], None] = lambda _: None) -> Source:
    """Read models from a run folder (its newest undamaged checkpoint), a checkpoint folder or a file.

    step: told what is about to happen.

    Raises:
        UserError: nothing there, damaged, or not the weights that are wanted.
    """
    names: tuple[WeightsOf, ...] = ("student", "teacher") if wanted == "both" else (wanted,)
    path = local_weights(path)
    name, epoch = path.stem, 0
    with reading(path):
        if path.is_dir():
            step("checking the checkpoint")
            path = _checkpoint_folder(path)
            epoch = int(checkpoint.read_state(path)[0].epoch)
            name = path.parent.parent.name if path.parent.name == "checkpoints" else path.name
        elif path.is_file() and wanted == "both" and set(weights_in(path)) != set(names):
            raise UserError(f"{path} does not hold a student and a teacher: choose --weights student or teacher")
    models = {}
    for one in names:
        step(f"reading the {one}")
        models[one] = load_checkpoint(path, one)
    return Source(models, name, epoch)


def _checkpoint_folder(path: Path) -> Path:
    """The folder of one checkpoint: a training beside this may save another between two readings."""
    root = path if path.name == "checkpoints" else path / "checkpoints"
    if not root.is_dir():
        return path
    found = checkpoint.newest_valid(root)
    if found is None:
        raise UserError(f"run folder {path} holds no complete checkpoint yet")
    return found
