"""Synthetic scenes: pure functions of (seed, split, index), disjoint splits, masks and captions that agree."""

from __future__ import annotations

import json
import re
from collections import Counter

import numpy as np
import pytest

from cosmos_fast.data.synthetic import vocabulary
from cosmos_fast.data.synthetic.captions import article, listing, write_captions
from cosmos_fast.data.synthetic.render import draw_scene
from cosmos_fast.data.synthetic.scene import Scene, SceneSettings, scenes, split_of
from cosmos_fast.data.synthetic.shards import make_sample
from cosmos_fast.utils.errors import UserError

SMALL = SceneSettings(seed=3, min_side=64, max_side=96)
FIELDS = ("raw_caption", "shortIB_captions", "shortSV_captions", "shortLLA_captions") + (
    LONG := ("longIB_captions", "longSV_captions", "longLLA_captions")
)


def some_scenes(settings: SceneSettings = SMALL, split: str = "train", count: int = 40) -> list[Scene]:
    return list(scenes(settings, split, 0, count))


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_a_scene_depends_on_seed_split_and_index_only(split: str) -> None:
    from_start = some_scenes(split=split, count=12)
    alone = [next(iter(scenes(SMALL, split, i, i + 1))) for i in (11, 3)]
    assert alone == [from_start[11], from_start[3]]
    assert make_sample(alone[0], SMALL) == make_sample(from_start[11], SMALL)


def test_seed_and_split_change_every_scene() -> None:
    other_seed = SceneSettings(seed=4, min_side=64, max_side=96)
    for other in (some_scenes(other_seed), some_scenes(split="heldout")):
        equal = sum(a.composition == b.composition for a, b in zip(some_scenes(), other, strict=True))
        assert equal <= 1


@pytest.mark.parametrize("seed", [0, 1, 2**40])
def test_train_and_heldout_share_no_composition(seed: int) -> None:
    # Two objects: 2,016 compositions, so that without the split's rule hundreds of them would collide.
    settings = SceneSettings(seed=seed, min_objects=2, max_objects=2)
    train = [scene.composition for scene in some_scenes(settings, "train", 1500)]
    heldout = [scene.composition for scene in some_scenes(settings, "heldout", 200)]
    assert not set(train) & set(heldout)
    assert {split_of(c, seed) for c in train} == {"train"}
    assert {split_of(c, seed) for c in heldout} == {"heldout"}
    assert len(set(heldout)) == 200
    assert len(set(train)) > 700  # and training is not a few compositions over and over


def test_too_many_heldout_scenes_are_refused() -> None:
    settings = SceneSettings(min_objects=1, max_objects=1)
    with pytest.raises(UserError, match=r"distinct heldout compositions .* fewer heldout scenes"):
        some_scenes(settings, "heldout", 40)


@pytest.mark.parametrize(
    "wrong",
    [{"seed": -1}, {"min_objects": 0}, {"min_objects": 4, "max_objects": 3}, {"max_objects": 10}, {"min_side": 20},
     {"min_side": 200}, {"max_side": 9999}],
)  # fmt: skip
def test_impossible_settings_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(UserError):
        SceneSettings(**wrong)


