"""Webdataset shards as evaluation sets, in the layout of CLIP-benchmark: captions for retrieval, or classes.

Any set with a reader of its own is read from this layout too, so that copies made for CLIP-benchmark serve as they are.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

from PIL import Image

from cosmos_fast.config import SourceConfig
from cosmos_fast.data.faults import SampleFault
from cosmos_fast.data.images import decode
from cosmos_fast.data.index import IMAGE_EXTENSIONS, RECORD_EXTENSION, Index, open_source
from cosmos_fast.data.records import parse_record, raw_captions
from cosmos_fast.evaluate.datasets.layout import all_there, read_text, refuse_too_large, required, visible
from cosmos_fast.evaluate.datasets.pairs import retrieval_set
from cosmos_fast.evaluate.datasets.sets import ClassificationSet, Reader, RetrievalSet, digest
from cosmos_fast.evaluate.prompts import ClassSet
from cosmos_fast.utils.errors import UserError

SPLIT = "test"
_MAX_BYTES = 64 * 2**20  # of a member
_MAX_TEXT = 2**20
_LAYOUT = """\
ROOT/test/nshards.txt      the number of shards
ROOT/test/0.tar, 1.tar ... s0000000.webp (or .jpg, .jpeg, .png) and, for retrieval,
                           s0000000.txt, a caption a line; for classification,
                           s0000000.cls, the number of the class from 0
ROOT/classnames.txt        a class a line (classification)
ROOT/zeroshot_classification_templates.txt   a template a line, {c} where the name goes (classification)
ROOT/dataset_type.txt      "retrieval" or "classification"; without it, classnames.txt means classification
Shards in ROOT itself, with or without nshards.txt, are read too.
"""


def is_one(root: Path) -> bool:
    """Whether a folder has CLIP-benchmark's layout."""
    return (root / SPLIT / "nshards.txt").is_file() or (root / "nshards.txt").is_file()


class ShardImages:
    """Images of shards by number (see `datasets.sets`). Reads of shards take turns, decoding does not."""

    def __init__(self, name: str, index: Index) -> None:
        self.name, self.index = name, index
        self._lock = threading.Lock()  # the index keeps its open files in a plain dictionary
        for number in range(len(index)):
            self._extension(number)

    def __len__(self) -> int:
        return len(self.index)

    def key(self, number: int) -> str:
        return self.index.name(number)

    def image(self, number: int) -> Image.Image:
        try:
            return decode(self.member(number, self._extension(number), _MAX_BYTES))
        except SampleFault as error:
            refuse_too_large(self.name, self.key(number), error)
            raise UserError(f"{self.name}: {self.key(number)}: {error}: take another copy of the shard") from None

    def member(self, number: int, extension: str, max_bytes: int) -> bytes:
        """Raises SampleFault: too large, or the shard has changed."""
        with self._lock:
            return self.index.read(number, max_bytes=max_bytes, only=lambda one: one == extension)[extension]

    def text(self, number: int, extension: str) -> str:
        """A member as UTF-8. UserError: missing, no UTF-8, larger than 1 MiB."""
        try:
            return self.member(number, extension, _MAX_TEXT).decode("utf-8-sig")
        except KeyError:
            raise UserError(f"{self.name}: {self.key(number)} has no .{extension}: take another copy") from None
        except (SampleFault, UnicodeDecodeError) as error:
            raise UserError(f"{self.name}: {self.key(number)}.{extension} cannot be read ({error})") from None

    def _extension(self, number: int) -> str:
        members = self.index.members(number)
        for extension in IMAGE_EXTENSIONS:
            if extension in members:
                return extension
        raise UserError(f"{self.name}: {self.key(number)} has no image ({', '.join(IMAGE_EXTENSIONS)}): take it out")


def open_shards(root: Path, name: str) -> ShardImages:
    """The images of ROOT/test, or of ROOT. UserError: a shard that is missing, cut off or broken; no sample."""
    counted = required(name, root, f"{SPLIT}/nshards.txt", "nshards.txt") if is_one(root) else None
    folder = counted.parent if counted else root
    if counted is not None:
        text = read_text(name, counted).strip()
        said = _number(text)
        if not said:
            raise UserError(f"{name}: {counted} holds {text[:20]!r}, not the number of shards: write it there")
        all_there(name, folder, [f"{number}.tar" for number in range(said)])
        found = len(visible(folder, "*.tar"))
        if found != said:
            raise UserError(f"{name}: {folder} holds {found} shards, nshards.txt says {said}: take the others away")
    elif not visible(root, "*.tar"):
        required(name, root, f"{SPLIT}/nshards.txt")
    index = open_source(SourceConfig(path=str(folder)), whole=True)
    if index.faults:
        raise UserError(f"{name}: {folder}: {index.faults[0]}: take another copy of the shard")
    return ShardImages(name, index)


