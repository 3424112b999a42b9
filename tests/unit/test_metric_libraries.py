"""The same metrics by scikit-learn, which shares no line with ours and needs no torch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from cosmos_fast.evaluate.classification import classification_metrics, top_k_accuracy
from cosmos_fast.evaluate.retrieval import retrieval_metrics, text_to_image_ranks
from cosmos_fast.evaluate.segmentation import IGNORE, class_iou, confusion_matrix, mean_iou

sklearn = pytest.importorskip("sklearn.metrics", reason="scikit-learn is not installed (pip install scikit-learn)")


def gallery(seed: int, images: int, *, ties: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Images [N, D], captions [M, D] that resemble theirs, and their owners [M]; whole numbers where scores tie."""
    generator = torch.Generator().manual_seed(seed)
    counts = torch.randint(1, 6, (images,), generator=generator)
    owner = torch.arange(images).repeat_interleave(counts)
    owner = owner[torch.randperm(len(owner), generator=generator)]
    image = torch.randn(images, 8, generator=generator)
    text = image[owner] + 1.5 * torch.randn(len(owner), 8, generator=generator)
    if ties:
        return (0.7 * image).round(), (0.7 * text).round(), owner
    return normalize(image.double(), dim=1), normalize(text.double(), dim=1), owner


def best_captions(scores_NM: np.ndarray, own_NM: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Every image's best own caption [N]; the scores with its other captions last, where they are in no one's way."""
    best = np.where(own_NM, scores_NM, -np.inf).argmax(axis=1)
    others = own_NM & (best[:, None] != np.arange(scores_NM.shape[1]))
    return best, np.where(others, scores_NM.min() - 1, scores_NM)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_mean_ranks_are_the_coverage_errors(seed: int, ties: bool) -> None:
    """How far one must go down a list to have found what is looked for; ties are decided against it there too."""
    image, text, owner = gallery(seed, 40, ties=ties)
    found = retrieval_metrics(image, text, owner)
    scores = (text @ image.T).numpy()
    assert len(np.unique(scores)) < scores.size / 10 or not ties
    own = owner.numpy()[:, None] == np.arange(len(image))
    assert found["t2i_mean_rank"] == pytest.approx(sklearn.coverage_error(own, scores))
    best, others_last = best_captions(scores.T, own.T)
    looked_for = best[:, None] == np.arange(len(text))
    assert found["i2t_mean_rank"] == pytest.approx(sklearn.coverage_error(looked_for, others_last))


@pytest.mark.parametrize("seed", range(3))
def test_recall_is_top_k_accuracy_and_the_reciprocal_rank_of_a_caption_its_precision(seed: int) -> None:
    image, text, owner = gallery(seed, 40, ties=False)
    scores = (text @ image.T).numpy()
    found = retrieval_metrics(image, text, owner)
    own = owner.numpy()[:, None] == np.arange(len(image))
    best, others_last = best_captions(scores.T, own.T)
    for k in (1, 5, 10):
        t2i = sklearn.top_k_accuracy_score(owner.numpy(), scores, k=k, labels=range(len(image)))
        i2t = sklearn.top_k_accuracy_score(best, others_last, k=k, labels=range(len(text)))
        assert (found[f"t2i_r{k}"], found[f"i2t_r{k}"]) == pytest.approx((100 * t2i, 100 * i2t))
    ranks = text_to_image_ranks(text, image, owner).double()
    # With one right answer the average precision is 1 / rank.
    assert float((1 / ranks).mean()) == pytest.approx(sklearn.label_ranking_average_precision_score(own, scores))


@pytest.mark.parametrize("seed", range(3))
def test_accuracies(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    image, label = torch.randn(200, 8, generator=generator), torch.randint(0, 12, (200,), generator=generator)
    label[label == 5] = 4  # a class without an image
    classes = torch.randn(12, 8, generator=generator)
    image += classes[label]
    scores = (image @ classes.T).numpy()
    found = classification_metrics(image, classes, label)
    for k in (1, 3, 5):
        expected = 100 * sklearn.top_k_accuracy_score(label.numpy(), scores, k=k, labels=range(12))
        assert top_k_accuracy(image, classes, label, ks=(k,))[f"top{k}"] == pytest.approx(expected)
    with pytest.warns(UserWarning, match="y_pred contains classes not in y_true"):
        balanced = sklearn.balanced_accuracy_score(label.numpy(), scores.argmax(axis=1))
    assert found["mean_per_class"] == pytest.approx(100 * balanced)
    assert 20 < found["top1"] < 90


@pytest.mark.parametrize("seed", range(3))
def test_confusions_and_iou_with_ignored_pixels_and_absent_classes(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    truth = torch.randint(0, 6, (40, 50), generator=generator, dtype=torch.uint8)
    wrong = torch.randint(0, 7, truth.shape, generator=generator, dtype=torch.uint8)
    predicted = torch.where(torch.rand(truth.shape, generator=generator) < 0.4, wrong, truth)
    truth[torch.rand(truth.shape, generator=generator) < 0.2] = IGNORE
    kept = truth != IGNORE
    pair = (truth[kept].numpy(), predicted[kept].numpy())
    table = confusion_matrix(predicted, truth, 8)  # class 6 is predicted and never there, 7 is neither
    assert table.numpy().tolist() == sklearn.confusion_matrix(*pair, labels=range(8)).tolist()
    expected = sklearn.jaccard_score(*pair, labels=range(7), average=None)
    assert class_iou(table)[:7].tolist() == pytest.approx(expected.tolist())
    assert bool(class_iou(table)[7].isnan())
    assert mean_iou(table) == pytest.approx(100 * sklearn.jaccard_score(*pair, labels=range(7), average="macro"))
