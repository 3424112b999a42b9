"""CIFAR-10 and CIFAR-100: the 10,000 test images, from the "binary" or the "python" archive.

The python archive is a pickle. Nothing of it is run: see `strict_pickle`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from cosmos_fast.evaluate.datasets import strict_pickle
from cosmos_fast.evaluate.datasets.class_sets import class_set, classification_set, inside, lines_of, reader
from cosmos_fast.evaluate.datasets.layout import required
from cosmos_fast.evaluate.datasets.sets import ClassificationSet
from cosmos_fast.utils.errors import UserError

_SIDE = 32
_PIXELS = 3 * _SIDE * _SIDE


@dataclass(frozen=True)
class _Release:
    """Folders of the two archives, files of names and of images in them, and where a label is found.

    label_bytes: at the start of a record of the binary file, the last of which is the label.
    """

    name: str
    title: str
    classes: int
    binary: str
    binary_names: str
    binary_images: str
    label_bytes: int
    python: str
    python_names: tuple[str, str]
    python_images: tuple[str, str]


CIFAR10 = _Release(
    name="cifar10",
    title="CIFAR-10",
    classes=10,
    binary="cifar-10-batches-bin",
    binary_names="batches.meta.txt",
    binary_images="test_batch.bin",
    label_bytes=1,
    python="cifar-10-batches-py",
    python_names=("batches.meta", "label_names"),
    python_images=("test_batch", "labels"),
)
CIFAR100 = _Release(
    name="cifar100",
    title="CIFAR-100",
    classes=100,
    binary="cifar-100-binary",
    binary_names="fine_label_names.txt",
    binary_images="test.bin",
    label_bytes=2,  # the coarse label comes first
    python="cifar-100-python",
    python_names=("meta", "fine_label_names"),
    python_images=("test", "fine_labels"),
)


class PixelImages:
    """Images of an array, uint8 [N, 3, 32, 32] (see `datasets.sets`)."""

    def __init__(self, pixels: np.ndarray) -> None:
        self.pixels = pixels

    def __len__(self) -> int:
        return len(self.pixels)

    def key(self, number: int) -> str:
        return f"test/{number:05d}"

    def image(self, number: int) -> Image.Image:
        return Image.fromarray(np.ascontiguousarray(self.pixels[number].transpose(1, 2, 0)))


def open_cifar(release: _Release, root: Path) -> ClassificationSet:
    """UserError: neither archive, a file that is cut off, of another kind, or a pickle of anything but plain data."""
    name = release.name
    python, binary = inside(root, release.python), inside(root, release.binary)
    if (python / release.python_images[0]).is_file():
        names, labels, pixels = _read_python(release, python)
    else:
        # Where there is neither, the message names the archive that the layout begins with.
        required(name, root, f"{release.python}/{release.python_images[0]}", release.binary, release.binary_images)
        names, labels, pixels = _read_binary(release, binary)
    if len(names) != release.classes:
        raise UserError(f"{name}: {root} names {len(names)} classes, not {release.classes}: unpack the data set again")
    if any(not 0 <= label < release.classes for label in labels):
        raise UserError(f"{name}: {root} holds a label outside 0 to {release.classes - 1}: unpack the data set again")
    classes = class_set(name, [one.replace("_", " ") for one in names])
    return classification_set(name, "test", PixelImages(pixels), labels, classes)


def _read_binary(release: _Release, folder: Path) -> tuple[list[str], Sequence[int], np.ndarray]:
    """Names, labels and pixels of the "binary" archive."""
    names = lines_of(release.name, required(release.name, folder, release.binary_names))
    path = required(release.name, folder, release.binary_images)
    record = release.label_bytes + _PIXELS
    data = np.frombuffer(path.read_bytes(), np.uint8)
    if not len(data) or len(data) % record:
        raise UserError(f"{release.name}: {path} is cut off ({len(data)} bytes): unpack the data set again")
    rows = data.reshape(-1, record)
    pixels = rows[:, release.label_bytes :].reshape(-1, 3, _SIDE, _SIDE)
    return names, rows[:, release.label_bytes - 1].tolist(), pixels


def _read_python(release: _Release, folder: Path) -> tuple[list[str], Sequence[int], np.ndarray]:
    """Names, labels and pixels of the "python" archive."""
    (names_file, names_key), (images_file, labels_key) = release.python_names, release.python_images
    names = _entries(release.name, required(release.name, folder, names_file), names_key)[names_key]
    path = required(release.name, folder, images_file)
    found = _entries(release.name, path, labels_key, "data")
    labels, pixels = found[labels_key], found["data"]
    if not isinstance(pixels, np.ndarray) or not isinstance(labels, list) or not isinstance(names, list):
        raise UserError(f"{release.name}: {path} holds no array with a list of labels: unpack the data set again")
    if pixels.dtype != np.uint8 or pixels.shape != (len(labels), _PIXELS) or not len(labels):
        raise UserError(f"{release.name}: {path} has {pixels.shape} numbers for {len(labels)} labels: unpack it again")
    if any(type(label) is not int for label in labels) or any(type(one) not in (bytes, str) for one in names):
        raise UserError(f"{release.name}: {path} holds labels of another kind: unpack the data set again")
    texts = [one if isinstance(one, str) else one.decode("utf-8", "replace") for one in names]
    return texts, labels, pixels.reshape(-1, 3, _SIDE, _SIDE)


def _entries(name: str, path: Path, *keys: str) -> dict[str, Any]:
    """A pickled dictionary. UserError: anything else, or one without these keys."""
    try:
        found = strict_pickle.read_pickle(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{name}: {path} cannot be read ({error}): unpack the data set again") from None
    missing = [key for key in keys if not isinstance(found, dict) or key not in found]
    if missing:
        raise UserError(f"{name}: {path} has no {missing[0]!r}: unpack the data set again")
    return found


def _layout(release: _Release) -> str:
    files = (release.python_images[0], release.python_names[0], release.binary_images, release.binary_names)
    return f"""\
ROOT/{release.python}/{files[0]}, {files[1]}      the python archive; nothing in it is unpickled
or ROOT/{release.binary}/{files[2]}, {files[3]}   the binary archive
ROOT may be that folder itself. All 10,000 test images.
"""


READERS = tuple(
    reader(
        name=release.name,
        title=f"{release.title} test, {release.classes} classes",
        layout=_layout(release),
        open=partial(open_cifar, release),
    )
    for release in (CIFAR10, CIFAR100)
)
