"""The eight segmentation sets, in the folders that their publishers' archives unpack to, or as usually converted.

Both forms of maps are read where there are two: Pascal Context's .mat and the PNGs made of them, COCO-Stuff's numbers
and its training numbers (COCO-Object is made of the same), Cityscapes' labelIds and labelTrainIds. They may lie side by
side; the one that more images have is taken.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from cosmos_fast.evaluate.datasets.class_map_files import (
    Maps,
    Numbers,
    identity,
    most_whole,
    published,
    read_label_map,
    segmentation_set,
    shifted,
)
from cosmos_fast.evaluate.datasets.layout import read_text, required, visible
from cosmos_fast.evaluate.datasets.sets import Reader, SegmentationSet
from cosmos_fast.evaluate.segmentation import IGNORE, SegmentationProtocol

# Pixels of the paper over its window of 224: the short side is 336 px, the long one at most 2048.
_PAPER = SegmentationProtocol(short_side=336 / 224, long_side=2048 / 224, interpolation="bilinear")
PROTOCOLS: Mapping[str, SegmentationProtocol] = {
    "voc21": replace(_PAPER, scale=65.0, prob_threshold=0.1, area_threshold=0.1),
    "context60": replace(_PAPER, scale=50.0, prob_threshold=0.1),
    "coco_object": replace(_PAPER, scale=50.0, prob_threshold=0.1),
    "voc20": _PAPER,
    "cityscapes": replace(_PAPER, short_side=560 / 224),
    "context59": _PAPER,
    "ade20k": _PAPER,
    "coco_stuff": replace(_PAPER, short_side=448 / 224),
}
# labelIds of Cityscapes that count, in the order of its training numbers; the rest of 0 to 33 is not counted.
_CITYSCAPES = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
_CONTEXT_LABELS = 460
_THINGS = 80

_VOC = """\
ROOT/VOCdevkit/VOC2012/ImageSets/Segmentation/val.txt       VOCtrainval_11-May-2012.tar; 1,449 images
ROOT/VOCdevkit/VOC2012/JPEGImages/2007_000033.jpg ...
ROOT/VOCdevkit/VOC2012/SegmentationClass/2007_000033.png ...   numbers 0 to 20, 255 is not counted{zero}
ROOT may be VOCdevkit or VOC2012 itself.
"""
_CONTEXT = """\
ROOT/VOCdevkit/VOC2010/JPEGImages/2008_000002.jpg ...       VOCtrainval_03-May-2010.tar; 5,105 images of val
and either the maps as published:
ROOT/VOCdevkit/VOC2010/trainval/2008_000002.mat ...         trainval.tar.gz of Pascal Context (or ROOT/trainval)
ROOT/VOCdevkit/VOC2010/ImageSets/Main/val.txt
or converted, numbers 0 (background) to 59:
ROOT/VOCdevkit/VOC2010/SegmentationClassContext/2008_000002.png ...
ROOT/VOCdevkit/VOC2010/ImageSets/SegmentationContext/val.txt
ROOT may be VOCdevkit or VOC2010 itself.{zero}
"""
_COCO = """\
ROOT/images/val2017/000000000139.jpg ...                    val2017.zip (or ROOT/val2017); 5,000 images
and either the maps as published:
ROOT/annotations/val2017/000000000139.png ...               stuffthingmaps_trainval2017.zip
                                                            (or ROOT/stuffthingmaps/val2017)
