"""Prompt ensembles and top-k accuracy."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.functional import normalize

from cosmos_fast.evaluate.chance import classification_chance
from cosmos_fast.evaluate.classification import (
    class_ranks,
    classification_metrics,
    first_of_same,
    mean_per_class,
    top_k_accuracy,
)
from cosmos_fast.evaluate.prompts import (
    ClassSet,
    class_features,
    encode_texts,
    ensemble,
    fill_templates,
    synonym_features,
)
from cosmos_fast.utils.errors import UserError


class LetterModel(nn.Module):
    """Text feature = counts of the letters a to h, so that every expectation can be worked out by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.batches: list[int] = []

    def encode_text(self, tokens: torch.Tensor, normalize: bool = True) -> torch.Tensor:
        self.batches.append(len(tokens))
        features = tokens.float() * self.scale
        return nn.functional.normalize(features, dim=-1) if normalize else features


def letters(texts: list[str]) -> torch.Tensor:
    return torch.tensor([[text.count(letter) for letter in "abcdefgh"] for text in texts])


WORDINGS = {"ab": ("ab", "ba"), "c": ("c",)}
TEMPLATES = ("{}", "{}ddd", "h{}")
CLASSES = fill_templates("toy", WORDINGS, TEMPLATES)


def test_ensemble_is_normalise_mean_normalise() -> None:
    prompts = torch.tensor([[3.0, 0.0], [0.0, 0.5]])
    assert torch.allclose(ensemble(prompts), torch.tensor([0.5**0.5, 0.5**0.5]))


def test_class_features_average_all_wordings_and_templates_in_order() -> None:
    features = class_features(LetterModel(), CLASSES, letters)
    for row, synonyms in zip(features, WORDINGS.values(), strict=True):
        prompts = [t.replace("{}", s) for s in synonyms for t in TEMPLATES]
        mean = normalize(letters(prompts).float(), dim=-1).mean(0)
        assert torch.allclose(row, mean / mean.norm(), atol=1e-6)


def test_synonym_features_keep_wordings_apart() -> None:
    features, owner = synonym_features(LetterModel(), CLASSES, letters)
    assert owner.tolist() == [0, 0, 1]
    assert torch.allclose(features[0], features[1])  # "ab" and "ba" have the same letters
    assert torch.allclose(features.norm(dim=-1), torch.ones(3))
    assert not torch.allclose(features[0], features[2])


def test_texts_come_back_in_order_and_repeats_are_encoded_once() -> None:
    model = LetterModel()
    texts = ["aaaa", "b", "aaaa", "cc", "b", "hgfe"]
    features = encode_texts(model, texts, letters)
    assert torch.allclose(features, normalize(letters(texts).float(), dim=-1))
    assert model.batches == [4]


@pytest.mark.parametrize(
    ("wordings", "templates"),
    [({}, ("{}",)), ({"a": ()}, ("{}",)), ({"a": ("a",)}, ("photo",)), ({"a": ("a",)}, ())],
)
def test_unusable_class_sets_are_refused(wordings: dict[str, tuple[str, ...]], templates: tuple[str, ...]) -> None:
    with pytest.raises(UserError, match="toy"):
        fill_templates("toy", wordings, templates)


def test_class_sets_whose_names_and_prompts_differ_in_number_are_refused() -> None:
    with pytest.raises(UserError, match="toy"):
        ClassSet("toy", ("a", "b"), ((("a",),),))


def test_top_k_equals_sorting_without_ties() -> None:
    generator = torch.Generator().manual_seed(1)
    image, text = torch.randn(60, 6, generator=generator), torch.randn(9, 6, generator=generator)
    label = torch.randint(0, 9, (60,), generator=generator)
    order = (image @ text.T).argsort(dim=1, descending=True)
    expected = {f"top{k}": 100 * sum(label[i] in order[i, :k] for i in range(60)) / 60 for k in (1, 5)}
    assert top_k_accuracy(image, text, label) == pytest.approx(expected)


def test_a_tie_is_not_a_hit() -> None:
    image, text = torch.ones(1, 2), torch.ones(3, 2)
    assert top_k_accuracy(image, text, torch.tensor([0]), ks=(1, 2, 3)) == {"top1": 0.0, "top2": 0.0, "top3": 100.0}


def test_every_class_counts_the_same_in_the_mean_per_class_whatever_it_holds() -> None:
    label = torch.tensor([0, 0, 0, 0, 2, 5, 5])  # classes 1, 3, 4 and those behind 5 show nothing and count nothing
    hit = torch.tensor([True, True, True, False, False, True, False])
    assert mean_per_class(hit, label) == pytest.approx(100 * (3 / 4 + 0 + 1 / 2) / 3)


def test_all_numbers_of_a_set_come_from_the_same_ranks() -> None:
    generator = torch.Generator().manual_seed(2)
    image, text = torch.randn(80, 6, generator=generator), torch.randn(9, 6, generator=generator)
    label = torch.randint(0, 7, (80,), generator=generator)
    best = (image @ text.T).argmax(dim=1)
    per_class = [(best[label == c] == c).double().mean().item() for c in label.unique().tolist()]
    metrics = classification_metrics(image, text, label)
    assert metrics == {
        **top_k_accuracy(image, text, label),
        "mean_per_class": pytest.approx(100 * sum(per_class) / len(per_class)),
    }


def test_of_classes_with_the_same_prompts_the_first_is_what_a_model_answers() -> None:
    prompts = (("a crane",), ("a dog",), ("a crane",), ("a crane",), ("a cat",))
    classes = ClassSet("toy", tuple("abcde"), tuple((one,) for one in prompts))
    same = first_of_same(classes)
    assert same.tolist() == [0, 1, 0, 0, 4]
    generator = torch.Generator().manual_seed(3)
    image = torch.randn(200, 7, generator=generator)
    text = torch.randn(5, 7, generator=generator)[same]
    text[3] *= 1.0001  # as rounding might have it: it is a crane all the same
    label = torch.randint(0, 5, (200,), generator=generator)
    scores = (image @ text.T)[:, same]
    order = torch.sort(scores, dim=1, descending=True, stable=True).indices
    expected = [order[row].tolist().index(wanted) + 1 for row, wanted in enumerate(label.tolist())]
    assert class_ranks(image, text, label, same).tolist() == expected
    assert classification_metrics(image, text, label, same)["top1"] == 100 * (scores.argmax(1) == label).double().mean()


def test_features_that_collapse_do_not_hit_any_class_but_those_of_the_same_prompts() -> None:
    classes = ClassSet("toy", ("a", "b", "c", "d"), ((("x",),), (("y",),), (("x",),), (("z",),)))
    image, text = torch.ones(4, 2), torch.ones(4, 2)
    assert class_ranks(image, text, torch.arange(4), first_of_same(classes)).tolist() == [3, 4, 4, 4]


def test_chance_is_k_in_c() -> None:
    assert classification_chance(8) == {"top1": 12.5, "top5": 62.5}
    assert classification_chance(3) == {"top1": pytest.approx(100 / 3), "top5": 100.0}
