"""Caption records: the json member of a sample, in DreamLIP's or PixelProse's layout, as a list of sentences."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

from cosmos_fast.data import faults
from cosmos_fast.data.faults import SampleFault

DREAMLIP_FIELDS = (
    "raw_caption",
    "shortIB_captions",
    "shortSV_captions",
    "shortLLA_captions",
    "longIB_captions",
    "longSV_captions",
    "longLLA_captions",
)
PIXELPROSE_FIELDS = ("original_caption", "caption")
MAX_RECORD_BYTES = 1 << 20  # real records hold a few kB; json and ftfy are slow on more
_PIXELPROSE_SPLIT = re.compile(r"\n|</s>|\.")
# A full stop ends a sentence when space and no lower-case letter follow ("2.5 m", "e.g. this" stay whole).
_SENTENCE_END = re.compile(r"[.!?]\s+(?![a-z\s])")


@dataclass(frozen=True)
class Record:
    """sentences: every caption of the sample, stripped, none empty, in the order of the record. raw: the whole json."""

    sentences: list[str]
    raw: dict[str, Any]


def parse_record(data: bytes, schema: str = "auto") -> Record:
    """Read a json member. schema: "dreamlip", "pixelprose", or "auto" (by the fields that are there).

    Raises SampleFault: not json, not an object, over MAX_RECORD_BYTES, or no caption in it.
    """
    if not data:
        raise SampleFault(faults.EMPTY_MEMBER, "json")
    if len(data) > MAX_RECORD_BYTES:
        raise SampleFault(faults.TOO_MANY_BYTES, f"json: {len(data)} bytes, the cap is {MAX_RECORD_BYTES}")
    try:
        raw = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise SampleFault(faults.BAD_JSON, str(error)) from error
    if not isinstance(raw, dict):
        raise SampleFault(faults.BAD_JSON, f"a {type(raw).__name__} instead of an object")
    if schema == "auto":
        schema = guess_schema(raw)
    sentences = _pixelprose_sentences(raw) if schema == "pixelprose" else _dreamlip_sentences(raw)
    if not sentences:
        raise SampleFault(faults.NO_CAPTION, f"no text in the fields of a {schema} record")
    return Record(sentences, raw)


def raw_captions(record: Record) -> tuple[str, ...]:
    """`raw_caption` of DreamLIP (one string counts as one caption), else the first sentence of the record."""
    raw = record.raw.get("raw_caption")
    captions = [raw] if isinstance(raw, str) else raw if isinstance(raw, list) else []
    texts = tuple(text.strip() for text in captions if isinstance(text, str) and text.strip())
    return texts or (record.sentences[0],)


def guess_schema(raw: dict[str, Any]) -> str:
    """ "dreamlip" when any of its fields is there, else "pixelprose" when one of its, else "dreamlip"."""
    if not any(field in raw for field in DREAMLIP_FIELDS) and any(field in raw for field in PIXELPROSE_FIELDS):
        return "pixelprose"
    return "dreamlip"


def _dreamlip_sentences(raw: dict[str, Any]) -> list[str]:
    sentences: list[str] = []
    for field in DREAMLIP_FIELDS:
        value = raw.get(field)
        if isinstance(value, str):  # a list is promised; taken as one it would be a list of letters
            sentences.extend(split_sentences(value))
        elif isinstance(value, list):
            sentences.extend(_strip_all(item for item in value if isinstance(item, str)))
        elif value is not None:
            raise SampleFault(faults.BAD_JSON, f"{field} is a {type(value).__name__}, not a list of strings")
    return sentences


def _pixelprose_sentences(raw: dict[str, Any]) -> list[str]:
    original, caption = (raw.get(field) for field in PIXELPROSE_FIELDS)
    for field, value in zip(PIXELPROSE_FIELDS, (original, caption), strict=True):
        if value is not None and not isinstance(value, str):
            raise SampleFault(faults.BAD_JSON, f"{field} is a {type(value).__name__}, not a string")
    return _strip_all([original or "", *_PIXELPROSE_SPLIT.split(caption or "")])


def split_sentences(text: str) -> list[str]:
    """The sentences of a text, stripped, none empty; without their full stops, since captions are joined with ". "."""
    lines = _SENTENCE_END.sub(lambda end: f"{end[0][0]}\n", text.replace("</s>", "\n")).split("\n")
    return _strip_all(line.strip().rstrip(".") for line in lines)


def _strip_all(texts: Any) -> list[str]:
    return [text.strip() for text in texts if text.strip()]