or converted, beside them:
ROOT/annotations/val2017/000000000139{suffix} ...   numbers {numbers}
"""
_CITIES = """\
ROOT/leftImg8bit/val/frankfurt/frankfurt_000000_000294_leftImg8bit.png ...    leftImg8bit_trainvaltest.zip; 500 images
ROOT/gtFine/val/frankfurt/frankfurt_000000_000294_gtFine_labelIds.png ...     gtFine_trainvaltest.zip
or converted, beside them: ..._gtFine_labelTrainIds.png
"""
_ADE = """\
ROOT/ADEChallengeData2016/images/validation/ADE_val_00000001.jpg ...         ADEChallengeData2016.zip; 2,000 images
ROOT/ADEChallengeData2016/annotations/validation/ADE_val_00000001.png ...    numbers 1 to 150, 0 is not counted
ROOT may be ADEChallengeData2016 itself.
"""


def open_voc(root: Path, background: bool) -> SegmentationSet:
    """VOC 2012 val; without background its 20 things only."""
    name = "voc21" if background else "voc20"
    folder = _inside(root, "VOCdevkit", "VOC2012")
    ids = _listed(name, required(name, folder, "ImageSets/Segmentation/val.txt"))
    meaning = identity(21) if background else shifted(20)
    maps = Maps(required(name, folder, "SegmentationClass"), "{}.png".format, Numbers.of(meaning, "0 to 20 and 255"))
    classes = published()["classes"]["voc"][0 if background else 1 :]
    images = required(name, folder, "JPEGImages")
    return segmentation_set(name, "val", images, "{}.jpg".format, ids, maps, classes, PROTOCOLS[name])


def open_context(root: Path, background: bool) -> SegmentationSet:
    """Pascal Context's 59 classes on VOC 2010 val; what is none of them is background, or not counted."""
    name = "context60" if background else "context59"
    folder = _inside(root, "VOCdevkit", "VOC2010")
    images = required(name, folder, "JPEGImages")
    labels: list[int] = published()["context_labels"]
    first, other = (0, 0) if background else (-1, IGNORE)
    listed = required(name, folder, "ImageSets/SegmentationContext/val.txt", "ImageSets/Main/val.txt")
    ids = _listed(name, listed)
    meaning = {number: number + first for number in range(1, 60)} | {0: other, IGNORE: IGNORE}
    forms = [
        Maps(folder / "SegmentationClassContext", "{}.png".format, Numbers.of(meaning, "0 to 59 and 255")),
        *(
            Maps(
                place / "trainval",
                "{}.mat".format,
                Numbers.of(
                    {label: number + first for number, label in enumerate(labels) if number},
                    "0 to 459",
                    _CONTEXT_LABELS,
                    other,
                ),
                read_label_map,
            )
            for place in (folder, root)
        ),
    ]
    if not any(form.folder.is_dir() for form in forms):
        required(name, folder, "SegmentationClassContext", "trainval")
    maps = most_whole(ids, *(form for form in forms if form.folder.is_dir()))
    classes = [*(["background"] if background else []), *published()["classes"]["context"]]
    return segmentation_set(name, "val", images, "{}.jpg".format, ids, maps, classes, PROTOCOLS[name])


def open_coco(root: Path, things: bool) -> SegmentationSet:
    """COCO 2017 val with the maps of COCO-Stuff: its 80 things over a background, or all 171 classes."""
    name = "coco_object" if things else "coco_stuff"
    images = required(name, root, "images/val2017", "val2017")
    folder = required(name, root, "annotations/val2017", "stuffthingmaps/val2017")
    names: list[str] = published()["classes"]["coco_stuff"]
    labels: list[int] = published()["coco_stuff_labels"]
    if things:
        # What is no thing is background, what has no label too.
        numbers = {label: place + 1 if place < _THINGS else 0 for place, label in enumerate(labels)}
        numbers[IGNORE] = 0
        suffix, converted, called = "_instanceTrainIds.png", identity(_THINGS + 1), "0 to 80 and 255"
        classes = ["background", *names[:_THINGS]]
    else:
        numbers = {label: place for place, label in enumerate(labels)} | {IGNORE: IGNORE}
        suffix, converted, called = "_labelTrainIds.png", identity(len(names)), "0 to 170 and 255"
        classes = names
    ids = sorted({*_stems(images, "*.jpg"), *(stem.partition("_")[0] for stem in _stems(folder, "*.png"))})
    maps = most_whole(
        ids,
        Maps(folder, "{}.png".format, Numbers.of(numbers, "COCO-Stuff's (0 to 181 with gaps, 255)")),
        Maps(folder, ("{}" + suffix).format, Numbers.of(converted, called)),
    )
    return segmentation_set(name, "val2017", images, "{}.jpg".format, ids, maps, classes, PROTOCOLS[name])


