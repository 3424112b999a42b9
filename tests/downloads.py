"""Small files in the published formats: DreamLIP's CSV, PixelProse's parquet, downloads of img2dataset."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cosmos_fast.config import SourceConfig
from cosmos_fast.data.index import Index, open_source
from tests.shards import picture, write_tar

DREAMLIP_HEADER = (
    "Image Path",
    "raw_caption",
    "shortIB_captions",
    "longIB_captions",
    "shortSV_captions",
    "longSV_captions",
    "shortLLA_captions",
    "longLLA_captions",
)
PIXELPROSE_HEADER = ("uid", "url", "key", "status", "original_caption", "vlm_model", "vlm_caption", "aesthetic_score")


def url_of(number: int) -> str:
    """With a comma and a quote, as some URLs have."""
    return f'https://images.example.org/{number:06d}/a,b"c.jpg?size=large&n={number}'


def dreamlip_row(number: int) -> dict[str, str]:
    """Seven captions as one string each; the long ones of several sentences, with line breaks and quotes."""
    return {
        "Image Path": url_of(number),
        "raw_caption": f"a cabin in the woods , number {number} .",
        "shortIB_captions": f"a small cabin {number}",
        "longIB_captions": f'The cabin "{number}" is 2.5 m high. It has a green roof, e.g. of copper.\n\nOne door.',
        "shortSV_captions": f"A wooden building {number} is shown.",
        "longSV_captions": f"The image captures cabin {number}. Is it old? It is!   In addition, there is a bench.",
        "shortLLA_captions": "",
        "longLLA_captions": f"The image features cabin {number}.</s>",
    }


def dreamlip_sentences(number: int) -> dict[str, list[str]]:
    """What dreamlip_row() says."""
    return {
        "raw_caption": [f"a cabin in the woods , number {number}"],
        "shortIB_captions": [f"a small cabin {number}"],
        "longIB_captions": [
            f'The cabin "{number}" is 2.5 m high',
            "It has a green roof, e.g. of copper",
            "One door",
        ],
        "shortSV_captions": [f"A wooden building {number} is shown"],
        "longSV_captions": [
            f"The image captures cabin {number}",
            "Is it old?",
            "It is!",
            "In addition, there is a bench",
        ],
        "longLLA_captions": [f"The image features cabin {number}"],
    }


def pixelprose_row(number: int) -> dict[str, Any]:
    """As in vlm_captions_*.parquet, of the columns the first ones and a figure."""
    return {
        "uid": f"{number:032x}",
        "url": url_of(number),
        "key": f"{number:09d}",
        "status": "success",
        "original_caption": f"Cabin no. {number}",
        "vlm_model": "gemini-pro-vision",
        "vlm_caption": f" This image displays: a cabin, number {number}. It has a green roof.\nThe style is a photo.",
        "aesthetic_score": 5.25,
    }


def write_csv(path: Path, header: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> Path:
    """As pandas writes it: quotes where they are needed."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, header, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_dreamlip(path: Path, numbers: Sequence[int]) -> Path:
    return write_csv(path, DREAMLIP_HEADER, [dreamlip_row(number) for number in numbers])


def metadata(number: int, key: str, **columns: Any) -> dict[str, Any]:
    """The json member that img2dataset writes: columns of the table first, then what it knows itself."""
    return {
        **columns,
        "url": url_of(number),
        "key": key,
        "status": "success",
        "error_message": None,
        "width": 40,
        "height": 32,
        "original_width": 40,
        "original_height": 32,
        "exif": "{}",
        "sha256": f"{number:064x}",
    }


def download_members(number: int, key: str, text: str | None = None, **columns: Any) -> dict[str, bytes]:
    """jpg, json and (with a caption column) txt of one image, in that order."""
    members = {
        f"{key}.jpg": picture(number),
        f"{key}.json": json.dumps(metadata(number, key, **columns), indent=4).encode(),
    }
    return members | ({} if text is None else {f"{key}.txt": text.encode()})


def write_download(folder: Path, counts: Sequence[int], **columns: Any) -> Path:
    """An output folder of img2dataset, webdataset format: 00000.tar, 00000_stats.json, ...; numbers run on."""
    folder.mkdir(parents=True, exist_ok=True)
    number = 0
    for shard, count in enumerate(counts):
        members: dict[str, bytes] = {}
        for place in range(count):
            members |= download_members(number, f"{shard:05d}{place:04d}", **columns)
            number += 1
        write_tar(folder / f"{shard:05d}.tar", members)
        stats = {"count": count + 3, "successes": count, "failed_to_download": 3, "failed_to_resize": 0}
        (folder / f"{shard:05d}_stats.json").write_text(json.dumps(stats, indent=4))
    return folder


def dreamlip(table: Path, images: Path, out: Path, *extra: str) -> list[str]:
    """Arguments of `cosmos-fast` that prepare DreamLIP in one process."""
    where = ["--images", str(images), "--out", str(out)]
    return ["data", "prepare", "dreamlip", str(table), *where, "--workers=1", *extra]


def shards_of(out: Path) -> dict[str, bytes]:
    """Name -> bytes of every shard."""
    return {path.name: path.read_bytes() for path in sorted(out.glob("*.tar"))}


def open_prepared(out: Path) -> Index:
    """The index that training would make of prepared shards."""
    return open_source(SourceConfig(path=str(out)))


def prepared_records(out: Path) -> dict[str, dict[str, Any]]:
    """key -> json of every sample."""
    index = open_prepared(out)
    return {index.key(i): json.loads(index.read(i)["json"]) for i in range(len(index))}
