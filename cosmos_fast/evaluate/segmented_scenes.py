"""Scenes segmented: what their pixels are compared with, predicted and true class maps, and the counts of both."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cosmos_fast.data.tokenizer import tokenize
from cosmos_fast.evaluate.division import ALONE, Division
from cosmos_fast.evaluate.pixels import short_side_view
from cosmos_fast.evaluate.prompts import synonym_features
from cosmos_fast.evaluate.scenes import Meta, Scene, SceneSet
from cosmos_fast.evaluate.segmentation import SegmentationProtocol, confusion_matrix, segment
from cosmos_fast.model.cosmos import CosmosModel
from cosmos_fast.utils.errors import UserError

SEGMENT_KINDS = ("shape", "colour")
Advance = Callable[[], None]


def text_encoder(model: CosmosModel) -> Callable[[list[str]], Tensor]:
    """The tokenizer at the model's context length."""
    return lambda texts: tokenize(texts, model.config.text.context_length)


def class_of(classes: tuple[str, ...], name: str) -> int:
    if name not in classes:
        raise UserError(
            f"class {name!r} of a record is not in meta.json ({', '.join(classes)}): data and meta.json differ"
        )
    return classes.index(name)


@dataclass(frozen=True)
class SegmentTexts:
    """Features [S, D] of all wordings; for each kind of class the names (0 is background) and every wording's class."""

    text_SD: Tensor
    names: dict[str, tuple[str, ...]]
    class_sets: dict[str, Tensor]


def segment_texts(model: CosmosModel, meta: Meta, division: Division = ALONE) -> SegmentTexts:
    """What pixels are compared with: background phrases, shapes and colours; the background belongs to both kinds."""
    parts = {"background": meta.background, "shape": meta.shapes, "colour": meta.colours}
    features = {
        kind: synonym_features(model, classes, text_encoder(model), division) for kind, classes in parts.items()
    }
    names = {kind: (*meta.background.classes, *parts[kind].classes) for kind in SEGMENT_KINDS}

    def classes_of(kind: str) -> Tensor:
        offsets = {"background": 0, kind: 1}
        return torch.cat(
            [
                owner_S + offsets[part] if part in offsets else torch.full_like(owner_S, -1)
                for part, (_, owner_S) in features.items()
            ]
        )

    text_SD = torch.cat([part_SD for part_SD, _ in features.values()])
    return SegmentTexts(text_SD, names, {kind: classes_of(kind) for kind in SEGMENT_KINDS})


def confusions(
    model: CosmosModel, scenes: SceneSet, texts: SegmentTexts, on_scene: Advance, division: Division
) -> tuple[int, dict[str, dict[str, Tensor]]]:
    """Images with a mask, and by suffix (without and with CSA) and kind of class the counts of all their pixels."""
    tables = {
        suffix: {kind: torch.zeros(len(names), len(names), dtype=torch.int64) for kind, names in texts.names.items()}
        for suffix in ("", "_csa")
    }
    images = 0
    with division.together():
        for number in division.own(scenes.blocks):
            masked = [scene for scene in scenes.block(number) if scene.mask_HW is not None]
            images += len(masked)
            for suffix, confusion in tables.items():
                maps = segment_scenes(model, masked, texts, suffix == "_csa", on_scene)
                for scene, labels in zip(masked, maps, strict=True):
                    for kind, label_HW in labels.items():
                        names = texts.names[kind]
                        confusion[kind] += confusion_matrix(label_HW, segment_truth(scene, names, kind), len(names))
    counted = [{suffix: {kind: t.tolist() for kind, t in found.items()} for suffix, found in tables.items()}]
    everywhere = division.ranks.gather([images, *counted])
    for suffix, confusion in tables.items():
        for kind in confusion:
            confusion[kind] = torch.tensor([found[suffix][kind] for _, found in everywhere]).sum(dim=0)
    return sum(found for found, _ in everywhere), tables


def segment_truth(scene: Scene, names: tuple[str, ...], kind: str) -> Tensor:
    """Class map int64 [h, w] by "shape" or "colour": the mask through the record's objects; 0 is background."""
    assert scene.mask_HW is not None
    table = np.zeros(256, dtype=np.int64)
    for thing in scene.objects:
        table[thing.instance] = class_of(names, getattr(thing, kind))
    return torch.from_numpy(table[scene.mask_HW])


def segment_scenes(
    model: CosmosModel, scenes: Iterable[Scene], texts: SegmentTexts, csa: bool, on_scene: Advance = lambda: None
) -> Iterator[dict[str, Tensor]]:
    """Predicted class maps uint8 [h, w] by kind, at each scene's own size, in order."""
    protocol = SegmentationProtocol()
    window = model.config.vision.image_size
    short_side = round(protocol.short_side * window)
    inputs = ((short_side_view(s.image, short_side, s.key), (s.image.height, s.image.width)) for s in scenes)
    sets = list(texts.class_sets.values())
    for labels in segment(
        model, inputs, texts.text_SD, sets, window=window, csa=csa, protocol=protocol, on_done=on_scene
    ):
        yield dict(zip(texts.class_sets, labels, strict=True))