def open_cityscapes(root: Path) -> SegmentationSet:
    """Its validation images with the 19 classes that its benchmark counts."""
    name = "cityscapes"
    images = required(name, root, "leftImg8bit/val")
    folder = required(name, root, "gtFine/val")
    ends = {images: "_leftImg8bit.png", folder: "_gtFine_labelIds.png"}
    ids = sorted({path.removesuffix(end) for place, end in ends.items() for path in visible(place, f"*/*{end}")})
    counted = {label: place for place, label in enumerate(_CITYSCAPES)}
    # Of license plates the number is -1, which converters write as 255.
    meaning = {label: counted.get(label, IGNORE) for label in (*range(34), 255)}
    maps = most_whole(
        ids,
        Maps(folder, "{}_gtFine_labelIds.png".format, Numbers.of(meaning, "0 to 33 and 255")),
        Maps(folder, "{}_gtFine_labelTrainIds.png".format, Numbers.of(identity(19), "0 to 18 and 255")),
    )
    classes = published()["classes"]["cityscapes"]
    return segmentation_set(name, "val", images, "{}_leftImg8bit.png".format, ids, maps, classes, PROTOCOLS[name])


def open_ade20k(root: Path) -> SegmentationSet:
    """The 150 classes of the scene parsing challenge of 2016."""
    name = "ade20k"
    folder = _inside(root, "ADEChallengeData2016")
    images = required(name, folder, "images/validation")
    annotations = required(name, folder, "annotations/validation")
    ids = sorted({*_stems(images, "*.jpg"), *_stems(annotations, "*.png")})
    maps = Maps(annotations, "{}.png".format, Numbers.of(shifted(150), "0 to 150 and 255"))
    classes = published()["classes"]["ade20k"]
    return segmentation_set(name, "validation", images, "{}.jpg".format, ids, maps, classes, PROTOCOLS[name])


def _inside(root: Path, *folders: str) -> Path:
    """The innermost of nested folders, of which the outer ones may be left out."""
    for folder in folders:
        root = root / folder if (root / folder).is_dir() else root
    return root


def _listed(name: str, path: Path) -> Sequence[str]:
    return read_text(name, path).split()


def _stems(folder: Path, pattern: str) -> Iterator[str]:
    return (Path(name).stem for name in visible(folder, pattern))


def _reader(name: str, title: str, layout: str) -> Reader:
    openers = {
        "voc21": lambda root: open_voc(root, background=True),
        "voc20": lambda root: open_voc(root, background=False),
        "context60": lambda root: open_context(root, background=True),
        "context59": lambda root: open_context(root, background=False),
        "coco_object": lambda root: open_coco(root, things=True),
        "coco_stuff": lambda root: open_coco(root, things=False),
        "cityscapes": open_cityscapes,
        "ade20k": open_ade20k,
    }
    return Reader(name=name, task="segmentation", title=title, layout=layout, open=openers[name])


_NOT_COUNTED = ", nor is 0"
READERS = (
    _reader("voc21", "Pascal VOC 2012 val, 20 things and background", _VOC.format(zero="")),
    _reader("context60", "Pascal Context val, 59 classes and background", _CONTEXT.format(zero="")),
    _reader(
        "coco_object",
        "COCO-Object val2017, 80 things and background",
        _COCO.format(suffix="_instanceTrainIds.png", numbers="0 (background) to 80"),
    ),
    _reader("voc20", "Pascal VOC 2012 val, 20 things", _VOC.format(zero=_NOT_COUNTED)),
    _reader("cityscapes", "Cityscapes val, 19 classes", _CITIES),
    _reader("context59", "Pascal Context val, 59 classes", _CONTEXT.format(zero="\nBackground is not counted.")),
    _reader("ade20k", "ADE20k validation, 150 classes", _ADE),
    _reader(
        "coco_stuff",
        "COCO-Stuff val2017, 171 classes",
        _COCO.format(suffix="_labelTrainIds.png", numbers="0 to 170, 255 is not counted"),
    ),
)
