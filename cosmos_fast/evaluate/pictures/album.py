"""What a folder of pictures holds: sheets as PNG, one page that loads nothing, and pictures.json with the numbers."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from cosmos_fast.evaluate import record
from cosmos_fast.evaluate.report import page
from cosmos_fast.utils.errors import UserError

FORMAT = "cosmos-fast-pictures/1"
PAGE, RECORD = "index.html", "pictures.json"


@dataclass(frozen=True)
class Sheet:
    """One image or query. key: what it is of. image: to be written as PNG. shown: what the page's template shows of it.
    numbers: what it says, JSON-ready."""

    key: str
    image: Image.Image
    shown: Any
    numbers: Mapping[str, Any]


@dataclass(frozen=True)
class Album:
    """kind: attention, retrieval or segmentation. title, reading: the page's first words. facts: how it was made, name
    and text. numbers: of all sheets together. legend: names and colours."""

    kind: str
    title: str
    reading: str
    sheets: Sequence[Sheet]
    facts: Sequence[tuple[str, str]]
    numbers: Mapping[str, Any] = field(default_factory=dict)
    legend: Sequence[tuple[str, str]] = ()

    def files(self) -> dict[str, bytes]:
        """Name -> bytes, all in one folder."""
        names = [f"{number:03d}_{file_stem(sheet.key)}.png" for number, sheet in enumerate(self.sheets, start=1)]
        files = {name: _png(sheet.image) for name, sheet in zip(names, self.sheets, strict=True)}
        shown = page.environment().get_template("pictures.html.j2").render(album=self, names=names)
        files[PAGE] = shown.encode()
        sheets = [{"file": name, "of": s.key, **s.numbers} for name, s in zip(names, self.sheets, strict=True)]
        content = {
            "format": FORMAT,
            "kind": self.kind,
            "files": [*files, RECORD],
            **self.numbers,
            "sheets": sheets,
            "made": dict(self.facts),
            "versions": record.versions(),
        }
        files[RECORD] = record.to_json(content).encode()
        return files


def _png(image: Image.Image) -> bytes:
    """Not the smallest that it could be: photographs do not shrink further, and the search takes most of the time."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def file_stem(key: str) -> str:
    """The last part of a key, as letters, digits, - and _ that any file system takes; 40 at most."""
    stem = re.sub(r"\.\w{1,5}$", "", re.split(r"[\\/]", key)[-1])
    return re.sub(r"[^A-Za-z0-9_-]+", "_", stem).strip("_")[:40] or "picture"


def check_folder(out: Path, overwrite: bool) -> None:
    """UserError where `out` is no place for a new folder of pictures: it holds something else, or former ones."""
    if not out.parent.is_dir():
        raise UserError(f"--out {out}: the folder {out.parent} does not exist: make it, or choose another path")
    if not out.exists():
        return
    if not out.is_dir():
        raise UserError(f"--out {out} is a file: choose another path")
    held = {path.name for path in out.iterdir()}
    if out.samefile(Path.cwd()):
        raise UserError(f"--out {out} is the folder you are in: choose a folder in it")
    foreign = sorted(held - _former_files(out))
    if foreign:
        raise UserError(f"--out {out} holds {foreign[0]}, which is no picture of a former call: choose another folder")
    if held and not overwrite:
        raise UserError(f"--out {out} holds former pictures: choose another folder, or replace them with --overwrite")


def _former_files(out: Path) -> set[str]:
    """What a former call has written there, by its own account."""
    try:
        content = json.loads((out / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return set()
    written = content.get("files") if isinstance(content, dict) and content.get("format") == FORMAT else None
    return {str(name) for name in written} if isinstance(written, list) else set()
