"""From tokens back to texts, and how many tokens a text is: for people who look at data."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from cosmos_fast.data.tokenizer import END_ID, byte_letters, clean, tokenizer

_END_OF_WORD = "</w>"


def token_counts(texts: Sequence[str]) -> list[int]:
    """Ids that each text takes before any cut, start and end included."""
    encodings = tokenizer().encode_batch_fast([clean(text) for text in texts], add_special_tokens=False)
    return [len(encoding.ids) + 2 for encoding in encodings]


def detokenize(ids: Sequence[int]) -> str:
    """What a row of tokenize() says, as a model reads it: cleaned, in lower case, cut to the context length."""
    words = list(ids)[1 : list(ids).index(END_ID)]
    pieces = [tokenizer().id_to_token(number) or "" for number in words]
    letters = "".join(piece.removesuffix(_END_OF_WORD) + " " * piece.endswith(_END_OF_WORD) for piece in pieces)
    return of_letters(letters.rstrip())


def of_letters(letters: str) -> str:
    """The text whose UTF-8 bytes the letters of the vocabulary stand for; "�" where a character was cut."""
    codes = _codes()
    return bytes(codes[letter] for letter in letters).decode("utf-8", "replace")


@lru_cache(maxsize=1)
def _codes() -> dict[str, int]:
    """Byte of each letter of the vocabulary; a space stands between words."""
    visible = {letter: ord(letter) for letter in byte_letters() if ord(letter) < 256}
    hidden = sorted(set(range(256)) - set(visible.values()))
    return {" ": ord(" "), **visible, **{chr(256 + number): byte for number, byte in enumerate(hidden)}}
