"""One shard of a synthetic data set: drawn, packed as a webdataset tar, and on disk before it gets its name."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cosmos_fast.data.shard_files import write_error
from cosmos_fast.data.synthetic.captions import write_captions
from cosmos_fast.data.synthetic.render import draw_scene, encode_jpeg, encode_mask
from cosmos_fast.data.synthetic.scene import Scene, SceneSettings, scenes
from cosmos_fast.utils.files import fsync_path

_TICK = 20  # scenes between two reports of progress


@dataclass(frozen=True)
class Shard:
    """Scenes start..stop-1 of a split, and the file they go to."""

    path: Path
    split: str
    start: int
    stop: int

    @property
    def aside(self) -> Path:
        """Its name until it is complete."""
        return self.path.with_suffix(".tar.tmp")


def write_shard(shard: Shard, progress: Callable[[int], None], *, settings: SceneSettings) -> None:
    """Write one shard aside, then rename it. Raises UserError if the file system refuses."""
    from webdataset import TarWriter  # imports torch: 2 s that a finished data set need not wait for

    try:
        with shard.aside.open("wb") as file:
            with TarWriter(file, encoder=False, mtime=0, user="cosmos", group="cosmos") as tar:
                for done, scene in enumerate(scenes(settings, shard.split, shard.start, shard.stop), 1):
                    tar.write(make_sample(scene, settings))
                    if done % _TICK == 0:
                        progress(_TICK)
            file.flush()
            os.fsync(file.fileno())
        shard.aside.replace(shard.path)
        fsync_path(shard.path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            shard.aside.unlink(missing_ok=True)
        raise write_error(shard.path, error) from error
    progress((shard.stop - shard.start) % _TICK)


def make_sample(scene: Scene, settings: SceneSettings) -> dict[str, Any]:
    """A webdataset sample: members jpg, json and mask.png as bytes."""
    drawing = draw_scene(scene, settings)
    objects = [
        {
            "shape": item.shape,
            "colour": item.colour,
            "size": item.size,
            "texture": item.texture,
            "place": item.place,
            "box": list(box),
            "instance": item.instance,
        }
        for item, box in zip(scene.objects, drawing.boxes, strict=True)
    ]
    record = {**write_captions(scene, settings), "scene": {"background": scene.background, "objects": objects}}
    return {
        "__key__": scene.key,
        "jpg": encode_jpeg(drawing, scene.quality),
        "json": json.dumps(record).encode(),
        "mask.png": encode_mask(drawing),
    }
