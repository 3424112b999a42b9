"""Captions as they stand in tables and json members, and the sentences they mean."""

from __future__ import annotations

import ast
import json
from typing import Any

from cosmos_fast.data.records import split_sentences

_FEWEST_LETTERS = 5  # a list this long of single characters is a text taken apart, not a list of captions


def as_sentences(value: Any) -> list[str]:
    """The sentences of a caption field, whatever it was made: a text, a list, a list stored as a string, or letters.

    A list's entries are split as well: some tools store a whole paragraph as the only entry. Other types (None, the NaN
    of an empty cell) hold no sentence.
    """
    if isinstance(value, str):
        held = _list_in(value)
        return split_sentences(value) if held is None else as_sentences(held)
    if not isinstance(value, list):
        return []
    entries = [entry for entry in value if isinstance(entry, str)]
    if _is_taken_apart(entries):
        return split_sentences("".join(entries))
    return [sentence for entry in entries for sentence in split_sentences(entry)]


def as_text(value: Any) -> str:
    """A caption field as one text, "" where it holds none."""
    if isinstance(value, str):
        held = _list_in(value)
        return value.strip() if held is None else as_text(held)
    return ". ".join(as_sentences(value))


def _list_in(text: str) -> list[str] | None:
    """The list that a string spells, in JSON or as Python prints it; None for any other text."""
    text = text.strip()
    if not (text.startswith("[") and text.endswith("]")):
        return None
    for parse in (json.loads, ast.literal_eval):  # neither runs anything
        try:
            held = parse(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
        if isinstance(held, list) and held and all(isinstance(entry, str) for entry in held):
            return held
    return None


def _is_taken_apart(entries: list[str]) -> bool:
    return len(entries) >= _FEWEST_LETTERS and all(len(entry) == 1 for entry in entries)
