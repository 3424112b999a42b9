"""Examples of a report: what the model says about a few held-out scenes, drawn by a fixed seed and not chosen."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from PIL import Image

from cosmos_fast.config import SourceConfig, TrainConfig
from cosmos_fast.data.images import denormalize, eval_crop, to_tensor
from cosmos_fast.data.loader import build_loader
from cosmos_fast.data.tokenizer import tokenize
from cosmos_fast.evaluate.attention import END, START, WordWeight, patch_map, word_spans, word_weights
from cosmos_fast.evaluate.report import pictures
from cosmos_fast.evaluate.scenes import Meta, Scene, SceneSet
from cosmos_fast.evaluate.segmented_scenes import segment_scenes, segment_texts, segment_truth
from cosmos_fast.evaluate.tasks import PairFeatures
from cosmos_fast.model.cosmos import CosmosModel
from cosmos_fast.utils.errors import UserError

SEED = 7
RETRIEVAL_SCENES, CAPTION_QUERIES, ATTENTION_SCENES, SEGMENTED_SCENES = 6, 4, 4, 6


@dataclass(frozen=True)
class Guess:
    """One retrieved item. picture is set for image results, text for caption results."""

    right: bool
    score: float
    text: str = ""
    picture: bytes = b""


@dataclass(frozen=True)
class Retrieved:
    """A query, its best answers, and the rank of the first right one (`right_text`, for image queries)."""

    guesses: list[Guess]
    rank: int
    text: str = ""
    right_text: str = ""
    picture: bytes = b""


@dataclass(frozen=True)
class Attended:
    """A scene, where captions look (text, overlay), and which words the image looks at."""

    picture: bytes
    overlays: list[tuple[str, bytes]]
    words: list[WordWeight]
    padding_share: float


@dataclass(frozen=True)
class Segmented:
    picture: bytes
    truth: bytes
    plain: bytes
    csa: bytes


@dataclass(frozen=True)
class View:
    picture: bytes
    side: int
    is_global: bool
    caption: str


def sample_scenes(scenes: Sequence[Scene], count: int, salt: int = 0) -> list[int]:
    """Indices of `count` scenes, the same for every report on the same data."""
    return sorted(random.Random(SEED + salt).sample(range(len(scenes)), min(count, len(scenes))))


def image_queries(pairs: PairFeatures, scenes: Sequence[Scene], top: int = 3) -> list[Retrieved]:
    """A few images and the captions that score highest for them."""
    found = []
    for i in sample_scenes(scenes, RETRIEVAL_SCENES):
        scores_M = pairs.text_MD @ pairs.image_ND[i]
        order = scores_M.argsort(descending=True)
        right = pairs.owner_M[order] == i
        guesses = [
            Guess(bool(right[k]), float(scores_M[j]), text=pairs.texts[int(j)]) for k, j in enumerate(order[:top])
        ]
        picture = pictures.jpeg(eval_crop(scenes[i].image, 240))
        first = int(right.nonzero()[0])
        found.append(Retrieved(guesses, first + 1, right_text=pairs.texts[int(order[first])], picture=picture))
    return found


def caption_queries(pairs: PairFeatures, scenes: Sequence[Scene], top: int = 5) -> list[Retrieved]:
    """A few captions and the images that score highest for them."""
    found = []
    for i in sample_scenes(scenes, CAPTION_QUERIES, salt=1):
        j = int((pairs.owner_M == i).nonzero()[0])
        scores_N = pairs.image_ND @ pairs.text_MD[j]
        order = scores_N.argsort(descending=True)
        guesses = [
            Guess(int(n) == i, float(scores_N[n]), picture=pictures.jpeg(eval_crop(scenes[int(n)].image, 200)))
            for n in order[:top]
        ]
        found.append(Retrieved(guesses, int((order == i).nonzero()[0]) + 1, text=pairs.texts[j]))
    return found


@torch.inference_mode()
def attention_examples(model: CosmosModel, scenes: Sequence[Scene]) -> list[Attended]:
    """Cross-attention of a few scenes; none for a model without cross-attention."""
    if not model.config.crossmodal:
        return []
    device = next(model.parameters()).device
    size = model.config.vision.image_size
    found = []
    for i in sample_scenes(scenes, ATTENTION_SCENES, salt=2):
        scene = scenes[i]
        crop = eval_crop(scene.image, size)
        texts = [scene.captions[0], *scene.long_sentences[:3]]
        tokens_BL = tokenize(texts, model.config.text.context_length).to(device)
        maps = model.cross_attention_maps(to_tensor(crop)[None].expand(len(texts), -1, -1, -1).to(device), tokens_BL)
        large = eval_crop(scene.image, pictures.SIDE)
        overlays = [
            (text, pictures.jpeg(pictures.heat_overlay(large, patch_map(maps.image_BHP[b]).cpu().numpy())))
            for b, text in enumerate(texts)
        ]
        words, padding = word_weights(maps.text_BHL[0].cpu(), tokens_BL[0].cpu())
        found.append(Attended(pictures.jpeg(large), overlays, words, padding))
    return found


@torch.inference_mode()
def segmentation_examples(model: CosmosModel, scenes: Sequence[Scene], meta: Meta, kind: str) -> list[Segmented]:
    """A few scenes with their true and predicted maps of shapes or colours, without and with CSA."""
    chosen = [scenes[i] for i in sample_scenes(scenes, SEGMENTED_SCENES, salt=3) if scenes[i].mask_HW is not None]
    texts = segment_texts(model, meta)
    colours = pictures.class_colours(texts.names[kind][1:])
    maps = [list(segment_scenes(model, chosen, texts, csa)) for csa in (False, True)]
    found = []
    for scene, plain, csa in zip(chosen, *maps, strict=True):
        truth = segment_truth(scene, texts.names[kind], kind)
        overlays = [
            pictures.png(pictures.class_overlay(scene.image, m.numpy(), colours))
            for m in (truth, plain[kind], csa[kind])
        ]
        found.append(Segmented(pictures.jpeg(pictures.enlarge(scene.image)), *overlays))
    return found


def view_examples(config: TrainConfig, scenes: SceneSet) -> list[View]:
    """The first training sample as the student sees it; a held-out one where the training shards are out of reach."""
    try:
        return _views_of(config, config.data.train)
    except UserError:
        return _views_of(config, scenes.sources)


def _views_of(config: TrainConfig, sources: tuple[SourceConfig, ...]) -> list[View]:
    # The loader itself, so that these are the pixels and tokens of training, not a second rendering of them; with
    # PIL, which is there wherever a report is made.
    loader = build_loader(
        replace(config.data, train=sources, workers=0, loader="pil"),
        image_size=config.model.vision.image_size,
        context_length=config.model.text.context_length,
        seed=config.seed,
        batch_size=1,
    )
    try:
        batch = next(iter(loader))
    finally:
        loader.close()
    views = []
    for v, (image_13HW, ids_1L) in enumerate(zip(batch.images, batch.texts, strict=False)):
        crop = Image.fromarray(denormalize(image_13HW)[0].permute(1, 2, 0).contiguous().numpy())
        picture = pictures.png(pictures.enlarge(crop, 4 * crop.width, smooth=False))
        caption = " ".join(word for word, _ in word_spans(ids_1L[0].tolist()) if word not in (START, END))
        views.append(
            View(picture, crop.width, v < config.data.views.global_crops, caption.replace(" .", ".").replace(" ,", ","))
        )
    return views
