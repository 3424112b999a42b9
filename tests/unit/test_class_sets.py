"""Readers of classification sets, on miniatures of the published layouts; published names and templates."""

from __future__ import annotations

import io
import logging
from pathlib import Path

import pytest
from PIL import Image

from cosmos_fast.evaluate.datasets import registry
from cosmos_fast.evaluate.datasets.class_folders import caltech_folders
from cosmos_fast.evaluate.datasets.class_sets import class_set, published
from cosmos_fast.evaluate.datasets.registry import READERS, open_set
from cosmos_fast.evaluate.datasets.sets import ClassificationSet
from cosmos_fast.utils.errors import UserError
from tests.benchmark_folders.captions import write_wds
from tests.benchmark_folders.classes import LAYOUTS

# Templates, and what the first and the last class are called, where we bring the names.
PUBLISHED = {
    "imagenet": (80, 1000, "tench", "toilet paper"),
    "food101": (1, None, "", ""),
    "cifar10": (18, None, "", ""),
    "cifar100": (18, None, "", ""),
    "sun397": (2, None, "", ""),
    "stanford_cars": (8, None, "", ""),
    "fgvc_aircraft": (2, None, "", ""),
    "dtd": (8, None, "", ""),
    "oxford_pets": (1, 37, "Abyssinian", "Yorkshire Terrier"),
    "flowers102": (1, 102, "pink primrose", "blackberry lily"),
    "caltech101": (34, 102, "background", "yin and yang symbol"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_gives_its_images_with_their_classes(tmp_path: Path, layout: str) -> None:
    name, write = LAYOUTS[layout]
    answers = write(tmp_path)
    found = open_set(name, tmp_path)
    assert isinstance(found, ClassificationSet)
    assert (found.name, found.split) == (name, answers.split)
    assert found.labels == answers.labels
    assert found.classes.classes == answers.names
    assert len(found.images) == len(answers.pictures)
    assert len({found.images.key(number) for number in range(len(answers.pictures))}) == len(answers.pictures)
    for number in (*range(min(20, len(answers.pictures))), len(answers.pictures) - 1):
        image = found.images.image(number)
        assert image.mode == "RGB"
        assert image.tobytes() == answers.image(answers.pictures[number]).tobytes(), number


@pytest.mark.parametrize("name", PUBLISHED)
def test_prompts_are_the_published_templates_around_the_names(name: str) -> None:
    templates, classes, first, last = PUBLISHED[name]
    assert READERS[name].task == "classification"
    assert len(set(published()[name]["templates"])) == templates
    assert all(template.count("{}") == 1 and "{c}" not in template for template in published()[name]["templates"])
    assert ("classes" in published()[name]) == (classes is not None)
    if classes is not None:
        names = published()[name]["classes"]
        assert (len(names), names[0], names[-1]) == (classes, first, last)
        assert all(one == " ".join(one.split()) for one in names)
    found = class_set(name, ("old {} car", "bus"))  # a name is no template
    wanted = [template.replace("{}", "old {} car") for template in published()[name]["templates"]]
    assert found.prompts[0] == (tuple(wanted),)
    assert found.prompts[1][0][-1] == published()[name]["templates"][-1].format("bus")


def test_imagenet_has_a_synset_a_class_in_order() -> None:
    synsets, names = published()["imagenet"]["synsets"], published()["imagenet"]["classes"]
    assert len(synsets) == len(set(synsets)) == 1000
    assert synsets == sorted(synsets)
    known = {"n01440764": "tench", "n02123045": "tabby cat", "n03595614": "T-shirt", "n15075141": "toilet paper"}
    assert {one: names[synsets.index(one)] for one in known} == known
    templates = published()["imagenet"]["templates"]
    assert (templates[0], templates[-1]) == ("a bad photo of a {}.", "a tattoo of the {}.")


def test_folders_of_caltech_have_their_names() -> None:
    names = dict(zip(caltech_folders(), published()["caltech101"]["classes"], strict=True))
    known = {"BACKGROUND_Google": "background", "Faces_easy": "centered face", "car_side": "side of a car"}
    known |= {
        "crocodile_head": "head of a crocodile",
        "snoopy": "snoopy (cartoon beagle)",
        "yin_yang": names["yin_yang"],
    }
    assert {one: names[one] for one in known} == known


def test_a_folder_that_holds_the_unpacked_one_gives_the_same_questions(tmp_path: Path) -> None:
    for layout, below in (("food101", "food-101"), ("oxford_pets", "oxford-iiit-pet"), ("dtd", "dtd")):
        name, write = LAYOUTS[layout]
        write(tmp_path / name)
        assert open_set(name, tmp_path / name / below).sha256 == open_set(name, tmp_path / name).sha256
    for name in ("cifar10", "cifar100"):
        forms = {open_set(name, made).sha256 for made in _forms_of(tmp_path, name)}
        assert len(forms) == 1


def _forms_of(tmp_path: Path, name: str) -> list[Path]:
    roots = []
    for layout, (of, write) in LAYOUTS.items():
        if of == name:
            roots.append(tmp_path / layout)
            write(roots[-1])
    assert len(roots) > 1
    return roots


def test_the_digest_tells_other_answers_apart(tmp_path: Path) -> None:
    write = LAYOUTS["oxford_pets"][1]
    write(tmp_path)
    before = open_set("oxford_pets", tmp_path).sha256
    listing = tmp_path / "oxford-iiit-pet/annotations/test.txt"
    lines = listing.read_text().splitlines()
    listing.write_text("\n".join(lines[:-1]))
    assert open_set("oxford_pets", tmp_path).sha256 != before


@pytest.mark.parametrize("name", PUBLISHED)
def test_shards_of_clip_benchmark_bring_their_own_classes(tmp_path: Path, name: str) -> None:
    found = open_set(name, write_wds(tmp_path, "classification"))
    assert isinstance(found, ClassificationSet)
    assert (found.name, found.labels) == (name, (0, 1, 2, 0, 1, 2))
    assert found.classes.classes == ("tench", "great white shark", "tench")


def test_a_bitmap_called_jpg_is_read_where_sets_hold_some(tmp_path: Path) -> None:
    LAYOUTS["sun397"][1](tmp_path)
    found = open_set("sun397", tmp_path)
    bitmap = Image.new("RGB", (8, 6), (200, 30, 5))
    stream = io.BytesIO()
    bitmap.save(stream, "BMP")
    (tmp_path / "SUN397" / found.images.key(0)).write_bytes(stream.getvalue())
    assert found.images.image(0).tobytes() == bitmap.tobytes()
    stream = io.BytesIO()
    bitmap.save(stream, "TIFF")
    (tmp_path / "SUN397" / found.images.key(0)).write_bytes(stream.getvalue())
    with pytest.raises(UserError, match="is broken"):
        found.images.image(0)


def test_the_log_says_where_images_are_fewer_than_published(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Folders of images may lack some that no list names."""
    layout = next(layout for layout, (name, _) in LAYOUTS.items() if name == "imagenet")
    count = len(LAYOUTS[layout][1](tmp_path).pictures)
    monkeypatch.setitem(registry.PUBLISHED_IMAGES, "imagenet", (count,))
    with caplog.at_level(logging.WARNING, "cosmos_fast"):
        open_set("imagenet", tmp_path)
        assert caplog.messages == []
        monkeypatch.setitem(registry.PUBLISHED_IMAGES, "imagenet", (50_000,))
        open_set("imagenet", tmp_path)
    expected = f"holds {count:,} images, the published set has 50,000: figures of others do not compare with it"
    assert [line.endswith(expected) for line in caplog.messages] == [True]


def test_published_counts_are_of_sets_that_there_are() -> None:
    assert set(registry.PUBLISHED_IMAGES) == set(READERS) - {"caltech101", "captions", "wds"}
