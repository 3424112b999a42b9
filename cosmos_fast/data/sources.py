"""From the path of a source to the list of its shards: a directory, a glob, a brace pattern or one file."""

from __future__ import annotations

import glob
from pathlib import Path

import braceexpand

from cosmos_fast.utils.errors import UserError


def find_shards(path: str) -> list[Path]:
    """The shards a source path names, in a fixed order. UserError where one is missing or there is none.

    `pipe:` and other URLs are refused: the first would run a shell command out of a config file, and neither can be
    read at random offsets.
    """
    if path.startswith("pipe:"):
        raise UserError(f"data source {path!r}: pipe: URLs run a shell command, so they are refused; copy the shards")
    if "://" in path:
        raise UserError(f"data source {path!r}: URLs are not read; mount or copy the shards and give a file path")
    names = _expand_braces(path)
    shards: list[Path] = []
    for name in names:
        shards.extend(_shards_of(name))
    for shard in shards:
        if not shard.is_file():
            raise UserError(f"data source {path!r}: shard {shard} is missing; check the path or the range of numbers")
    return shards


def _expand_braces(path: str) -> list[str]:
    if Path(path).expanduser().exists():  # a name that merely contains braces
        return [path]
    try:
        return list(braceexpand.braceexpand(path))
    except ValueError as error:
        raise UserError(f"data source {path!r}: unbalanced braces; write ranges as {{0000..0012}}") from error


def _shards_of(name: str) -> list[Path]:
    where = Path(name).expanduser()
    if where.is_dir():
        return _shards_in_folder(where)
    if glob.has_magic(name) and not where.exists():
        found = sorted(Path(match) for match in glob.glob(str(where), recursive=True))
        if not found:
            raise UserError(f"data source {name!r}: no file matches; check the path")
        return [match for match in found if not match.is_dir()]
    return [where]


def _shards_in_folder(folder: Path) -> list[Path]:
    shards = sorted(folder.glob("*.tar"))
    if shards:
        return shards
    below = sorted({shard.parent.name for shard in folder.glob("*/*.tar")})
    if below:
        raise UserError(
            f"data source {str(folder)!r} holds no .tar itself; give one of its folders: {', '.join(below)}"
        )
    packed = next(folder.glob("*.tar.*"), None)
    if packed is not None:
        raise UserError(f"data source {str(folder)!r} holds compressed shards ({packed.name}): decompress them first")
    raise UserError(f"data source {str(folder)!r} holds no .tar shards; check the path")