def test_mask_boxes_and_objects_agree() -> None:
    for scene in some_scenes(SceneSettings(seed=1, min_side=64, max_side=128, max_objects=9), count=60):
        drawing = draw_scene(scene, SMALL)
        assert drawing.picture.shape == (scene.height, scene.width, 3)
        assert drawing.mask.shape == (scene.height, scene.width)
        assert drawing.mask.dtype == np.uint8
        assert set(np.unique(drawing.mask)) == {0, *(item.instance for item in scene.objects)}
        for item, box, share in zip(scene.objects, drawing.boxes, drawing.shares, strict=True):
            rows, columns = np.nonzero(drawing.mask == item.instance)
            assert box == (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
            assert share > 0.6
            # Where the record says it is, and no larger than its radius allows.
            assert box[0] - 2 <= item.x <= box[2] + 2
            assert box[1] - 2 <= item.y <= box[3] + 2
            assert max(box[2] - box[0], box[3] - box[1]) <= 2 * 1.12 * item.radius + 3


def test_pixels_of_an_object_have_its_colour() -> None:
    """The median of a plain object's pixels is nearer to its own colour than to any other."""
    names = list(vocabulary.COLOURS)
    palette = np.array([vocabulary.COLOURS[name] for name in names], dtype=np.float64)
    seen: Counter[str] = Counter()
    for scene in some_scenes(SceneSettings(seed=2), count=60):
        drawing = draw_scene(scene, SMALL)
        for item in scene.objects:
            if item.texture == "plain":
                median = np.median(drawing.picture[drawing.mask == item.instance], axis=0)
                assert names[int(np.linalg.norm(palette - median, axis=1).argmin())] == item.colour
                seen[item.colour] += 1
    assert set(seen) == set(names)


def test_shapes_are_distinct_at_the_size_of_a_crop() -> None:
    """The silhouette most like another one (IoU at 16 px) has the same shape, whatever the angle."""
    silhouettes, names = [], []
    for scene in some_scenes(SceneSettings(seed=5, min_side=96, max_side=128), count=100):
        drawing = draw_scene(scene, SMALL)
        for item, box, share in zip(scene.objects, drawing.boxes, drawing.shares, strict=True):
            if share > 0.99:
                crop = drawing.mask[box[1] : box[3], box[0] : box[2]] == item.instance
                rows = np.arange(16) * crop.shape[0] // 16
                columns = np.arange(16) * crop.shape[1] // 16
                silhouettes.append(crop[np.ix_(rows, columns)].ravel())
                names.append(item.shape)
    flat = np.stack(silhouettes).astype(np.float32)
    shared, areas = flat @ flat.T, flat.sum(1)
    overlap = shared / (areas[:, None] + areas[None] - shared)
    np.fill_diagonal(overlap, 0)
    nearest = [names[i] for i in overlap.argmax(1)]
    assert np.mean([a == b for a, b in zip(names, nearest, strict=True)]) > 0.97


def test_everything_in_the_vocabulary_occurs() -> None:
    drawn = some_scenes(SceneSettings(), count=300)
    items = [item for scene in drawn for item in scene.objects]
    assert {item.shape for item in items} == set(vocabulary.SHAPES)
    assert {item.colour for item in items} == set(vocabulary.COLOURS)
    assert {item.texture for item in items} == set(vocabulary.TEXTURES)
    assert {item.place for item in items} == set(vocabulary.PLACES)
    assert {scene.background for scene in drawn} == set(vocabulary.BACKGROUNDS)
    assert {len(scene.objects) for scene in drawn} == {2, 3, 4, 5, 6}
    sizes = Counter(item.size for item in items)
    assert min(sizes[size] for size in vocabulary.SIZES) > 0.12 * len(items)


def test_pictures_vary_in_size_and_aspect() -> None:
    drawn = some_scenes(SceneSettings(), count=200)
    assert all(96 <= side <= 192 for scene in drawn for side in (scene.width, scene.height))
    assert len({(scene.width, scene.height) for scene in drawn}) > 150
    aspects = [scene.width / scene.height for scene in drawn]
    assert min(aspects) < 0.8
    assert max(aspects) > 1.25


def test_a_centre_crop_keeps_every_object() -> None:
    """Evaluation crops the central square: what the captions name must be in there."""
    for scene in some_scenes(SceneSettings(seed=6), count=100):
        mask = draw_scene(scene, SMALL).mask
        side = min(mask.shape)
        top, left = (mask.shape[0] - side) // 2, (mask.shape[1] - side) // 2
        cropped = mask[top : top + side, left : left + side]
        for item in scene.objects:
            assert (cropped == item.instance).sum() > 0.9 * (mask == item.instance).sum()


def mentions(sentence: str, phrase: str) -> bool:
    return re.search(rf"\b{re.escape(phrase)}\b", sentence.lower()) is not None


def test_captions_are_lists_and_name_every_object() -> None:
    for scene in some_scenes(count=150):
        fields = write_captions(scene, SMALL)
        assert tuple(fields) == FIELDS
        for sentences in fields.values():
            assert isinstance(sentences, list)
            assert sentences
            for sentence in sentences:
                assert isinstance(sentence, str)
                assert sentence == sentence.strip()
                assert "." not in sentence  # sentences are joined by ". "
        raw = fields["raw_caption"]
        assert len(raw) == 1
        for item in scene.objects:
            words = rf"\b{item.colour} {item.shape}\b"
            assert len(re.findall(words, raw[0].lower())) == 1
        for name in LONG:
            about = " | ".join(fields[name])
            for item in scene.objects:
                colours = vocabulary.COLOUR_SYNONYMS[item.colour]
                shapes = vocabulary.SHAPE_SYNONYMS[item.shape]
                assert any(mentions(about, f"{c} {s}") for c in colours for s in shapes)
            assert any(mentions(about, phrase) for phrase in vocabulary.BACKGROUND_PHRASES[scene.background])


def test_no_caption_names_what_is_not_there() -> None:
    for scene in some_scenes(count=150):
        there = {(item.colour, item.shape) for item in scene.objects}
        text = " | ".join(sentence for value in write_captions(scene, SMALL).values() for sentence in value)
        for colour in vocabulary.COLOURS:
            for shape in vocabulary.SHAPES:
                if (colour, shape) not in there:
                    assert not mentions(text, f"{colour} {shape}")


def test_long_captions_have_a_sentence_an_object_and_the_right_length() -> None:
    for scene in some_scenes(SceneSettings(), count=150):
        fields = write_captions(scene, SceneSettings())
        for name in LONG:
            assert len(fields[name]) >= len(scene.objects) + 1  # and the background
            assert all(8 <= len(sentence.split()) <= 25 for sentence in fields[name])


def test_the_three_voices_differ() -> None:
    shared: Counter[str] = Counter()
    for scene in some_scenes(count=100):
        fields = write_captions(scene, SMALL)
        for names in (LONG, FIELDS[1:4]):
            texts = [" | ".join(fields[name]) for name in names]
            assert len(set(texts)) == 3
        for sentence in {s for name in LONG for s in fields[name]}:
            shared[sentence] = max(shared[sentence], sum(sentence in fields[name] for name in LONG))
    assert max(shared.values()) == 1  # no sentence stands in two lists


def test_relations_are_true() -> None:
    told = 0
    pattern = re.compile(
        r"the (\w+ \w+) (?:is|stands) (to the left of|left of|to the right of|right of|above|below|higher up than|"
        r"lower down than) the (\w+ \w+)$"
    )
    for scene in some_scenes(count=150):
        place = {f"{item.colour} {item.shape}": (item.x, item.y) for item in scene.objects}
        fields = write_captions(scene, SMALL)
        for sentence in fields["longIB_captions"] + fields["longSV_captions"]:
            if match := pattern.search(sentence.lower()):
                first, second = place[match[1]], place[match[3]]
                how = match[2]
                axis = 0 if "left" in how or "right" in how else 1
                before = any(word in how for word in ("left", "above", "higher"))
                assert (first[axis] < second[axis]) == before, sentence
                told += 1
    assert told > 200


def test_record_is_what_the_scene_is() -> None:
    scene = some_scenes(count=5)[4]
    sample = make_sample(scene, SMALL)
    assert sample["__key__"] == "train_0000004"
    record = json.loads(sample["json"])
    assert record["scene"]["background"] == scene.background
    keys = ["shape", "colour", "size", "texture", "place", "box", "instance"]
    for item, there in zip(scene.objects, record["scene"]["objects"], strict=True):
        assert list(there) == keys
        assert all(there[name] == getattr(item, name) for name in keys if name != "box")


def test_wording_helpers() -> None:
    assert article("orange star") == "an orange star"
    assert article("red star") == "a red star"
    assert [listing(list("abc"[:n])) for n in (1, 2, 3)] == ["a", "a and b", "a, b and c"]
