"""The three tasks on a scene set: features or maps of every scene, metrics, chance, and the protocol in words."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cosmos_fast.data.images import eval_crop, to_tensor
from cosmos_fast.data.tokenizer import tokenize
from cosmos_fast.evaluate import chance
from cosmos_fast.evaluate.classification import encode_images, top_k_accuracy
from cosmos_fast.evaluate.pixels import object_view, short_side_view
from cosmos_fast.evaluate.prompts import class_features, encode_texts, synonym_features
from cosmos_fast.evaluate.retrieval import retrieval_metrics
from cosmos_fast.evaluate.scenes import Meta, Scene, SceneSet
from cosmos_fast.evaluate.segmentation import (
    SegmentationProtocol,
    class_iou,
    confusion_matrix,
    mean_iou,
    segment,
)
from cosmos_fast.model.cosmos import CosmosModel
from cosmos_fast.utils.errors import UserError

TASKS = ("retrieval", "classification", "segmentation")
BATCH_SIZE = 64
CROP_MARGIN = 0.15
SEGMENT_KINDS = ("shape", "colour")
Advance = Callable[[], None]


@dataclass(frozen=True)
class TaskResult:
    """metrics and chance share their keys. protocol: what was done, JSON-ready."""

    metrics: dict[str, float]
    chance: dict[str, float]
    protocol: dict[str, Any] = field(default_factory=dict)


def evaluate(model: CosmosModel, scenes: SceneSet, task: str, on_scene: Advance = lambda: None) -> TaskResult:
    """Run one of TASKS. on_scene is called once a scene (twice for segmentation: without and with CSA)."""
    run = {
        "retrieval": evaluate_retrieval,
        "classification": evaluate_classification,
        "segmentation": evaluate_segmentation,
    }
    if task not in run:
        raise UserError(f"task {task!r} does not exist: choose among {', '.join(TASKS)}")
    training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            return run[task](model, scenes, on_scene)
    finally:
        model.train(training)


def text_encoder(model: CosmosModel) -> Callable[[list[str]], Tensor]:
    """The tokenizer at the model's context length."""
    return lambda texts: tokenize(texts, model.config.text.context_length)


def batches(views: Iterable[Tensor], size: int = BATCH_SIZE) -> Iterator[Tensor]:
    """Stack equally shaped tensors, `size` at a time."""
    waiting: list[Tensor] = []
    for view in views:
        waiting.append(view)
        if len(waiting) == size:
            yield torch.stack(waiting)
            waiting.clear()
    if waiting:
        yield torch.stack(waiting)


@dataclass(frozen=True)
class PairFeatures:
    """Features of images [N, D] and of their raw captions [M, D]; owner_M is the image of each caption."""

    image_ND: Tensor
    text_MD: Tensor
    owner_M: Tensor
    texts: tuple[str, ...]


def pair_features(model: CosmosModel, scenes: SceneSet, on_scene: Advance = lambda: None) -> PairFeatures:
    """Encode every scene and all its raw captions. UserError if the weights give NaN or infinite features."""
    texts: list[str] = []
    owner: list[int] = []
    size = model.config.vision.image_size

    def views() -> Iterator[Tensor]:
        for i, scene in enumerate(scenes):
            texts.extend(scene.captions)
            owner.extend([i] * len(scene.captions))
            on_scene()
            yield to_tensor(eval_crop(scene.image, size))

    image_ND = encode_images(model, batches(views()))
    text_MD = encode_texts(model, texts, text_encoder(model))
    if not (image_ND.isfinite().all() and text_MD.isfinite().all()):
        raise UserError(
            "the model's features hold NaN or infinite values: its weights are unusable, take another checkpoint"
        )
    return PairFeatures(image_ND, text_MD, torch.tensor(owner, device=image_ND.device), tuple(texts))


def evaluate_retrieval(model: CosmosModel, scenes: SceneSet, on_scene: Advance = lambda: None) -> TaskResult:
    """Raw captions against images, both ways."""
    pairs = pair_features(model, scenes, on_scene)
    captions = torch.bincount(pairs.owner_M).tolist()
    return TaskResult(
        retrieval_metrics(pairs.image_ND, pairs.text_MD, pairs.owner_M),
        chance.retrieval_chance(captions),
        {
            "images": len(captions),
            "captions": len(pairs.texts),
            "distinct_captions": len(set(pairs.texts)),
            "text": "raw_caption",
            "rank": "best own caption; a tie with another image's caption counts as a miss",
        },
    )


def evaluate_classification(model: CosmosModel, scenes: SceneSet, on_scene: Advance = lambda: None) -> TaskResult:
    """Objects, each cut out with its box, named by prompt ensembles among shapes, colours, and pairs of both."""
    meta = scenes.require_meta("classification")
    labels: dict[str, list[int]] = {"shape": [], "colour": [], "pair": []}
    size = model.config.vision.image_size

    def views() -> Iterator[Tensor]:
        for scene in scenes:
            for thing in scene.objects:
                shape, colour = (
                    _class_of(meta.shapes.classes, thing.shape),
                    _class_of(meta.colours.classes, thing.colour),
                )
                labels["shape"].append(shape)
                labels["colour"].append(colour)
                labels["pair"].append(colour * len(meta.shapes.classes) + shape)
                yield object_view(scene.image, thing.box, size, CROP_MARGIN)
            on_scene()

    crops = list(batches(views()))
    if not crops:
        raise UserError(f"classification needs objects in the records and masks in {scenes.name}: there are none")
    image_ND = encode_images(model, crops)
    metrics: dict[str, float] = {}
    expected: dict[str, float] = {}
    for kind, classes in (("shape", meta.shapes), ("colour", meta.colours), ("pair", meta.pairs)):
        class_CD = class_features(model, classes, text_encoder(model))
        target = torch.tensor(labels[kind], device=image_ND.device)
        metrics |= {f"{kind}_{k}": v for k, v in top_k_accuracy(image_ND, class_CD, target).items()}
        expected |= {f"{kind}_{k}": v for k, v in chance.classification_chance(len(class_CD)).items()}
    protocol = {
        "objects": len(image_ND),
        "classes": {
            "shape": len(meta.shapes.classes),
            "colour": len(meta.colours.classes),
            "pair": len(meta.pairs.classes),
        },
        "prompts": {
            "shape": _count(meta.shapes.prompts),
            "colour": _count(meta.colours.prompts),
            "pair": _count(meta.pairs.prompts),
        },
        "crop": f"square around the box, {CROP_MARGIN:.0%} margin a side, inside the image; other objects may show",
        "ensemble": "normalise each prompt, mean over wordings and templates, normalise",
    }
    return TaskResult(metrics, expected, protocol)


