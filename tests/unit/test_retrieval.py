"""Retrieval metrics against brute force, ties, chunking, and their chance level against simulation."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cosmos_fast.evaluate import retrieval
from cosmos_fast.evaluate.chance import retrieval_chance


def brute_force_i2t(image: torch.Tensor, text: torch.Tensor, owner: list[int]) -> list[int]:
    ranks = []
    for i in range(len(image)):
        scores = [float(image[i] @ text[j]) for j in range(len(text))]
        best = max(scores[j] for j in range(len(text)) if owner[j] == i)
        ranks.append(1 + sum(1 for j in range(len(text)) if owner[j] != i and scores[j] >= best))
    return ranks


def brute_force_t2i(image: torch.Tensor, text: torch.Tensor, owner: list[int]) -> list[int]:
    ranks = []
    for j in range(len(text)):
        scores = [float(text[j] @ image[i]) for i in range(len(image))]
        ranks.append(1 + sum(1 for i in range(len(image)) if i != owner[j] and scores[i] >= scores[owner[j]]))
    return ranks


def random_gallery(images: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """Small whole-number features: scores are exact, and ties are frequent."""
    generator = torch.Generator().manual_seed(seed)
    rng = random.Random(seed)
    owner = [i for i in range(images) for _ in range(rng.randint(1, 4))]
    rng.shuffle(owner)
    image = torch.randint(-2, 3, (images, 3), generator=generator).float()
    text = torch.randint(-2, 3, (len(owner), 3), generator=generator).float()
    return image, text, owner


@pytest.mark.parametrize(("images", "block"), [(1, 4), (7, 1), (23, 64), (23, 10**6)])
def test_ranks_equal_brute_force_with_ties_in_any_chunking(
    monkeypatch: pytest.MonkeyPatch, images: int, block: int
) -> None:
    monkeypatch.setattr(retrieval, "BLOCK_ELEMENTS", block)
    for seed in range(5):
        image, text, owner = random_gallery(images, seed)
        i2t = retrieval.image_to_text_ranks(image, text, torch.tensor(owner))
        t2i = retrieval.text_to_image_ranks(text, image, torch.tensor(owner))
        assert i2t.tolist() == brute_force_i2t(image, text, owner)
        assert t2i.tolist() == brute_force_t2i(image, text, owner)


def test_metrics_are_read_off_the_ranks() -> None:
    metrics = retrieval.rank_metrics(torch.tensor([1, 1, 4, 5, 10, 11, 300, 6]), "i2t")
    assert metrics == {
        "i2t_r1": 25.0,
        "i2t_r5": 50.0,
        "i2t_r10": 75.0,
        "i2t_mean_rank": 338 / 8,
        "i2t_median_rank": 5.5,
    }


def test_perfect_features_score_100_and_the_worst_score_last() -> None:
    image = torch.eye(12)
    owner = torch.arange(12).repeat_interleave(2)
    perfect = retrieval.retrieval_metrics(image, image[owner], owner)
    assert perfect["i2t_r1"] == perfect["t2i_r1"] == 100.0
    worst = retrieval.retrieval_metrics(image, -image[owner], owner)
    assert worst["i2t_mean_rank"] == 24 - 1
    assert worst["t2i_mean_rank"] == 12


@pytest.mark.parametrize("value", [1.0, math.nan])
def test_collapsed_or_nan_features_score_nothing(value: float) -> None:
    image, text = torch.full((20, 4), value), torch.full((20, 4), value)
    metrics = retrieval.retrieval_metrics(image, text, torch.arange(20))
    assert metrics["i2t_r10"] == metrics["t2i_r10"] == 0.0
    assert metrics["i2t_mean_rank"] == 20


@pytest.mark.parametrize("dim", [16, 32, 64, 512])
def test_equal_features_tie_wherever_their_columns_stand(dim: int) -> None:
    for images in (2, 3, 5, 7, 11, 50, 101):
        generator = torch.Generator().manual_seed(images)
        features = functional.normalize(torch.randn(images, dim, generator=generator), dim=1)
        features[-1] = features[0]
        owner = torch.arange(images)  # every caption is its image, and one image is there twice
        for ranks in (retrieval.image_to_text_ranks, retrieval.text_to_image_ranks):
            assert ranks(features, features.clone(), owner).tolist() == [2, *[1] * (images - 2), 2]


@pytest.mark.parametrize("kind", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("block", [1, 10**6])
def test_equal_rows_are_those_of_equal_bits(monkeypatch: pytest.MonkeyPatch, block: int, kind: torch.dtype) -> None:
    monkeypatch.setattr(retrieval, "BLOCK_ELEMENTS", block)
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(-1, 2, (60, 3), generator=generator).to(kind)
    rows[20] = rows[50] = math.nan
    listed = [str(row) for row in rows.tolist()]  # where NaN is as NaN
    expected = [(n, listed.index(row)) for n, row in enumerate(listed) if listed.index(row) < n]
    again, first = retrieval.equal_rows(rows)
    assert list(zip(again.tolist(), first.tolist(), strict=True)) == expected
    assert [len(found) for found in retrieval.equal_rows(torch.eye(4, dtype=kind))] == [0, 0]


def test_memory_stays_bounded_however_large_the_gallery(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retrieval, "BLOCK_ELEMENTS", 1000)
    sizes: list[int] = []

    class Recording(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            sizes.extend(leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor))
            return out

    image = torch.randn(300, 1)  # features of one number, so that scores are the largest that there is
    with Recording():
        retrieval.retrieval_metrics(image, image.repeat_interleave(2, 0), torch.arange(300).repeat_interleave(2))
    assert 600 <= max(sizes) <= 1000


@pytest.mark.parametrize("owner", [[0, 0, 1], [0, 1, 3], [-1, 0, 1], [0, 1]])
def test_images_without_captions_and_stray_owners_are_refused(owner: list[int]) -> None:
    with pytest.raises(ValueError, match="own"):
        retrieval.image_to_text_ranks(torch.eye(3), torch.eye(3), torch.tensor(owner))


@pytest.mark.parametrize("captions", [[1] * 40, [1, 2, 5, 3, 1, 1, 4, 2]])
def test_chance_equals_simulation_with_random_scores(captions: list[int]) -> None:
    generator = torch.Generator().manual_seed(0)
    owner = torch.arange(len(captions)).repeat_interleave(torch.tensor(captions))
    trials: dict[str, list[float]] = {}
    medians: list[torch.Tensor] = []
    for _ in range(400):
        # One-hot images make the scores of a pair independent random numbers: a random order for every query.
        image = torch.eye(len(captions))
        text = torch.rand(len(owner), len(captions), generator=generator)
        for key, value in retrieval.retrieval_metrics(image, text, owner).items():
            trials.setdefault(key, []).append(value)
        medians.append(retrieval.image_to_text_ranks(image, text, owner))
    expected = retrieval_chance(captions)
    assert expected.keys() == trials.keys()
    for key, values in trials.items():
        if "median" not in key:
            sample = torch.tensor(values, dtype=torch.float64)
            error = 5 * float(sample.std()) / math.sqrt(len(values)) + 1e-9
            assert abs(float(sample.mean()) - expected[key]) <= error, key
    assert abs(expected["i2t_median_rank"] - float(torch.cat(medians).double().quantile(0.5))) <= 1


def test_chance_median_by_hand() -> None:
    assert retrieval_chance([1] * 40)["i2t_median_rank"] == 20.5
    assert retrieval_chance([1] * 41)["i2t_median_rank"] == 21
    # Two captions of one image among four: the first own one is at 1 with 1/2, at 2 with 1/3.
    assert retrieval_chance([2, 2])["i2t_median_rank"] == 1.5


def test_chance_of_one_caption_an_image_is_k_in_n() -> None:
    chance = retrieval_chance([1] * 500)
    assert chance["i2t_r1"] == pytest.approx(0.2)
    assert chance["i2t_r10"] == pytest.approx(2.0)
    assert chance["t2i_r5"] == pytest.approx(1.0)
    assert chance["i2t_mean_rank"] == chance["t2i_mean_rank"] == pytest.approx(250.5)
