"""Published evaluation sets on a model: retrieval, classification and segmentation, by the paper's protocols.

A block of images is a batch of the model, and ranks take whole blocks, so that any number of ranks comes to the same
bits. Axis legend: N images, M captions, C classes, D embed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cosmos_fast.evaluate import chance
from cosmos_fast.evaluate.classification import classification_metrics, first_of_same
from cosmos_fast.evaluate.datasets.sets import ClassificationSet, EvalSet, RetrievalSet, SegmentationSet
from cosmos_fast.evaluate.division import ALONE, Division
from cosmos_fast.evaluate.encoder import Model
from cosmos_fast.evaluate.feeding import encode_blocks, reader_threads
from cosmos_fast.evaluate.prompts import class_features, encode_texts
from cosmos_fast.evaluate.retrieval import retrieval_metrics
from cosmos_fast.evaluate.segmented_sets import evaluate_segmentation_set
from cosmos_fast.evaluate.set_runs import DEFAULT, Settings, check_finite, class_protocol, counted_tokenizer
from cosmos_fast.evaluate.tasks import TaskResult
from cosmos_fast.utils.errors import UserError


def evaluate_set(model: Model, found: EvalSet, settings: Settings = DEFAULT, division: Division = ALONE) -> TaskResult:
    """Metrics, chance and protocol of one set; on several ranks all get them, which are those of one process.

    UserError: a broken image, on any rank; features that are not finite.
    """
    with torch.no_grad():
        if isinstance(found, RetrievalSet):
            result = evaluate_retrieval_set(model, found, settings, division)
        elif isinstance(found, ClassificationSet):
            result = evaluate_classification_set(model, found, settings, division)
        elif isinstance(found, SegmentationSet):
            result = evaluate_segmentation_set(model, found, settings, division)
        else:
            raise UserError(f"{found.name}: no task is known for a {type(found).__name__}")
    common = {"images": len(found.images), "batch_size": settings.batch_size, "precision": settings.precision}
    return TaskResult(result.metrics, result.chance, common | result.protocol)


def image_features(model: Model, found: EvalSet, settings: Settings, division: Division) -> Tensor:
    """Normalised features [N, D] float32 of all images, on every rank. UserError."""
    count, size = len(found.images), settings.batch_size
    blocks = [range(start, min(start + size, count)) for start in range(0, count, size)]
    with division.together():
        own = encode_blocks(
            model,
            found.images,
            [blocks[number] for number in division.own(len(blocks))],
            model.config.vision.image_size,
            reader_threads(division.ranks.local_world_size),
            settings.on_image,
        )
    return check_finite(division.cat(own))


def evaluate_retrieval_set(
    model: Model, found: RetrievalSet, settings: Settings = DEFAULT, division: Division = ALONE
) -> TaskResult:
    """All captions against all images, both ways."""
    image_ND = image_features(model, found, settings, division)
    texts = [text for captions in found.captions for text in captions]
    owner_M = torch.tensor([i for i, captions in enumerate(found.captions) for _ in captions], device=image_ND.device)
    text_MD = encode_texts(model, texts, counted_tokenizer(model, settings), division=division)
    return TaskResult(
        retrieval_metrics(image_ND, check_finite(text_MD), owner_M),
        chance.retrieval_chance([len(captions) for captions in found.captions]),
        {"captions": len(texts), "rank": "best own caption; a tie with another image's caption counts as a miss"},
    )


def evaluate_classification_set(
    model: Model, found: ClassificationSet, settings: Settings = DEFAULT, division: Division = ALONE
) -> TaskResult:
    """Every image against an ensemble of prompts a class."""
    image_ND = image_features(model, found, settings, division)
    class_CD = class_features(model, found.classes, counted_tokenizer(model, settings), division)
    label_N = torch.tensor(found.labels, device=image_ND.device)
    classes = len(class_CD)
    return TaskResult(
        classification_metrics(image_ND, check_finite(class_CD), label_N, first_of_same(found.classes)),
        chance.classification_chance(classes) | {"mean_per_class": 100.0 / classes},
        class_protocol(found.classes, "normalise each prompt, mean over wordings and templates, normalise"),
    )


def texts_of(found: EvalSet) -> int:
    """How many different texts a set asks a model for, over all ranks."""
    if isinstance(found, RetrievalSet):
        return len({text for captions in found.captions for text in captions})
    if isinstance(found, (ClassificationSet, SegmentationSet)):
        return len({p for wordings in found.classes.prompts for wording in wordings for p in wording})
    return 0
