"""What a model ranks first among the images or captions of a gallery.

Axis legend: N images, M captions, Q queries, D embed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from PIL import Image
from torch import Tensor

from cosmos_fast.data.images import eval_crop, to_tensor
from cosmos_fast.evaluate.classification import encode_images
from cosmos_fast.evaluate.feeding import encode_blocks
from cosmos_fast.evaluate.pictures import drawing
from cosmos_fast.evaluate.pictures.album import Sheet
from cosmos_fast.evaluate.pictures.sources import Source
from cosmos_fast.evaluate.prompts import encode_texts
from cosmos_fast.evaluate.report.pictures import enlarge, jpeg
from cosmos_fast.evaluate.segmented_scenes import text_encoder
from cosmos_fast.evaluate.set_runs import check_finite
from cosmos_fast.evaluate.tasks import BATCH_SIZE
from cosmos_fast.model.cosmos import CosmosModel

SIDE = 220


@dataclass(frozen=True)
class Answer:
    """One ranked item. right: None where nobody knows. picture: of images."""

    score: float
    right: bool | None
    text: str
    picture: bytes = b""


@dataclass(frozen=True)
class Ranked:
    """A query and its best answers. rank: of the first right answer, None where nobody knows one."""

    query: str
    answers: list[Answer]
    rank: int | None
    picture: bytes = b""


@dataclass(frozen=True)
class Gallery:
    """A source with its features: of images [N, D], of all their captions [M, D]; owner_M is the image of each."""

    source: Source
    image_ND: Tensor
    text_MD: Tensor
    owner_M: Tensor
    texts: tuple[str, ...] = field(default=())


@dataclass(frozen=True)
class Query:
    """A text, or an image (then `text` is its name). owner: the image of the gallery that it belongs to, or is."""

    text: str
    image: Image.Image | None = None
    owner: int | None = None


@torch.inference_mode()
def encode_gallery(
    model: CosmosModel, source: Source, texts: bool, on_image: Callable[[], None] = lambda: None
) -> Gallery:
    """Features of all images, and of all captions if `texts`. UserError: a broken image, features that are NaN."""
    size, count = model.config.vision.image_size, len(source)
    blocks = [range(start, min(start + BATCH_SIZE, count)) for start in range(0, count, BATCH_SIZE)]
    image_ND = torch.cat(encode_blocks(model, source.images, blocks, size, on_image=on_image))
    captions = [text for own in source.captions for text in own] if texts else []
    owner = [number for number, own in enumerate(source.captions) for _ in own] if texts else []
    text_MD = _encode(model, captions) if captions else image_ND[:0]
    check_finite(image_ND)
    return Gallery(source, image_ND, text_MD, torch.tensor(owner, device=image_ND.device).long(), tuple(captions))


@torch.inference_mode()
def retrieval_sheets(
    model: CosmosModel,
    gallery: Gallery,
    queries: Sequence[Query],
    top: int,
    on_sheet: Callable[[], None] = lambda: None,
) -> Iterator[Sheet]:
    """A sheet a query: texts rank images; images rank captions where the gallery has some, else images."""
    for query in queries:
        if query.image is None:
            feature_D = _encode(model, [query.text])[0]
            yield _images_sheet(gallery, query, feature_D, top)
        else:
            view_3HW = to_tensor(eval_crop(query.image, model.config.vision.image_size))
            feature_D = encode_images(model, [view_3HW[None]])[0]
            rank = _captions_sheet if gallery.texts else _images_sheet
            yield rank(gallery, query, feature_D, top)
        on_sheet()


def best(scores: Tensor, top: int) -> list[int]:
    """Numbers of the highest scores, highest first; of equal ones the first comes first."""
    return scores.sort(descending=True, stable=True).indices[:top].tolist()


def first_right(scores: Tensor, right: Tensor) -> int | None:
    """Rank of the best right item, ties against it (as `evaluate.retrieval` counts); None if there is none."""
    if not bool(right.any()):
        return None
    return int((~(scores < scores[right].max()) & ~right).sum()) + 1


def _images_sheet(gallery: Gallery, query: Query, feature_D: Tensor, top: int) -> Sheet:
    """The images nearest to a text, or to an image."""
    scores_N = gallery.image_ND @ feature_D
    check_finite(scores_N)
    right_N = torch.zeros(len(scores_N), dtype=torch.bool, device=scores_N.device)
    if query.owner is not None:
        right_N[query.owner] = True
    if query.image is None:  # a caption may be true of several images
        right_N[[n for n, own in enumerate(gallery.source.captions) if query.text in own]] = True
    known = bool(right_N.any())
    answers, drawn, images = [], [], gallery.source.images
    for number in best(scores_N, top):
        picture = eval_crop(images.image(number), SIDE)
        right = bool(right_N[number]) if known else None
        answers.append(Answer(float(scores_N[number]), right, images.key(number), jpeg(picture)))
        label = drawing.text_block(f"{_mark(right)}{float(scores_N[number]):.3f}  {images.key(number)}", SIDE, most=2)
        drawn.append(drawing.stacked([drawing.framed(picture, _colour(right), 5), label]))
    return _sheet(query, answers, first_right(scores_N, right_N), drawing.rows(drawn, across=5))


def _captions_sheet(gallery: Gallery, query: Query, feature_D: Tensor, top: int) -> Sheet:
    """The captions nearest to an image."""
    scores_M = gallery.text_MD @ feature_D
    check_finite(scores_M)
    known = query.owner is not None
    right_M = torch.eq(gallery.owner_M, -1 if query.owner is None else query.owner)
    answers, drawn = [], []
    for number in best(scores_M, top):
        right = bool(right_M[number]) if known else None
        answers.append(Answer(float(scores_M[number]), right, gallery.texts[number]))
        line = f"{_mark(right)}{float(scores_M[number]):.3f}   {gallery.texts[number]}"
        colour = drawing.INK if right is None else drawing.GOOD if right else drawing.FAINT
        drawn.append(drawing.text_block(line, 720, colour=colour, most=3))
    return _sheet(query, answers, first_right(scores_M, right_M), drawing.stacked(drawn, gap=10))


def _sheet(query: Query, answers: list[Answer], rank: int | None, drawn: Image.Image) -> Sheet:
    found = [] if rank is None else [drawing.text_block(rank_words(rank), drawn.width, colour=drawing.FAINT)]
    if query.image is None:
        picture, parts = b"", [*found, drawn]
    else:
        small = enlarge(query.image, SIDE)
        picture, parts = jpeg(small), [drawing.rows([small, drawing.stacked([*found, drawn])], across=2)]
    numbers = {
        "query": query.text,
        "by": "text" if query.image is None else "image",
        "rank_of_the_right_one": rank,
        "answers": [{"item": a.text, "score": round(a.score, 6), "right": a.right} for a in answers],
    }
    title = f"“{query.text}”" if query.image is None else query.text
    return Sheet(query.text, drawing.titled(title, parts), Ranked(query.text, answers, rank, picture), numbers)


def rank_words(rank: int) -> str:
    return "the right one comes first" if rank == 1 else f"the right one is at rank {rank}"


def _mark(right: bool | None) -> str:
    return "" if right is None else "✓ " if right else "✗ "


def _colour(right: bool | None) -> drawing.Colour:
    return drawing.GOOD if right else drawing.LINE


def _encode(model: CosmosModel, texts: Sequence[str]) -> Tensor:
    return encode_texts(model, texts, text_encoder(model))
