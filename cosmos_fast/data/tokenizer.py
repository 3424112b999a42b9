"""CLIP's byte-pair tokenizer: the Rust `tokenizers` library, from the vocabulary shipped with the package, and a memory
of words.

Ids equal those of OpenAI's and OpenCLIP's Python tokenizers: start 49406, end 49407, padding 0.
"""

from __future__ import annotations

import gzip
import html
import os
import re
from collections.abc import Sequence
from functools import lru_cache
from importlib import resources
from itertools import chain

import ftfy
import numpy as np
import torch
from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers

START_ID = 49406
END_ID = 49407
VOCAB_SIZE = 49408
# Rayon threads do not survive the fork of a loader worker, and one thread does 17,000 captions a second.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
_START, _END = "<start_of_text>", "<end_of_text>"
_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"
_ASCII_WORDS = re.compile(r"'s|'t|'re|'ve|'m|'ll|'d|[a-z]+|[0-9]|[^\sa-z0-9]+")  # the same of clean ASCII
_REMEMBERED_WORDS = 1 << 15  # about 6 MB a process
_LONG_TEXT = 2000  # characters: its words may be long, and are not remembered
# Of longer texts the beginning is read: it fills every context, while ftfy takes minutes for a megabyte.
_MAX_CHARACTERS = 10_000
_VOCABULARY = "bpe_simple_vocab_16e6.txt.gz"


def tokenize(texts: str | Sequence[str], context_length: int = 77) -> torch.Tensor:
    """Ids of the texts, int64 [N, context_length]: start, words, end, then zeros.

    A text that does not fit is cut and its last id is the end token, as CLIP does. Of one of over 10,000 characters the
    beginning alone is cleaned and encoded.
    """
    if isinstance(texts, str):
        texts = [texts]
    if context_length < 2:
        raise ValueError(f"context_length is {context_length}: the start and end tokens alone need 2")
    ids = np.zeros((len(texts), context_length), dtype=np.int64)
    ids[:, 0] = START_ID
    room = context_length - 2
    for row, text in zip(ids, texts, strict=True):
        words = _ids(clean(_beginning(text)), room)
        row[1 : len(words) + 1] = words
        row[len(words) + 1] = END_ID
    return torch.from_numpy(ids)


def _beginning(text: str) -> str:
    """Whole words of what is read of a text; a part of a word that is too long itself."""
    if len(text) <= _MAX_CHARACTERS:
        return text
    words = text[:_MAX_CHARACTERS].rsplit(maxsplit=1)
    return words[0] if words else ""


def _ids(text: str, limit: int) -> list[int]:
    """The first `limit` ids of a clean text.

    What a word becomes depends on nothing else, and most words have been met before: looking them up is several times
    as fast as the Rust tokenizer, which encodes what is new, or not ASCII.
    """
    if len(text) > _LONG_TEXT or not (text.isascii() and text.isprintable()) or "_of_text>" in text:
        return _encoded(text)[:limit]
    words = _ASCII_WORDS.findall(text)[:limit]  # each is one id or more
    return list(chain.from_iterable(map(word_ids, words)))[:limit]


@lru_cache(maxsize=_REMEMBERED_WORDS)
def word_ids(word: str) -> tuple[int, ...]:
    """Ids of one clean ASCII word."""
    return tuple(_encoded(word))


def _encoded(text: str) -> list[int]:
    encoding = tokenizer().encode_batch_fast([text], add_special_tokens=False)[0]
    return list(encoding.ids)


def clean(text: str) -> str:
    """Mend the encoding, resolve HTML entities, collapse white space, lower the case.

    Printable ASCII without "&" is a fixed point of ftfy and html.unescape; skipping them there triples the speed.
    """
    if not (text.isascii() and text.isprintable() and "&" not in text):
        text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return " ".join(text.split()).lower()


@lru_cache(maxsize=1)
def tokenizer() -> Tokenizer:
    """The Rust tokenizer behind tokenize(), built once a process (0.1 s)."""
    merges = read_merges()
    letters = byte_letters()
    pieces = [*letters, *(letter + "</w>" for letter in letters), *(a + b for a, b in merges), _START, _END]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    assert len(vocabulary) == VOCAB_SIZE
    clip = Tokenizer(models.BPE(vocabulary, merges, end_of_word_suffix="</w>"))
    clip.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    clip.add_special_tokens([AddedToken(name, normalized=False) for name in (_START, _END)])
    return clip


def read_merges() -> list[tuple[str, str]]:
    """The first 48,894 merges of the file; its first line is a header."""
    packed = resources.files("cosmos_fast.data").joinpath("assets").joinpath(_VOCABULARY).read_bytes()
    lines = gzip.decompress(packed).decode("utf-8").split("\n")
    merges = []
    for line in lines[1 : VOCAB_SIZE - 2 - 2 * 256 + 1]:
        left, right = line.split()
        merges.append((left, right))
    return merges


def byte_letters() -> list[str]:
    """A visible character for each byte, in vocabulary order: printable Latin-1 stands for itself, the rest follow."""
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = 256 - len(visible)
    return [chr(byte) for byte in visible] + [chr(256 + number) for number in range(hidden)]
