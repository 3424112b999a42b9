"""Held-out scenes as an evaluation set, and the tasks on models whose answers are known by hand."""

from __future__ import annotations

import io
import json
import tarfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from cosmos_fast.config import SourceConfig
from cosmos_fast.data.synthetic.writer import DatasetSettings, write_dataset
from cosmos_fast.evaluate import segmented_scenes, tasks
from cosmos_fast.evaluate.attention import word_spans
from cosmos_fast.evaluate.pixels import object_square
from cosmos_fast.evaluate.scenes import SceneSet, read_meta
from cosmos_fast.utils.errors import UserError


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scenes")
    write_dataset(folder, DatasetSettings(train=0, heldout=10), workers=1)
    return folder


def open_set(path: Path, **options: int) -> SceneSet:
    return SceneSet((SourceConfig(path=str(path)),), **options)


def test_scenes_carry_captions_objects_and_masks_that_agree(data: Path) -> None:
    scenes = list(open_set(data / "heldout"))
    assert len(scenes) == 10
    for scene in scenes:
        assert len(scene.captions) == 1
        assert set(scene.captions) < set(scene.sentences)
        assert scene.mask_HW is not None
        assert scene.mask_HW.shape == (scene.image.height, scene.image.width)
        assert {0, *(thing.instance for thing in scene.objects)} >= set(np.unique(scene.mask_HW).tolist())
        for thing in scene.objects:
            ys, xs = np.nonzero(scene.mask_HW == thing.instance)
            x0, y0, x1, y1 = thing.box
            assert x0 <= xs.min() <= xs.max() <= x1
            assert y0 <= ys.min() <= ys.max() <= y1


@pytest.mark.parametrize("kind", segmented_scenes.SEGMENT_KINDS)
def test_true_segments_are_what_the_record_says_of_each_instance(data: Path, kind: str) -> None:
    scenes = open_set(data / "heldout")
    meta = scenes.require_meta("test")
    names = ("background", *(meta.shapes if kind == "shape" else meta.colours).classes)
    scene = next(iter(scenes))
    truth = segmented_scenes.segment_truth(scene, names, kind)
    assert scene.mask_HW is not None
    for thing in scene.objects:
        assert {names[c] for c in truth[torch.from_numpy(scene.mask_HW == thing.instance)].tolist()} == {
            getattr(thing, kind)
        }
    assert not truth[torch.from_numpy(scene.mask_HW == 0)].any()


def test_class_sets_use_synonyms_and_background_phrases(data: Path) -> None:
    meta, raw = read_meta(data / "meta.json"), json.loads((data / "meta.json").read_text())
    assert meta.pairs.classes[len(raw["shapes"]) + 1] == f"{raw['colours'][1]} {raw['shapes'][1]}"
    assert len(meta.shapes.prompts[0]) == len(raw["synonyms"]["shapes"][raw["shapes"][0]])
    background = [prompt for wording in meta.background.prompts[0] for prompt in wording]
    for phrases in raw["synonyms"]["backgrounds"].values():
        assert all(any(phrase in prompt for prompt in background) for phrase in phrases)


def test_scenes_are_decoded_once_and_limited(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scenes = open_set(data / "heldout", max_samples=4)
    first = [scene.key for scene in scenes]
    monkeypatch.setattr(scenes.indexes[0], "read", None)
    assert [scene.key for scene in scenes] == first
    assert len(first) == len(scenes) == 4


def write_shard(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))


def picture(side: int = 20) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (side, side), "red").save(buffer, "PNG")
    return buffer.getvalue()


def test_broken_samples_are_counted_by_cause_and_the_others_kept(tmp_path: Path) -> None:
    record = json.dumps({"raw_caption": ["one", "two"], "longIB_captions": ["a sentence"]}).encode()
    mask = io.BytesIO()
    Image.new("L", (5, 5)).save(mask, "PNG")
    members = {
        "a.png": picture(),
        "a.json": record,
        "b.png": picture()[:60],
        "b.json": record,
        "c.png": picture(),
        "c.json": b"{",
        "d.png": picture(),
        "d.json": record,
        "d.mask.png": mask.getvalue(),
        "e.png": picture(),
        "e.json": json.dumps({"raw_caption": "just a string"}).encode(),
    }
    write_shard(tmp_path / "0.tar", members)
    scenes = open_set(tmp_path)
    assert [(scene.key, scene.captions) for scene in scenes] == [("a", ("one", "two")), ("e", ("just a string",))]
    assert sum(scenes.faults.counts.values()) == 3
    assert scenes.faults.counts["wrong json"] == 1


def test_no_usable_sample_at_all_is_an_error(tmp_path: Path) -> None:
    write_shard(tmp_path / "0.tar", {"a.png": b"no image", "a.json": b'{"raw_caption": ["x"]}'})
    with pytest.raises(UserError, match="no usable sample"):
        list(open_set(tmp_path))


