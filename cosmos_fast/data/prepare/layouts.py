"""The json member of a sample, in DreamLIP's or PixelProse's layout, from a table's row or a download's metadata."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cosmos_fast.data.prepare.texts import as_sentences, as_text
from cosmos_fast.data.records import DREAMLIP_FIELDS

Record = dict[str, Any]  # what is written as json


@dataclass(frozen=True)
class Layout:
    """A published table. url: names its URL column goes by, the published one first. key: the column of names.

    needed: a table without any of these columns holds no captions of this layout.
    """

    name: str
    url: tuple[str, ...]
    key: str
    needed: tuple[str, ...]
    columns: tuple[str, ...]

    def record(self, row: Mapping[str, Any]) -> Record | None:
        """Captions of a row; None if it has none."""
        return dreamlip_record(row) if self.name == "dreamlip" else pixelprose_record(row)


DREAMLIP = Layout("dreamlip", ("Image Path", "url"), "Image Path", DREAMLIP_FIELDS, DREAMLIP_FIELDS)
PIXELPROSE = Layout(
    "pixelprose", ("url",), "key", ("vlm_caption", "caption"), ("uid", "original_caption", "vlm_caption", "caption")
)
LAYOUTS = {layout.name: layout for layout in (DREAMLIP, PIXELPROSE)}


def dreamlip_record(row: Mapping[str, Any]) -> Record | None:
    """The seven fields as lists of sentences; empty ones are left out."""
    found = {field: as_sentences(row.get(field)) for field in DREAMLIP_FIELDS}
    record = {field: sentences for field, sentences in found.items() if sentences}
    return record or None


def pixelprose_record(row: Mapping[str, Any]) -> Record | None:
    """original_caption and caption (the dense one, `vlm_caption` in the table) as texts, uid where there is one.

    Without a dense caption the row is of no use: the original ones are the alt texts PixelProse was made to replace.
    """
    caption = as_text(row.get("vlm_caption")) or as_text(row.get("caption"))
    if not caption:
        return None
    record = {"original_caption": as_text(row.get("original_caption")), "caption": caption, "uid": row.get("uid")}
    return {field: value for field, value in record.items() if isinstance(value, str) and value}


def download_record(metadata: Mapping[str, Any], text: str) -> Record | None:
    """From what img2dataset saved with an image: its metadata, and the txt member ("" if there is none).

    Columns of DreamLIP or PixelProse that were saved along decide; else the one caption there is, as sentences.
    """
    if any(as_sentences(metadata.get(field)) for field in DREAMLIP_FIELDS):
        return dreamlip_record(metadata)
    if metadata.get("vlm_caption") or metadata.get("original_caption"):
        return pixelprose_record({"vlm_caption": text, **_without_blanks(metadata)})
    return dreamlip_record({"raw_caption": metadata.get("caption") or text})


def _without_blanks(metadata: Mapping[str, Any]) -> Record:
    return {name: value for name, value in metadata.items() if value}
