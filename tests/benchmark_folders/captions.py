"""Miniatures of the published caption sets, in exactly their layouts. Pictures are of tests.shards, by number."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path

from tests.shards import picture, write_tar

# Number of a picture -> its captions, of unequal count as in COCO; two pictures share a caption.
CAPTIONS = {
    0: ["A red bus.", "a bus in a street"],
    1: ["two dogs, on grass", 'a "good" dog', "Two dogs play"],
    2: ["a cat"],
    3: ["a bowl of soup", "soup"],
    4: ["a cat", "A black cat sleeps on a couch ", "something small", "a couch"],
    5: ["a plane over the sea"],
}


def expected() -> list[tuple[str, ...]]:
    """Captions in the order of the pictures' numbers, as readers give them."""
    return [tuple(text.strip() for text in texts) for texts in CAPTIONS.values()]


def write_pictures(folder: Path, names: Sequence[str]) -> None:
    """Picture `number` under names[number]; `.png` and `.webp` in their formats."""
    formats = {".png": "PNG", ".webp": "WEBP"}
    for number, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(number, 24 + 8 * number, 40, formats.get(path.suffix, "JPEG")))


def coco_json() -> dict:
    """captions_val2017.json: annotations in the order of their ids, which is not that of the images."""
    images = [
        {"id": 100 + number, "file_name": f"{100 + number:012}.jpg", "height": 40, "width": 24 + 8 * number}
        for number in CAPTIONS
    ]
    notes = [
        {"image_id": 100 + number, "id": 10 * place + number, "caption": text}
        for number, texts in CAPTIONS.items()
        for place, text in enumerate(texts)
    ]
    notes.sort(key=lambda note: note["caption"])
    return {"info": {}, "licenses": [], "images": images[::-1], "annotations": notes}


def write_coco(root: Path) -> Path:
    """annotations_trainval2017.zip and val2017.zip, unpacked."""
    write_pictures(root / "val2017", [f"{100 + number:012}.jpg" for number in CAPTIONS])
    (root / "annotations").mkdir()
    (root / "annotations/captions_val2017.json").write_text(json.dumps(coco_json()))
    return root


def karpathy_json(names: Sequence[str], folder: str | None = None) -> dict:
    """A JSON of Karpathy and Fei-Fei's: the pictures are the test split; those around them are not there."""
    images = []
    for number, name in enumerate(names):
        for split, filename in (("train", f"absent{number}.jpg"), ("test", name)):
            sentences = [
                {"tokens": text.lower().split(), "raw": text, "imgid": number, "sentid": 10 * number + place}
                for place, text in enumerate(CAPTIONS[number])
            ]
            image = {"imgid": number, "sentids": [], "sentences": sentences, "split": split, "filename": filename}
            images.append(image | ({"filepath": folder, "cocoid": number} if folder else {}))
    return {"images": images, "dataset": "x"}


def write_coco_karpathy(root: Path) -> Path:
    """dataset_coco.json of caption_datasets.zip, and val2014.zip unpacked."""
    names = [f"COCO_val2014_{number:012}.jpg" for number in CAPTIONS]
    write_pictures(root / "val2014", names)
    (root / "dataset_coco.json").write_text(json.dumps(karpathy_json(names, "val2014")))
    return root


def write_flickr30k(root: Path, form: str = "json") -> Path:
    """flickr30k-images.tar.gz unpacked, and the split as "json" (Karpathy), "txt" (CLIP-benchmark) or "csv" (hub)."""
    names = [f"{1007129816 + number}.jpg" for number in CAPTIONS]
    write_pictures(root / "flickr30k-images", names)
    if form == "json":
        (root / "dataset_flickr30k.json").write_text(json.dumps(karpathy_json(names)))
    elif form == "txt":
        lines = [f"{name},{text}" for name, texts in zip(names, CAPTIONS.values(), strict=True) for text in texts]
        (root / "flickr30k_test_karpathy.txt").write_text("\n".join(["image,caption", *lines, ""]))
    else:
        with (root / "flickr_annotations_30k.csv").open("w", newline="") as file:
            table = csv.writer(file)
            table.writerow(["raw", "sentids", "split", "filename", "img_id"])
            for number, name in enumerate(names):
                table.writerow([json.dumps(["no"]), "[0]", "train", f"absent{number}.jpg", 100 + number])
                table.writerow([json.dumps(CAPTIONS[number]), "[1]", "test", name, number])
    return root


def write_captions(root: Path, form: str = "folder") -> Path:
    """A folder of somebody's own: "folder" (texts beside the images), "tar", or the name of the list of images."""
    if form == "tar":
        return write_shards(root, "txt", ["\n".join(texts) for texts in CAPTIONS.values()])
    names = ["a/0.jpg", "a/1.png", "b/2.webp", "b/c/3.jpeg", "b/c/4.v2.jpg", "d.JPG"]
    write_pictures(root, names)
    captions = dict(zip(names, CAPTIONS.values(), strict=True))
    flat = [(name, text) for name, texts in captions.items() for text in texts]
    path = root / form
    if form == "folder":
        for name, texts in captions.items():
            (root / name).with_suffix(".txt").write_text("\n".join(texts) + "\n\n")
    elif form == "captions.json":
        path.write_text(json.dumps(captions))
    elif form == "metadata.jsonl":
        path.write_text("".join(json.dumps({"file_name": name, "text": text}) + "\n" for name, text in flat))
    else:
        with path.open("w", newline="") as file:
            table = csv.writer(file, delimiter="\t" if path.suffix == ".tsv" else ",")
            table.writerows([("image", "caption"), *flat])
    return root


def write_shards(folder: Path, extension: str, texts: Sequence[str], image: str = "jpg", a_shard: int = 4) -> Path:
    """0.tar, 1.tar, ... of a folder: picture `number` and `texts[number]`, with the keys of CLIP-benchmark."""
    formats = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}
    for shard, start in enumerate(range(0, len(texts), a_shard)):
        members: dict[str, bytes] = {}
        for number in range(start, min(start + a_shard, len(texts))):
            members[f"s{number:07}.{extension}"] = texts[number].encode()
            members[f"s{number:07}.{image}"] = picture(number, 24 + 8 * number, 40, formats[image])
        write_tar(folder / f"{shard}.tar", members)
    return folder


def write_wds(root: Path, kind: str = "retrieval") -> Path:
    """A repository of CLIP-benchmark: captions, or three classes whose label is the picture's number modulo three."""
    if kind == "retrieval":
        write_shards(root / "test", "txt", ["\n".join(texts) for texts in CAPTIONS.values()])
        (root / "dataset_type.txt").write_text("retrieval\n")
    else:
        write_shards(root / "test", "cls", [str(number % 3) for number in CAPTIONS], "webp")
        (root / "classnames.txt").write_text("tench\ngreat white shark\ntench\n")
        (root / "zeroshot_classification_templates.txt").write_text("a photo of a {c}.\nthe {c}\n")
    (root / "test/nshards.txt").write_text("2\n")
    return root