def open_retrieval(root: Path, name: str = "wds") -> RetrievalSet:
    """Images with `.txt` members, or with the `.json` records that training reads, of which the raw captions count.

    UserError as `open_shards`, and a sample without such a member, or without a caption in it.
    """
    _check_type(root, name, "retrieval")
    images = open_shards(root, name)
    captions = [_captions(images, number) for number in range(len(images))]
    return retrieval_set(name, SPLIT, root, images, captions)


def _captions(images: ShardImages, number: int) -> Sequence[str]:
    members = images.index.members(number)
    if "txt" in members or RECORD_EXTENSION not in members:
        return _lines(images.text(number, "txt"))
    try:
        return raw_captions(parse_record(images.text(number, RECORD_EXTENSION).encode()))
    except SampleFault as error:
        raise UserError(f"{images.name}: {images.key(number)}.json: {error}: take it out") from None


def open_classification(root: Path, name: str = "wds", classes: ClassSet | None = None) -> ClassificationSet:
    """Images with `.cls` members. classes: to be used instead of those of the folder, which then may lack them.

    UserError as `open_shards`, and a sample without a class, or of one that the names do not reach.
    """
    _check_type(root, name, "classification")
    if classes is None:
        classes = _class_set(root, name)
    images = open_shards(root, name)
    labels = tuple(_labels(images, len(classes.classes)))
    keys = (images.key(number) for number in range(len(images)))
    answers = (classes.classes[label] for label in labels)
    return ClassificationSet(
        name=name, split=SPLIT, images=images, sha256=digest(keys, answers), labels=labels, classes=classes
    )


def open_wds(root: Path) -> RetrievalSet | ClassificationSet:
    """What dataset_type.txt says; without it, classes where the folder names some."""
    named = (root / "classnames.txt").exists()
    return open_classification(root) if _type(root, "wds", named) == "classification" else open_retrieval(root)


def _type(root: Path, name: str, classes: bool) -> str:
    path = root / "dataset_type.txt"
    if not path.is_file():
        return "classification" if classes else "retrieval"
    said = read_text(name, path).strip().lower()
    if said not in ("retrieval", "classification"):
        raise UserError(f"{name}: {path} says {said[:20]!r}: only retrieval and classification are evaluated")
    return said


def _check_type(root: Path, name: str, wanted: str) -> None:
    """UserError where dataset_type.txt says something else."""
    said = _type(root, name, wanted == "classification")
    if said != wanted:
        raise UserError(f"{name}: {root / 'dataset_type.txt'} says {said!r}, not {wanted!r}: take the folder of {name}")


def _labels(images: ShardImages, classes: int) -> Iterator[int]:
    for number in range(len(images)):
        text = images.text(number, "cls").strip()
        label = _number(text)
        if label is None or label >= classes:
            raise UserError(
                f"{images.name}: {images.key(number)} is of class {text[:20]!r}, not one of 0 to {classes - 1}: the "
                "names are of another data set"
            )
        yield label


def _class_set(root: Path, name: str) -> ClassSet:
    """Names and templates of the folder."""
    names = _lines(read_text(name, required(name, root, "classnames.txt")))
    path = required(name, root, "zeroshot_classification_templates.txt")
    templates = [line.replace("{c}", "{}") for line in _lines(read_text(name, path))]
    for template in templates:
        if "{}" not in template:
            raise UserError(f"{name}: {path}: {template!r} has no {{c}} where the name of a class goes: add it")
    if not names or not templates:
        raise UserError(f"{name}: {root}: classnames.txt and {path.name} need a line each at least")
    # Names may repeat: two classes called the same are two classes all the same.
    prompts = tuple((tuple(template.replace("{}", one) for template in templates),) for one in names)
    return ClassSet(name, tuple(names), prompts)


def _number(text: str) -> int | None:
    """A number of up to six digits; None for any other text."""
    return int(text) if text.isascii() and text.isdecimal() and len(text) <= 6 else None


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip()]


READERS = (
    Reader(
        name="wds",
        task="retrieval or classification",
        title="webdataset shards with captions or classes, as CLIP-benchmark has them",
        layout=_LAYOUT,
        open=open_wds,
    ),
)