def test_object_squares_stay_inside_and_hold_the_box() -> None:
    assert object_square((10, 20, 30, 30), 100, 80, 0.25) == (5, 10, 35, 40)
    assert object_square((0, 0, 20, 10), 100, 80, 0.5) == (0, 0, 40, 40)
    assert object_square((0, 0, 100, 30), 100, 80, 0.5) == (10, 0, 90, 80)  # wider than the image is high


class WordModel(nn.Module):
    """Texts are bags of the words in `words`; image features are read off the first pixels of a view."""

    def __init__(self, words: list[str]) -> None:
        super().__init__()
        self.words = words
        self.anchor = nn.Parameter(torch.zeros(()))
        vision, text = SimpleNamespace(image_size=16), SimpleNamespace(context_length=32)
        self.config = SimpleNamespace(vision=vision, text=text)

    def encode_text(self, tokens: torch.Tensor, normalize: bool = True) -> torch.Tensor:
        bags = [{word for word, _ in word_spans(row.tolist())} for row in tokens]
        counts = torch.tensor([[float(word in bag) for word in self.words] for bag in bags])
        return nn.functional.normalize(counts + 1e-3, dim=-1)

    def encode_image(self, images: torch.Tensor, normalize: bool = True) -> torch.Tensor:
        hot = nn.functional.one_hot(images.flatten(1)[:, :2].long(), len(self.words)).sum(1)
        return nn.functional.normalize(hot.float(), dim=-1)


def test_a_model_that_knows_every_object_scores_100(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scenes = open_set(data / "heldout")
    meta = scenes.require_meta("test")
    words = [*meta.shapes.classes, *meta.colours.classes]
    known = {(id(s.image), thing.box): thing for s in scenes for thing in s.objects}

    def reveal(image: Image.Image, box: tuple[float, float, float, float], size: int, margin: float) -> torch.Tensor:
        thing = known[id(image), box]
        return torch.tensor([words.index(thing.shape), words.index(thing.colour), 0.0]).view(3, 1, 1)

    monkeypatch.setattr(tasks, "object_view", reveal)
    result = tasks.evaluate(WordModel(words), scenes, "classification")  # type: ignore[arg-type]
    assert {key: result.metrics[key] for key in ("shape_top1", "colour_top1", "pair_top1")} == {
        "shape_top1": 100.0,
        "colour_top1": 100.0,
        "pair_top1": 100.0,
    }
    assert result.chance["pair_top1"] == pytest.approx(100 / 64)
    assert result.metrics.keys() == result.chance.keys()


def test_a_record_that_does_not_fit_meta_is_refused(data: Path) -> None:
    scene = next(iter(open_set(data / "heldout")))
    alien = replace(scene, objects=(replace(scene.objects[0], shape="dodecahedron"),))
    with pytest.raises(UserError, match="dodecahedron"):
        segmented_scenes.segment_truth(alien, ("background", "circle"), "shape")


def test_nan_weights_are_refused_instead_of_scored(data: Path) -> None:
    class Broken(WordModel):
        def encode_image(self, images: torch.Tensor, normalize: bool = True) -> torch.Tensor:
            return torch.full((len(images), len(self.words)), float("nan"))

    with pytest.raises(UserError, match="NaN"):
        tasks.evaluate(Broken(["red"]), open_set(data / "heldout"), "retrieval")  # type: ignore[arg-type]


def test_classes_that_never_occur_have_no_iou_and_do_not_spoil_the_mean(data: Path) -> None:
    class Shapeless(WordModel):
        """Says "background" everywhere: patches look like the word that all background prompts share."""

        def encode_image_dense(self, images: torch.Tensor, csa: bool = False) -> torch.Tensor:
            hot = torch.zeros(len(self.words))
            hot[self.words.index("background")] = 1.0
            return hot.expand(len(images), 4, -1)

    scenes = open_set(data / "heldout", max_samples=1)
    meta = scenes.require_meta("test")
    words = [*meta.shapes.classes, *meta.colours.classes, "background"]
    result = tasks.evaluate(Shapeless(words), scenes, "segmentation")  # type: ignore[arg-type]
    for kind, classes in (("shape", meta.shapes.classes), ("colour", meta.colours.classes)):
        present = {getattr(thing, kind) for scene in scenes for thing in scene.objects}
        assert present < set(classes)
        prefix = f"{kind}_iou_"
        measured = {k.removeprefix(prefix) for k in result.metrics if k.startswith(prefix) and "csa" not in k}
        assert measured == {"background", *present}
        assert result.metrics[f"{kind}_miou"] == pytest.approx(result.protocol["all_background_miou"][kind])
