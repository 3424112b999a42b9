"""Write a synthetic data set: meta.json and shards; resumable, and byte-identical for a seed.

A shard appears under its name only when it is complete and on disk (write aside, fsync, rename), so what a killed run
left behind is either complete or carries the suffix .tmp.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

from cosmos_fast.data.pool import run_in_pool
from cosmos_fast.data.shard_files import is_complete_tar, locked, write_error
from cosmos_fast.data.synthetic import vocabulary
from cosmos_fast.data.synthetic.scene import SPLITS, SceneSettings, compositions
from cosmos_fast.data.synthetic.shards import Shard, write_shard
from cosmos_fast.utils.errors import UserError
from cosmos_fast.utils.files import write_atomic

FORMAT = "cosmos-fast-synthetic/1"  # to be raised when the same parameters come to give other bytes


@dataclass(frozen=True, kw_only=True)
class DatasetSettings:
    """All that decides the bytes of a data set."""

    train: int
    heldout: int
    shard_size: int = 500
    scene: SceneSettings = field(default_factory=SceneSettings)

    def __post_init__(self) -> None:
        if self.train < 0 or self.heldout < 0 or self.train + self.heldout == 0:
            raise UserError(f"{self.train} train and {self.heldout} held-out scenes: give at least one scene")
        if max(self.train, self.heldout) >= 10**7:
            raise UserError("more than 9,999,999 scenes in a split: keys have seven digits")
        if self.shard_size < 1:
            raise UserError(f"shard size is {self.shard_size}: give at least 1 sample a shard")

    def count(self, split: str) -> int:
        return self.train if split == "train" else self.heldout

    def parameters(self) -> dict[str, int]:
        """As they stand in meta.json."""
        own = {"train": self.train, "heldout": self.heldout, "shard_size": self.shard_size}
        return own | asdict(self.scene)


def plan_shards(out: Path, settings: DatasetSettings) -> list[Shard]:
    """All shards of the data set."""
    size = settings.shard_size
    return [
        Shard(out / split / f"{number:05d}.tar", split, start, min(start + size, settings.count(split)))
        for split in SPLITS
        for number, start in enumerate(range(0, settings.count(split), size))
    ]


def missing_shards(out: Path, settings: DatasetSettings) -> list[Shard]:
    """Shards that are not there, or are no complete tar files."""
    return [shard for shard in plan_shards(out, settings) if not is_complete_tar(shard.path)]


def write_dataset(
    out: Path, settings: DatasetSettings, workers: int, progress: Callable[[int], None] = lambda scenes: None
) -> int:
    """Write what is missing; calls `progress` with numbers of scenes done. Returns the number of shards written.

    Raises UserError if `out` holds a data set with other parameters, another process writes there, or the disk is full.
    """
    if missing_shards(out, settings):
        for _ in compositions(settings.scene, "heldout", 0, settings.heldout):
            pass  # raises where there are too few, before anything is written
    try:
        out.mkdir(parents=True, exist_ok=True)
        with locked(out):
            _check_parameters(out, settings)
            for split in SPLITS:
                (out / split).mkdir(exist_ok=True)
                for leftover in (out / split).glob("*.tar.tmp"):
                    leftover.unlink()
            for leftover in out.glob(".meta.json.*.tmp"):
                leftover.unlink()
            if not (out / "meta.json").exists():
                write_atomic(out / "meta.json", _meta(settings))
            shards = missing_shards(out, settings)
            try:
                run_in_pool(partial(write_shard, settings=settings.scene), shards, workers, progress)
            finally:
                for shard in shards:  # of workers stopped half-way; a full disk needs the room
                    shard.aside.unlink(missing_ok=True)
    except OSError as error:
        raise write_error(error.filename or out, error) from error
    return len(shards)


def _meta(settings: DatasetSettings) -> str:
    """meta.json: parameters, counts, and the vocabulary with synonyms and prompt templates."""
    counts = {split: settings.count(split) for split in SPLITS}
    meta = {
        "format": FORMAT,
        "seed": settings.scene.seed,
        "parameters": settings.parameters(),
        "counts": counts,
        "shards": {split: -(-count // settings.shard_size) for split, count in counts.items()},
        "shapes": list(vocabulary.SHAPES),
        "colours": list(vocabulary.COLOURS),
        "sizes": list(vocabulary.SIZES),
        "textures": list(vocabulary.TEXTURES),
        "places": list(vocabulary.PLACES),
        "backgrounds": list(vocabulary.BACKGROUNDS),
        "synonyms": {
            "shapes": vocabulary.SHAPE_SYNONYMS,
            "colours": vocabulary.COLOUR_SYNONYMS,
            "sizes": vocabulary.SIZE_SYNONYMS,
            "textures": vocabulary.TEXTURE_SYNONYMS,
            "places": vocabulary.PLACE_PHRASES,
            "backgrounds": vocabulary.BACKGROUND_PHRASES,
        },
        "templates": list(vocabulary.TEMPLATES),
        "colour_templates": list(vocabulary.COLOUR_TEMPLATES),
        "background_templates": list(vocabulary.BACKGROUND_TEMPLATES),
    }
    return json.dumps(meta, indent=1) + "\n"


def _check_parameters(out: Path, settings: DatasetSettings) -> None:
    """Refuse to mix two data sets in one directory."""
    path = out / "meta.json"
    if not path.exists():
        if any(out.glob("*/*.tar")):
            raise UserError(f"{out} holds shards but no meta.json: choose another --out, or delete that directory")
        return
    try:
        meta = json.loads(path.read_bytes())
        there = {"format": meta["format"], **meta["parameters"]}
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path} is damaged: delete {out} and run again") from None
    asked = {"format": FORMAT, **settings.parameters()}
    differing = [
        f"{name} {there.get(name)} there, {asked[name]} asked" for name in asked if there.get(name) != asked[name]
    ]
    if differing:
        raise UserError(
            f"{out} holds a data set with other parameters ({'; '.join(differing)}): "
            "choose another --out, or delete that directory"
        )
