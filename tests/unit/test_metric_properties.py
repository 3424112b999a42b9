"""Metrics of retrieval, classification and segmentation against what their definitions say, on anything small.

Features are small whole numbers: scores are exact, and ties are frequent.
"""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cosmos_fast.evaluate import classification, retrieval
from cosmos_fast.evaluate.segmentation import IGNORE, class_iou, confusion_matrix, mean_iou

checked = settings(max_examples=60, deadline=None)
SEEDS = st.integers(0, 2**32 - 1)
BLOCKS = st.sampled_from([1, 7, 40, 10**6])
LEVELS = st.sampled_from([0, 1, 4])  # entries of features from -level to level; of 0 all scores tie


def whole_numbers(rng: random.Random, rows: int, level: int) -> Tensor:
    return torch.tensor([[float(rng.randint(-level, level)) for _ in range(3)] for _ in range(rows)])


def pessimist(scores: Sequence[float], own: set[int]) -> int:
    """Place of the first own item when the list is sorted by score, NaN and equal scores of others first."""
    key = [(-math.inf if math.isnan(score) else -score, index in own) for index, score in enumerate(scores)]
    return 1 + next(place for place, index in enumerate(sorted(range(len(key)), key=key.__getitem__)) if index in own)


def dot(a: Tensor, b: Tensor) -> float:
    return sum(x * y for x, y in zip(a.tolist(), b.tolist(), strict=True))


@dataclass
class Gallery:
    image_ND: Tensor
    text_MD: Tensor
    owner: list[int]

    def ranks(self) -> tuple[list[int], list[int]]:
        """As the product has them."""
        owner_M = torch.tensor(self.owner)
        i2t = retrieval.image_to_text_ranks(self.image_ND, self.text_MD, owner_M)
        return i2t.tolist(), retrieval.text_to_image_ranks(self.text_MD, self.image_ND, owner_M).tolist()


@st.composite
def galleries(draw: st.DrawFn) -> Gallery:
    """1 to 12 images of 1 to 4 captions each, in any order."""
    rng = random.Random(draw(SEEDS))
    images = draw(st.integers(1, 12))
    owner = [image for image in range(images) for _ in range(rng.randint(1, 4))]
    rng.shuffle(owner)
    level = draw(LEVELS)
    return Gallery(whole_numbers(rng, images, level), whole_numbers(rng, len(owner), level), owner)


@checked
@given(galleries(), BLOCKS)
def test_ranks_are_the_places_in_a_list_that_a_pessimist_sorts(gallery: Gallery, block: int) -> None:
    image_ND, text_MD, owner = gallery.image_ND, gallery.text_MD, gallery.owner
    with mock.patch.object(retrieval, "BLOCK_ELEMENTS", block):
        i2t, t2i = gallery.ranks()
    captions = [{j for j, image in enumerate(owner) if image == i} for i in range(len(image_ND))]
    assert i2t == [pessimist([dot(image, text) for text in text_MD], captions[i]) for i, image in enumerate(image_ND)]
    assert t2i == [pessimist([dot(text, image) for image in image_ND], {owner[j]}) for j, text in enumerate(text_MD)]


@checked
@given(galleries(), SEEDS, BLOCKS)
def test_nan_stands_before_whatever_is_searched_for(gallery: Gallery, seed: int, block: int) -> None:
    """A score that is NaN counts as ahead; an own one that is NaN loses to all, its better siblings included."""
    rng = random.Random(seed)
    image_ND, text_MD, owner = gallery.image_ND.clone(), gallery.text_MD.clone(), gallery.owner
    for rows in (image_ND, text_MD):
        rows[rng.randrange(len(rows))] = math.nan
    with mock.patch.object(retrieval, "BLOCK_ELEMENTS", block):
        i2t, t2i = Gallery(image_ND, text_MD, owner).ranks()
    nan_image, nan_text = image_ND.isnan().any(dim=1).tolist(), text_MD.isnan().any(dim=1).tolist()
    for i, image in enumerate(image_ND):
        own = {j for j, found in enumerate(owner) if found == i}
        lost = nan_image[i] or any(nan_text[j] for j in own)
        last = len(owner) - len(own) + 1
        assert i2t[i] == (last if lost else pessimist([dot(image, text) for text in text_MD], own))
    for j, text in enumerate(text_MD):
        lost = nan_text[j] or nan_image[owner[j]]
        assert t2i[j] == (len(image_ND) if lost else pessimist([dot(text, image) for image in image_ND], {owner[j]}))


@checked
@given(galleries(), SEEDS)
def test_the_order_of_images_and_captions_changes_no_rank(gallery: Gallery, seed: int) -> None:
    rng = random.Random(seed)
    images, captions = list(range(len(gallery.image_ND))), list(range(len(gallery.owner)))
    rng.shuffle(images)
    rng.shuffle(captions)
    place = {image: row for row, image in enumerate(images)}
    owner = [place[gallery.owner[j]] for j in captions]
    i2t, t2i = gallery.ranks()
    moved = Gallery(gallery.image_ND[images], gallery.text_MD[captions], owner).ranks()
    assert moved == ([i2t[image] for image in images], [t2i[j] for j in captions])


