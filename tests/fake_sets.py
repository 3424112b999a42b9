"""Evaluation sets of a few pictures in memory, and what a plain loop over them finds: no blocks, threads or batches.

The pictures are of uneven sizes; some captions belong to two pictures, and some of them have several.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from cosmos_fast.data.images import decode, eval_transform
from cosmos_fast.data.tokenizer import tokenize
from cosmos_fast.evaluate.datasets.registry import READERS
from cosmos_fast.evaluate.datasets.sets import ClassificationSet, EvalSet, Reader, RetrievalSet, SegmentationSet, digest
from cosmos_fast.evaluate.prompts import fill_templates
from cosmos_fast.evaluate.segmentation import SegmentationProtocol
from cosmos_fast.model.cosmos import CosmosModel
from cosmos_fast.utils.errors import UserError
from tests.shards import picture

CAPTIONS = [["red", "a bus"], ["two dogs"], ["a cat", "a black cat", "cat"], ["soup"], ["a cat"], ["sea"], ["a hill"]]
LABELS = [0, 0, 0, 1, 1, 2, 2]
CLASSES = {"cat": ["cat", "kitten"], "dog": ["dog"], "bus": ["bus"], "sea": ["sea", "ocean"]}
TEMPLATES = ("a photo of a {}.", "art of the {}")


@dataclass
class FakeImages:
    """Pictures by number; reads counts them. broken: raises as a reader does."""

    count: int = len(CAPTIONS)
    broken: frozenset[int] = frozenset()
    reads: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def __len__(self) -> int:
        return self.count

    def key(self, number: int) -> str:
        return f"{number}.jpg"

    def data(self, number: int) -> bytes:
        return picture(number, 24 + 5 * number, 40 - 2 * number)

    def image(self, number: int) -> Image.Image:
        with self.lock:
            self.reads += 1
        if number in self.broken:
            raise UserError(f"fake: {self.key(number)} is broken")
        return decode(self.data(number))


def fake_captions(root: Path) -> RetrievalSet:
    """A folder that is there; the file `broken` in it breaks an image, `other` changes a caption."""
    if not root.is_dir():
        raise UserError(f"fake: {root} does not exist")
    images = FakeImages(broken=frozenset([5]) if (root / "broken").exists() else frozenset())
    captions = [tuple(texts) for texts in CAPTIONS]
    if (root / "other").exists():
        captions[0] = ("blue", "a bus")
    keys = [images.key(number) for number in range(len(images))]
    sha256 = digest(keys, map("\n".join, captions))
    return RetrievalSet(name="fake", split="test", images=images, sha256=sha256, captions=tuple(captions))


def fake_classes(root: Path) -> ClassificationSet:
    images = FakeImages()
    keys = [images.key(number) for number in range(len(images))]
    classes = fill_templates("fake names", CLASSES, TEMPLATES)
    sha256 = digest(keys, map(str, LABELS))
    labels = tuple(LABELS)
    return ClassificationSet(name="things", split="val", images=images, sha256=sha256, labels=labels, classes=classes)


def fake_maps(root: Path) -> SegmentationSet:
    """Stripes of the four classes over the same pictures, some of them not counted; thresholds that change some."""
    images = FakeImages()
    keys = [images.key(number) for number in range(len(images))]

    def truth(number: int) -> np.ndarray:
        image = images.image(number)
        y, x = np.mgrid[0 : image.height, 0 : image.width]
        return np.array([0, 1, 2, 3, 255], dtype=np.uint8)[(x // 7 + y // 9 + number) % 5]

    classes = fill_templates("fake names", CLASSES, TEMPLATES)
    protocol = SegmentationProtocol(scale=20.0, prob_threshold=0.2, area_threshold=0.05)
    sha256 = digest(keys, keys)
    return SegmentationSet(
        name="pixels",
        split="val",
        images=images,
        sha256=sha256,
        truth=truth,
        classes=classes,
        protocol=protocol,
        background=True,
    )


FAKE_READERS: Mapping[str, Reader] = {
    "fake": Reader(name="fake", task="retrieval", title="Seven pictures", layout="ROOT/anything", open=fake_captions),
    "things": Reader(name="things", task="classification", title="Named", layout="ROOT/", open=fake_classes),
    "pixels": Reader(name="pixels", task="segmentation", title="Stripes", layout="ROOT/", open=fake_maps),
}


def register() -> None:
    """In this process, for good."""
    READERS.update(FAKE_READERS)


def features_alone(model: CosmosModel, found: EvalSet, texts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Images and texts, each alone through the model, float64."""
    size, length = model.config.vision.image_size, model.config.text.context_length
    with torch.no_grad():
        images = [
            model.encode_image(eval_transform(found.images.data(i), size)[None]) for i in range(len(found.images))
        ]  # type: ignore[attr-defined]
        encoded = [model.encode_text(tokenize([text], length)) for text in texts]
    return torch.cat(images).double(), torch.cat(encoded).double()


def recalls_alone(model: CosmosModel, found: RetrievalSet) -> dict[str, float]:
    """R@1 and mean rank both ways, by sorting; equal scores of others go first."""
    pairs = [(text, i) for i, texts in enumerate(found.captions) for text in texts]
    image_ND, text_MD = features_alone(model, found, [text for text, _ in pairs])
    scores = (image_ND @ text_MD.T).round(decimals=6).tolist()
    to_text = [
        1 + min(sum(s >= row[own] for s, (_, o) in zip(row, pairs, strict=True) if o != i) for own in _own(pairs, i))
        for i, row in enumerate(scores)
    ]
    to_image = [sum(row[m] >= scores[owner][m] for row in scores) for m, (_, owner) in enumerate(pairs)]
    found_metrics = {}
    for way, ranks in (("i2t", to_text), ("t2i", to_image)):
        found_metrics[f"{way}_r1"] = 100 * sum(rank == 1 for rank in ranks) / len(ranks)
        found_metrics[f"{way}_mean_rank"] = sum(ranks) / len(ranks)
    return found_metrics


def _own(pairs: Sequence[tuple[str, int]], image: int) -> list[int]:
    return [place for place, (_, owner) in enumerate(pairs) if owner == image]


def accuracy_alone(model: CosmosModel, found: ClassificationSet) -> dict[str, float]:
    """top-1, and that of each class averaged over the classes with images."""
    prompts = [[text for wording in wordings for text in wording] for wordings in found.classes.prompts]
    image_ND, text_PD = features_alone(model, found, [text for texts in prompts for text in texts])
    parts = text_PD.split([len(texts) for texts in prompts])
    class_CD = torch.stack([part.mean(dim=0) / part.mean(dim=0).norm() for part in parts])
    nearest = (image_ND @ class_CD.T).argmax(dim=1).tolist()
    hits = [guess == label for guess, label in zip(nearest, found.labels, strict=True)]
    of_class = {label: [h for h, own in zip(hits, found.labels, strict=True) if own == label] for label in found.labels}
    means = [sum(one) / len(one) for one in of_class.values()]
    return {"top1": 100 * sum(hits) / len(hits), "mean_per_class": 100 * sum(means) / len(means)}
