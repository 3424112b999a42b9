"""The three tasks on a scene set: features or maps of every scene, metrics, chance, and the protocol in words."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from cosmos_fast.data.images import eval_crop, to_tensor
from cosmos_fast.evaluate import chance
from cosmos_fast.evaluate.classification import encode_images, top_k_accuracy
from cosmos_fast.evaluate.division import ALONE, Division
from cosmos_fast.evaluate.pixels import object_view
from cosmos_fast.evaluate.prompts import class_features, encode_texts
from cosmos_fast.evaluate.retrieval import retrieval_metrics
from cosmos_fast.evaluate.scenes import Meta, SceneObject, SceneSet
from cosmos_fast.evaluate.segmentation import SegmentationProtocol, class_iou, mean_iou
from cosmos_fast.evaluate.segmented_scenes import Advance, class_of, confusions, segment_texts, text_encoder
from cosmos_fast.model.cosmos import CosmosModel
from cosmos_fast.utils.errors import UserError

TASKS = ("retrieval", "classification", "segmentation")
BATCH_SIZE = 64
CROP_MARGIN = 0.15


@dataclass(frozen=True)
class TaskResult:
    """metrics and chance share their keys. protocol: what was done, JSON-ready."""

    metrics: dict[str, float]
    chance: dict[str, float]
    protocol: dict[str, Any] = field(default_factory=dict)


def evaluate(
    model: CosmosModel,
    scenes: SceneSet,
    task: str,
    on_scene: Advance = lambda: None,
    division: Division = ALONE,
) -> TaskResult:
    """Run one of TASKS; on several ranks all get the result, which is that of one process.

    on_scene: called once a scene of this rank (twice for segmentation: without and with CSA).
    """
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
            return run[task](model, scenes, on_scene, division)
    finally:
        model.train(training)


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


def pair_features(
    model: CosmosModel, scenes: SceneSet, on_scene: Advance = lambda: None, division: Division = ALONE
) -> PairFeatures:
    """Encode every scene and all its raw captions. UserError if the weights give NaN or infinite features."""
    captions: list[list[list[str]]] = []  # block, scene, caption
    images: list[Tensor] = []
    size = model.config.vision.image_size
    with division.together():
        for number in division.own(scenes.blocks):
            captions.append([])
            views = []
            for scene in scenes.block(number):
                captions[-1].append(list(scene.captions))
                views.append(to_tensor(eval_crop(scene.image, size)))
                on_scene()
            images.append(encode_images(model, batches(views)))
    of_scenes = [one for block in division.join(captions) for one in block]
    scenes.check_usable(len(of_scenes))
    texts = [text for one in of_scenes for text in one]
    owner = [i for i, one in enumerate(of_scenes) for _ in one]
    image_ND = division.cat(images)
    text_MD = encode_texts(model, texts, text_encoder(model), division=division)
    if not (image_ND.isfinite().all() and text_MD.isfinite().all()):
        raise UserError(
            "the model's features hold NaN or infinite values: its weights are unusable, take another checkpoint"
        )
    return PairFeatures(image_ND, text_MD, torch.tensor(owner, device=image_ND.device), tuple(texts))


def evaluate_retrieval(
    model: CosmosModel, scenes: SceneSet, on_scene: Advance = lambda: None, division: Division = ALONE
) -> TaskResult:
    """Raw captions against images, both ways."""
    pairs = pair_features(model, scenes, on_scene, division)
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


def evaluate_classification(
    model: CosmosModel, scenes: SceneSet, on_scene: Advance = lambda: None, division: Division = ALONE
) -> TaskResult:
    """Objects, each cut out with its box, named by prompt ensembles among shapes, colours, and pairs of both."""
    meta = scenes.require_meta("classification")
    labels: list[list[dict[str, int]]] = []  # block, object
    crops: list[Tensor] = []
    with division.together():
        for number in division.own(scenes.blocks):
            labels.append([])
            views = []
            for scene in scenes.block(number):
                for thing in scene.objects:
                    labels[-1].append(_labels(meta, thing))
                    views.append(object_view(scene.image, thing.box, model.config.vision.image_size, CROP_MARGIN))
                on_scene()
            crops.append(encode_images(model, batches(views)))
    things = [thing for block in division.join(labels) for thing in block]
    if not things:
        raise UserError(f"classification needs objects in the records and masks in {scenes.name}: there are none")
    image_ND = division.cat(crops)
    metrics: dict[str, float] = {}
    expected: dict[str, float] = {}
    for kind, classes in (("shape", meta.shapes), ("colour", meta.colours), ("pair", meta.pairs)):
        class_CD = class_features(model, classes, text_encoder(model), division)
        target = torch.tensor([thing[kind] for thing in things], device=image_ND.device)
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


def _labels(meta: Meta, thing: SceneObject) -> dict[str, int]:
    shape, colour = class_of(meta.shapes.classes, thing.shape), class_of(meta.colours.classes, thing.colour)
    return {"shape": shape, "colour": colour, "pair": colour * len(meta.shapes.classes) + shape}


def _count(prompts: tuple[tuple[tuple[str, ...], ...], ...]) -> int:
    return sum(len(wording) for wordings in prompts for wording in wordings)


def evaluate_segmentation(
    model: CosmosModel, scenes: SceneSet, on_scene: Advance = lambda: None, division: Division = ALONE
) -> TaskResult:
    """Background against shapes, and against colours, by the protocol of `segmentation`, without and with CSA."""
    meta = scenes.require_meta("segmentation")
    texts = segment_texts(model, meta, division)
    images, tables = confusions(model, scenes, texts, on_scene, division)
    if not images:
        raise UserError(f"segmentation needs mask.png members in {scenes.name}: there are none")
    metrics: dict[str, float] = {}
    expected: dict[str, float] = {}
    constant: dict[str, float] = {}
    for suffix, confusion in tables.items():
        for kind, table_CC in confusion.items():
            metrics[f"{kind}_miou{suffix}"] = mean_iou(table_CC)
            ious = zip(texts.names[kind], class_iou(table_CC).tolist(), strict=True)
            metrics |= {f"{kind}_iou{suffix}_{name}": 100 * iou for name, iou in ious if not math.isnan(iou)}
            pixels = table_CC.sum(dim=1).tolist()
            expected[f"{kind}_miou{suffix}"] = chance.segmentation_chance(pixels)
            constant[kind] = chance.constant_segmentation(pixels)
    protocol = {
        "images": images,
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
