"""Ways to spoil a copy of a data set: each takes the folder that holds it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

Break = Callable[[Path], object]


def without(path: str) -> Break:
    return lambda root: (root / path).unlink()


def moved(path: str, to: str) -> Break:
    return lambda root: (root / path).rename(root / to)


def text(path: str, content: str) -> Break:
    return lambda root: (root / path).write_text(content)


def data(path: str, content: bytes) -> Break:
    return lambda root: (root / path).write_bytes(content)


def cut(path: str, size: int) -> Break:
    """The first bytes of a file are left, or all but so many where size is negative."""
    return lambda root: (root / path).write_bytes((root / path).read_bytes()[:size])


def replaced(path: str, old: str, new: str) -> Break:
    """The first place of a text is changed; it must be there."""

    def breaks(root: Path) -> None:
        content = (root / path).read_text()
        assert old in content
        (root / path).write_text(content.replace(old, new, 1))

    return breaks
