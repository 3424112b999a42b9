"""The page: template and data into one self-contained HTML file, and all files of a report written at once."""

from __future__ import annotations

import base64
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from cosmos_fast.evaluate.report import findings
from cosmos_fast.evaluate.report.pictures import class_colours
from cosmos_fast.evaluate.report.theme import DARK, LIGHT
from cosmos_fast.utils.errors import UserError
from cosmos_fast.utils.files import fsync_path


def data_uri(image: bytes) -> Markup:
    """PNG or JPEG bytes as a data URI: the page loads nothing from anywhere."""
    kind = "png" if image.startswith(b"\x89PNG") else "jpeg"
    return Markup(f"data:image/{kind};base64,{base64.b64encode(image).decode('ascii')}")


def environment() -> Environment:
    """Jinja with escaping on and missing names as errors."""
    jinja = Environment(
        loader=PackageLoader("cosmos_fast.evaluate", "templates"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    jinja.filters["uri"] = data_uri
    jinja.globals |= {
        "labels": findings.LABELS,
        "themes": {"light": LIGHT, "dark": DARK},
        "class_colours": class_colours,
    }
    return jinja


def render(content: Mapping[str, Any]) -> str:
    """The HTML of a report. content: see `build.page_content`; a missing name raises."""
    return environment().get_template("report.html.j2").render(content)


def write_files(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write all of `files` (relative name -> bytes) into `folder`, or none: aside first, then one rename each.

    UserError when the disk refuses; what was there before then stays as it was.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=".report_", dir=folder))
    except OSError as error:
        raise UserError(f"report folder {folder} cannot be written ({error.strerror}): choose another --out") from None
    try:
        for name, content in files.items():
            path = aside / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
            fsync_path(path)
        for name in files:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(aside / name, folder / name)
        fsync_path(folder)
    except OSError as error:
        raise UserError(f"report in {folder} cannot be written ({error.strerror}): free some space") from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)