def _class_of(classes: tuple[str, ...], name: str) -> int:
    if name not in classes:
        raise UserError(
            f"class {name!r} of a record is not in meta.json ({', '.join(classes)}): data and meta.json differ"
        )
    return classes.index(name)


def _count(prompts: tuple[tuple[tuple[str, ...], ...], ...]) -> int:
    return sum(len(wording) for wordings in prompts for wording in wordings)


@dataclass(frozen=True)
class SegmentTexts:
    """Features [S, D] of all wordings; for each kind of class the names (0 is background) and every wording's class."""

    text_SD: Tensor
    names: dict[str, tuple[str, ...]]
    class_sets: dict[str, Tensor]


def segment_texts(model: CosmosModel, meta: Meta) -> SegmentTexts:
    """What pixels are compared with: background phrases, shapes and colours; the background belongs to both kinds."""
    parts = {"background": meta.background, "shape": meta.shapes, "colour": meta.colours}
    features = {kind: synonym_features(model, classes, text_encoder(model)) for kind, classes in parts.items()}
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


def evaluate_segmentation(model: CosmosModel, scenes: SceneSet, on_scene: Advance = lambda: None) -> TaskResult:
    """Background against shapes, and against colours, by the protocol of `segmentation`, without and with CSA."""
    meta = scenes.require_meta("segmentation")
    texts = segment_texts(model, meta)
    masked = [scene for scene in scenes if scene.mask_HW is not None]
    if not masked:
        raise UserError(f"segmentation needs mask.png members in {scenes.name}: there are none")
    metrics: dict[str, float] = {}
    expected: dict[str, float] = {}
    constant: dict[str, float] = {}
    for suffix, csa in (("", False), ("_csa", True)):
        confusion = {
            kind: torch.zeros(len(names), len(names), dtype=torch.int64) for kind, names in texts.names.items()
        }
        for scene, labels in zip(masked, segment_scenes(model, masked, texts, csa, on_scene), strict=True):
            for kind, label_HW in labels.items():
                names = texts.names[kind]
                confusion[kind] += confusion_matrix(label_HW, segment_truth(scene, names, kind), len(names))
        for kind, table_CC in confusion.items():
            metrics[f"{kind}_miou{suffix}"] = mean_iou(table_CC)
            ious = zip(texts.names[kind], class_iou(table_CC).tolist(), strict=True)
            metrics |= {f"{kind}_iou{suffix}_{name}": 100 * iou for name, iou in ious if not math.isnan(iou)}
            pixels = table_CC.sum(dim=1).tolist()
            expected[f"{kind}_miou{suffix}"] = chance.segmentation_chance(pixels)
            constant[kind] = chance.constant_segmentation(pixels)
    protocol = {
        "images": len(masked),
        "classes": {kind: list(names) for kind, names in texts.names.items()},
        "wordings": len(texts.text_SD),
        "prompts": sum(_count(classes.prompts) for classes in (meta.background, meta.shapes, meta.colours)),
        "background": "class 0; its synonyms are the phrases of all backgrounds",
        "window_px": model.config.vision.image_size,
        "stride": SegmentationProtocol().stride,
        "short_side_windows": SegmentationProtocol().short_side,
        "chance": "a class drawn uniformly for each pixel",
        "all_background_miou": constant,
    }
    return TaskResult(metrics, expected, protocol)


def segment_truth(scene: Scene, names: tuple[str, ...], kind: str) -> Tensor:
    """Class map int64 [h, w] by "shape" or "colour": the mask through the record's objects; 0 is background."""
    assert scene.mask_HW is not None
    table = np.zeros(256, dtype=np.int64)
    for thing in scene.objects:
        table[thing.instance] = _class_of(names, getattr(thing, kind))
    return torch.from_numpy(table[scene.mask_HW])


def segment_scenes(
    model: CosmosModel, scenes: Iterable[Scene], texts: SegmentTexts, csa: bool, on_scene: Advance = lambda: None
) -> Iterator[dict[str, Tensor]]:
    """Predicted class maps uint8 [h, w] by kind, at each scene's own size, in order."""
    protocol = SegmentationProtocol()
    window = model.config.vision.image_size
    short_side = round(protocol.short_side * window)
    inputs = ((short_side_view(s.image, short_side), (s.image.height, s.image.width)) for s in scenes)
    sets = list(texts.class_sets.values())
    for labels in segment(
        model, inputs, texts.text_SD, sets, window=window, csa=csa, protocol=protocol, on_done=on_scene
    ):
        yield dict(zip(texts.class_sets, labels, strict=True))
