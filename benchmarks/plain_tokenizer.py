"""CLIP's byte-pair tokenizer in plain Python, one text at a time: the baseline of `bench tokenizer`.

Written from a description: mend the text (ftfy, HTML entities), lower-case, split into words, spell each word in
letters that stand for bytes, join the best ranked neighbours until none is left, remember each word's outcome. Every
text goes through all of it; the memory has no bound. Do not make it faster.
"""

from __future__ import annotations

import html
import re
import sys
import unicodedata
from collections.abc import Sequence
from itertools import pairwise

import ftfy
import torch
from torch import Tensor

from cosmos_fast.data.tokenizer import END_ID, START_ID, byte_letters, read_merges

_START, _END = "<start_of_text>", "<end_of_text>"


def _words_pattern() -> re.Pattern[str]:
    """Words as CLIP splits them: contractions, runs of letters, single digits, runs of anything else.

    Python's own `re` knows no classes of letters and numbers: a letter is what counts as part of a word and is neither
    a number of any kind nor the underscore.
    """
    numbers = "".join(
        chr(code)
        for code in range(sys.maxunicode + 1)
        if unicodedata.category(chr(code)) in ("Nl", "No") and re.match(r"\w", chr(code))
    )
    letter, number, other = rf"[^\W\d_{numbers}]", rf"[\d{numbers}]", r"(?:[^\s\w]|_)"
    return re.compile(rf"{_START}|{_END}|'s|'t|'re|'ve|'m|'ll|'d|{letter}+|{number}|{other}+")


class PlainTokenizer:
    """Texts to ids, as `cosmos_fast.data.tokenizer.tokenize` gives them."""

    def __init__(self) -> None:
        letters, merges = byte_letters(), read_merges()
        visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
        hidden = [byte for byte in range(256) if byte not in visible]
        self._letter = dict(zip([*visible, *hidden], letters, strict=True))
        self._rank = {pair: rank for rank, pair in enumerate(merges)}
        pieces = [*letters, *(letter + "</w>" for letter in letters), *(a + b for a, b in merges), _START, _END]
        self._id = {piece: number for number, piece in enumerate(pieces)}
        self._known: dict[str, list[str]] = {}
        self.forget()
        self._pattern = _words_pattern()

    def forget(self) -> None:
        """Know no word but the two that are no words."""
        self._known = {_START: [_START], _END: [_END]}

    def __call__(self, texts: Sequence[str], context_length: int = 77) -> Tensor:
        """int64 [N, context_length]; what does not fit is cut, the last id is the end token."""
        rows = torch.zeros(len(texts), context_length, dtype=torch.long)
        for row, text in zip(rows, texts, strict=True):
            ids = [START_ID, *self.encode(text), END_ID]
            if len(ids) > context_length:
                ids = [*ids[: context_length - 1], END_ID]
            row[: len(ids)] = torch.tensor(ids)
        return rows

    def encode(self, text: str) -> list[int]:
        """Ids of the words of a text."""
        text = html.unescape(html.unescape(ftfy.fix_text(text))).strip()
        text = re.sub(r"\s+", " ", text).strip().lower()
        ids: list[int] = []
        for word in self._pattern.findall(text):
            spelled = "".join(self._letter[byte] for byte in word.encode("utf-8"))
            ids.extend(self._id[piece] for piece in self._pieces(spelled))
        return ids

    def _pieces(self, word: str) -> list[str]:
        """The pieces of a spelled word: the best ranked pair of neighbours is joined, wherever it stands, and again."""
        if word in self._known:
            return self._known[word]
        pieces = [*word[:-1], word[-1] + "</w>"]
        while len(pieces) > 1:
            pairs = set(pairwise(pieces))
            best = min(pairs, key=lambda pair: self._rank.get(pair, len(self._rank)))
            if best not in self._rank:
                break
            joined: list[str] = []
            at = 0
            while at < len(pieces):
                if at + 1 < len(pieces) and (pieces[at], pieces[at + 1]) == best:
                    joined.append(pieces[at] + pieces[at + 1])
                    at += 2
                else:
                    joined.append(pieces[at])
                    at += 1
            pieces = joined
        self._known[word] = pieces
        return pieces
