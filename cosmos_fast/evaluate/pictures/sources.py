"""What pictures are made of: image files, shards, or a published set; with captions and true maps where known."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from cosmos_fast.config import SourceConfig
from cosmos_fast.data.faults import SampleFault
from cosmos_fast.data.images import decode
from cosmos_fast.data.storage import Storage
from cosmos_fast.data.transport import shown
from cosmos_fast.evaluate.datasets.registry import open_set
from cosmos_fast.evaluate.datasets.sets import Images, RetrievalSet, SegmentationSet, part_of
from cosmos_fast.evaluate.prompts import ClassSet
from cosmos_fast.evaluate.scenes import Meta, Scene, SceneSet
from cosmos_fast.evaluate.segmentation import SegmentationProtocol
from cosmos_fast.evaluate.segmented_scenes import segment_truth
from cosmos_fast.utils.errors import UserError

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif")
SCENES_KEPT = 500
"""So many samples of shards are held, decoded; of a set as many as it has, which are read when they are shown."""
SEED = 7


@dataclass(frozen=True)
class Source:
    """Images by number. captions: of every image, none or more. segmentation: its classes and true maps, if any.
    sentences: what else is said of every image; right answers are captions only."""

    name: str
    images: Images
    captions: tuple[tuple[str, ...], ...]
    segmentation: SegmentationSet | None = None
    sentences: tuple[tuple[str, ...], ...] = ()

    def __len__(self) -> int:
        return len(self.images)

    def choose(self, count: int, captioned: bool = False) -> list[int]:
        """Numbers of `count` images, the same each time: all if there are no more, else drawn by a fixed seed.

        captioned: of those only that have a caption.
        """
        among = [number for number, own in enumerate(self.captions) if own] if captioned else range(len(self))
        return sorted(random.Random(SEED).sample(among, min(count, len(among))))


class PictureFiles:
    """Image files, known by their names."""

    def __init__(self, files: Sequence[Path]) -> None:
        self.files = tuple(files)

    def __len__(self) -> int:
        return len(self.files)

    def key(self, number: int) -> str:
        return self.files[number].name

    def image(self, number: int) -> Image.Image:
        path = self.files[number]
        try:
            return decode(path.read_bytes())
        except (OSError, SampleFault) as error:
            raise UserError(f"{path} cannot be shown ({error}): take another image, or mend it") from None


class SceneImages:
    """Samples of shards, decoded; broken ones are left out."""

    def __init__(self, scenes: Sequence[Scene]) -> None:
        self.scenes = tuple(scenes)

    def __len__(self) -> int:
        return len(self.scenes)

    def key(self, number: int) -> str:
        return self.scenes[number].key

    def image(self, number: int) -> Image.Image:
        return self.scenes[number].image


def of_files(paths: Sequence[Path], max_samples: int | None = None) -> Source:
    """Image files, and all those in folders (and folders of these), by name. Beside `x.jpg`, `x.txt` has a caption a
    line. UserError: no such file, no image in a folder, a caption file that is no text."""
    files = [file for path in paths for file in _files_at(path)][:max_samples]
    captions = tuple(_captions_beside(file) for file in files)
    names = [path.resolve().name for path in paths]
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return Source(", ".join(names[:3]) + more, PictureFiles(files), captions)


def _files_at(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UserError(f"{path} does not exist: give image files, or a folder with some")
    found = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
    if not found:
        raise UserError(f"{path} holds no image ({', '.join(SUFFIXES)})")
    return found


def _captions_beside(file: Path) -> tuple[str, ...]:
    beside = file.with_suffix(".txt")
    if not beside.is_file():
        return ()
    try:
        lines = beside.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{beside} cannot be read ({error}): it should hold a caption a line, as UTF-8") from None
    return tuple(line.strip() for line in lines if line.strip())


def of_set(address: str, max_samples: int | None) -> Source:
    """A published set, `NAME=PATH`. UserError: no such set, another layout."""
    name, equals, path = address.partition("=")
    if not equals or not path:
        raise UserError(f"--benchmark {address}: write NAME=PATH; `cosmos-fast eval sets` lists the names")
    found = part_of(open_set(name, Path(path).expanduser()), max_samples)
    captions = found.captions if isinstance(found, RetrievalSet) else ((),) * len(found.images)
    maps = found if isinstance(found, SegmentationSet) else None
    return Source(f"{found.name} ({found.split})", found.images, captions, maps)


def of_shards(path: str, max_samples: int | None, storage: Storage, kind: str) -> Source:
    """Samples of shards, the first SCENES_KEPT if no number is given. Masks of synthetic scenes are the truth of a
    segmentation by "shape" or "colour"."""
    scene_set = SceneSet((SourceConfig(path=path),), max_samples or SCENES_KEPT, storage)
    scenes = list(scene_set)
    meta = scene_set.meta()
    masked = all(scene.mask_HW is not None for scene in scenes)
    name, images = shown(path).rstrip("/").rpartition("/")[2], SceneImages(scenes)
    maps = _scene_maps(name, images, meta, kind) if meta is not None and masked else None
    sentences = tuple(scene.long_sentences or scene.sentences for scene in scenes)
    return Source(name, images, tuple(scene.captions for scene in scenes), maps, sentences)


def _scene_maps(name: str, images: SceneImages, meta: Meta, kind: str) -> SegmentationSet:
    things = meta.colours if kind == "colour" else meta.shapes
    names = (*meta.background.classes, *things.classes)
    return SegmentationSet(
        name=name,
        split=kind,
        images=images,
        sha256="",
        truth=lambda number: segment_truth(images.scenes[number], names, kind).numpy().astype("uint8"),
        classes=ClassSet(kind, names, (*meta.background.prompts, *things.prompts)),
        protocol=SegmentationProtocol(),
    )
