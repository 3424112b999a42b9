"""Lists of images and captions as people write them: JSON, JSON lines, comma or tab separated."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from cosmos_fast.evaluate.datasets.layout import read_json, read_text
from cosmos_fast.utils.errors import UserError

IMAGE_FIELDS = ("image", "file_name", "filename", "filepath", "path")
CAPTION_FIELDS = ("captions", "caption", "text", "title")
_MAX_FIELD = 1 << 20  # characters; the csv module's own limit is 128 kB

Pairs = list[tuple[str, list[str]]]


def read_table(name: str, path: Path) -> Pairs:
    """(image, its captions) in order of first appearance; rows of the same image are put together.

    `.json`: an object of image -> caption or captions, or a list of rows; `.jsonl`: a row a line; `.csv`, `.tsv`: with
    a head. A row has one of IMAGE_FIELDS and one of CAPTION_FIELDS. UserError names the first wrong row.
    """
    read = {".json": _json, ".jsonl": _lines, ".csv": _separated, ".tsv": _separated}[path.suffix]
    pairs: dict[str, list[str]] = {}
    for where, image, captions in read(name, path):
        found = [captions] if isinstance(captions, str) else captions
        if not isinstance(image, str) or not isinstance(found, list) or not all(isinstance(c, str) for c in found):
            raise UserError(
                f"{name}: {path}: {where} has not one image ({', '.join(IMAGE_FIELDS)}) and its caption or list of "
                f"captions ({', '.join(CAPTION_FIELDS)}): mend it"
            )
        pairs.setdefault(image, []).extend(found)
    return list(pairs.items())


def _json(name: str, path: Path) -> Iterator[tuple[str, Any, Any]]:
    content = read_json(name, path)
    if isinstance(content, dict):
        yield from ((f"entry {image!r}", image, captions) for image, captions in content.items())
    elif isinstance(content, list):
        yield from (_of_row(f"entry {number}", row) for number, row in enumerate(content))
    else:
        raise UserError(f"{name}: {path} holds neither an object nor a list: give image -> captions")


def _lines(name: str, path: Path) -> Iterator[tuple[str, Any, Any]]:
    for number, line in enumerate(read_text(name, path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{name}: {path}: line {number} is no JSON ({error}): mend it") from None
        yield _of_row(f"line {number}", row)


def _separated(name: str, path: Path) -> Iterator[tuple[str, Any, Any]]:
    delimiter = "\t" if path.suffix == ".tsv" else ","
    text = read_text(name, path)
    head = text.split("\n", 1)[0]
    if delimiter not in head and "\t" in head:
        delimiter = "\t"  # tables for CLIP's training are often called .csv
    for where, row in csv_rows(name, path, text, delimiter):
        yield _of_row(where, row)


def csv_rows(name: str, path: Path, text: str, delimiter: str = ",") -> Iterator[tuple[str, dict[str, Any]]]:
    """("line 7", column -> field) of the rows below the head. UserError: a row that is shorter or longer than it."""
    csv.field_size_limit(_MAX_FIELD)
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        for row in reader:
            if None in row or None in row.values():
                raise UserError(
                    f"{name}: {path}: line {reader.line_num} has not the {len(reader.fieldnames or ())} columns of the "
                    "head: put texts that hold the separator in double quotes"
                )
            yield f"line {reader.line_num}", row
    except csv.Error as error:
        raise UserError(f"{name}: {path}: line {reader.line_num} is no row of a table ({error}): mend it") from None


def _of_row(where: str, row: Any) -> tuple[str, Any, Any]:
    if not isinstance(row, dict):
        return where, None, None
    return where, _first(row, IMAGE_FIELDS), _first(row, CAPTION_FIELDS)


def _first(row: dict[str, Any], fields: Sequence[str]) -> Any:
    return next((row[field] for field in fields if field in row), None)
