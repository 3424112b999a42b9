"""The tokenizer against recorded ids, and its edges."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cosmos_fast.data import tokenizer as tokenizer_module
from cosmos_fast.data.tokenizer import END_ID, START_ID, VOCAB_SIZE, _ids, clean, tokenize, tokenizer, word_ids

RECORDED = json.loads((Path(__file__).parent.parent / "data" / "tokens.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("number", range(len(RECORDED["texts"])))
def test_ids_equal_the_recorded_ones(number: int) -> None:
    ids = tokenize([RECORDED["texts"][number]], RECORDED["context_length"])
    assert ids[0].tolist() == RECORDED["ids"][number]


def test_a_batch_equals_its_texts_one_by_one() -> None:
    assert torch.equal(tokenize(RECORDED["texts"]), torch.tensor(RECORDED["ids"]))


@pytest.mark.parametrize("context_length", [2, 3, 8, 32, 76])
def test_shorter_context_keeps_the_start_and_the_end_token(context_length: int) -> None:
    ids = tokenize(RECORDED["texts"], context_length)
    full = torch.tensor(RECORDED["ids"])
    for short, long in zip(ids, full, strict=True):
        words = int((long == END_ID).nonzero()[-1])  # start and words
        kept = min(words, context_length - 1)
        assert short[:kept].tolist() == long[:kept].tolist()
        assert short[kept] == END_ID
        assert not short[kept + 1 :].any()


@pytest.mark.parametrize(
    "text", ["a" * 900_000, "\u00c3\u00a9\u00c2" * 150_000, "\u00e9 &amp; " * 100_000, "&" * 900_000]
)
def test_texts_of_a_megabyte_take_no_longer_than_their_beginning(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cleaned: list[int] = []
    monkeypatch.setattr(tokenizer_module, "clean", lambda part: cleaned.append(len(part)) or clean(part))
    ids = tokenize(text)
    assert len(cleaned) == 1
    assert cleaned[0] <= 10_000
    assert ids[0, -1] == END_ID
    assert (ids > 0).all()


def test_a_long_text_has_the_ids_of_its_whole() -> None:
    text = " ".join(RECORDED["texts"]) * 40
    assert len(text) > 10_000
    ids = tokenize(text)[0]
    assert ids[1:-1].tolist() == _ids(clean(text), 75)


def test_shape_type_and_range() -> None:
    ids = tokenize("a dog")
    assert ids.shape == (1, 77)
    assert ids.dtype == torch.int64
    assert ids[0, 0] == START_ID
    assert tokenize([]).shape == (0, 77)
    assert tokenizer().get_vocab_size() == VOCAB_SIZE
    with pytest.raises(ValueError, match="context_length"):
        tokenize(["x"], 1)


@pytest.mark.parametrize("text", ["plain text, with (marks) & more", "tab\tand\nnewline", "x\x00y\x1b[0mz", "A  B   C"])
def test_fast_path_cleans_like_the_slow_one(text: str) -> None:
    import html

    import ftfy

    assert clean(text) == " ".join(html.unescape(html.unescape(ftfy.fix_text(text))).split()).lower()


def test_every_printable_ascii_character_is_a_fixed_point_of_the_slow_path() -> None:
    import ftfy

    for code in range(32, 127):
        if chr(code) != "&":
            assert ftfy.fix_text(f"a {chr(code)} {chr(code)}b") == f"a {chr(code)} {chr(code)}b"


def test_hostile_lengths_are_cut() -> None:
    ids = tokenize(["word " * 50_000, "x" * 100_000], 16)
    assert (ids[:, -1] == END_ID).all()


@given(st.text(st.characters(codec="ascii"), max_size=200))
def test_remembered_words_give_the_ids_of_the_whole_text(text: str) -> None:
    cleaned = clean(text)
    whole = tokenizer().encode(cleaned, add_special_tokens=False).ids
    assert _ids(cleaned, 10_000) == whole
    assert _ids(cleaned, 5) == whole[:5]


def test_memory_of_words_is_bounded_and_does_not_outlive_its_use() -> None:
    word_ids.cache_clear()
    tokenize(["one two two three", "four " * 1000])  # a text of 5,000 characters is not remembered
    assert word_ids.cache_info().currsize == 3
    assert word_ids.cache_info().maxsize is not None


def test_importing_the_package_does_not_build_the_tokenizer() -> None:
    code = (
        "import cosmos_fast.data.tokenizer as t, cosmos_fast.data.loader; assert t.tokenizer.cache_info().currsize == 0"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
