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
from cosmos_fast.evaluate.scenes import Scene, SceneSet
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


def evaluate_segmentation(model: CosmosModel, scenes: SceneSet, on_scene: Advance = lambda: None) -> TaskResult:
    """Shapes and background, by the sliding-window protocol of `segmentation`, without and with CSA."""
    meta = scenes.require_meta("segmentation")
    names = meta.segments.classes
    text_SD, class_S = synonym_features(model, meta.segments, text_encoder(model))
    metrics: dict[str, float] = {}
    pixels: list[int] = []
    for suffix, csa in (("", False), ("_csa", True)):
        confusion = torch.zeros(len(names), len(names), dtype=torch.int64)
        truths = (segment_truth(scene, names) for scene in scenes if scene.mask_HW is not None)
        maps = segment_scenes(model, (s for s in scenes if s.mask_HW is not None), text_SD, class_S, csa, on_scene)
        for label_HW, truth_HW in zip(maps, truths, strict=True):
            confusion += confusion_matrix(label_HW, truth_HW, len(names))
        if confusion.sum() == 0:
            raise UserError(f"segmentation needs mask.png members in {scenes.name}: there are none")
        metrics[f"miou{suffix}"] = mean_iou(confusion)
        ious = zip(names, class_iou(confusion).tolist(), strict=True)
        metrics |= {f"iou{suffix}_{name}": 100 * iou for name, iou in ious if not math.isnan(iou)}
        pixels = confusion.sum(dim=1).tolist()
    guess = chance.segmentation_chance(pixels)
    protocol = {
        "classes": list(names),
        "wordings": len(text_SD),
        "prompts": _count(meta.segments.prompts),
        "background": "class 0; its synonyms are the phrases of all backgrounds",
        "window_px": model.config.vision.image_size,
        "stride": SegmentationProtocol().stride,
        "short_side_windows": SegmentationProtocol().short_side,
        "chance": "a class drawn uniformly for each pixel",
        "all_background_miou": chance.constant_segmentation(pixels),
    }
    return TaskResult(metrics, {"miou": guess, "miou_csa": guess}, protocol)


def segment_truth(scene: Scene, names: tuple[str, ...]) -> Tensor:
    """Class map int64 [h, w] of a scene: its mask's instance numbers through the record's objects; 0 is background."""
    assert scene.mask_HW is not None
    table = np.zeros(256, dtype=np.int64)
    for thing in scene.objects:
        table[thing.instance] = _class_of(names, thing.shape)
    return torch.from_numpy(table[scene.mask_HW])


def segment_scenes(
    model: CosmosModel,
    scenes: Iterable[Scene],
    text_SD: Tensor,
    class_S: Tensor,
    csa: bool,
    on_scene: Advance = lambda: None,
) -> Iterator[Tensor]:
    """Predicted class maps uint8 [h, w] at each scene's own size, in order."""
    protocol = SegmentationProtocol()
    window = model.config.vision.image_size
    short_side = round(protocol.short_side * window)
    inputs = ((short_side_view(s.image, short_side), (s.image.height, s.image.width)) for s in scenes)
    return segment(model, inputs, text_SD, class_S, window=window, csa=csa, protocol=protocol, on_done=on_scene)
