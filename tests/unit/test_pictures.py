"""What pictures show, held against the model itself; how sheets are drawn."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from cosmos_fast.config import ModelConfig
from cosmos_fast.data.images import eval_crop, to_tensor
from cosmos_fast.data.tokenizer import tokenize
from cosmos_fast.evaluate.attention import WordWeight, patch_map, word_weights
from cosmos_fast.evaluate.datasets.sets import SegmentationSet
from cosmos_fast.evaluate.pictures import attention, choices, drawing, retrieval, segmentation
from cosmos_fast.evaluate.pictures.sources import Source
from cosmos_fast.evaluate.pixels import short_side_view
from cosmos_fast.evaluate.prompts import fill_templates, synonym_features
from cosmos_fast.evaluate.retrieval import text_to_image_ranks
from cosmos_fast.evaluate.segmentation import IGNORE, SegmentationProtocol, segment
from cosmos_fast.model.cosmos import CosmosModel, create_model
from cosmos_fast.utils.errors import UserError

TOWERS = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 16, "layers": 2, "head_width": 8},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}


class Drawn:
    """Images of noise, each with a square of its own."""

    def __init__(self, sizes: list[tuple[int, int]]) -> None:
        rng = np.random.default_rng(3)
        self.pictures = [
            Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8)) for width, height in sizes
        ]

    def __len__(self) -> int:
        return len(self.pictures)

    def key(self, number: int) -> str:
        return f"folder/{number}.jpg"

    def image(self, number: int) -> Image.Image:
        return self.pictures[number]


@pytest.fixture(scope="module")
def model() -> CosmosModel:
    torch.manual_seed(5)
    found = create_model(replace(ModelConfig.from_openclip(TOWERS), pool_heads=2)).eval()
    with torch.no_grad():
        for parameter in found.parameters():  # a fresh model attends evenly
            parameter.add_(0.3 * torch.randn_like(parameter))
    return found


@pytest.fixture(scope="module")
def source() -> Source:
    images = Drawn([(48, 40), (36, 60), (40, 40), (50, 33), (33, 50)])
    return Source("drawn", images, (("a red star",), ("a blue ring", "a ring"), ("a cat",), (), ("a red star",)))


def seen(model: CosmosModel, source: Source, number: int) -> torch.Tensor:
    return to_tensor(eval_crop(source.images.image(number), model.config.vision.image_size))[None]


@torch.no_grad()
def test_attention_is_the_models_own_scaled_to_0_1(model, source) -> None:
    captions = ("a purple kaleidoscope", "grass")
    (sheet,) = attention.attention_sheets(model, source, [1], captions)
    for caption, numbers in zip(captions, sheet.numbers["captions"], strict=True):
        ids_1L = tokenize([caption], 16)
        maps = model.cross_attention_maps(seen(model, source, 1), ids_1L)
        grid = torch.tensor(numbers["patches"])
        assert grid.shape == (4, 4)
        torch.testing.assert_close(grid, patch_map(maps.image_BHP[0]), atol=2e-6, rtol=0)
        assert (grid.min(), grid.max()) == (0, 1)
        shares = {w.word: w.share for w in word_weights(maps.text_BHL[0], ids_1L[0])[0]}
        words = numbers["words"]
        assert [word["word"] for word in words] == caption.split()
        assert [word["share"] for word in words] == pytest.approx([shares[w] for w in caption.split()], abs=2e-6)
        assert sum(word["share"] for word in words) + sum(numbers["rest"].values()) == pytest.approx(1, abs=1e-5)
    shades = [word["shade"] for word in sheet.numbers["captions"][0]["words"]]
    assert (min(shades), max(shades)) == (0, 1)
    assert len({tuple(map(tuple, numbers["patches"])) for numbers in sheet.numbers["captions"]}) == 2


def test_words_are_scaled_among_themselves_without_start_end_and_padding() -> None:
    weights = [WordWeight("⟨start⟩", 0.5, 1.0), WordWeight("a", 0.1, 0.2), WordWeight("b", 0.2, 0.4)]
    words, rest = attention.words_scaled([*weights, WordWeight("⟨end⟩", 0.05, 0.1)], 0.15)
    assert [(word.word, word.shade) for word in words] == [("a", 0), ("b", 1)]
    assert rest == [("⟨start⟩", 0.5), ("⟨end⟩", 0.05), ("padding", 0.15)]


def test_attention_takes_an_images_own_captions_and_wants_one(model, source) -> None:
    sheets = list(attention.attention_sheets(model, source, [1, 2], ()))
    assert [[n["caption"] for n in s.numbers["captions"]] for s in sheets] == [["a blue ring", "a ring"], ["a cat"]]
    with pytest.raises(UserError, match=r"no caption for folder/3\.jpg: give --caption"):
        list(attention.attention_sheets(model, source, [3], ()))
    plain = create_model(replace(model.config, crossmodal=False))
    with pytest.raises(UserError, match="no cross-modal heads"):
        list(attention.attention_sheets(plain, source, [1], ("a",)))


@torch.no_grad()
def test_retrieval_ranks_by_cosine_and_marks_what_is_right(model, source) -> None:
    gallery = retrieval.encode_gallery(model, source, texts=True)
    image_ND = torch.cat([model.encode_image(seen(model, source, n)) for n in range(5)])
    queries = [retrieval.Query("a ring"), retrieval.Query("a red star"), retrieval.Query("a dog")]
    sheets = list(retrieval.retrieval_sheets(model, gallery, queries, top=4))
    for query, sheet in zip(queries, sheets, strict=True):
        text_D = model.encode_text(tokenize([query.text], 16))[0]
        scores = sorted(((float(image_ND[n] @ text_D), f"folder/{n}.jpg") for n in range(5)), reverse=True)
        answers = sheet.numbers["answers"]
        assert [answer["item"] for answer in answers] == [key for _, key in scores[:4]]
        assert [answer["score"] for answer in answers] == pytest.approx([score for score, _ in scores[:4]], abs=2e-6)
    right = [{a["item"]: a["right"] for a in sheet.numbers["answers"]} for sheet in sheets]
    assert all(value is (key == "folder/1.jpg") for key, value in right[0].items())
    assert all(value is (key in ("folder/0.jpg", "folder/4.jpg")) for key, value in right[1].items())
    assert set(right[2].values()) == {None}
    assert sheets[2].numbers["rank_of_the_right_one"] is None
    text_D = model.encode_text(tokenize(["a ring"], 16))
    expected = text_to_image_ranks(text_D.expand(5, -1), image_ND, torch.arange(5))[1]
    assert sheets[0].numbers["rank_of_the_right_one"] == int(expected)


@torch.no_grad()
def test_an_image_ranks_captions_or_images_where_there_are_none(model, source) -> None:
    query = retrieval.Query("x", source.images.image(2), owner=2)
    (sheet,) = retrieval.retrieval_sheets(model, retrieval.encode_gallery(model, source, True), [query], top=9)
    texts = ["a red star", "a blue ring", "a ring", "a cat", "a red star"]
    scores = (model.encode_text(tokenize(texts, 16)) @ model.encode_image(seen(model, source, 2))[0]).tolist()
    expected = [
        text for _, _, text in sorted((-score, n, t) for n, (score, t) in enumerate(zip(scores, texts, strict=True)))
    ]
    found = sheet.numbers["answers"]
    assert [answer["item"] for answer in found] == expected
    assert [answer["right"] for answer in found] == [text == "a cat" for text in expected]
    assert sheet.numbers["rank_of_the_right_one"] == expected.index("a cat") + 1
    bare = replace(source, captions=((),) * 5)
    stranger = retrieval.Query("x", source.images.image(2))
    (sheet,) = retrieval.retrieval_sheets(model, retrieval.encode_gallery(model, bare, True), [stranger], top=2)
    first = sheet.numbers["answers"][0]
    assert (first["item"], first["right"]) == ("folder/2.jpg", None)
    assert first["score"] == pytest.approx(1, abs=1e-5)


def test_ties_count_against_the_right_answer_and_the_first_is_shown_first() -> None:
    scores = torch.tensor([0.1, 0.7, 0.7, 0.3])
    assert retrieval.best(scores, 3) == [1, 2, 3]
    right = torch.tensor([False, True, False, False])
    assert retrieval.first_right(scores, right) == 2
    assert retrieval.first_right(scores, torch.tensor([False, True, True, False])) == 1
    assert retrieval.first_right(scores, torch.zeros(4, dtype=torch.bool)) is None


def with_truth(source: Source, names: tuple[str, ...]) -> Source:
    def truth(number: int) -> np.ndarray:
        image = source.images.image(number)
        labels = np.zeros((image.height, image.width), dtype=np.uint8)
        labels[: image.height // 2] = 1
        labels[:, :3] = IGNORE
        return labels

    classes = fill_templates("two", {name: [name] for name in names}, ["a {}."])
    maps = SegmentationSet(
        name="t",
        split="x",
        images=source.images,
        sha256="",
        truth=truth,
        classes=classes,
        protocol=SegmentationProtocol(),
    )
    return replace(source, segmentation=maps)


@torch.no_grad()
def test_every_pixel_has_the_nearest_class_and_the_truth_stands_beside(model, source) -> None:
    both = with_truth(source, ("sky", "grass"))
    known, classes, protocol = choices.chosen_classes(both, (), None)
    image = source.images.image(0)
    text_SD, class_S = synonym_features(model, classes, lambda texts: tokenize(texts, 16))
    found = {}
    for csa in (True, False):
        (sheet,) = segmentation.segmentation_sheets(model, known, [0], classes, replace(protocol, csa=csa))
        views = [(short_side_view(image, 48), (40, 48))]
        ((labels,),) = segment(model, views, text_SD, [class_S], window=32, csa=csa, protocol=protocol)
        share = float((labels == 0).double().mean())
        assert sheet.numbers["predicted"].get("sky", 0.0) == pytest.approx(share, abs=1e-6)
        found[csa] = labels
    assert not found[True].equal(found[False])
    assert [name for name, _ in sheet.shown.panels] == ["image", "truth", "predicted"]
    numbers = sheet.numbers
    assert sum(numbers["predicted"].values()) == pytest.approx(1, abs=1e-5)
    assert numbers["truth"] == {"sky": round(20 * 45 / (40 * 48), 6), "grass": round(20 * 45 / (40 * 48), 6)}
    assert 0 <= numbers["pixels_right"] <= 1
    always = fill_templates("one", {"grass": ["grass"], "lawn": ["grass"]}, ["a {}."])  # a tie: the first one
    (sheet,) = segmentation.segmentation_sheets(model, known, [0], always, protocol)
    assert sheet.numbers["predicted"] == {"grass": 1.0}
    assert sheet.numbers["pixels_right"] == pytest.approx(0.5)


def test_overlays_have_the_colours_of_the_legend_and_leave_the_background_grey() -> None:
    grey = Image.new("RGB", (segmentation.SIDE, segmentation.SIDE), (100, 100, 100))
    labels = np.zeros((4, 4), dtype=np.uint8)
    labels[:2] = 1
    labels[3] = IGNORE
    for names, painted_first in ((("background", "cat"), False), (("cat", "dog"), True)):
        colours = segmentation.class_colours(names)
        picture = np.asarray(segmentation._overlay(grey, labels, names, colours)).astype(int)
        top, third, last = picture[20, 20], picture[250, 20], picture[390, 20]
        assert (np.abs(top - (0.72 * np.array(drawing.rgb(colours[1])) + 0.28 * 125)) < 2).all()
        assert (len(set(third)) == 1) is not painted_first
        assert len(set(last)) == 1


def test_no_two_classes_share_a_colour() -> None:
    names = ["background", "red", "red wine", "crimson", *(f"class {number}" for number in range(170))]
    colours = segmentation.class_colours(names)
    assert len(set(colours)) == len(names)
    assert colours[1] == "#ff0000"


CLASSES = {
    "name a class": ((), None, "brings no classes: name them"),
    "one class only": (("cat",), None, "2 to 254 classes, not 1"),
    "twice": (("cat", "cat;kitten"), None, "cat is given twice"),
    "no wording": (("cat;", "dog"), None, "name is missing"),
    "both": (("cat", "dog"), "x.txt", "not both"),
    "empty file": ((), "", "lists no classes"),
    "too many": ((), "\n".join(map(str, range(300))), "not 300"),
}


@pytest.mark.parametrize("case", CLASSES)
def test_mistakes_in_classes_are_one_line(source, tmp_path, case) -> None:
    named, content, message = CLASSES[case]
    file = None if content is None else tmp_path / "classes.txt"
    if file is not None:
        file.write_text(content)
    with pytest.raises(UserError, match=message):
        choices.chosen_classes(source, named, file)


def test_the_protocol_is_the_sets_with_the_changes(source) -> None:
    known = with_truth(source, ("sky", "grass"))
    maps = replace(known.segmentation, protocol=SegmentationProtocol(scale=65.0))
    _, _, protocol = choices.chosen_classes(replace(known, segmentation=maps), (), None, ("pamr_steps=2",))
    assert (protocol.scale, protocol.pamr_steps, protocol.csa) == (65.0, 2, True)
    with pytest.raises(UserError, match="did you mean csa"):
        choices.chosen_classes(known, (), None, ("cs=1",))


def test_named_classes_have_wordings_and_published_templates_and_no_truth(source) -> None:
    known = with_truth(source, ("sky", "grass"))
    free, classes, _ = choices.chosen_classes(known, ("cat;kitten", "grass"), None)
    assert free.segmentation is None
    assert classes.classes == ("cat", "grass")
    assert [len(wordings) for wordings in classes.prompts] == [2, 1]
    assert len(classes.prompts[0][1]) == 80
    assert all("kitten" in prompt for prompt in classes.prompts[0][1])