@checked
@given(st.lists(st.integers(1, 30), min_size=1, max_size=40))
def test_recall_and_means_are_counted(ranks: list[int]) -> None:
    found = retrieval.rank_metrics(torch.tensor(ranks), "t2i")
    expected = {f"t2i_r{k}": 100 * sum(rank <= k for rank in ranks) / len(ranks) for k in (1, 5, 10)}
    means = {"t2i_mean_rank": statistics.mean(ranks), "t2i_median_rank": statistics.median(ranks)}
    assert found == pytest.approx(expected | means)
    assert found["t2i_median_rank"] == statistics.median(ranks)  # a half is a half


@dataclass
class Answers:
    """Whole-numbered features of images and classes, and the label of each image."""

    image_BD: Tensor
    class_CD: Tensor
    labels: list[int]

    def scores(self, row: int) -> list[float]:
        return [dot(self.image_BD[row], one) for one in self.class_CD]


@st.composite
def answers(draw: st.DrawFn) -> Answers:
    rng = random.Random(draw(SEEDS))
    images, classes, level = draw(st.integers(1, 30)), draw(st.integers(1, 8)), draw(LEVELS)
    labels = [rng.randrange(classes) for _ in range(images)]
    return Answers(whole_numbers(rng, images, level), whole_numbers(rng, classes, level), labels)


@checked
@given(answers(), BLOCKS, st.lists(st.integers(1, 10), min_size=1, max_size=3, unique=True))
def test_top_k_and_mean_per_class_are_counted(given_: Answers, block: int, ks: list[int]) -> None:
    labels = given_.labels
    ranks = [pessimist(given_.scores(row), {label}) for row, label in enumerate(labels)]
    arguments = (given_.image_BD, given_.class_CD, torch.tensor(labels))
    with mock.patch.object(classification, "BLOCK_ELEMENTS", block):
        found = classification.top_k_accuracy(*arguments, ks=ks)
        metrics = classification.classification_metrics(*arguments)

    def top(k: int, among: Callable[[int], bool] = lambda label: True) -> float:
        hits = [rank <= k for rank, label in zip(ranks, labels, strict=True) if among(label)]
        return 100 * sum(hits) / len(hits)

    assert found == pytest.approx({f"top{k}": top(k) for k in ks})
    of_classes = [top(1, lambda label, one=one: label == one) for one in sorted(set(labels))]
    mean = sum(of_classes) / len(of_classes)
    assert metrics == pytest.approx({"top1": top(1), "top5": top(5), "mean_per_class": mean})


@checked
@given(answers(), BLOCKS, SEEDS)
def test_of_classes_with_the_same_prompts_the_first_is_the_answer(given_: Answers, block: int, seed: int) -> None:
    rng = random.Random(seed)
    classes = range(len(given_.class_CD))
    kinds = [rng.choice(classes) for _ in classes]
    same = [kinds.index(kind) for kind in kinds]  # the first class of each kind, whose feature all of it have
    class_CD = given_.class_CD[same]
    with mock.patch.object(classification, "BLOCK_ELEMENTS", block):
        arguments = (given_.image_BD, class_CD, torch.tensor(given_.labels), torch.tensor(same))
        found = classification.class_ranks(*arguments).tolist()
    for row, (rank, label) in enumerate(zip(found, given_.labels, strict=True)):
        scores = Answers(given_.image_BD, class_CD, []).scores(row)
        ahead = [one for one in classes if same[one] != same[label] and scores[one] >= scores[label]]
        before = [one for one in range(label) if same[one] == same[label]]
        assert rank == 1 + len(ahead) + len(before)


@dataclass
class Maps:
    """Some images' predicted and true classes, of several sizes; nothing is known of the truth's IGNORE."""

    predicted: list[Tensor]
    truth: list[Tensor]
    classes: int

    def table(self) -> Tensor:
        tables = [confusion_matrix(*pair, self.classes) for pair in zip(self.predicted, self.truth, strict=True)]
        return torch.stack(tables).sum(dim=0)

    def pixels(self) -> list[tuple[int, int]]:
        """Predicted and true class of every pixel that counts."""
        flat = [torch.cat([one.flatten() for one in maps]).tolist() for maps in (self.predicted, self.truth)]
        return [(p, t) for p, t in zip(*flat, strict=True) if t != IGNORE]


@st.composite
def class_maps(draw: st.DrawFn) -> Maps:
    generator = torch.Generator().manual_seed(draw(SEEDS))
    classes, used = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    ignored = draw(st.sampled_from([0.0, 0.3, 1.0]))
    found = Maps([], [], classes)
    for _ in range(draw(st.integers(1, 3))):
        shape = (draw(st.integers(1, 6)), draw(st.integers(1, 6)))
        both = torch.randint(0, min(classes, used), (2, *shape), generator=generator, dtype=torch.uint8)
        found.predicted.append(both[0])
        found.truth.append(both[1].masked_fill(torch.rand(shape, generator=generator) < ignored, IGNORE))
    return found


@checked
@given(class_maps())
def test_iou_is_of_sets_of_pixels(maps: Maps) -> None:
    pixels = maps.pixels()
    of_classes = []
    for one in range(maps.classes):
        called, true = ({n for n, pair in enumerate(pixels) if pair[side] == one} for side in (0, 1))
        of_classes.append(len(called & true) / len(called | true) if called | true else math.nan)
    table_CC = maps.table()
    assert int(table_CC.sum()) == len(pixels)
    assert class_iou(table_CC).tolist() == pytest.approx(of_classes, nan_ok=True)
    shown = [iou for iou in of_classes if not math.isnan(iou)]
    expected = 100 * sum(shown) / len(shown) if shown else math.nan
    assert mean_iou(table_CC) == pytest.approx(expected, nan_ok=True)
